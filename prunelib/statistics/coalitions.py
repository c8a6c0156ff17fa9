"""Forward passes: how good the model is with some of its blocks, attentions or MLPs alone.

"A deeper look at depth pruning of LLMs" (arXiv 2407.16286) values a block by what models with and
without it achieve. Per coalition of units that stay, of ``m`` in all:

* ``present`` [m, layers], uint8: whether a layer's unit is in it;
* ``losses`` [m], fp64: the mean next-token loss, nats;
* ``distances`` [m], fp64: the mean over predicting positions of ``||z - z_0||_2``, z and z_0 being
  the logits of that model and of the whole one;
* ``loss`` []: that of the whole model.

Schemes: ``leave_one_out``, every coalition that lacks one unit (what the authors' code does unless
told otherwise); ``subsets``, ``draws`` random sets of a share ``kept`` of the units, each unit
missing from and present in at least one; ``chains``, ``draws`` random orders in which all units
leave one by one, whose mean marginals estimate Shapley values without bias. All windows see the
same coalitions; the authors' code draws anew for every batch.

Coalitions begin with the whole model's hidden states at their first missing unit. Logits exist for
one chunk of positions at a time, those of the whole model again for every coalition.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from prunelib.errors import InputError, NonFiniteError
from prunelib.statistics.batches import progress
from prunelib.statistics.gradients import LOGITS_BYTES
from prunelib.statistics.layerwise import Layers, Stream
from prunelib.statistics.without import advance, check_unit, targets_of

if TYPE_CHECKING:
    from prunelib.statistics.inputs import PassInputs

logger = logging.getLogger(__name__)

SCHEMES = ("leave_one_out", "subsets", "chains")


def collect(
    inputs: PassInputs,
    *,
    part: str,
    scheme: str,
    draws: int,
    kept: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the statistics above, on the CPU.

    Args:
        inputs: model and windows.
        part: ``block``, ``attention`` or ``mlp``.
        scheme: one of ``SCHEMES``.
        draws: random sets or orders.
        kept: share of the units in a random set.
        seed: of the draws.

    Raises:
        InputError: the part or the scheme is unknown, or the part cannot be removed alone.
        NonFiniteError: a loss or a distance is NaN or infinite; says which.
    """
    check_unit(inputs.family, inputs.config, part)
    layers = Layers(inputs.model, inputs.family)
    count = len(layers.modules)
    present = draw(count, scheme, draws, kept, seed)
    prefix, place = layers.begin(inputs.windows, inputs.batch_windows), 0
    whole = prefix.branch()
    advance(layers, whole, part, (), 0)
    found = np.zeros((2, len(present)))
    # By the first unit that is missing: what lies in front of it is the whole model's.
    same = np.cumprod(present, axis=1).sum(1)
    for number in progress(np.argsort(same, kind="stable"), len(same), "coalitions", logger):
        gone = np.flatnonzero(~present[number]).tolist()
        advance(layers, prefix, part, (), place, int(same[number]))
        place = int(same[number])
        stream = prefix.branch()
        advance(layers, stream, part, gone, place)
        loss, distance = _compare(layers, stream, whole)
        for name, value in (("loss", loss), ("distance of logits", distance)):
            if not math.isfinite(value):
                raise NonFiniteError(f"coalitions: the {name} without {part} {gone} is {value}")
        found[:, number] = loss, distance
    return {
        "present": torch.from_numpy(present.astype(np.uint8)),
        "losses": torch.from_numpy(found[0]),
        "distances": torch.from_numpy(found[1]),
        "loss": torch.tensor(_compare(layers, whole, whole)[0], dtype=torch.float64),
    }


def draw(count: int, scheme: str, draws: int, kept: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return who is in which coalition [m, count]; arguments as of ``collect``.

    Raises:
        InputError: unknown scheme, no draws, or a share that keeps none or all.
    """
    if scheme not in SCHEMES:
        raise InputError(f"scheme {scheme!r} is unknown; allowed: {', '.join(SCHEMES)}")
    if draws < 1:
        raise InputError(f"draws {draws} given; a whole number from 1 allowed")
    if scheme == "leave_one_out":
        return ~np.eye(count, dtype=bool)
    rng = np.random.default_rng(seed)
    if scheme == "chains":
        # Row k of a chain lacks the k units that leave first.
        ranks = [np.argsort(rng.permutation(count)) for _ in range(draws)]
        return np.concatenate([rank >= np.arange(count + 1)[:, None] for rank in ranks])
    size = math.floor(kept * count)
    if not 0 < size < count:
        raise InputError(f"kept {kept} given; between 1 and {count - 1} of {count} allowed")
    rows = np.zeros((draws, count), dtype=bool)
    for row in rows:
        row[rng.choice(count, size, replace=False)] = True
    if not (rows.any(0) & ~rows.all(0)).all():
        raise InputError(
            f"draws {draws} given: a unit is in all or none of the {draws} sets; more allowed"
        )
    return rows


def _compare(layers: Layers, stream: Stream, whole: Stream) -> tuple[float, float]:
    """Return the mean loss behind the last layer and the mean distance of the logits."""
    norm = layers.family.final_norm(layers.model)
    head = layers.model.get_output_embeddings()
    chunk = max(LOGITS_BYTES // (4 * head.weight.shape[0]), 1)
    loss = distance = 0.0
    with torch.no_grad():
        for ids, *states in zip(stream.parts, stream.states, whole.states, strict=True):
            flat, other = (state[:, :-1].reshape(-1, state.shape[-1]) for state in states)
            labels = ids[:, 1:].reshape(-1)
            for begin in range(0, len(flat), chunk):
                piece = slice(begin, begin + chunk)
                logits = head(norm(flat[piece])).float()
                loss += (
                    torch.nn.functional.cross_entropy(
                        logits, labels[piece].to(logits.device), reduction="none"
                    )
                    .sum(dtype=torch.float64)
                    .item()
                )
                logits -= head(norm(other[piece])).float()
                distance += logits.norm(dim=-1).sum(dtype=torch.float64).item()
    targets = targets_of(stream)
    return loss / targets, distance / targets
