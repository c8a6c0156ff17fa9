"""SLURM's client commands as typed functions.

Every call is bounded in time: a client whose controller or database is away may otherwise retry for
minutes. The formats are those of SLURM 22.05, which later versions have kept.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunelib.errors import InputError, PrunelibError

TIMEOUT_SECONDS = 20.0
"""How long a client command may take."""
UNFINISHED = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "SIGNALING",
        "STAGE_OUT",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "RESIZING",
        "RESV_DEL_HOLD",
    }
)
"""States of a job that may still change; all others are final."""

# Not found in names, paths and comments that people write.
_SEPARATOR = "\x1f"
# A user's own defaults for these commands would filter or order what is read here.
_USER_DEFAULTS = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")
_FIELD = re.compile(r"(?:^|(?<=\s))([A-Za-z][\w:/]*)=")
_GPU = re.compile(r"^gpu(?::(?P<type>[^:=]+))?[:=](?P<count>\d+)$")


@dataclass(frozen=True)
class Node:
    """A compute node.

    Attributes:
        name: its name.
        state: long state without flags (``idle``, ``mixed``, ``allocated``, ``down``, ...).
        responding: False where the controller does not hear it, or is about to power it up.
        cpus: number of CPUs.
        memory_mb: memory in MiB.
        gpus: GPU type to number; ``""`` for GPUs without a type.
    """

    name: str
    state: str
    responding: bool
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]


@dataclass(frozen=True)
class Partition:
    """A partition with its limits.

    Attributes:
        name: its name.
        default: whether jobs that name none go there.
        up: whether it takes and starts jobs.
        max_seconds: longest time limit of a job, None if unlimited.
        max_memory_mb: most memory that a job may ask for on a node in MiB, None if only the nodes
            limit it.
        whole_nodes: whether every job gets whole nodes.
        nodes: its nodes.
    """

    name: str
    default: bool
    up: bool
    max_seconds: int | None
    max_memory_mb: int | None
    whole_nodes: bool
    nodes: tuple[Node, ...] = field(repr=False)

    @property
    def memory_mb(self) -> int:
        """Most memory in MiB that a one-node job can get."""
        largest = max((node.memory_mb for node in self.nodes), default=0)
        return largest if self.max_memory_mb is None else min(largest, self.max_memory_mb)

    @property
    def cpus(self) -> int:
        """CPUs of the largest node."""
        return max((node.cpus for node in self.nodes), default=0)

    @property
    def gpus(self) -> dict[str, int]:
        """GPU type to the largest number in one node."""
        found: dict[str, int] = {}
        for node in self.nodes:
            for kind, count in node.gpus.items():
                found[kind] = max(count, found.get(kind, 0))
        return found


@dataclass(frozen=True)
class Accounts:
    """What a user may charge jobs to.

    Attributes:
        names: the accounts.
        default: the one that jobs get that name none, None if there is none.
    """

    names: tuple[str, ...]
    default: str | None


@dataclass(frozen=True)
class Job:
    """A job in the queue.

    Attributes:
        job_id: SLURM's number.
        state: long state.
        directory: its work directory.
        comment: comment of the submitter, Snakemake's executor writes rule and wildcards there.
        name: its name.
        nodes: names of its nodes, empty while it waits.
        seconds: how long it has run.
    """

    job_id: str
    state: str
    directory: Path
    comment: str
    name: str
    nodes: str
    seconds: int


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, or stands.

    Attributes:
        job_id: SLURM's number.
        state: ``COMPLETED``, ``FAILED``, ``TIMEOUT``, ``OUT_OF_MEMORY``, ``NODE_FAIL``,
            ``CANCELLED``, ``PREEMPTED``, ... or one of ``UNFINISHED``.
        exit_code: the batch script's exit code.
        signal: the signal that ended it, 0 for none.
        reason: SLURM's reason, None where it has none.
        nodes: names of its nodes, None if it never had one.
        cancelled_by: numeric user id of who cancelled it, None where unknown (only the accounting
            database knows) or not cancelled.
    """

    job_id: str
    state: str
    exit_code: int
    signal: int
    reason: str | None
    nodes: str | None
    cancelled_by: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state not in UNFINISHED


