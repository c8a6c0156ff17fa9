"""Fingerprints of code: what a step runs, with comments, docstrings and formatting left out.

The closure of a step is found by reading sources, never by running them: the modules that the
entries import, at the top or inside functions, and what those import in turn. Each top-level
definition is normalised, printed by ``ast.unparse`` and hashed.

``ast.unparse`` alone differs between Python versions in two places, which are normalised here:
nested quotes of f-strings (they may reuse the outer quote from 3.12 on) and characters that only
the newer Unicode tables call printable.

What reading cannot see (modules imported by a computed name) ``unlisted_modules`` finds after a
step has run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from prunelib.errors import InputError

LIBRARY = "prunelib"
ROOT = Path(__file__).resolve().parents[2]
_NEUTRAL = ("prunelib.provenance", "prunelib.cluster")
_FUNCTIONS_AND_CLASSES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Fingerprint:
    """What a step's code is, as far as its results depend on it.

    Attributes:
        digest: sha256 (hex) over all definitions of all modules, in source order.
        definitions: ``module:definition`` to a short hash; ``module:<module>`` stands for the
            statements that are neither functions nor classes. For people who ask what changed.
        modules: dotted names of modules, and paths of scripts relative to the root.
    """

    digest: str
    definitions: dict[str, str]
    modules: frozenset[str]


@dataclass(frozen=True)
class _Import:
    """One import statement: ``names`` is empty for ``import module``."""

    module: str
    level: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """One parsed file: (name, sha256) per top-level statement, and the imports."""

    definitions: tuple[tuple[str, str], ...]
    imports: tuple[_Import, ...]


class _Normaliser(ast.NodeTransformer):
    """Remove what does not run, and what ``ast.unparse`` prints differently across versions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Drop bare strings: docstrings and the comments that are written as strings."""
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Keep only the ``else`` part of ``if TYPE_CHECKING:``."""
        name = getattr(node.test, "id", getattr(node.test, "attr", None))
        self.generic_visit(node)
        return node.orelse if name == "TYPE_CHECKING" else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Write an f-string as a call of its parts, which has no nested quotes."""
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for value in node.values:
            last = parts[-1] if parts else None
            if not isinstance(value, ast.Constant):
                parts.append(value)
            elif isinstance(last, ast.Constant):
                parts[-1] = ast.Constant(f"{last.value!s}{value.value!s}")
            elif value.value:
                parts.append(value)
        return ast.Call(ast.Name("f-string"), parts, [])

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        """Write one replacement field as (value, conversion, format)."""
        self.generic_visit(node)
        layout = node.format_spec or ast.Constant(None)
        return ast.Tuple([node.value, ast.Constant(node.conversion), layout])

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit the children; a body that lost all its statements keeps a ``pass``."""
        super().generic_visit(node)
        holders = ast.stmt | ast.ExceptHandler | ast.match_case
        if isinstance(node, holders) and getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[union-attr]
        return node


_parsed: dict[str, _Source] = {}
"""Parsed files by the sha256 of their content, so that an edit is always seen."""


def _parse(source: bytes, origin: str) -> _Source:
    name = hashlib.sha256(source).hexdigest()
    if name not in _parsed:
        _parsed[name] = _parse_anew(source, origin)
    return _parsed[name]


@cache
def _parsed_by() -> str:
    """Return what decides the outcome of parsing, besides the file: this module and Python."""
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return f"{own} {sys.version_info.major}.{sys.version_info.minor}"


