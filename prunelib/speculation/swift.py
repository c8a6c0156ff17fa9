"""SWIFT: a search, while text is being decoded, for the sub-layers that a draft leaves out.

Xia et al., *SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration* (arXiv
2410.06916) and its repository. A candidate is a set of attentions and MLPs of fixed size, of all
layers but the first and the last. Its *matchness* is the share of tokens, of a window of the text
decoded so far, that its most likely token agrees with, all in one pass. Candidates are random but
for every ``bayes_interval``-th, which a Gaussian process proposes. The draft is always the best
candidate so far.

The Gaussian process is this library's: Matérn 5/2 over the Euclidean distance of sets as 0/1
vectors, its length scale the root mean square distance of two random sets, scores standardised;
the candidate is the one of highest upper confidence bound among random sets and all that differ
from the best by one exchange. SWIFT's repository gives the same kernel, noise and bound to a
package that optimises over the cube and takes the largest coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prunelib.checkpoint import family_of_config
from prunelib.errors import InputError
from prunelib.speculation.draft import Draft, DraftCache, Skipped

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Floats = npt.NDArray[np.float64]

# Random sets among which the bound is looked for, beside the neighbours of the best.
_POOL = 500


@dataclass(frozen=True)
class SwiftSettings:
    """Hyper-parameters of the search; defaults are those of the authors' scripts.

    Attributes:
        skip_ratio: share of the sub-layers, first and last layer apart, that is left out.
        window: tokens that the matchness is measured on: the first ones decoded of a text.
        iterations: candidates at most.
        patience: candidates without gain at most.
        stop_score: matchness above which the search ends.
        bayes_interval: every how many candidates one is proposed by the Gaussian process.
        noise: variance of a standardised score.
        kappa: weight of the standard deviation in the upper confidence bound.
        seed: of all random choices.
    """

    skip_ratio: float = 0.45
    window: int = 32
    iterations: int = 1000
    patience: int = 300
    stop_score: float = 0.95
    bayes_interval: int = 25
    noise: float = 1e-2
    kappa: float = 2.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.skip_ratio < 1:
            raise InputError(f"swift: skip_ratio is {self.skip_ratio!r}; allowed: between 0 and 1")
        for name in ("window", "iterations", "patience", "bayes_interval"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"swift: {name} is {value!r}; allowed: at least 1")
        if not self.noise > 0:
            raise InputError(f"swift: noise is {self.noise!r}; allowed: above 0")


def upper_confidence(
    points: Floats, scores: Floats, candidates: Floats, scale: float, noise: float, kappa: float
) -> Floats:
    """Return the upper confidence bounds of a Gaussian process, in standardised scores.

    Posterior mean plus ``kappa`` standard deviations; Matérn 5/2 kernel of variance 1.

    Args:
        points: [observed, dimensions].
        scores: [observed].
        candidates: [candidates, dimensions].
        scale: length scale.
        noise: variance of a standardised score.
        kappa: weight of the standard deviation.
    """

    def kernel(a: Floats, b: Floats) -> Floats:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        distance = np.sqrt(5 * np.maximum(squares, 0)) / scale
        result: Floats = (1 + distance + distance**2 / 3) * np.exp(-distance)
        return result

    deviation = scores.std()
    values = (scores - scores.mean()) / (deviation if deviation > 0 else 1.0)
    across = kernel(points, candidates)
    solved = np.linalg.solve(
        kernel(points, points) + noise * np.eye(len(points)),
        np.concatenate([values[:, None], across], axis=1),
    )
    variance = 1 - (across * solved[:, 1:]).sum(0)
    bounds: Floats = across.T @ solved[:, 0] + kappa * np.sqrt(np.maximum(variance, 0))
    return bounds


class Search:
    """The search for a draft of a model; it goes on from text to text.

    Attributes:
        model: whose sub-layers are left out.
        settings: hyper-parameters.
        draft: of the best candidate so far; at first, every second layer but the last is left out,
            attention and MLP alike, as in the authors' scripts.
        best: its matchness; 0 before the first candidate.
        scores: matchness of all candidates so far.
    """

    def __init__(self, model: PreTrainedModel, settings: SwiftSettings) -> None:
        """Begin a search.

        Raises:
            InputError: the model has too few layers for the ratio, or its attentions or MLPs cannot
                be left out alone.
        """
        self.model, self.settings = model, settings
        self.layers = len(family_of_config(model.config.to_dict()).layers(model))
        self._sublayers = 2 * (self.layers - 2)
        self._count = int(self._sublayers * settings.skip_ratio)
        if self._count < 1:
            raise InputError(
                f"swift: skip_ratio {settings.skip_ratio} of {max(self._sublayers, 0)} sub-layers "
                "(those of the first and last layer stay) is less than one"
            )
        self._random = np.random.default_rng(settings.seed)
        every_second = tuple(range(1, self.layers - 1, 2))
        self.draft = Draft(model, Skipped(attention=every_second, mlp=every_second))
        self.best = 0.0
        self.scores: list[float] = []
        self._points: list[Floats] = []
        self._idle = 0

    @property
    def finished(self) -> bool:
        """Whether one of the rules that end the search holds."""
        told = self.settings
        return (
            self.best > told.stop_score
            or len(self.scores) >= told.iterations
            or self._idle >= told.patience
        )

    def wants(self, decoded: int) -> bool:
        """Whether a candidate can be tried on a text of so many decoded tokens."""
        return decoded > self.settings.window and not self.finished

    def step(self, tokens: Tensor, cache: DraftCache) -> float:
        """Try one candidate; from then on the draft is the better of it and the best so far.

        Args:
            tokens: int64 [1, more than the window], decoded behind what the cache holds.
            cache: of the model, over the text in front of ``tokens``; written to.

        Returns:
            The candidate's cost (``Draft.cost``).
        """
        point = self.propose()
        draft = self._draft(point)
        score = matchness(draft, tokens[:, : self.settings.window + 1], cache)
        self.tell(point, score)
        if not self._idle:
            self.draft = draft
        return draft.cost

    def resume(self, scores: Sequence[float]) -> None:
        """Go to where a search of the same settings stood that had these scores.

        Args:
            scores: matchness of its candidates, which follow from their scores and the seed.
        """
        best = None
        for score in scores:
            point = self.propose()
            self.tell(point, score)
            best = best if self._idle else point
        if best is not None:
            self.draft = self._draft(best)

    def _draft(self, point: Floats) -> Draft:
        half = self._sublayers // 2
        named = np.flatnonzero(point)
        attention = tuple(int(i) + 1 for i in named if i < half)
        mlp = tuple(int(i) - half + 1 for i in named if i >= half)
        return Draft(self.model, Skipped(attention=attention, mlp=mlp))

    def propose(self) -> Floats:
        """Return the next candidate [sub-layers]: attentions, then MLPs; 1 is left out."""
        if (len(self.scores) + 1) % self.settings.bayes_interval or not self.scores:
            return self._random_sets(1).ravel()
        points, scores = np.array(self._points), np.array(self.scores)
        best = points[scores.argmax()]
        neighbours = []
        for gone in np.flatnonzero(best):
            for kept in np.flatnonzero(best == 0):
                other = best.copy()
                other[gone], other[kept] = 0, 1
                neighbours.append(other)
        pool = np.concatenate([self._random_sets(_POOL), np.array(neighbours)])
        share = self._count / self._sublayers
        bounds = upper_confidence(
            points,
            scores,
            pool,
            math.sqrt(2 * self._count * (1 - share)),
            self.settings.noise,
            self.settings.kappa,
        )
        proposal: Floats = pool[bounds.argmax()]
        return proposal

    def tell(self, point: Floats, score: float) -> None:
        """Take note of a candidate's matchness."""
        self._points.append(point)
        self.scores.append(score)
        self._idle = 0 if score > self.best else self._idle + 1
        self.best = max(self.best, score)

    def _random_sets(self, many: int) -> Floats:
        keys = self._random.random((many, self._sublayers))
        sets = np.zeros(keys.shape)
        np.put_along_axis(sets, keys.argsort(1)[:, : self._count], 1.0, axis=1)
        return sets


def matchness(draft: Draft, tokens: Tensor, cache: DraftCache) -> float:
    """Return the share of tokens that are the draft's most likely ones, in one draft pass.

    Args:
        draft: whose agreement is asked for.
        tokens: int64 [1, n + 1]: all but the first are held against what the draft says.
        cache: of the model, over the text in front of ``tokens``; written to.
    """
    with draft.drafting(cache):
        logits = draft.model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True).logits
    return float((logits.argmax(-1) == tokens[:, 1:]).double().mean())
