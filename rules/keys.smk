# Content keys: every artefact lies at results/<step>/<labels>/<key>/ and is valid when its
# provenance.json and the files that it lists are there. Inputs are ancient(): the key in the path
# says everything, file times say nothing.
from prunelib.sharing.repository import awaited, steps_of

load_parsed(Path("results/.parsed.json"))
STEPS = steps_of(EXPERIMENT)
NODES = closure(STEPS)
# Jobs on a cluster read this file too; what they shall make has been decided.
PLANS = workflow.is_main_process
# Not the checkpoints that others share: the report reads what git has of them, and a step that
# needs one still asks for it.
TERMINAL = awaited(STEPS) if PLANS else STEPS
# What has to be made.
WANTED = needed(TERMINAL) if PLANS else {}
# Half an artefact: its record is there, a file of it is not. It is put away and made again: a stamp
# that is newer than the record, asked for by the last rule, is an input of its step.
BROKEN = {
    key: f"results/.broken/{key}-{Path(node.target).stat().st_mtime_ns}"
    for key, node in WANTED.items()
    if os.path.isfile(node.target)
}
save_parsed(Path("results/.parsed.json"))
RUN = f"{shell_word(sys.executable)} -P {shell_word(ROOT / 'workflow_scripts')}"
# A run on this machine's CPU forks its steps; only worth it for more than a few of them.
FORKS = (
    PLANS
    and not workflow.non_local_exec
    and sys.platform == "linux"
    and EXPERIMENT.data["compute"]["device"] == "cpu"
    and len(WANTED) > 3
)
STEP = f"{RUN}/fork_server.py {shell_word(ROOT / 'workflow_scripts')}" if FORKS else RUN


wildcard_constraints:
    key="[0-9a-f]{16}",
    label=".+",


def node_of(wildcards):
    """The step that a key stands for in this experiment."""
    try:
        return NODES[wildcards.key]
    except KeyError:
        raise WorkflowError(
            f"no step of {EXPERIMENT.path} has the key {wildcards.key}: code, packages or "
            "configuration changed since the run was planned; start the run again"
        )


def inputs_of(wildcards):
    """The records of a step's upstream artefacts; none for a step that is finished.

    Snakemake takes ancient() back for a file that is missing: it would delete and redo every
    finished step below an intermediate that a new one needs again.
    """
    node = node_of(wildcards)
    if PLANS and node.key not in WANTED and os.path.isfile(node.target):
        return []
    upstream = node.inputs.values()
    records = [
        ancient(above.target)
        for above in (waits_for(upstream, WANTED) if PLANS else upstream)
    ]
    return records + [BROKEN[key] for key in BROKEN if key == wildcards.key]


def request_of(wildcards):
    """What the step is told, as JSON."""
    return node_of(wildcards).request()


# Snakemake looks at the signatures of these functions several times for every job.
for function in (inputs_of, request_of):
    function.__signature__ = inspect.signature(function)


# Threads of a computing step: part of the experiment, since they decide the last bits.
THREADS = int(EXPERIMENT.data["compute"]["threads"])


def step_command(script):
    """The command of a step."""
    return f"{STEP}/{script}.py --request {{params.request:q}} > {{log}} 2>&1"


# The step replaces what it finds.
rule broken:
    output:
        touch("results/.broken/{key}-{time}"),


localrules:
    broken,