def load_parsed(path: Path) -> None:
    """Take over what ``save_parsed`` kept; a file of another version, or damaged, is passed by.

    Parsing all sources is most of the time that building a small DAG takes.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_bytes())
        if content["by"] == _parsed_by() and content["sha256"] == _digest(content["files"]):
            for name, (definitions, imports) in content["files"].items():
                _parsed[name] = _Source(
                    tuple((str(text), str(digest)) for text, digest in definitions),
                    tuple(_Import(module, level, tuple(names)) for module, level, names in imports),
                )


def _digest(files: Mapping[str, Any]) -> str:
    """Hash of what is kept: one flipped bit in it would plan keys that no step agrees with."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def save_parsed(path: Path) -> None:
    """Keep the parsed files for other processes, if there are any that ``path`` does not hold."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_bytes())
        whole = content["sha256"] == _digest(content["files"])
        if whole and content["by"] == _parsed_by() and content["files"].keys() >= _parsed.keys():
            return
    files = {
        name: (source.definitions, [(i.module, i.level, i.names) for i in source.imports])
        for name, source in _parsed.items()
    }
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    # It only saves time: a directory that cannot be written is no reason to stop.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"by": _parsed_by(), "sha256": _digest(files), "files": files}
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(path)


def _parse_anew(source: bytes, origin: str) -> _Source:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{origin}:{line}" if line else origin
        raise InputError(f"{where}: cannot be parsed as Python: {error}") from error
    tree = _Normaliser().visit(tree)
    definitions = []
    for statement in tree.body:
        is_definition = isinstance(statement, _FUNCTIONS_AND_CLASSES)
        name = statement.name if is_definition else "<module>"
        text = ast.unparse(statement).encode("ascii", "backslashreplace")
        definitions.append((name, hashlib.sha256(text).hexdigest()))
    return _Source(tuple(definitions), tuple(_imports(tree)))


def _imports(tree: ast.AST) -> Iterator[_Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _Import(alias.name, 0, ())
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield _Import(node.module or "", node.level, names)


def _is_script(name: str) -> bool:
    return name.endswith(".py")


def _is_neutral(name: str) -> bool:
    """Whether a module cannot change a number: the package's root, errors, provenance, cluster.

    Every script imports them, so hashing them would make each of their edits rerun everything.
    """
    return name in (LIBRARY, f"{LIBRARY}.errors") or ".".join(name.split(".")[:2]) in _NEUTRAL


def _package(name: str, root: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the file of a top-level package or module, and where its submodules are.

    ``find_spec`` of a top-level name executes nothing.
    """
    if name == LIBRARY:
        return root / LIBRARY / "__init__.py", (root / LIBRARY,)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise InputError(f"module {name!r} of a code entry is not installed")
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    return file, tuple(Path(place) for place in spec.submodule_search_locations or ())


@dataclass
class Snapshot:
    """Files and places looked at so far, for calls that shall see one state of the code."""

    sources: dict[Path, _Source] = field(default_factory=dict)
    places: dict[tuple[Path, str], Path | None] = field(default_factory=dict)


