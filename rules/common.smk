# The experiment and its cells. All logic is in prunelib.experiment; nothing here imports torch.
import atexit
import gc
import inspect
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(workflow.basedir)
# The library beside this file, also where nothing is installed.
sys.path.insert(0, str(ROOT))

from snakemake.exceptions import WorkflowError

from prunelib.errors import PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure, needed, waits_for
from prunelib.provenance import lock
from prunelib.provenance.fingerprint import load_parsed, save_parsed

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def project_path(name):
    """A path of the configuration: as given, or else beside the Snakefile."""
    return Path(name) if Path(name).exists() else ROOT / name


def shell_word(path):
    """A path as one word of a rule's shell command, in which braces are Snakemake's own."""
    return shlex.quote(str(path)).replace("{", "{{").replace("}", "}}")


def load_experiment():
    """The experiment, or one line that says what is wrong with it."""
    try:
        experiment = Experiment.load(
            project_path(config["experiment"]), project_path(config["catalogue"])
        )
        experiment.cells
    except PrunelibError as error:
        raise WorkflowError(f"{error}")
    return experiment


EXPERIMENT = load_experiment()


STARTED = time.time()
ORPHANS = config.get("orphans", "wait")
if ORPHANS != "wait":
    from prunelib.cluster.orphans import check_policy

    try:
        check_policy(ORPHANS, "configuration")
    except PrunelibError as error:
        raise WorkflowError(f"{error}")


# Jobs inherit it. The tries of one run at a step are counted by it.
if workflow.is_main_process:
    os.environ["PRUNELIB_RUN"] = f"{STARTED:.6f}-{os.getpid()}"
    # A DAG of thousands of jobs is all living objects: looking for dead ones while it is built
    # takes a fifth of the time. On again before the first job starts.
    gc.disable()


def say(line):
    print(line, file=sys.stderr, flush=True)


def start_again():
    """Build the DAG anew in this same process: artefacts have come meanwhile."""
    say("reading the results again")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def no_default_limit():
    """Take away the limit of 100 submissions a second that Snakemake sets where none is asked for.

    While jobs wait, every round of the scheduler starts a timer for another round a second later,
    and every job that ends starts a round: they add up, and after some hundred jobs the scheduler
    takes a quarter of a core. A limit that was asked for stays.
    """
    limiter = workflow.scheduler.job_rate_limiter
    if limiter is not None and (limiter.max_jobs, limiter.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


def start_fork_server():
    """Start the process that local steps are forked from; it ends with this one."""
    import socket
    import subprocess

    address = Path(tempfile.mkdtemp(prefix="prunelib-")) / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(128)
        script = ROOT / "workflow_scripts/fork_server.py"
        subprocess.Popen(
            [sys.executable, "-P", script, "--serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
    os.environ["PRUNELIB_FORK_SERVER"] = str(address)


onstart:
    gc.freeze()
    gc.enable()
    no_default_limit()
    # Here, not at the top: a plan, and every job on a node, read this file and start nothing.
    from prunelib.cluster import watch
    from prunelib.cluster.orphans import settle

    # Only a real run gets here: a dry run plans what cannot be fetched yet.
    problems = EXPERIMENT.preflight()
    if problems:
        for problem in problems:
            say(f"error: {problem}")
        raise WorkflowError("nothing was started; see above")
    status_command = getattr(workflow.executor_settings, "status_command", None)
    # One launch a directory at a time; a dead one's lock is taken over. A second launch would be
    # harmless to the results, but would compute the same steps.
    try:
        launch = lock.acquire(
            Path("results/.launch.lock"), command=shlex.join(sys.argv)
        )
        atexit.register(launch.release)
        # Also without the SLURM executor: jobs of an earlier run may still be at these steps.
        if settle(ORPHANS, say, tries=3 if workflow.non_local_exec else 1):
            launch.release()
            start_again()
        if workflow.non_local_exec:
            watch.check_status_command(status_command)

            def again():
                launch.release()
                start_again()

            watch.start(status_command, say, again)
    except PrunelibError as error:
        raise WorkflowError(f"{error}")
    if FORKS:
        start_fork_server()
