"""Jobs of an earlier run of this directory that outlived it.

Snakemake's executor knows only the jobs that it submitted itself: after a ``kill -9`` of the main
process a second start would submit the same steps beside those that still run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prunelib.cluster.progress import workflow_jobs
from prunelib.cluster.slurm import Job, cancel
from prunelib.errors import InputError, PrunelibError

POLICIES = ("wait", "cancel", "refuse")
_LOOK_SECONDS = 10.0
_TELL_SECONDS = 300.0


def check_policy(policy: str, where: str) -> str:
    """Return the policy if there is such a one.

    Raises:
        InputError: what was given and what is allowed.
    """
    if policy not in POLICIES:
        raise InputError(f"{where}: orphans: {policy!r}; allowed: {', '.join(POLICIES)}")
    return policy


def settle(
    policy: str,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    *,
    tries: int = 3,
) -> bool:
    """Wait for, or cancel, the jobs of an earlier run in this directory.

    Args:
        policy: ``wait`` until they have ended, ``cancel`` them, or ``refuse`` to start.
        say: told in lines what happens.
        sleep: waits between two looks.
        tries: how often a controller that does not answer is asked; it may be away for a moment.

    Returns:
        Whether there were any; what they finished is to be taken into account then.

    Raises:
        InputError: there are jobs and the policy is ``refuse``.
    """
    jobs = _look(say, tries)
    if not jobs:
        return False
    listed = ", ".join(f"{job.job_id} ({job.state.lower()}, {_step(job)})" for job in jobs[:10])
    more = f" and {len(jobs) - 10} more" if len(jobs) > 10 else ""
    number = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    found = f"{number} of an earlier run in this directory: {listed}{more}"
    if policy == "refuse":
        raise InputError(
            f"{found}; start with --config orphans=wait or orphans=cancel, or scancel them"
        )
    if policy == "cancel":
        say(f"{found}; cancelling them")
        cancel(job.job_id for job in jobs)
    else:
        say(f"{found}; waiting for them (--config orphans=cancel cancels them instead)")
    told = time.monotonic()
    while jobs := _look(say, tries):
        sleep(_LOOK_SECONDS if policy == "wait" else 1.0)
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say(f"waiting for {len(jobs)} jobs of an earlier run")
    return True


def _step(job: Job) -> str:
    return job.comment.partition("_wildcards_")[0].removeprefix("rule_")


def _look(say: Callable[[str], None], tries: int) -> list[Job]:
    for number in range(tries):
        try:
            return workflow_jobs() or []
        except PrunelibError as error:
            if number + 1 == tries:
                said = str(error).rpartition(": ")[2]
                say(f"SLURM does not answer ({said}): jobs of an earlier run are not looked for")
            else:
                time.sleep(2.0)
    return []
