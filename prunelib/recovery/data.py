"""What recovery trains on: packed windows of plain text, or instructions with masked prompts.

The training loop sees one interface: a number of items, and the micro-batches of some of them.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prunelib.data import instructions
from prunelib.data.calibration import packed_windows, tokenise
from prunelib.data.text import read_articles
from prunelib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The label of a token that is no target, as everywhere in the field.
IGNORED = -100


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
    """Items that are drawn by index.

    Attributes:
        kind: what an item is called.
    """

    kind: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abstractmethod
    def check(self, length: int, vocabulary: int) -> None:
        """Refuse (InputError) items that do not fit windows of ``length`` or the vocabulary."""

    @abstractmethod
    def batches(self, indices: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield the items ``indices`` (int64 ``[n]``) in batches of ``micro_batch``."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Digest of all items."""

    def record(self) -> dict[str, Any]:
        """Return what the adapter's record says about its data."""
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
class PackedWindows(TrainingData):
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

    def batches(self, indices: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield whole windows."""
        for part in self.ids[indices].split(micro_batch):
            yield Batch(part)

    @cached_property
    def sha256(self) -> str:
        """Digest of the windows in order."""
        return _digest(self.ids)


@dataclass(frozen=True, eq=False)
class Examples(TrainingData):
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

    def batches(self, indices: torch.Tensor, micro_batch: int) -> Iterator[Batch]:
        """Yield examples, each batch padded to its longest."""
        for part in indices.split(micro_batch):
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
) -> tuple[TrainingData, TrainingData | None]:
    """Return what a text's artefact holds for training, and for validation.

    Args:
        text: the artefact: articles, or instructions.
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
