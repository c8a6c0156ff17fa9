# The experiment and its cells. All logic is in prunelib.experiment; nothing here imports torch.
import atexit
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
# The library beside this file, also where nothing is installed.
sys.path.insert(0, str(ROOT))

from snakemake.exceptions import WorkflowError

from prunelib.errors import PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import Node, closure, needed
from prunelib.provenance import lock

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def project_path(name):
    """A path of the configuration: as given, or else beside the Snakefile."""
    return Path(name) if Path(name).exists() else ROOT / name


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


onstart:
    # Only a real run gets here: a dry run plans what cannot be fetched yet.
    problems = EXPERIMENT.preflight()
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        raise WorkflowError("nothing was started; see above")
    # One launch a directory at a time; a dead one's lock is taken over. A second launch would be
    # harmless to the results, but would compute the same steps.
    try:
        launch = lock.acquire(
            Path("results/.launch.lock"), command=shlex.join(sys.argv)
        )
    except PrunelibError as error:
        raise WorkflowError(f"{error}")
    atexit.register(launch.release)
