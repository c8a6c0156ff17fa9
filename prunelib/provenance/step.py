"""How a step of the workflow runs: check what was planned, compute, commit.

A step script holds one function ``main(request, out)`` that writes files into ``out``, and hands it
to ``run_step``.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from prunelib.errors import InputError, IntegrityError, PrunelibError
from prunelib.provenance import artefact, environment
from prunelib.provenance.attempt import begin, earlier_try, wait_for_others
from prunelib.provenance.fingerprint import (
    ROOT,
    Fingerprint,
    Snapshot,
    fingerprint,
    unlisted_modules,
)
from prunelib.provenance.keys import package_versions, step_key

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRequest:
    """What a step is asked to do.

    Attributes:
        step: name of the step.
        key: the content key that was planned, see ``planned_key``.
        params: everything that the step is told; JSON values.
        inputs: name to artefact directory.
        out: the artefact to make.
        entry: modules and scripts that the fingerprint starts from.
        packages: distributions whose versions are part of the key.
    """

    step: str
    key: str
    params: dict[str, Any]
    inputs: dict[str, Path]
    out: Path
    entry: tuple[str, ...]
    packages: tuple[str, ...]

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        content = {
            "step": self.step,
            "key": self.key,
            "params": self.params,
            "inputs": {name: path.as_posix() for name, path in self.inputs.items()},
            "out": self.out.as_posix(),
            "entry": list(self.entry),
            "packages": list(self.packages),
        }
        return json.dumps(content, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> StepRequest:
        """Read a request.

        Raises:
            InputError: the text is not a request: not JSON, keys missing or unknown, wrong types.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"request: is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"request: a JSON object is needed, got {type(content).__name__}")
        known = {field.name for field in fields(cls)}
        for kind, names in (
            ("unknown", content.keys() - known),
            ("missing", known - content.keys()),
        ):
            if names:
                allowed = ", ".join(sorted(known))
                raise InputError(f"request: {kind} {', '.join(sorted(names))}; keys: {allowed}")
        params = content["params"]
        if not isinstance(params, dict):
            raise InputError("request: params must be an object")
        inputs = content["inputs"]
        if not isinstance(inputs, dict):
            raise InputError("request: inputs must be an object of names and paths")
        return cls(
            step=_text(content, "step"),
            key=_text(content, "key"),
            params=params,
            inputs={name: Path(_text(inputs, name)) for name in inputs},
            out=Path(_text(content, "out")),
            entry=_texts(content, "entry"),
            packages=_texts(content, "packages"),
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _text(content: Mapping[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str) or not value:
        raise InputError(f"request: {name} must be a text that is not empty, got {value!r}")
    return value


def _texts(content: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = content[name]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"request: {name} must be a list of texts, got {value!r}")
    return tuple(value)


Main = Callable[[StepRequest, Path], None]

_SMALL_BYTES = 64 * 2**20
_WEIGHTS = re.compile(r"model.*\.safetensors")
_COSTS = ("step", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")
_PLANNED = Snapshot()


@cache
def _planned_code(entry: tuple[str, ...]) -> Fingerprint:
    return fingerprint(entry, seen=_PLANNED)


def planned_key(
    step: str,
    params: Mapping[str, Any],
    entry: Iterable[str],
    upstream: Mapping[str, str],
    packages: Iterable[str],
) -> str:
    """Return the key that a step is going to have; called while the DAG is built.

    One process sees one state of the code: each file is read once, so that one saved while the DAG
    is built cannot make two keys of one DAG disagree. The step itself reads the code anew and
    refuses if it has changed.

    Args:
        step: name of the step.
        params: everything the step is told.
        entry: modules and scripts that its fingerprint starts from.
        upstream: name of each input to its key.
        packages: distributions whose versions count.

    Raises:
        InputError: an entry or a package does not exist, or a parameter is not a JSON value.
    """
    code = _planned_code(tuple(sorted(set(entry))))
    return step_key(step, params, code, upstream, package_versions(packages))


def state_directory(request: StepRequest) -> Path:
    """Return where a step may keep state to resume from; it is not created here.

    It lies beside the target, survives a kill, and is removed once the artefact is committed.
    """
    return request.out.with_name(f"{request.out.name}.state")


def execute(request: StepRequest, main: Main) -> bool:
    """Run a step in this process and commit its artefact.

    Returns:
        True if the artefact was made, False if a valid one was there or came first.

    Raises:
        InputError: an input is not a valid artefact, or the request cannot be hashed.
        IntegrityError: a file of an input is not what its record says.
        PrunelibError: the key differs from the planned one, before or after the work.
    """
    return _execute(request, main, lambda code: None)


def _execute(request: StepRequest, main: Main, check: Callable[[Fingerprint], None]) -> bool:
    made = False
    if artefact.is_valid(request.out, request.key):
        _log.info("%s is there already", request.out)
        artefact.remove_dead_writers(request.out)
    else:
        made = _make(request, main, check)
    artefact.remove(state_directory(request))
    return made


def _make(request: StepRequest, main: Main, check: Callable[[Fingerprint], None]) -> bool:
    records = {name: _input_record(name, path) for name, path in request.inputs.items()}
    upstream: dict[str, str] = {name: record["key"] for name, record in records.items()}
    versions = package_versions(request.packages)
    code = fingerprint(request.entry)

    def refuse_change(now: Fingerprint) -> None:
        key = step_key(request.step, request.params, now, upstream, versions)
        if key != request.key:
            raise PrunelibError(
                f"planned key {request.key}, but the code, packages and inputs that are here give "
                f"{key}: something changed since the run was planned; start the run again"
            )

    def check_before_commit() -> None:
        # Modules imported late may have been edited while the step ran.
        refuse_change(fingerprint(request.entry))
        check(code)

    refuse_change(code)
    provenance = {
        "step": request.step,
        "key": request.key,
        "params": request.params,
        "upstream": upstream,
        "upstream_costs": _upstream_costs(records.values()),
        "fingerprint": code.digest,
        "definitions": code.definitions,
        "packages": versions,
        **environment.describe(ROOT),
    }
    if request.params.get("device", "cpu") != "cpu":
        provenance["gpus"] = environment.visible_gpus()
    return artefact.commit(
        request.out, lambda scratch: main(request, scratch), provenance, check_before_commit
    )


def _input_record(name: str, directory: Path) -> dict[str, Any]:
    if not artefact.is_valid(directory):
        try:
            artefact.read(directory)
            fault = "files are missing or have another size"
        except IntegrityError as error:
            fault = str(error)
        raise InputError(f"input {name!r}: {directory} is not a whole artefact ({fault})")
    record = artefact.read(directory)
    # Large weights are verified where their first tensor is read, by whoever reads it.
    here = [
        file
        for file, facts in record["files"].items()
        if facts["size"] <= _SMALL_BYTES or not _WEIGHTS.fullmatch(file)
    ]
    artefact.verify(directory, here)
    return record


def _upstream_costs(inputs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what these artefacts, by their records, and all they were made from took, by key.

    Whoever has this record knows these figures without the artefacts they are of: ``step``,
    ``seconds`` and the peak memory of the process that made each one, in bytes on the host and on
    its GPUs.
    """
    costs: dict[str, dict[str, Any]] = {}
    for record in inputs:
        # Artefacts of earlier versions have no costs of what is behind them.
        costs |= record.get("upstream_costs") or {}
        costs[record["key"]] = {name: record.get(name) for name in _COSTS}
    return costs


def _refuse_unlisted(code: Fingerprint) -> None:
    """Refuse if this process has loaded code that the key does not cover."""
    missing = unlisted_modules(code, sys.modules)
    if missing:
        raise PrunelibError(
            f"{', '.join(missing)} was loaded but is not in the fingerprint: "
            "name it in the step's code entries"
        )


def _refuse_unlisted_script(request: StepRequest) -> None:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return
    path = Path(script).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    if name not in request.entry:
        raise PrunelibError(f"the script {name} is not among the step's code entries")


class _Stopped(SystemExit):
    """A signal asked the step to end."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the removal of the scratch directory.
    signal.signal(number, signal.SIG_IGN)
    raise _Stopped(128 + number)


def run_step(main: Main) -> None:
    """Run a step script: read ``--request``, log to standard error, commit, report.

    Ends the process with an error's own exit code and one line ``error: <step>: <message>`` for
    errors meant for people, with a traceback and exit code 1 for all others, and with 128 plus the
    signal's number, nothing left behind, for SIGTERM, SIGINT and SIGHUP.

    How a try ended is kept beside the target until the artefact is there, see
    ``prunelib.provenance.attempt``. After an error that is permanent, later tries of the same run
    end at once with the same line.
    """
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup and shells in the background ask for signals to be ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--request", required=True, help="the step's request, as JSON")
    arguments = parser.parse_args()
    step = Path(sys.argv[0]).stem
    try:
        request = StepRequest.from_json(arguments.request)
        step = request.step
        _refuse_unlisted_script(request)
    except PrunelibError as error:
        _fail(step, str(error), error.exit_code)
    wait_for_others(request.out)
    before = earlier_try(request.out, request.key)
    if before and before.permanent:
        _fail(step, f"{before.error} (not tried again)", before.exit_code or 1)
    try:
        running = begin(request.out, step, request.key)
    except OSError as error:
        _fail(step, artefact.disk_full(error, request.out) or f"OSError: {error}", 1)
    # The workflow empties the log for every try.
    for line in running.attempt.earlier:
        _log.info("before: %s", line)
    try:
        _execute(request, main, _refuse_unlisted)
    except PrunelibError as error:
        running.fail(str(error), error.exit_code, permanent=error.permanent)
        _fail(step, str(error), error.exit_code)
    except _Stopped as stopped:
        code = int(str(stopped.code))
        name = signal.Signals(code - 128).name
        running.fail(f"stopped by {name}", code, permanent=False)
        raise
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        running.fail(message, 1, permanent=False)
        _fail(step, message, 1)
    running.succeed()


def _fail(step: str, message: str, code: int) -> NoReturn:
    print(f"error: {step}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
