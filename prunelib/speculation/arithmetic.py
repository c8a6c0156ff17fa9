"""What verification accepts, and what speed-up to expect: pure functions.

Leviathan, Kalman and Matias, *Fast Inference from Transformers via Speculative Decoding*
(arXiv 2211.17192); the same rule in Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prunelib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return what a token is drawn from after a draft token was rejected.

    ``max(0, p - q)``, normalised (2211.17192, algorithm 1).

    Args:
        p: [..., vocabulary], the model's probabilities.
        q: the same shape, the draft's.
    """
    left = (p - q).clamp_min(0)
    total = left.sum(-1, keepdim=True)
    # Where p and q are equal nothing is ever rejected, but for rounding.
    return torch.where(total > 0, left / total, p)


def verification(p: Tensor, q: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many draft tokens are accepted, and what comes then, as distributions.

    Draft token ``i`` is accepted with ``min(1, p_i / q_i)`` if all before it were (2211.17192,
    algorithm 1). After a rejection the next token is drawn from the residual at that position, else
    from the model's own distribution behind the last draft token.

    Args:
        p: [k + 1, vocabulary], the model's probabilities at each draft token and behind the last.
        q: [k, vocabulary], the probabilities that the draft tokens were drawn from.
        drafted: int64 [k], the draft tokens; k may be 0.

    Returns:
        Probabilities [k + 1] of 0 to k accepted tokens; [k + 1, vocabulary] those of the next token
        for each of these numbers.
    """
    place = drafted[:, None]
    accept = (p[:-1].gather(1, place) / q.gather(1, place)).squeeze(1).clamp_max(1)
    reached = torch.cat([p.new_ones(1), accept.cumprod(0)])
    stays = torch.cat([1 - accept, p.new_ones(1)])
    return reached * stays, torch.cat([residual(p[:-1], q), p[-1:]])


def expected_tokens(alpha: float, gamma: int) -> float:
    """Return the mean number of tokens that a round of ``gamma`` draft tokens yields.

    ``(1 - alpha^(gamma + 1)) / (1 - alpha)`` (2211.17192, equation 1), for independent tokens.

    Args:
        alpha: acceptance rate, from 0 to 1.
        gamma: draft length, from 0.

    Raises:
        InputError: a value is out of range.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"acceptance rate {alpha} given; 0 to 1 allowed")
    if gamma < 0:
        raise InputError(f"draft length {gamma} given; from 0 allowed")
    return float(gamma + 1) if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def expected_speed_up(alpha: float, gamma: int, cost: float) -> float:
    """Return plain over speculative time, a pass over several tokens costing what one over 1 does.

    ``(1 - alpha^(gamma + 1)) / ((1 - alpha) (gamma c + 1))`` (2211.17192, theorem 3.8).

    Args:
        alpha: acceptance rate, from 0 to 1.
        gamma: draft length, from 0.
        cost: time of a draft pass over that of a pass of the model, c.

    Raises:
        InputError: a value is out of range.
    """
    if not cost >= 0:
        raise InputError(f"cost ratio {cost} given; from 0 allowed")
    return expected_tokens(alpha, gamma) / (gamma * cost + 1)


def counted_speed_up(tokens: int, passes: int, draft_work: float) -> float:
    """Return the same from what was counted: no independence of tokens, and any draft lengths.

    Args:
        tokens: that the passes gave, each of which costs plain decoding a pass.
        passes: of the model.
        draft_work: of all passes of drafts, those of a search included, in passes of the model.

    Raises:
        InputError: there was no pass, or the work is out of range.
    """
    if passes < 1 or not draft_work >= 0:
        raise InputError(
            f"{passes} passes and draft work {draft_work} given; from 1 and from 0 allowed"
        )
    return tokens / (passes + draft_work)


def best_draft_length(alpha: float, cost: float, most: int = 32) -> int:
    """Return the draft length, up to ``most``, of the highest expected speed-up.

    Raises:
        InputError: a value is out of range.
    """
    return max(range(most + 1), key=lambda gamma: expected_speed_up(alpha, gamma, cost))
