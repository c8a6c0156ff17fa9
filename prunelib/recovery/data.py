"""What recovery trains on: windows of plain text, or instructions with masked prompts.

The training loop sees one interface: what a step reads, and the micro-batches of it. Windows come
from a text that is held whole (`PackedWindows`) or from a stream (`StreamedWindows`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from prunelib.data import instructions, stream
from prunelib.data.calibration import packed_windows, tokenise
from prunelib.data.text import read_articles
from prunelib.errors import InputError
from prunelib.recovery.recipe import LoraRecipe, batch_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# The label of a token that is no target, as everywhere in the field.
IGNORED = -100
# Documents of a stream that the tokenizer gets at once: enough to keep its threads busy.
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one forward pass.

    Attributes:
        ids: token ids, int64 ``[sequences, length]``, shorter ones padded on the right.
        labels: the ids where they are targets, else ``IGNORED``; same shape. None where every
            token but the first is one.
        mask: int64, 1 for tokens and 0 for padding; same shape. None where nothing is padded.
    """

    ids: torch.Tensor
    labels: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted."""
        if self.labels is None:
            return self.ids.shape[0] * (self.ids.shape[1] - 1)
        return int((self.labels[:, 1:] != IGNORED).sum())

    def predictions(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states that predict a target, and the targets.

        Args:
            hidden: last hidden states, ``[sequences, length, hidden_size]``.

        Returns:
            ``[targets, hidden_size]`` and int64 ``[targets]``, both on the device of ``hidden``.
        """
        if self.labels is None:
            return hidden[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten().to(hidden.device)
        labels = self.labels[:, 1:].to(hidden.device)
        wanted = labels != IGNORED
        return hidden[:, :-1][wanted], labels[wanted]


class TrainingData(ABC):
    """What the steps of a run read.

    Attributes:
        kind: what an item is called.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Number of items; None for a stream."""

    @abstractmethod
    def check(self, length: int, vocabulary: int) -> None:
        """Refuse (InputError) items that do not fit windows of ``length`` or the vocabulary."""

    @abstractmethod
    def pick(self, step: int, recipe: LoraRecipe, seed: int) -> torch.Tensor:
        """Return what 0-based ``step`` reads, for `batches`: int64, items along the first axis."""

    @abstractmethod
    def batches(self, picked: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield what was picked in batches of ``micro_batch``."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Digest of all that decides what is read."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what the adapter's record says about its data."""


class Items(TrainingData):
    """Items that are drawn by index."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self)

    def pick(self, step: int, recipe: LoraRecipe, seed: int) -> torch.Tensor:
        """Return indices: every epoch is a permutation of its own."""
        return batch_indices(step, len(self), recipe, seed)

    def record(self) -> dict[str, Any]:
        """Return the digest of the items."""
        return {f"{self.kind}_sha256": self.sha256}


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_vocabulary(ids: torch.Tensor, vocabulary: int, kind: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"recovery: {kind} hold token ids {low}..{high}; allowed: 0..{vocabulary - 1}"
        )


@dataclass(frozen=True, eq=False)
class PackedWindows(Items):
    """Windows of plain text, int64 ``[n, length]``: nothing is padded, nothing is masked."""

    kind = "windows"
    ids: torch.Tensor

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.ids)

    def check(self, length: int, vocabulary: int) -> None:
        """Refuse windows of another shape or with unknown tokens."""
        shape = tuple(self.ids.shape)
        if self.ids.dtype != torch.int64 or len(shape) != 2 or shape[1] != length or not shape[0]:
            raise InputError(
                f"recovery: windows are {self.ids.dtype} {list(shape)}; "
                f"allowed: int64 [n >= 1, {length}]"
            )
        _check_vocabulary(self.ids, vocabulary, self.kind)

    def batches(self, picked: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield whole windows."""
        for part in self.ids[picked].split(micro_batch):
            yield Batch(part)

    @cached_property
    def sha256(self) -> str:
        """Digest of the windows in order."""
        return _digest(self.ids)


class StreamedWindows(TrainingData):
    """Windows cut from a stream of documents in the stream's own order, whatever the seed.

    Documents stand one behind the other, each closed with EOS, and are cut wherever a window is
    full: nothing is padded, masked or dropped, and a window may hold parts of several documents,
    which see each other. At its end the stream is read again from the beginning.

    Args:
        documents: the stream, at its beginning.
        tokenizer: of the model that is trained; must have an EOS token.
        length: tokens per window.
        min_characters: shorter documents are left out.
        description: of the stream, for the record.

    Raises:
        InputError: the tokenizer has no EOS token.
    """

    kind = "stream"
    count = None

    def __init__(
        self,
        documents: stream.Documents,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        min_characters: int = 0,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("streamed text: the tokenizer has no EOS token to end documents with")
        self._documents, self._tokenizer = documents, tokenizer
        self._length, self._min_characters = length, min_characters
        self._description = dict(description or {})
        self._vocabulary = 0
        self._waiting = torch.empty(0, dtype=torch.int64)
        self._read, self._passes, self._fruitless, self._digest = 0, 0, True, ""

    def check(self, length: int, vocabulary: int) -> None:
        """Refuse another length; tokens are held against the vocabulary when they are read."""
        if length != self._length:
            raise InputError(f"recovery: windows have {self._length} tokens; allowed: {length}")
        self._vocabulary = vocabulary

    def pick(self, step: int, recipe: LoraRecipe, seed: int) -> torch.Tensor:
        """Return the next windows, ``[batch, length]``; steps must be asked for in order."""
        wanted = recipe.batch * self._length
        waiting, held = [self._waiting], len(self._waiting)
        while held < wanted:
            waiting.append(self._tokens())
            held += len(waiting[-1])
        tokens = torch.cat(waiting)
        windows, self._waiting = tokens[:wanted].view(recipe.batch, -1), tokens[wanted:].clone()
        _check_vocabulary(windows, self._vocabulary, "windows")
        # A chain, since it must go on in another process.
        self._digest = hashlib.sha256(f"{self._digest}{_digest(windows)}".encode()).hexdigest()
        return windows

    def _tokens(self) -> torch.Tensor:
        """Return the tokens of the next documents, int64 ``[tokens]``."""
        pieces = list(itertools.islice(iter(self._documents.read, None), _CHUNK))
        least = max(1, self._min_characters)
        # Of a long document there is more than one piece.
        kept = [p for p in pieces if not (p.first and p.last and len(p.text) < least)]
        self._read += sum(piece.last for piece in kept)
        if len(pieces) < _CHUNK:
            self._passes += 1
            logger.warning("the stream ended after %d documents; it is read again", self._read)
            self._documents.seek(None)
        self._fruitless = self._fruitless and not kept
        if self._fruitless and self._passes:
            raise InputError(
                f"streamed text: no document has min_characters = {self._min_characters}"
            )
        if not kept:
            return torch.empty(0, dtype=torch.int64)
        texts = [piece.text for piece in kept]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        ids = [
            np.asarray([*tokens, end] if piece.last else tokens, dtype=np.int64)
            for piece, tokens in zip(kept, encoded, strict=True)
        ]
        return torch.from_numpy(np.concatenate(ids))

    def batches(self, picked: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield the picked windows."""
        for part in picked.split(micro_batch):
            yield Batch(part)

    @cached_property
    def sha256(self) -> str:
        """Digest of what the stream is and of how it becomes tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else json.dumps(self._tokenizer.get_vocab())
        settings = [self._description, self._length, self._min_characters, words]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def place(self) -> dict[str, Any]:
        """Where the next document is read and what was read so far, as JSON."""
        return {
            "documents": self._documents.place,
            "read": self._read,
            "passes": self._passes,
            "fruitless": self._fruitless,
            "digest": self._digest,
        }

    @property
    def waiting(self) -> torch.Tensor:
        """Tokens read that are in no window yet, int64 ``[tokens]``."""
        return self._waiting

    def seek(self, place: Mapping[str, Any], waiting: torch.Tensor) -> None:
        """Go on from a ``place`` and its ``waiting`` tokens."""
        self._documents.seek(place["documents"])
        self._read, self._passes = place["read"], place["passes"]
        self._fruitless, self._digest = place["fruitless"], place["digest"]
        self._waiting = waiting

    def record(self) -> dict[str, Any]:
        """Return what was read: from where, how many documents, and the digest of the windows."""
        files = [Path(file["path"]).name for file in self._description.get("files", ())]
        return {
            "stream": self._description | {"files": files},
            "stream_documents": self._read,
            "stream_passes": self._passes,
            "windows_sha256_chain": self._digest,
        }


@dataclass(frozen=True, eq=False)
class Examples(Items):
    """Instructions of different lengths, whose prompts are no targets.

    Attributes:
        tokens: ids of all examples, one behind the other, int64 ``[tokens]``.
        starts: example ``i`` is ``tokens[starts[i]:starts[i + 1]]``, int64 ``[n + 1]``.
        prompts: leading tokens of each example that are no targets, int64 ``[n]``.
        dropped: examples left out because they had no target within the window.
        padding: id that shorter sequences are filled up with; it is masked everywhere.
    """

    kind = "examples"
    tokens: torch.Tensor
    starts: torch.Tensor
    prompts: torch.Tensor
    dropped: int = 0
    padding: int = 0

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.prompts)

    def check(self, length: int, vocabulary: int) -> None:
        """Refuse examples that are longer than ``length``, without targets or unknown tokens."""
        lengths = self.starts.diff()
        # The first token has nothing before it that could predict it.
        if not len(self) or int((lengths - self.prompts.clamp(min=1)).min()) < 1:
            raise InputError("recovery: every example needs a target after its prompt")
        if int(lengths.max()) > length:
            raise InputError(
                f"recovery: an example has {int(lengths.max())} tokens; allowed: {length}"
            )
        _check_vocabulary(self.tokens, vocabulary, self.kind)

    def batches(self, picked: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield examples, each batch padded to its longest."""
        for part in picked.split(micro_batch):
            rows = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in part]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
            labels = torch.full_like(ids, IGNORED)
            mask = torch.zeros_like(ids)
            for row, (example, masked) in enumerate(zip(rows, self.prompts[part], strict=True)):
                ids[row, : len(example)] = example
                labels[row, masked : len(example)] = example[masked:]
                mask[row, : len(example)] = 1
            yield Batch(ids, labels, None if bool(mask.all()) else mask)

    @cached_property
    def sha256(self) -> str:
        """Digest of tokens, borders and masked lengths."""
        return _digest(self.tokens, self.starts, self.prompts)

    def record(self) -> dict[str, Any]:
        """Return the digest and how many examples were used and left out."""
        return {**super().record(), "examples": len(self), "dropped_examples": self.dropped}


def load_data(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, *, validate: bool
) -> tuple[TrainingData, Items | None]:
    """Return what a text's artefact holds for training, and for validation.

    Args:
        text: the artefact: articles, instructions, or the description of a stream.
        tokenizer: of the model that is trained.
        length: tokens of a window; instructions are cut off there.
        validate: whether the validation part is wanted; the second value is None without.

    Raises:
        InputError: the text has no such part, or is too short for windows of this length.
        IntegrityError: the artefact cannot be read.
    """
    if not (text / instructions.FILE).is_file():
        if validate:
            raise InputError(
                f"{text}: articles have no validation part; allowed with eval_every: instructions"
            )
        if (text / stream.FILE).is_file():
            description = stream.read_description(text)
            documents = stream.open_documents(description)
            least = description["min_characters"]
            return StreamedWindows(documents, tokenizer, length, least, description), None
        tokens = tokenise(read_articles(text, "recovery"), tokenizer)
        return PackedWindows(torch.from_numpy(packed_windows(tokens, length))), None

    def part(name: str) -> Examples:
        encoded = instructions.encode(instructions.load_records(text, name), tokenizer, length)
        examples = Examples(
            torch.from_numpy(encoded.tokens),
            torch.from_numpy(encoded.starts),
            torch.from_numpy(encoded.prompts),
            dropped=encoded.dropped,
        )
        logger.info(
            "%s: %d examples, %d tokens; %d left out, whose prompts fill %d tokens",
            *(name, len(examples), len(examples.tokens), examples.dropped, length),
        )
        return examples

    return part("recovery"), part("validation") if validate else None
