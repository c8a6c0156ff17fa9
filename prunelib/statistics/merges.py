"""Where LaCo's merges begin and what they can reach; no torch, so that plans can check it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from prunelib.errors import InputError


def first_place(layers: int, layers_per_merge: int, lowest: int, highest: int | None) -> int:
    """Return the layer that the first merge is tried into; arguments as of ``most_merged``.

    Raises:
        InputError: the model has no such layers.
    """
    highest = layers - 1 if highest is None else highest
    if not (0 <= lowest <= highest - layers_per_merge and highest < layers):
        raise InputError(
            f"lowest {lowest}, highest {highest}, layers_per_merge {layers_per_merge}: the model "
            f"has layers 0..{layers - 1}, and the first merge begins layers_per_merge below highest"
        )
    return highest - layers_per_merge


def most_merged(
    layers: int, *, layers_per_merge: int, interval: int, lowest: int, highest: int | None
) -> int:
    """Return how many layers merges can take up at most, whatever the weights and the threshold.

    Every merge is kept or not (arXiv 2402.11187, algorithm 1, as ``statistics.laco`` runs it); this
    is the most over all ways. A merge near the end takes up no more layers than there are.

    Args:
        layers: of the model.
        layers_per_merge: how many layers become one.
        interval: after a kept merge, how much lower the next one begins.
        lowest: the lowest layer that others are merged into.
        highest: the first merge begins ``layers_per_merge`` below it; None: the last layer.

    Raises:
        InputError: the model has no such layers.
    """
    first = first_place(layers, layers_per_merge, lowest, highest)

    @cache
    def most(place: int, behind: int) -> int:
        if place < lowest:
            return 0
        gone = min(layers_per_merge - 1, behind)
        return max(
            gone + most(place - interval, behind - gone + interval), most(place - 1, behind + 1)
        )

    return most(first, layers - 1 - first)


def check_merges(options: Mapping[str, Any], layers: int, blocks: int) -> None:
    """Refuse merges that a model's layers do not allow.

    Args:
        options: those of the pass ``laco``.
        layers: of the model.
        blocks: how many are to be merged into others.

    Raises:
        InputError: the model has no such layers, or too few of them can be merged.
    """
    names = ("layers_per_merge", "interval", "lowest", "highest")
    told = {name: options[name] for name in names}
    most = most_merged(layers, **told)
    if blocks > most:
        given = ", ".join(f"{name} {value}" for name, value in told.items())
        raise InputError(
            f"{blocks} of {layers} blocks are to be merged; with {given} at most {most} can be"
        )
