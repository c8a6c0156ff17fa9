"""Checks of an experiment, a profile and a cluster before anything is submitted.

What would otherwise show after hours in a queue, or never, shows here in one line each: what was
found, what is allowed, what to change.
"""

from __future__ import annotations

import getpass
import math
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunelib.cluster import slurm
from prunelib.cluster.cost import planned_disk_bytes
from prunelib.cluster.resources import Request, is_local, request
from prunelib.cluster.settings import Cluster
from prunelib.cluster.slurm import JobEnd, Partition
from prunelib.errors import InputError, PrunelibError
from prunelib.experiment.experiment import Experiment
from prunelib.experiment.graph import RESULTS, Node, needed
from prunelib.experiment.schema import read_yaml
from prunelib.provenance.fingerprint import ROOT

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"

_COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "scancel", "srun")
_USABLE = {"idle", "mixed", "allocated", "completing"}
# Snakemake's executor looks at least this often; a job forgotten in between is waited for for ever.
_LONGEST_POLL_SECONDS = 180
_MOST_NODES = 32
"""Nodes of a partition that the work directory is looked for on, at most."""
_PROBE_MEMORY_MB = 500
_GB = 10**9


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        status: ``ok``, ``warn`` (works, but look at it), ``FAIL`` (would not work) or ``skip``
            (could not be found out).
        name: what was checked.
        message: what was found, and for failures what is allowed and what to change.
    """

    status: str
    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14}  {' '.join(self.message.split())}"


# ------------------------------------------------------------------ the profile


@dataclass(frozen=True)
class Profile:
    """What a Snakemake profile says that matters for a cluster.

    Attributes:
        path: its file.
        executor: Snakemake's executor, None if the profile names none.
        defaults: default-resources by name, as text.
        status_command: ``sacct`` or ``squeue``, None if it names none.
        first_look_seconds: from a submission to the first look at it.
        retries: further tries of a failed step.
    """

    path: Path
    executor: str | None
    defaults: Mapping[str, str]
    status_command: str | None
    first_look_seconds: int
    retries: int

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; other keys are Snakemake's business.

        Raises:
            InputError: the file cannot be read, or holds something else than is known here.
        """
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise InputError(f"{path}: a mapping of options is needed, got {_kind(data)}")
        status = data.get("slurm-status-command")
        if status not in (None, "sacct", "squeue"):
            raise InputError(f"{path}: slurm-status-command: {status!r}; allowed: sacct, squeue")
        executor = data.get("executor")
        return cls(
            path=path,
            executor=None if executor is None else str(executor),
            defaults=_defaults(path, data.get("default-resources")),
            status_command=status,
            # The default of the executor.
            first_look_seconds=_number(path, data, "slurm-init-seconds-before-status-checks", 40),
            retries=_number(path, data, "retries", 0),
        )

    def where(self, resource: str) -> str:
        """Return where a default resource is set: file and key."""
        return f"{self.path}: default-resources: {resource}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _number(path: Path, data: Mapping[str, Any], key: str, default: int) -> int:
    value = data.get(key, default)
    if type(value) is not int or value < 0:
        raise InputError(f"{path}: {key}: a whole number from 0 is needed, got {value!r}")
    return value


def _defaults(path: Path, given: Any) -> dict[str, str]:
    """Default resources from a mapping or a list of ``name=value``: Snakemake takes both."""
    where = f"{path}: default-resources"
    if given is None:
        return {}
    if isinstance(given, list):
        pairs = []
        for entry in given:
            name, equals, value = str(entry).partition("=")
            if not isinstance(entry, str) or not equals or not name.strip():
                raise InputError(f"{where}: name=value is needed, got {entry!r}")
            pairs.append((name.strip(), value))
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{where}: {twice} is given twice")
        given = dict(pairs)
    if not isinstance(given, dict):
        raise InputError(
            f"{where}: a mapping, or a list of name=value, is needed, got {_kind(given)}"
        )
    found = {}
    for name, value in given.items():
        if not isinstance(value, str | int | float):
            raise InputError(f"{where}: {name}: one text or number is needed, got {_kind(value)}")
        text = str(value).strip().strip("'\"")
        if text:
            found[str(name)] = text
    return found


