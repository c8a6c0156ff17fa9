"""Reading and validating experiment and catalogue files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from prunelib.errors import InputError

SCHEMAS = Path(__file__).resolve().parents[2] / "config" / "schemas"
CATALOGUES = ("models", "texts", "methods", "calibration", "recovery", "evaluation")


# libyaml's is ten times as fast; not every build of PyYAML has it.
_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_SafeLoader):  # type: ignore[misc, valid-type]
    """YAML without tags that build objects, and without silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain data.

    Raises:
        InputError: the file is missing, is not YAML, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - derives from SafeLoader
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error


def _place(error: jsonschema.ValidationError) -> str:
    place = ""
    for part in error.absolute_path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    return place.lstrip(".") or "top level"


def _whole_pattern(
    validator: Any, pattern: str, instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """Hold a text against a pattern in which ``$`` is the end, not also the place before a newline.

    So JSON Schema has it; Python's ``$`` would let a name end in a newline.
    """
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"pattern": _whole_pattern}
)


def validate(data: Any, schema: str, path: Path) -> None:
    """Hold data against ``config/schemas/<schema>.schema.json``.

    Raises:
        InputError: file, key, what was given and what is allowed, on one line.
    """
    rules = json.loads((SCHEMAS / f"{schema}.schema.json").read_text(encoding="utf-8"))
    validator = _Validator(rules)
    error = jsonschema.exceptions.best_match(validator.iter_errors(data))
    if error is not None:
        message = " ".join(error.message.split())
        if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
            allowed = ", ".join(sorted(error.schema.get("properties", {})))
            message = f"{message}; allowed keys: {allowed}"
        elif error.validator in ("exclusiveMaximum", "maximum", "minimum", "pattern"):
            message = f"{message} (allowed: {error.validator} {error.validator_value})"
        raise InputError(f"{path}: {_place(error)}: {message}")


def load_catalogue(directory: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return a validated catalogue: entries by name.

    Args:
        directory: the configuration directory, with ``<name>.yaml``.
        name: one of ``CATALOGUES``.
    """
    path = directory / f"{name}.yaml"
    data = read_yaml(path)
    validate(data, name, path)
    entries: dict[str, dict[str, Any]] = data
    return entries


def lookup(entries: Mapping[str, Any], name: str, what: str, where: str) -> Any:
    """Return ``entries[name]``, or refuse with the known names.

    Raises:
        InputError: the catalogue has no such entry.
    """
    if name not in entries:
        raise InputError(
            f"{where}: {what} {name!r} is not in the catalogue; known: {', '.join(sorted(entries))}"
        )
    return entries[name]
