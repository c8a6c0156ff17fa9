"""How far every block's matrices are from every other's: which one can stand for it.

FlexiGPT (arXiv 2501.14713, section 3.2): with ``W^`` the truncation of W to rank r,
``d(i, j) = ||W^_i - (W^_j + D)||_F``, D being the truncation of ``W^_i - W^_j`` to rank r, per
matrix. A block's distance is the sum over its matrices, which the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from prunelib.criteria.fold import Array
from prunelib.low_rank import seed_of, truncated_distance, truncated_svd

# Rows of all blocks' matrices are looked at in pieces of this size.
PIECE_BYTES = 256 * 1024**2


def truncated_distances(
    matrices: Callable[[int], torch.Tensor], layers: int, rank: int, *, scaled: bool, seed: int
) -> Array:
    """Return the paper's distance between all layers' matrices of one name [layers, layers].

    Every matrix is decomposed once; pairs are compared by their factors.

    Args:
        matrices: returns the matrix of a layer [out, in].
        layers: number of layers.
        rank: r of the truncations.
        scaled: whether truncated matrices are divided by their Frobenius norm first, so that a
            block of small weights is not near to all others.
        seed: of the randomised decompositions.
    """
    factors = [truncated_svd(matrices(i), rank, seed_of(seed, i)) for i in range(layers)]
    if scaled:
        factors = [factor.scaled() for factor in factors]
    distances = np.zeros((layers, layers))
    for i in range(layers):
        for j in range(i):
            distances[i, j] = truncated_distance(factors[i], factors[j], rank)
    return distances + distances.T


def frobenius_distances(matrices: Callable[[int], torch.Tensor], layers: int) -> Array:
    """Return ``||W_i - W_j||_F`` of all layers' matrices of one name [layers, layers].

    ``|x - y|^2 = |x|^2 + |y|^2 - 2 x y`` in fp64, over pieces of rows.
    """
    rows, columns = matrices(0).shape
    step = max(PIECE_BYTES // (8 * layers * columns), 1)
    gram = np.zeros((layers, layers))
    for begin in range(0, rows, step):
        piece = torch.stack(
            [matrices(i)[begin : begin + step].double().flatten() for i in range(layers)]
        )
        gram += (piece @ piece.T).numpy()
    squares = np.diag(gram)
    return np.sqrt(np.clip(squares[:, None] + squares - 2 * gram, 0, None))


def residual_distances(
    matrices: Callable[[int], torch.Tensor], layers: int, rank: int, *, seed: int
) -> Array:
    """Return ``||W_i - W_j - D||_F`` of all layers' matrices of one name [layers, layers].

    D is ``W_i - W_j`` truncated to ``rank``: the paper's distance of matrices that are not
    truncated themselves. Every pair's difference is decomposed.

    Args:
        matrices: returns the matrix of a layer [out, in].
        layers: number of layers.
        rank: r of the truncation.
        seed: of the randomised decompositions.
    """
    distances = np.zeros((layers, layers))
    for i in range(layers):
        own = matrices(i).float()
        for j in range(i):
            difference = own - matrices(j).float()
            largest = truncated_svd(difference, rank, seed_of(seed, i, j)).s.double()
            left = difference.double().square().sum() - largest.square().sum()
            distances[i, j] = left.clamp(min=0).sqrt()
    return distances + distances.T


def combined(distances: Sequence[Array], combination: str) -> Array:
    """Return one distance per pair of blocks from those of their matrices.

    Args:
        distances: per matrix, [layers, layers].
        combination: ``sum``, or ``squares``: the root of the sum of squares, which is the distance
            of all matrices put together.
    """
    stacked = np.stack(distances)
    result: Array = stacked.sum(0) if combination == "sum" else np.sqrt((stacked**2).sum(0))
    return result