def _listed(text: str) -> list[str]:
    """The names of a setting that may hold several."""
    return [name for name in re.split(r"[,\s]+", text) if name]


# --------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Asked:
    """What one step will ask the cluster for: at its first and at its last try."""

    node: Node
    first: Request
    last: Request


@dataclass(frozen=True, eq=False)
class Setup:
    """All that is checked together.

    Attributes:
        experiment: what is to run.
        cluster: the resource model.
        profile: how Snakemake is to submit.
        wait_seconds: how long jobs that look for the work directory may wait in the queue.
    """

    experiment: Experiment
    cluster: Cluster
    profile: Profile
    wait_seconds: float

    @cached_property
    def needed(self) -> list[Node]:
        """The steps that are still to be done."""
        cells = self.experiment.cells
        return list(needed(node for cell in cells for node in cell.steps.values()).values())

    @cached_property
    def asked(self) -> list[Asked]:
        """The requests of the steps that are to be submitted.

        Raises:
            InputError: a step's request cannot be worked out.
        """
        gpu_type = self.profile.defaults.get("gpu_type")
        return [
            Asked(
                node,
                request(node, self.cluster, 1, gpu_type),
                request(node, self.cluster, self.profile.retries + 1, gpu_type),
            )
            for node in self.needed
            if not is_local(node.step, self.needed, self.cluster)
        ]


def examine(setup: Setup) -> Iterator[Check]:
    """Yield the outcome of every check, as soon as it is known.

    The working directory is the one that the workflow is going to be started in.
    """
    yield from _experiment_checks(setup)
    yield from _cluster_checks(setup)


# --------------------------------------------------------------- the experiment


def _experiment_checks(setup: Setup) -> Iterator[Check]:
    problems = setup.experiment.preflight()
    yield from (Check(FAIL, "experiment", problem) for problem in problems)
    if not problems:
        done = f"{len(setup.needed)} steps to do" if setup.needed else "nothing is left to do"
        yield Check(OK, "experiment", f"{setup.experiment.path}: {done}")
    yield _device(setup)
    yield _fetched(setup)
    yield _disk(setup)


def _device(setup: Setup) -> Check:
    device = setup.experiment.data["compute"]["device"]
    where = f"{setup.experiment.path}: compute: device"
    if device == "cpu":
        return Check(
            WARN, "device", f"{where} is cpu: no job will ask for a GPU; cuda would ask for one"
        )
    return Check(OK, "device", f"{where} is {device}")


def _fetched(setup: Setup) -> Check:
    steps = ("fetch_model", "fetch_text", "fetch_analogies")
    missing = sorted("/".join(node.labels) for node in setup.needed if node.step in steps)
    if not missing:
        return Check(OK, "fetched", "all models and texts that are still needed are here")
    experiment = setup.experiment
    command = ["snakemake", "--cores", "1", "--until", *steps, "--config"]
    if Path.cwd() != ROOT:
        command[1:1] = ["--snakefile", str(ROOT / "Snakefile")]
    command += [f"experiment={experiment.path}", f"catalogue={experiment.config}"]
    return Check(
        FAIL,
        "fetched",
        f"not here yet: {', '.join(missing)}; compute nodes often have no network. Fetch on this "
        f"machine: {shlex.join(command)} (snakemake --profile slurm would do it too, as local "
        "steps on the machine that it is started on)",
    )


def _disk(setup: Setup) -> Check:
    try:
        planned = planned_disk_bytes(setup.needed, setup.cluster)
    except InputError as error:
        return Check(SKIP, "disk space", f"cannot be worked out: {error}")
    place = next(path for path in (RESULTS, Path()) if path.is_dir()).resolve()
    free = shutil.disk_usage(place).free
    figures = f"{planned / _GB:.1f} GB planned, {free / _GB:.1f} GB free in {place}"
    if planned > free:
        return Check(
            FAIL,
            "disk space",
            f"{figures}: make room, link results/ to a larger file system, or ask for fewer models,"
            f" targets or seeds in {setup.experiment.path}",
        )
    return Check(OK, "disk space", f"{figures} (a quota is not looked at)")


# ------------------------------------------------------------------ the cluster


