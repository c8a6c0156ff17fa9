"""Texts that are read as a stream, document by document, and never held or written as a whole.

The artefact of a streamed text is a description of where it is (`FILE`); its reader opens the
source itself. A place in a stream is JSON, and reading goes on from it exactly.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prunelib.data.sources import Source, sha256_file
from prunelib.data.text import load_rows
from prunelib.errors import InputError, IntegrityError

FILE = "stream.json"
FORMATS = ("dataset", "jsonl", "plain")
# Plain text has no records: it is read in whole lines of about so many bytes.
_PLAIN_BYTES = 1 << 16


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: its text.
        first: whether the document begins with it.
        last: whether the document ends with it.
    """

    text: str
    first: bool = True
    last: bool = True


class Documents(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def read(self) -> Piece | None:
        """Return the next piece; None at the end."""

    @property
    @abstractmethod
    def place(self) -> Any:
        """Where the next piece is read, as JSON; None is the beginning."""

    @abstractmethod
    def seek(self, place: Any) -> None:
        """Go on reading from ``place``."""


class FileDocuments(Documents):
    """Files one after the other: JSON lines (a line a document) or plain text (a file a document).

    Args:
        files: the files in order.
        text_field: key of the text in a JSON line; None for plain text.
    """

    def __init__(self, files: Sequence[Path], text_field: str | None) -> None:
        self._files, self._field = list(files), text_field
        self._index, self._offset, self._size = 0, 0, 0
        self._open: BinaryIO | None = None

    def read(self) -> Piece | None:
        """Return the next document, or lines of one."""
        while self._index < len(self._files):
            path = self._files[self._index]
            try:
                if self._open is None:
                    self._open = path.open("rb")
                    self._open.seek(self._offset)
                    self._size = path.stat().st_size
                if self._field is None:
                    data = b"".join(self._open.readlines(_PLAIN_BYTES))
                else:
                    data = self._open.readline()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            start = self._offset
            self._offset += len(data)
            if not data:
                self._close()
                self._index, self._offset = self._index + 1, 0
            elif self._field is None:
                text, last = _decoded(data, f"{path}, byte {start}"), self._offset >= self._size
                return Piece(text, start == 0, last)
            elif data.strip():
                return Piece(_text_of(data, self._field, f"{path}, byte {start}"))
        return None

    @property
    def place(self) -> Any:
        """File number and byte."""
        return [self._index, self._offset]

    def seek(self, place: Any) -> None:
        """Open the file at the byte when the next piece is read."""
        self._close()
        self._index, self._offset = place or (0, 0)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from error


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a JSON object") from error
    return _field_of(row, field, where)


def _field_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: {field!r} is missing or no string")
    return text


class RowDocuments(Documents):
    """Rows of a dataset, of the Hugging Face hub or of a local directory in its layout.

    Args:
        name: of the repository, or the directory.
        revision: the repository's commit.
        config: of the dataset.
        split: the hub's own split.
        text_field: column of the text.
    """

    def __init__(
        self, name: str, revision: str | None, config: str | None, split: str, text_field: str
    ) -> None:
        self._name, self._revision, self._config = name, revision, config
        self._split, self._field = split, text_field
        self.seek(None)

    def read(self) -> Piece | None:
        """Return the next row."""
        try:
            row = next(self._iterator, None)
        except Exception as error:  # network, decompression and parsing errors of many libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"dataset {self._name}: its stream broke off: {reason}") from error
        if row is None:
            return None
        return Piece(_field_of(row, self._field, f"dataset {self._name}"))

    @property
    def place(self) -> Any:
        """Return what the library needs to find the next row."""
        return self._rows.state_dict()

    def seek(self, place: Any) -> None:
        """Open the dataset anew, at ``place``."""
        self._rows = load_rows(
            self._name,
            revision=self._revision,
            config=self._config,
            split=self._split,
            streaming=True,
        )
        if place is not None:
            self._rows.load_state_dict(place)
        self._iterator: Iterator[Any] = iter(self._rows)


def describe(source: Source, path: Path | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a streamed text, which `open_documents` reads.

    Args:
        source: the text's source.
        path: where it is, unless on the hub; its files are hashed, one after the other.
        params: the text's catalogue entry.

    Raises:
        InputError: the format cannot be streamed, or there is no file of it.
    """
    form = params["format"]
    if form not in FORMATS:
        raise InputError(
            f"{source}: a text of the format {form!r} cannot be streamed; "
            f"allowed: {', '.join(FORMATS)}"
        )
    files: list[Path] = []
    if path is not None:
        pattern = {"jsonl": "*.jsonl", "plain": "*.txt"}.get(form, "**/*")
        files = [path] if path.is_file() else sorted(p for p in path.glob(pattern) if p.is_file())
        if not files:
            raise InputError(f"{path} holds no {pattern} file")
    return {
        "format": form,
        "name": source.name if path is None else str(path),
        "revision": source.revision if path is None else None,
        "config": params.get("config"),
        "subset": params.get("subset", "train"),
        "text_field": params.get("text_field", "text"),
        "min_characters": int(params.get("min_characters", 0)),
        "files": [
            {"path": str(file), "bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in files
        ],
    }


def read_description(directory: Path) -> dict[str, Any]:
    """Return the description in a streamed text's artefact.

    Raises:
        IntegrityError: it cannot be read, or a file has another size than it had when described.
    """
    path = directory / FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = [(Path(file["path"]), file["bytes"]) for file in description["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error!r}") from error
    for file, size in files:
        found = None
        with contextlib.suppress(OSError):
            found = file.stat().st_size
        if found != size:
            raise IntegrityError(
                f"{file} has {found} bytes; it had {size} when the text was fetched"
            )
    return description


def open_documents(description: Mapping[str, Any]) -> Documents:
    """Return the documents of a described text, at their beginning.

    Raises:
        InputError: the dataset cannot be loaded.
    """
    field = description["text_field"]
    if description["format"] == "dataset":
        name, revision, config, subset = (
            description[key] for key in ("name", "revision", "config", "subset")
        )
        return RowDocuments(name, revision, config, subset, field)
    files = [Path(file["path"]) for file in description["files"]]
    return FileDocuments(files, field if description["format"] == "jsonl" else None)