def run(*command: str, timeout: float = TIMEOUT_SECONDS) -> str:
    """Run a client command and return its output.

    Raises:
        InputError: the command is not installed here.
        PrunelibError: it failed or did not answer in ``timeout`` seconds; with what it said.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_USER_DEFAULTS)
    }
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"SLURM's command {command[0]} is not on PATH: this machine is no login node of a "
            "cluster, or a module must be loaded"
        ) from error
    except OSError as error:
        raise PrunelibError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise PrunelibError(f"{' '.join(command)}: no answer in {timeout:g} s") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing said"
        raise PrunelibError(f"{' '.join(command)}: exit code {done.returncode}: {said[:500]}")
    return done.stdout


def missing_commands(names: Iterable[str]) -> list[str]:
    """Return those of the commands that are not on PATH."""
    return [name for name in names if shutil.which(name) is None]


def parse_seconds(text: str) -> int | None:
    """Return a duration as SLURM prints it (``[days-]hours:minutes:seconds``) in seconds.

    None for ``UNLIMITED``, ``infinite``, ``NONE`` and other words.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_gpus(gres: str) -> dict[str, int]:
    """Return GPU type to number from a node's generic resources (``gpu:h100:2(S:0-1),shard:8``)."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        if match := _GPU.match(entry.strip()):
            kind = match["type"] or ""
            found[kind] = found.get(kind, 0) + int(match["count"])
    return found


def parse_fields(line: str) -> dict[str, str]:
    """Return ``Key=value`` pairs of a ``scontrol -o`` line; values may hold spaces.

    Of a key that occurs twice the first counts: paths and comments, which may look like pairs, come
    late in the line.
    """
    parts = _FIELD.split(line)[1:]
    found: dict[str, str] = {}
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(key, value.strip())
    return found


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


# ------------------------------------------------------------------ the cluster


def controller() -> str:
    """Return what the controller says when asked whether it is up.

    Raises:
        PrunelibError: it does not answer, or says that it is down.
    """
    said = " ".join(run("scontrol", "ping").split())
    if "is UP" not in said:
        raise PrunelibError(f"scontrol ping: {said}")
    return said


def configuration() -> dict[str, str]:
    """Return the cluster's configuration by key, as ``scontrol show config`` prints it."""
    found = {}
    for line in run("scontrol", "show", "config").splitlines():
        key, equals, value = line.partition("=")
        if equals:
            found[key.strip()] = value.strip()
    return found


def min_job_age(config: Mapping[str, str]) -> int | None:
    """Return for how many seconds the controller remembers a job that has ended.

    None if the configuration does not say.
    """
    match = re.match(r"(\d+)", config.get("MinJobAge", ""))
    return int(match[1]) if match else None


def has_accounting(config: Mapping[str, str]) -> bool:
    """Return whether the cluster is configured with an accounting database."""
    return config.get("AccountingStorageType", "").endswith("slurmdbd")


def enforces_associations(config: Mapping[str, str]) -> bool:
    """Return whether jobs of a user without a valid account are refused."""
    enforced = config.get("AccountingStorageEnforce", "none").lower()
    return bool({"associations", "limits", "safe", "qos", "wckeys", "all"} & set(_split(enforced)))


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def partitions() -> dict[str, Partition]:
    """Return all partitions by name, hidden ones too.

    Raises:
        PrunelibError: the controller does not answer.
    """
    nodes = _nodes()
    found = {}
    for line in run("scontrol", "-a", "-o", "show", "partition").splitlines():
        facts = parse_fields(line)
        if "PartitionName" in facts:
            partition = _partition(facts, nodes)
            found[partition.name] = partition
    return found


def _partition(facts: Mapping[str, str], nodes: Mapping[str, tuple[Node, ...]]) -> Partition:
    name = facts["PartitionName"]
    return Partition(
        name=name,
        default=facts.get("Default") == "YES",
        up=facts.get("State") == "UP",
        max_seconds=parse_seconds(facts.get("MaxTime", "UNLIMITED")),
        max_memory_mb=_whole(facts.get("MaxMemPerNode", "UNLIMITED")),
        whole_nodes=facts.get("OverSubscribe", "").startswith("EXCLUSIVE"),
        nodes=nodes.get(name, ()),
    )


def _nodes() -> dict[str, tuple[Node, ...]]:
    """Nodes by partition."""
    codes = _SEPARATOR.join(("%R", "%N", "%T", "%c", "%m", "%G"))
    found: dict[str, dict[str, Node]] = {}
    for line in run("sinfo", "-a", "-h", "-N", "-e", "-o", codes).splitlines():
        parts = [part.strip() for part in line.split(_SEPARATOR)]
        if len(parts) != 6:
            raise PrunelibError(f"sinfo: a line that cannot be read: {line!r}")
        partition, name, state, cpus, memory, gres = parts
        found.setdefault(partition, {})[name] = Node(
            name=name,
            # Flags follow the word: * not responding, ~ powered off, # powering up, ! % $ @ ^ -.
            state=re.sub(r"[^a-z_]+$", "", state.lower()),
            responding=not state.endswith(("*", "~", "#", "!", "%", "@", "^")),
            cpus=_whole(cpus) or 0,
            memory_mb=_whole(memory) or 0,
            gpus=parse_gpus(gres),
        )
    return {partition: tuple(nodes.values()) for partition, nodes in found.items()}


def accounting_answers() -> bool:
    """Return whether sacct gives answers: it is installed, and there is a database behind it."""
    try:
        run("sacct", "-X", "-n", "-P", "-o", "JobID")
    except PrunelibError:
        return False
    return True