def _cluster_checks(setup: Setup) -> Iterator[Check]:
    profile = setup.profile
    if profile.executor != "slurm":
        yield Check(
            FAIL,
            "executor",
            f"{profile.path}: executor is {profile.executor}: nothing would go to SLURM; "
            "set executor: slurm",
        )
    commands = list(_COMMANDS)
    if profile.status_command == "sacct":
        commands.append("sacct")
    if missing := slurm.missing_commands(commands):
        yield Check(
            FAIL,
            "commands",
            f"not on PATH: {', '.join(missing)}: run this on a login node of the cluster, or load "
            "the module that brings SLURM's client commands",
        )
        yield Check(SKIP, "cluster", "cannot be looked at without these commands")
        return
    yield Check(OK, "commands", f"{', '.join(commands)} are here")
    try:
        said = slurm.controller()
        config = slurm.configuration()
        partitions = slurm.partitions()
    except PrunelibError as error:
        yield Check(FAIL, "controller", f"{error}: wait until the cluster is up, ask its staff")
        yield Check(SKIP, "cluster", "cannot be looked at while the controller does not answer")
        return
    yield Check(OK, "controller", f"{said} (SLURM {config.get('SLURM_VERSION', 'unknown')})")
    yield _status_command(profile, config)
    account = _account(profile, config)
    yield account
    yield from _partition_checks(setup, partitions, account)


def _status_command(profile: Profile, config: Mapping[str, str]) -> Check:
    name = "status command"
    where = f"{profile.path}: slurm-status-command"
    # What the executor takes when nothing is said.
    command = profile.status_command or ("squeue" if shutil.which("sacct") is None else "sacct")
    age = slurm.min_job_age(config)
    wanted = max(3 * profile.first_look_seconds, _LONGEST_POLL_SECONDS)
    remembers = age is not None and age >= wanted
    if command == "sacct":
        if slurm.accounting_answers():
            return Check(OK, name, "sacct answers")
        advice = f"set {where}: squeue"
        if not remembers:
            advice = (
                f"and squeue will not do either, since the controller's MinJobAge is {age} s, of "
                f"the {wanted} s that are needed: ask the cluster's staff for a running slurmdbd"
            )
        return Check(
            FAIL,
            name,
            f"{where} is sacct{'' if profile.status_command else ' by default'}, but no slurmdbd "
            f"answers: Snakemake would wait for ever without a word; {advice}",
        )
    if not remembers:
        seconds = 0 if age is None else age // 3
        advice = (
            f"set slurm-init-seconds-before-status-checks to {seconds} or less"
            if age is not None and age >= _LONGEST_POLL_SECONDS
            else "set slurm-status-command: sacct"
            if slurm.accounting_answers()
            else "ask the cluster's staff for a larger MinJobAge"
        )
        return Check(
            FAIL,
            name,
            f"{where} is squeue, but the controller's MinJobAge, how long it remembers ended jobs, "
            f"is {age} s; at least {wanted} s are needed: three times "
            f"slurm-init-seconds-before-status-checks ({profile.first_look_seconds} s), and "
            f"{_LONGEST_POLL_SECONDS} s between two looks; {advice}",
        )
    return Check(OK, name, f"squeue, and the controller remembers ended jobs for {age} s")


def _account(profile: Profile, config: Mapping[str, str]) -> Check:
    name = "account"
    where = profile.where("slurm_account")
    given = profile.defaults.get("slurm_account")
    if not slurm.has_accounting(config):
        if given:
            return Check(
                FAIL,
                name,
                f"{where} is {given}, but this cluster has no accounting, so every submission "
                "would fail; remove slurm_account",
            )
        return Check(OK, name, "none named, and the cluster has no accounting")
    user = getpass.getuser()
    try:
        allowed = slurm.accounts(user, config.get("ClusterName", ""))
    except PrunelibError as error:
        return Check(FAIL, name, f"the accounting database does not answer: {error}")
    names = ", ".join(allowed.names) or "none"
    if given:
        # The executor takes several names and compares without case.
        wrong = [
            part
            for part in _listed(given)
            if part.lower() not in {account.lower() for account in allowed.names}
        ]
        if wrong:
            return Check(
                FAIL,
                name,
                f"{where} is {given}, which is no account of user {user}; allowed: {names}",
            )
        return Check(OK, name, f"{given} is an account of user {user}")
    if allowed.default:
        return Check(
            OK, name, f"none named: jobs are charged to {user}'s default, {allowed.default}"
        )
    if slurm.enforces_associations(config):
        return Check(
            FAIL,
            name,
            f"{where} is not set, user {user} has no default account, and this cluster refuses "
            f"jobs without one; set it to one of: {names}",
        )
    return Check(OK, name, "none named, and the cluster does not ask for one")


