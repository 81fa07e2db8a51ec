"""HiPPO-LegS, the matrix that state spaces start from, as a normal matrix less one of rank one.

A[n, k] = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, 0 above; B[n] = sqrt(2n+1). With
P[n] = sqrt(n + 1/2), A + P P^T is -1/2 plus a skew-symmetric matrix, so A = V (Lambda - p p^*) V^*
with unitary V (S4, arXiv 2111.00396, appendix C.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Legs:
    """One eigenvector of each conjugate pair, N of the 2N; float64 and complex128."""

    frequencies: Tensor
    """(N,), above 0 and ascending: the imaginary parts of Lambda, whose real parts are -1/2."""
    low_rank: Tensor
    """(N,): p, and sqrt(2) p is B in this basis. Real: eigenvectors are turned so."""
    vectors: Tensor
    """(2N, N): the columns of V."""


def legs(pairs: int) -> Legs:
    """The decomposition for 2 * `pairs` states."""
    n = torch.arange(2 * pairs, dtype=torch.float64)
    p = torch.sqrt(n + 0.5)
    # P P^T + A + 1/2: p_n p_k above the diagonal, minus that below it.
    outer = torch.outer(p, p)
    skew = outer.triu(1) - outer.tril(-1)
    found = torch.linalg.eigh(-1j * skew)
    frequencies: Tensor = found.eigenvalues[pairs:]
    vectors: Tensor = found.eigenvectors[:, pairs:]
    low_rank = vectors.mH @ p.to(vectors.dtype)
    # An eigenvector's phase is the library's choice; this one is the same everywhere.
    vectors = vectors * torch.sgn(low_rank)
    return Legs(frequencies, low_rank.abs(), vectors)