class _Closure:
    """Collects the files that the entries reach: name -> path."""

    def __init__(self, root: Path, tops: Iterable[str], seen: Snapshot) -> None:
        self.root = root
        self.seen = seen
        self.packages = {top: _package(top, root) for top in tops}
        self.files: dict[str, Path] = {}
        self.pending: list[str] = []

    def locate(self, module: str) -> Path | None:
        """Return the source file of a dotted name, None if it is not a module of ours."""
        if module.split(".")[0] not in self.packages:
            return None
        place = (self.root, module)
        if place not in self.seen.places:
            self.seen.places[place] = self._look_for(module)
        return self.seen.places[place]

    def _look_for(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        file, places = self.packages[top]
        if not rest:
            return file
        for place in places:
            base = place.joinpath(*rest)
            for candidate in (base / "__init__.py", base.with_name(f"{base.name}.py")):
                if candidate.is_file():
                    return candidate
        return None

    def add(self, module: str) -> bool:
        """Add a module and its parent packages; False if there is no such source."""
        path = self.locate(module)
        parts = module.split(".")
        for count in range(1, len(parts)):
            parent = ".".join(parts[:count])
            self.add_file(parent, self.locate(parent))
        self.add_file(module, path)
        return path is not None

    def add_file(self, name: str, path: Path | None) -> None:
        if path is not None and name not in self.files:
            self.files[name] = path
            self.pending.append(name)

    def add_script(self, path: Path) -> None:
        self.add_file(path.relative_to(self.root).as_posix(), path)

    def follow(self, name: str, statement: _Import) -> None:
        """Add what one import statement of the file ``name`` reaches."""
        path = self.files[name]
        module = statement.module
        if statement.level:
            # A package is its own level 1, a module's level 1 is the package it is in.
            drop = statement.level - (path.name == "__init__.py")
            base = name.split(".")[: len(name.split(".")) - drop]
            module = ".".join([*base, module] if module else base)
        elif _is_script(name):
            # The directory of a script is first on the import path.
            beside = path.with_name(f"{module.split('.')[0]}.py")
            if beside.is_file():
                self.add_script(beside)
        self.add(module)
        for imported in statement.names:
            self.add(f"{module}.{imported}")


def fingerprint(
    entry: Iterable[str], root: Path = ROOT, seen: Snapshot | None = None
) -> Fingerprint:
    """Return the fingerprint of the code that the entries run.

    Reads every file of the closure anew (parsing is cached by content), so that two calls differ
    exactly when the code does; calls that share a snapshot read each file once. Relative order of
    top-level statements counts, because it can change what a module means. ``if TYPE_CHECKING:``
    blocks never run and do not count.

    Args:
        entry: dotted module names (``prunelib.methods.wanda_sp``, or a module of an installed
            outside package, which is not executed) or paths of scripts relative to ``root``
            (``workflow_scripts/prune.py``). Imports are followed into prunelib, into the top-level
            packages of the entries, and from scripts into the files beside them.
        root: the directory that contains prunelib.
        seen: what earlier calls have read, and this one adds to.

    Raises:
        InputError: an entry does not exist, or a file is not valid Python.
    """
    seen = seen or Snapshot()
    entries = sorted(set(entry))
    modules = [name for name in entries if not _is_script(name)]
    closure = _Closure(root, {LIBRARY, *(name.split(".")[0] for name in modules)}, seen)
    for name in entries:
        if _is_script(name):
            path = root / name
            if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
                raise InputError(f"code entry {name!r}: there is no such script under {root}")
            closure.add_script(path)
        elif not closure.add(name):
            raise InputError(f"code entry {name!r}: no Python source of that module was found")
    sources: dict[str, _Source] = {}
    while closure.pending:
        name = closure.pending.pop()
        path = closure.files[name]
        if path not in seen.sources:
            seen.sources[path] = _parse(path.read_bytes(), str(path))
        sources[name] = seen.sources[path]
        for statement in sources[name].imports:
            closure.follow(name, statement)
    return _combine({name: sources[name] for name in sorted(sources) if not _is_neutral(name)})


def _combine(sources: Mapping[str, _Source]) -> Fingerprint:
    definitions: dict[str, str] = {}
    for name, source in sources.items():
        parts: dict[str, str] = {}
        for definition, digest in source.definitions:
            parts[definition] = parts.get(definition, "") + digest
        for definition, text in parts.items():
            definitions[f"{name}:{definition}"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    whole = json.dumps([[name, source.definitions] for name, source in sources.items()])
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return Fingerprint(digest, definitions, frozenset(sources))


def unlisted_modules(code: Fingerprint, loaded: Mapping[str, ModuleType]) -> list[str]:
    """Return the loaded modules that belong to the fingerprinted packages but are not in it.

    Args:
        code: the fingerprint to hold against.
        loaded: ``sys.modules``. Entries without a Python source file (compiled extensions,
            namespace packages) are the business of the package versions.
    """
    tops = {LIBRARY, *(name.split(".")[0] for name in code.modules if not _is_script(name))}
    missing = []
    for name, module in list(loaded.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] not in tops or not str(file).endswith(".py"):
            continue
        if name not in code.modules and not _is_neutral(name):
            missing.append(name)
    return sorted(missing)