# --------------------------------------------------------------- the partitions


def _partition_checks(
    setup: Setup, partitions: Mapping[str, Partition], account: Check
) -> Iterator[Check]:
    profile = setup.profile
    gpu_names, problem = _named(profile, "slurm_partition", partitions)
    if problem:
        yield problem
    cpu_names = gpu_names
    if "cpu_partition" in profile.defaults:
        cpu_names, problem = _named(profile, "cpu_partition", partitions)
        if problem:
            yield problem
    names = list(dict.fromkeys([*gpu_names, *cpu_names]))
    for name in names:
        yield _condition(partitions[name])
    gpu_check = _gpu_type(setup, [partitions[name] for name in gpu_names])
    yield gpu_check
    if gpu_check.status == FAIL:
        yield Check(SKIP, "limits", "cannot be worked out before the GPU type is right")
    else:
        yield from _limits(setup, partitions, gpu_names, cpu_names)
    if FAIL in (account.status, gpu_check.status) or not names:
        yield Check(
            SKIP, "work directory", "no job can look for it before the failures above are mended"
        )
    else:
        places = [
            # Some sites refuse jobs without a GPU where GPUs are.
            _Place(partitions[name], with_gpu=name not in cpu_names and gpu_check.status != SKIP)
            for name in names
        ]
        yield from _look_from_nodes(places, setup)


def _named(
    profile: Profile, key: str, partitions: Mapping[str, Partition]
) -> tuple[list[str], Check | None]:
    """The partitions that a profile names by a key and that exist; what is wrong with the rest."""
    given = profile.defaults.get(key)
    if given is None:
        found = [partition.name for partition in partitions.values() if partition.default]
        if found:
            return found, None
        return [], Check(
            FAIL,
            "partition",
            f"{profile.where(key)} is not set, and the cluster has no default partition; "
            f"there are: {', '.join(sorted(partitions))}",
        )
    # sbatch takes several, and starts the job in the first that has room.
    names = _listed(given)
    unknown = [name for name in names if name not in partitions]
    if unknown:
        return [name for name in names if name in partitions], Check(
            FAIL,
            "partition",
            f"{profile.where(key)} is {given}, but there is no partition {', '.join(unknown)}; "
            f"there are: {', '.join(sorted(partitions))}",
        )
    return names, None


def _condition(partition: Partition) -> Check:
    usable = [node for node in partition.nodes if node.responding and node.state in _USABLE]
    facts = f"{partition.name}: {len(usable)} of {len(partition.nodes)} nodes in service"
    if not partition.up:
        return Check(FAIL, "partition", f"{facts}, but the partition takes no jobs (State not UP)")
    if not usable:
        return Check(WARN, "partition", f"{facts}: jobs will wait until one comes back")
    return Check(OK, "partition", facts)