def accounts(user: str, cluster: str) -> Accounts:
    """Return the accounts that a user may charge jobs to.

    Args:
        user: login name.
        cluster: the cluster's name, ``ClusterName`` of its configuration.

    Raises:
        PrunelibError: the accounting database does not answer.
    """
    where = (f"user={user}", f"cluster={cluster}")
    names = run("sacctmgr", "-n", "-P", "show", "associations", *where, "format=account").split()
    default = run("sacctmgr", "-n", "-P", "show", "user", user, "format=defaultaccount").split()
    return Accounts(tuple(sorted(set(names))), default[0] if default else None)


# --------------------------------------------------------------------- the jobs


def jobs_of(directory: Path) -> list[Job]:
    """Return this user's waiting and running jobs whose work directory is ``directory``.

    Raises:
        PrunelibError: the controller does not answer, or its answer cannot be read.
    """
    codes = _SEPARATOR.join(("%i", "%T", "%Z", "%k", "%j", "%N", "%M"))
    here = directory.resolve()
    jobs = (_job(line) for line in run("squeue", "-h", "--me", "-o", codes).splitlines())
    return [job for job in jobs if job.directory.resolve() == here]


def _job(line: str) -> Job:
    parts = line.split(_SEPARATOR)
    if len(parts) != 7:
        raise PrunelibError(f"squeue: a line that cannot be read: {line!r}")
    job_id, state, directory, comment, name, nodes, elapsed = (part.strip() for part in parts)
    return Job(
        job_id=job_id,
        state=state,
        directory=Path(directory),
        comment="" if comment == "(null)" else comment,
        name=name,
        nodes=nodes,
        seconds=parse_seconds(elapsed) or 0,
    )


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter.

    Raises:
        PrunelibError: the controller does not answer, or refuses.
    """
    if ids := list(job_ids):
        run("scancel", "-Q", *ids)


def job_state(job_id: str) -> JobEnd | None:
    """Return how a job stands or ended, None if neither controller nor accounting knows it.

    The controller is asked first, since the accounting database lags behind it; it forgets a job
    ``MinJobAge`` after its end.

    Raises:
        PrunelibError: the controller does not answer.
    """
    try:
        found = _from_controller(job_id)
    except PrunelibError as error:
        # The wording of all versions so far; an unknown job is no fault of the controller.
        if "Invalid job id" not in str(error):
            raise
        return _from_accounting(job_id)
    if found.state == "CANCELLED" and (recorded := _from_accounting(job_id)):
        return replace(found, cancelled_by=recorded.cancelled_by)
    return found


def _show_job(job_id: str) -> dict[str, str]:
    lines = run("scontrol", "-o", "show", "job", job_id).splitlines()
    return parse_fields(lines[0] if lines else "")


def _from_controller(job_id: str) -> JobEnd:
    facts = _show_job(job_id)
    code, signal = _exit_code(facts.get("ExitCode", "0:0"))
    return JobEnd(
        job_id=job_id,
        state=facts.get("JobState", "UNKNOWN"),
        exit_code=code,
        signal=signal,
        reason=_or_none(facts.get("Reason")),
        nodes=_or_none(facts.get("NodeList")),
    )


def _from_accounting(job_id: str) -> JobEnd | None:
    columns = "JobIDRaw,State,ExitCode,Reason,NodeList"
    try:
        lines = run("sacct", "-n", "-P", "-X", "-j", job_id, "-o", columns).splitlines()
    except PrunelibError:
        return None
    if not lines:
        return None
    found_id, state, codes, reason, nodes = lines[-1].split("|")
    # "CANCELLED by 1000"
    word, _, user = state.partition(" by ")
    code, signal = _exit_code(codes)
    return JobEnd(found_id, word, code, signal, _or_none(reason), _or_none(nodes), user or None)


def _exit_code(text: str) -> tuple[int, int]:
    code, _, signal = text.partition(":")
    return _whole(code) or 0, _whole(signal) or 0


def _or_none(text: str | None) -> str | None:
    return None if text in (None, "", "None", "(null)", "None assigned", "Unknown") else text


def has_node_alone(job_id: str) -> bool:
    """Return whether no other job can share the nodes of a running job.

    True where it was submitted with ``--exclusive`` or in a partition that gives whole nodes, and
    where all CPUs of its nodes are allocated to it.

    Raises:
        PrunelibError: the controller does not know the job or does not answer.
    """
    facts = _show_job(job_id)
    if facts.get("OverSubscribe") == "NO":
        return True
    nodes = _or_none(facts.get("NodeList"))
    if nodes is None:
        return False
    lines = run("scontrol", "-o", "show", "node", nodes).splitlines()
    total = sum(int(parse_fields(line)["CPUTot"]) for line in lines)
    return _whole(facts.get("NumCPUs", "")) == total
