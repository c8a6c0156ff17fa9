"""Truncated singular value decompositions, and distances between matrices given by them.

Large matrices are decomposed by randomised subspace iteration (Halko, Martinsson & Tropp 2011,
algorithm 4.4), small ones and those of which nearly all is wanted exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Further directions of the random subspace, and how often it is multiplied by W W^T. Repeated here
# without torch in prunelib.cluster.resources; a test holds the copies equal.
OVERSAMPLE = 32
ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix [m, n] of rank r as ``U diag(S) V^T``.

    Attributes:
        u: orthonormal columns [m, r].
        s: singular values [r], falling.
        v: orthonormal columns [n, r].
    """

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    def scaled(self) -> Factors:
        """Return the factors of the matrix divided by its Frobenius norm."""
        return Factors(self.u, self.s / self.s.square().sum().sqrt(), self.v)


def seed_of(*parts: object) -> int:
    """Return a generator's seed that is a function of ``parts`` alone."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def is_exact(shape: Sequence[int], rank: int) -> bool:
    """Return whether a truncation to ``rank`` decomposes the whole matrix."""
    return 2 * (rank + OVERSAMPLE) >= min(shape)


def truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> Factors:
    """Return the ``rank`` largest singular values of ``matrix`` [m, n] and their vectors, fp32.

    Args:
        matrix: of any floating type, on the CPU.
        rank: at most ``min(m, n)`` of them are returned.
        seed: of the random subspace.
    """
    rank = min(rank, *matrix.shape)
    if is_exact(matrix.shape, rank):
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Factors(u[:, :rank].float(), s[:rank].float(), vt[:rank].T.float())
    matrix = matrix.float()
    generator = torch.Generator().manual_seed(seed)
    y = matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator)
    for _ in range(ITERATIONS):
        y = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(y).Q).Q
    basis = torch.linalg.qr(y).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Factors((basis @ u)[:, :rank], s[:rank], vt[:rank].T.contiguous())


def truncated_distance(a: Factors, b: Factors, rank: int) -> float:
    """Return ``||X - Y - D||_F`` of two matrices given by factors, D being X - Y cut to ``rank``.

    FlexiGPT's distance (arXiv 2501.14713, equation 2): what an adapter of that rank cannot make up
    for. The singular values of ``X - Y = [Ua Ub] diag(Sa, -Sb) [Va Vb]^T`` are those of a matrix
    as wide as both ranks together, so that no product of the full size is formed. fp64.
    """

    def gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Columns of either are orthonormal.
        cross = (x.T @ y).double()
        return torch.cat(
            [
                torch.cat([torch.eye(x.shape[1], dtype=torch.float64), cross], 1),
                torch.cat([cross.T, torch.eye(y.shape[1], dtype=torch.float64)], 1),
            ]
        )

    scale = torch.cat([a.s, -b.s]).double()
    left = scale[:, None] * gram(a.u, b.u) * scale
    values, vectors = torch.linalg.eigh(gram(a.v, b.v))
    root = vectors * values.clamp(min=0).sqrt()
    squares = torch.linalg.eigvalsh(root.T @ left @ root).clamp(min=0)
    return float(squares[: max(len(squares) - rank, 0)].sum().sqrt())