def _gpu_type(setup: Setup, partitions: Sequence[Partition]) -> Check:
    name = "gpu type"
    profile, cluster = setup.profile, setup.cluster
    if not any(cluster.wants_gpu(node) for node in setup.needed):
        return Check(SKIP, name, "no step that is to be done asks for a GPU")
    if not partitions:
        return Check(SKIP, name, "cannot be looked for before the partition is right")
    where = profile.where("gpu_type")
    table = f"{cluster.path}: gpus: types"
    given = profile.defaults.get("gpu_type")
    offered = {kind for partition in partitions for kind in partition.gpus}
    kinds = ", ".join(sorted(kind or "GPUs without a type" for kind in offered)) or "no GPUs"
    offer = f"partition {', '.join(partition.name for partition in partitions)} offers {kinds}"
    if not offered:
        return Check(FAIL, name, f"{offer}; name another in {profile.where('slurm_partition')}")
    if given is None:
        expected = f"planned for {cluster.default_gpu} ({cluster.path}: gpus: default)"
        if offered == {cluster.default_gpu}:
            return Check(OK, name, f"{offer}, and jobs are {expected}")
        return Check(WARN, name, f"{where} is not set; {offer}, and jobs are {expected}")
    if any(given not in partition.gpus for partition in partitions):
        known = sorted(offered & cluster.gpus.keys())
        advice = f"set it to {' or '.join(known)}" if known else f"add what is there to {table}"
        if offered == {""}:
            advice = f"leave it out and set {cluster.path}: gpus: default to what the nodes have"
        return Check(FAIL, name, f"{where} is {given}, but {offer}; {advice}")
    if given not in cluster.gpus:
        known = sorted(cluster.gpus)
        return Check(
            FAIL,
            name,
            f"{where} is {given}, which {table} does not know ({', '.join(known)}); add its memory "
            "and speed there",
        )
    return Check(OK, name, f"{offer}, and {table} knows {given}")


@dataclass(frozen=True)
class _Quantity:
    """One thing that jobs ask for, and the most of it that one job can get in a partition."""

    name: str
    unit: str
    of: Callable[[Request], int]
    most: float


def _quantities(partition: Partition, gpu_type: str | None) -> list[_Quantity]:
    minutes = math.inf if partition.max_seconds is None else partition.max_seconds // 60
    gpus = partition.gpus
    most = gpus.get(gpu_type, 0) if gpu_type else max(gpus.values(), default=0)
    return [
        _Quantity("runtime", "minutes", lambda need: need.runtime, minutes),
        _Quantity("mem_mb", "MiB", lambda need: need.mem_mb, partition.memory_mb),
        _Quantity("cpus", "CPUs", lambda need: need.cpus, partition.cpus),
        _Quantity("gpus", "GPUs", lambda need: need.gpus, most),
    ]


def _limits(
    setup: Setup,
    partitions: Mapping[str, Partition],
    gpu_names: Sequence[str],
    cpu_names: Sequence[str],
) -> Iterator[Check]:
    try:
        asked = setup.asked
    except InputError as error:
        yield Check(FAIL, "limits", str(error))
        return
    for name in dict.fromkeys([*gpu_names, *cpu_names]):
        here = [entry for entry in asked if name in (gpu_names if entry.first.gpus else cpu_names)]
        if here:
            yield from _limits_of(setup, partitions[name], here)


def _limits_of(setup: Setup, partition: Partition, asked: Sequence[Asked]) -> Iterator[Check]:
    gpu_type = setup.profile.defaults.get("gpu_type")
    quantities = _quantities(partition, gpu_type)
    exceeded = [
        check for quantity in quantities for check in _excess(setup, partition, quantity, asked)
    ]
    yield from exceeded
    if exceeded:
        return
    figures = ", ".join(
        f"{max(quantity.of(entry.first) for entry in asked)} {quantity.unit}"
        for quantity in quantities
    )
    for entry in asked:
        if not any(_fits(node, partition, entry.first, gpu_type) for node in partition.nodes):
            need = ", ".join(f"{q.of(entry.first)} {q.unit}" for q in quantities[1:])
            yield Check(
                FAIL,
                "limits",
                f"{entry.node.name} asks for {need}, and no single node of partition "
                f"{partition.name} has all of that; name another partition in "
                f"{setup.profile.where('slurm_partition')}",
            )
            return
    yield Check(OK, "limits", f"{partition.name} holds all {len(asked)} jobs; at most {figures}")


