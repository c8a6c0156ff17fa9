# What each step asks a cluster for: gpus, memory, time and cpus from config/cluster.yaml. A run on
# one machine does not look at them.
from prunelib.provenance.environment import visible_gpus

# With an executor that submits jobs, or in such a job.
CLUSTER_RUN = (
    workflow.resource_settings.nodes is not None or not workflow.is_main_process
)
# On one machine nobody hands out its GPUs: one step at a time, unless --resources gpu=N says more.
if not CLUSTER_RUN and "gpu" not in workflow.global_resources and visible_gpus():
    workflow.register_resource("gpu", 1)
if CLUSTER_RUN or "gpu" in workflow.global_resources:
    from prunelib.cluster.resources import is_local, request
    from prunelib.cluster.settings import Cluster

    try:
        CLUSTER = Cluster.load(project_path(config["cluster"]))
    except PrunelibError as error:
        raise WorkflowError(f"{error}")

# The profile's default-resources, our own names among them.
DEFAULTS = {
    name: value.strip("'\"")
    for name, _, value in (
        argument.partition("=")
        for argument in getattr(
            workflow.resource_settings.default_resources, "args", []
        )
    )
}


def runs_here(step):
    """Whether a step's jobs are too short for the queue. A job that is on a node just runs."""
    return (
        CLUSTER_RUN
        and workflow.is_main_process
        and is_local(step, NODES.values(), CLUSTER)
    )


def asked(node, attempt):
    """What one try of a step asks for, by Snakemake's names."""
    try:
        need = request(node, CLUSTER, attempt, DEFAULTS.get("gpu_type"))
    except PrunelibError as error:
        raise WorkflowError(f"{error}")
    cpu_partition = DEFAULTS.get("cpu_partition") or DEFAULTS.get("slurm_partition")
    extra = [DEFAULTS.get("slurm_extra"), "--exclusive" if need.exclusive else None]
    return {
        "mem_mb": need.mem_mb,
        "runtime": need.runtime,
        "cpus_per_task": need.cpus,
        "gpu": need.gpus,
        "gpu_model": (DEFAULTS.get("gpu_type") or "") if need.gpus else "",
        "slurm_partition": (
            DEFAULTS.get("slurm_partition") if need.gpus else cpu_partition
        ),
        "slurm_extra": " ".join(filter(None, extra)),
    }


NAMES = (
    "mem_mb runtime cpus_per_task gpu gpu_model slurm_partition slurm_extra".split()
    if CLUSTER_RUN
    # One machine needs none of them but the GPU, where it has one.
    else ["gpu"] if "gpu" in workflow.global_resources else []
)


def of_step(step):
    """The resources of a rule: functions of wildcards and attempt.

    They cost Snakemake half a millisecond each for every job, so that what all jobs of a step have
    in common, whatever the try, is given as it is. A job on a node has only itself to look at.
    """
    nodes = [node for node in NODES.values() if node.step == step]
    first = (
        [asked(node, 1) for node in nodes] if workflow.is_main_process and NAMES else []
    )
    found = {name: {asking[name] for asking in first} for name in NAMES}

    def is_common(name):
        # Memory, time and GPUs grow with the tries; no GPU stays none.
        return len(found[name]) == 1 and (
            name not in ("mem_mb", "runtime", "gpu") or found[name] == {0}
        )

    # Snakemake's own default, which it would evaluate for every job. On a cluster it is the node's.
    here = {} if CLUSTER_RUN else {"tmpdir": tempfile.gettempdir()}
    return here | {
        name: (
            next(iter(values))
            if is_common(name)
            else lambda wildcards, attempt, name=name: (
                asked(node_of(wildcards), attempt)[name]
            )
        )
        for name, values in found.items()
    }
