"""How each step of an experiment stands, and why a failed one failed.

Read from what the steps leave behind (artefacts, attempts, logs) and, where there is one, from
SLURM. Nothing is asked of Snakemake, so it works while a run goes on, after it, and from another
shell.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunelib.cluster.slurm import Job, JobEnd, job_state, jobs_of
from prunelib.errors import PrunelibError
from prunelib.experiment.graph import Node
from prunelib.provenance import artefact
from prunelib.provenance.attempt import Attempt, attempt_path, read_attempt
from prunelib.provenance.liveness import host_name, is_same_process

DONE, RUNNING, QUEUED, FAILED, WAITING = "done", "running", "queued", "failed", "waiting"
SLURM_LOGS = Path("logs", "slurm")
"""Where profiles/slurm lets SLURM write the output of jobs."""

# A running try touches its file every 15 s.
_FRESH_SECONDS = 120.0
_SIGTERM = 143
_OVER_MEMORY = re.compile(r"exceeded memory limit|oom[-_ ]kill|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Standing:
    """How one step stands: ``state`` and, in one line, where it runs or why it failed."""

    state: str
    detail: str = ""


def workflow_jobs() -> list[Job] | None:
    """Return this user's jobs of the workflow in this directory; None where SLURM is not."""
    if shutil.which("squeue") is None:
        return None
    # The comment is how Snakemake's executor marks its jobs.
    return [job for job in jobs_of(Path.cwd()) if job.comment.startswith(("rule_", "group_"))]


def standings(nodes: Mapping[str, Node], jobs: Iterable[Job]) -> dict[str, Standing]:
    """Return how every node stands, by key.

    Args:
        nodes: by key.
        jobs: the workflow's jobs in SLURM's queue, none without SLURM.
    """
    jobs = list(jobs)
    return {key: standing(node, jobs) for key, node in nodes.items()}


def standing(node: Node, jobs: Iterable[Job]) -> Standing:
    """Return how one node stands, see ``standings``."""
    if artefact.is_valid(node.directory, node.key):
        return Standing(DONE)
    attempt = read_attempt(node.directory)
    mine = [job for job in jobs if node.key in job.comment]
    if attempt and _works(node, attempt, mine):
        where = f"SLURM job {attempt.slurm_job} on " if attempt.slurm_job else ""
        minutes = (time.time() - attempt.started) / 60
        return Standing(RUNNING, f"{where}{attempt.host}, {minutes:.0f} min{_last_words(node.log)}")
    if mine:
        return Standing(QUEUED, f"SLURM job {mine[-1].job_id} {mine[-1].state.lower()}")
    if attempt:
        return Standing(FAILED, failure(node, attempt))
    if found := _newest_slurm_log(node):
        return Standing(FAILED, f"ended before the step began; SLURM's log {found}")
    return Standing(WAITING)


def _works(node: Node, attempt: Attempt, jobs: list[Job]) -> bool:
    if attempt.ended is not None:
        return False
    if attempt.slurm_job:
        return any(job.job_id == attempt.slurm_job for job in jobs)
    if attempt.host == host_name():
        return is_same_process(attempt.pid, attempt.process_start)
    try:
        silent = time.time() - attempt_path(node.directory).stat().st_mtime
    except OSError:
        return False
    return silent < _FRESH_SECONDS


def failure(node: Node, attempt: Attempt) -> str:
    """Return in one line why an attempt failed: the step's own error, or SLURM's state of its job.

    The line ends with the path of the step's log.
    """
    tries = f" (try {attempt.number})" if attempt.number > 1 else ""
    return f"{_cause(attempt)}{tries}; log {node.log}"


def _cause(attempt: Attempt) -> str:
    # The step's own words are the best, unless somebody else ended it.
    if attempt.ended is not None and attempt.exit_code != _SIGTERM:
        return " ".join((attempt.error or "unknown").split())
    end = None
    if attempt.slurm_job:
        try:
            end = job_state(attempt.slurm_job)
        except PrunelibError as error:
            return f"killed; SLURM job {attempt.slurm_job} cannot be asked for: {error}"
    if end is None:
        return attempt.error or f"killed: process {attempt.pid} on {attempt.host} is gone"
    return explain_end(end, _slurm_log_of(end.job_id))


def explain_end(end: JobEnd, log: str) -> str:
    """Return in words how SLURM ended a job.

    Args:
        end: what SLURM says.
        log: the job's own output; without cgroups only that tells of exceeded memory.
    """
    job = f"SLURM job {end.job_id}" + (f" on {end.nodes}" if end.nodes else "")
    if end.state == "OUT_OF_MEMORY" or _OVER_MEMORY.search(log):
        limit = re.search(r"memory limit \((\d+) > (\d+)\)", log)
        figures = ""
        if limit:
            used, asked = (int(part) / 2**20 for part in limit.groups())
            figures = f": it used {used:.0f} of {asked:.0f} MiB"
        return f"out of memory, killed by {job}{figures}"
    if end.state == "TIMEOUT":
        return f"time limit reached, ended by {job}"
    if end.state == "NODE_FAIL":
        return f"node failure: {job}"
    if end.state == "CANCELLED":
        return f"cancelled{f' by user {end.cancelled_by}' if end.cancelled_by else ''}: {job}"
    if end.state == "PREEMPTED":
        return f"preempted by another job: {job}"
    if end.signal:
        return f"killed by signal {end.signal}: {job} {end.state}"
    return f"{end.state.lower()} with exit code {end.exit_code}: {job}"


def failures(nodes: Mapping[str, Node], since: float) -> list[str]:
    """Return one line for each step that was tried after ``since`` and has failed.

    Args:
        nodes: by key.
        since: seconds since the epoch; clocks of other hosts may be a minute off.
    """
    lines = []
    for node in nodes.values():
        attempt = read_attempt(node.directory)
        if attempt and attempt.started >= since - 60:
            found = standing(node, [])
            if found.state == FAILED:
                lines.append(f"failed: {node.name}: {found.detail}")
    return lines


def why_missing(steps: Mapping[str, Node]) -> dict[str, str]:
    """Return, by name, why steps have no artefact: their own failure, or an upstream step's."""
    found = {}
    for name, node in steps.items():
        if not artefact.is_valid(node.directory, node.key):
            found[name] = _first_failure(node) or "not made yet"
    return found


def _first_failure(node: Node) -> str | None:
    if artefact.is_valid(node.directory, node.key):
        return None
    now = standing(node, [])
    if now.state == FAILED:
        return f"{node.name} failed: {now.detail}"
    causes = (_first_failure(upstream) for upstream in node.inputs.values())
    return next((cause for cause in causes if cause), None)


def _slurm_logs(pattern: str) -> list[Path]:
    return sorted(SLURM_LOGS.glob(pattern), key=lambda path: path.stat().st_mtime)


def _slurm_log_of(job_id: str) -> str:
    found = _slurm_logs(f"**/{job_id}.log")
    return found[-1].read_text(encoding="utf-8", errors="replace")[-20_000:] if found else ""


def _newest_slurm_log(node: Node) -> Path | None:
    # SLURM's logs of jobs that succeeded are removed, so one that is there tells of a failure.
    found = _slurm_logs(f"rule_{node.step}/*{node.key}*/*.log")
    return found[-1] if found else None


def _last_words(log: Path) -> str:
    """The last line of a log, without time and logger."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = [line.split(": ", 1)[-1].strip() for line in lines if line.strip()]
    return f", {words[-1][:80]}" if words else ""