def _excess(
    setup: Setup, partition: Partition, quantity: _Quantity, asked: Sequence[Asked]
) -> Iterator[Check]:
    """A failure if the largest job does not fit, a warning if only its last try does not."""
    first = max(asked, key=lambda entry: quantity.of(entry.first))
    last = max(asked, key=lambda entry: quantity.of(entry.last))
    allowed = f"partition {partition.name} allows {quantity.most:.0f}"
    if quantity.of(first.first) > quantity.most:
        key = "slurm_partition"
        if not first.first.gpus and "cpu_partition" in setup.profile.defaults:
            key = "cpu_partition"
        yield Check(
            FAIL,
            "limits",
            f"{first.node.name} asks for {quantity.of(first.first)} {quantity.unit} "
            f"({quantity.name}), {allowed}; name a partition with more in "
            f"{setup.profile.where(key)}",
        )
    elif quantity.of(last.last) > quantity.most:
        yield Check(
            WARN,
            "limits",
            f"{last.node.name} asks for {quantity.of(last.last)} {quantity.unit} "
            f"({quantity.name}) at try {setup.profile.retries + 1}, {allowed}: that try would not "
            f"start; set {setup.cluster.path}: limits: {quantity.name}: {quantity.most:.0f}",
        )


def _fits(node: slurm.Node, partition: Partition, need: Request, gpu_type: str | None) -> bool:
    gpus = node.gpus.get(gpu_type, 0) if gpu_type else max(node.gpus.values(), default=0)
    memory = min(node.memory_mb, partition.memory_mb)
    return need.cpus <= node.cpus and need.mem_mb <= memory and need.gpus <= gpus


# ---------------------------------------------------------- the work directory


@dataclass(frozen=True)
class _Place:
    """A partition to look from, and whether jobs there ask for a GPU."""

    partition: Partition
    with_gpu: bool


@dataclass(frozen=True)
class _Probe:
    """A job that looks for the work directory."""

    partition: str
    job_id: str


# The exit codes say what a node does not see.
_FAULTS = {
    41: "the work directory {work} is not visible from {nodes}: run in a directory of a file "
    "system that the compute nodes mount",
    42: "{results} is visible but cannot be written from {nodes}: mend the rights there",
    43: "the project {root} is not visible from {nodes}: put it on a file system that the compute "
    "nodes mount",
    44: "{python} does not run there or lacks snakemake ({nodes}): make the environment on a file "
    "system that the compute nodes mount",
}
_UNSEEN = (
    "what {nodes} wrote into {results} does not appear on this machine: run in a directory of a "
    "file system that both mount"
)
# Network file systems may need a moment until they show what another machine has written.
_SCRIPT = """
work={work} results={results} root={root} python={python} scratch={scratch}
for wait in 0 1 2; do sleep $wait; test -f "$scratch/here" && break; done
test -f "$scratch/here" && cd "$work" || exit 41
echo seen > "$scratch/$SLURM_JOB_ID" || exit 42
test -d "$root/prunelib" || exit 43
PYTHONPATH="$root" "$python" -P -c 'import prunelib, snakemake' || exit 44
"""


def _look_from_nodes(places: Iterable[_Place], setup: Setup) -> Iterator[Check]:
    """Look for the work directory, the project and this Python from the nodes of partitions.

    One small job goes to every idle node (to at most 32 of a partition), or, where no node is idle,
    one to the partition. A file is passed in both directions.
    """
    RESULTS.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".doctor-", dir=RESULTS)).resolve()
    probes: list[_Probe] = []
    try:
        (scratch / "here").touch()
        words = {
            "work": Path.cwd(),
            "results": RESULTS.resolve(),
            "root": ROOT,
            "python": Path(sys.executable),
        }
        script = _SCRIPT.format(
            scratch=shlex.quote(str(scratch)),
            **{name: shlex.quote(str(path)) for name, path in words.items()},
        )
        for place in places:
            try:
                # One by one: those before an error must be known, to be cancelled.
                for probe in _submit(place, script, setup.profile):
                    probes.append(probe)
            except PrunelibError as error:
                said = str(error).partition(": exit code ")[2] or str(error)
                yield Check(
                    FAIL,
                    "work directory",
                    f"a small job for partition {place.partition.name} was refused: {said}",
                )
        ends = _await([probe.job_id for probe in probes], setup.wait_seconds)
        texts = {name: str(path) for name, path in words.items()}
        for name in dict.fromkeys(probe.partition for probe in probes):
            mine = {
                probe.job_id: ends.get(probe.job_id) for probe in probes if probe.partition == name
            }
            yield from _outcomes(name, mine, scratch, texts, setup.wait_seconds)
    finally:
        _cancel_quietly([probe.job_id for probe in probes])
        shutil.rmtree(scratch, ignore_errors=True)


