"""Batches of calibration windows and the logging of progress through them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
REPORT_SECONDS = 10.0


def batches(windows: torch.Tensor, batch_windows: int) -> Iterator[torch.Tensor]:
    """Yield slices of at most ``batch_windows`` windows out of ``[windows, length]``."""
    yield from windows.split(batch_windows)


def progress(
    items: Iterable[Item], total: int, unit: str, logger: logging.Logger
) -> Iterator[Item]:
    """Yield items and log how many are done, the rate and the time left, every ten seconds."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= REPORT_SECONDS:
            rate = done / (now - start)
            logger.info(
                "%d of %d %s, %.2f/s, %.0f s left", done, total, unit, rate, (total - done) / rate
            )
            last = now
        yield item
