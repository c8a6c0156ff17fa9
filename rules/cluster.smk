# What each step asks a cluster for: gpus, memory, time and cpus from config/cluster.yaml. A run on
# one machine does not look at them.
from prunelib.cluster.resources import is_local, request
from prunelib.cluster.settings import Cluster
from prunelib.provenance.environment import visible_gpus


def of_profile(name):
    """A value of the profile's default-resources, None where there is none."""
    defaults = workflow.resource_settings.default_resources
    given = dict(arg.split("=", 1) for arg in getattr(defaults, "args", []))
    return given.get(name, "").strip("'\"") or None


try:
    CLUSTER = Cluster.load(project_path(config["cluster"]))
except PrunelibError as error:
    raise WorkflowError(f"{error}")


# On one machine nobody hands out its GPUs: one step at a time, unless --resources gpu=N says more.
if (
    workflow.is_main_process
    and workflow.resource_settings.nodes is None
    and "gpu" not in workflow.global_resources
    and visible_gpus()
):
    workflow.register_resource("gpu", 1)


def runs_here(step):
    """Whether a step's jobs are too short for the queue. A job that is on a node just runs."""
    return workflow.is_main_process and is_local(step, NODES.values(), CLUSTER)


def asked(name):
    """A resource of a step as Snakemake wants it: a function of wildcards and attempt."""

    def value(wildcards, attempt):
        try:
            need = request(node_of(wildcards), CLUSTER, attempt, of_profile("gpu_type"))
        except PrunelibError as error:
            raise WorkflowError(f"{error}")
        return {
            "mem_mb": need.mem_mb,
            "runtime": need.runtime,
            "cpus_per_task": need.cpus,
            "gpu": need.gpus,
            "gpu_model": of_profile("gpu_type") or "" if need.gpus else "",
            "slurm_partition": of_profile(
                "slurm_partition"
                if need.gpus or not of_profile("cpu_partition")
                else "cpu_partition"
            ),
            "slurm_extra": " ".join(
                filter(
                    None, [of_profile("slurm_extra"), need.exclusive and "--exclusive"]
                )
            ),
            # Tells the step which try of this run it is.
            "attempt": attempt,
        }[name]

    return value


RESOURCES = {
    name: asked(name)
    for name in (
        "mem_mb",
        "runtime",
        "cpus_per_task",
        "gpu",
        "gpu_model",
        "slurm_partition",
        "slurm_extra",
        "attempt",
    )
}