def _cancel_quietly(job_ids: Sequence[str]) -> None:
    try:
        slurm.cancel(job_ids)
    except PrunelibError:
        # They end by their own time limit.
        return


def _submit(place: _Place, script: str, profile: Profile) -> Iterator[_Probe]:
    partition = place.partition
    command = ["sbatch", "--parsable", "--no-requeue", "--job-name=doctor", "--ntasks=1"]
    command += [f"--partition={partition.name}", "--time=5", f"--mem={_PROBE_MEMORY_MB}"]
    # Not in the work directory: where that is missing, some versions refuse to start a job.
    command += ["--output=/dev/null", "--chdir=/"]
    if account := profile.defaults.get("slurm_account"):
        command.append(f"--account={_listed(account)[0]}")
    idle = [node for node in partition.nodes if node.state == "idle" and node.responding]
    if place.with_gpu:
        gpu_type = profile.defaults.get("gpu_type")
        command.append(f"--gpus={gpu_type}:1" if gpu_type else "--gpus=1")
        idle = [node for node in idle if (gpu_type in node.gpus if gpu_type else node.gpus)]
    step = max(1, math.ceil(len(idle) / _MOST_NODES))
    for where in [f"--nodelist={node.name}" for node in idle[::step]] or ["--nodes=1"]:
        said = slurm.run(*command, where, f"--wrap={script}")
        yield _Probe(partition.name, said.strip().partition(";")[0])


def _await(job_ids: Sequence[str], seconds: float) -> dict[str, JobEnd]:
    """How jobs ended, or stand after ``seconds`` in the queue and as long again at work."""
    start = time.monotonic()
    found: dict[str, JobEnd] = {}
    while True:
        for job_id in job_ids:
            if job_id not in found or not found[job_id].ended:
                end = slurm.job_state(job_id)
                if end is not None:
                    found[job_id] = end
        waited = time.monotonic() - start
        open_states = {end.state for end in found.values() if not end.ended}
        if not open_states or waited > 2 * seconds:
            return found
        if waited > seconds and open_states <= {"PENDING", "CONFIGURING"}:
            return found
        time.sleep(0.3)


def _outcomes(
    partition: str,
    ends: Mapping[str, JobEnd | None],
    scratch: Path,
    words: Mapping[str, str],
    seconds: float,
) -> Iterator[Check]:
    """One check for each thing that became of the jobs of a partition."""
    groups: dict[tuple[str, str], list[str]] = {}
    for job_id, end in ends.items():
        outcome = _outcome(job_id, end, scratch, seconds)
        groups.setdefault(outcome, []).append((end.nodes if end else None) or f"job {job_id}")
    for (status, text), nodes in groups.items():
        shown = f"partition {partition}, {', '.join(nodes[:8])}"
        if len(nodes) > 8:
            shown += f" and {len(nodes) - 8} more"
        yield Check(status, "work directory", text.format(nodes=shown, **words))


def _outcome(job_id: str, end: JobEnd | None, scratch: Path, seconds: float) -> tuple[str, str]:
    """Status and text, the same for all nodes with the same fault."""
    if end is None or end.state in ("PENDING", "CONFIGURING"):
        reason = f" ({end.reason})" if end and end.reason else ""
        return SKIP, (
            f"not known: a job did not start within {seconds:g} s{reason}: {{nodes}}; "
            "ask again with a larger --wait"
        )
    if not end.ended:
        return FAIL, f"does not answer within {seconds:g} s on {{nodes}}: file system or node hangs"
    if end.exit_code in _FAULTS:
        return FAIL, _FAULTS[end.exit_code]
    if end.state != "COMPLETED":
        return FAIL, (
            f"a job that looks for it ended as {end.state} ({end.exit_code}:{end.signal}, "
            f"{end.reason or 'no reason given'}) on {{nodes}}"
        )
    for _ in range(10):
        if (scratch / job_id).is_file():
            return OK, "{work}, the project and {python} are visible from {nodes}"
        time.sleep(0.5)
    return FAIL, _UNSEEN
