"""Loading a checkpoint's tokenizer, apart from its model: steps on text need nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunelib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; code beside it is never executed.

    Raises:
        InputError: the directory does not exist or holds no tokenizer that loads.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise InputError(f"model directory {directory} does not exist")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # every tokenizer class fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
    return tokenizer
