"""Dominance, crowding, hypervolume and knee over losses: every column is minimised.

Losses are (n, m) float64 arrays, one row per trial; `objectives.Goal.loss` turns a value into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moocore  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

_BLOCK = 512
"""Rows of a history that are looked at together."""


def as_losses(rows: Sequence[Sequence[float]]) -> Losses:
    """Rows of equal length as an (n, m) array; no rows give (0, 0)."""
    if not rows:
        return np.zeros((0, 0))
    return np.asarray(rows, dtype=np.float64)


def ranks(losses: Losses) -> NDArray[np.int64]:
    """The non-dominated front of each row, 0 the best (Deb et al. 2002, NSGA-II); equals share."""
    if len(losses) == 0:
        return np.zeros(0, dtype=np.int64)
    if losses.shape[1] == 1:
        return np.unique(losses[:, 0], return_inverse=True)[1].astype(np.int64)
    return np.asarray(moocore.pareto_rank(losses), dtype=np.int64)


def crowding(losses: Losses) -> NDArray[np.float64]:
    """Crowding distance of each row within the given set (Deb et al. 2002); the ends have inf.

    A column without spread says nothing and adds nothing, not even to the ends.
    """
    count, columns = losses.shape if losses.size else (len(losses), 0)
    distance = np.zeros(count)
    for m in range(columns):
        order = np.argsort(losses[:, m], kind="stable")
        column = losses[order, m]
        spread = column[-1] - column[0]
        if not spread > 0:
            continue
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (column[2:] - column[:-2]) / spread
    return distance


def order(losses: Losses) -> NDArray[np.int64]:
    """Row indices from best to worst: by rank, then crowding within the rank, then index."""
    rank = ranks(losses)
    distance = np.zeros(len(losses))
    for value in np.unique(rank):
        members = np.flatnonzero(rank == value)
        distance[members] = crowding(losses[members])
    return np.lexsort((np.arange(len(losses)), -distance, rank)).astype(np.int64)


def best(losses: Losses, count: int) -> NDArray[np.int64]:
    """The `count` first of `order`, with crowding computed only where the cut falls."""
    rank = ranks(losses)
    by_rank = np.argsort(rank, kind="stable")
    if count <= 0 or count >= len(losses):
        return order(losses)[: max(count, 0)]
    cut = rank[by_rank[count - 1]]
    inside = np.flatnonzero(rank < cut)
    members = np.flatnonzero(rank == cut)
    distance = crowding(losses[members])
    chosen = members[np.lexsort((members, -distance))][: count - len(inside)]
    return np.concatenate([inside[np.argsort(rank[inside], kind="stable")], chosen])


def front(losses: Losses) -> list[int]:
    """The rows that no row dominates, in order of index; equal rows all stand on it."""
    return [int(i) for i in np.flatnonzero(ranks(losses) == 0)]


@dataclass(frozen=True)
class Frame:
    """How losses are normalised for hypervolume and knee: (loss - low) / (high - low), fixed.

    The reference point is REFERENCE in every normalised column, so a loss up to a tenth of the span
    worse than `high` still counts. Of `m` objectives the hypervolume of a point at `low` is
    REFERENCE ** m; better than `low` counts for more.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    REFERENCE = 1.1

    @classmethod
    def around(cls, losses: Losses, bounds: Sequence[tuple[float, float] | None]) -> Frame:
        """The span of the given rows; a column with known bounds takes those instead."""
        low, high = [], []
        for m, known in enumerate(bounds):
            column = losses[:, m] if losses.size else np.zeros(1)
            least, most = known if known is not None else (float(column.min()), float(column.max()))
            if not most > least:
                most = least + max(abs(least), 1.0)
            low.append(least)
            high.append(most)
        return cls(tuple(low), tuple(high))

    def normalise(self, losses: Losses) -> Losses:
        if not losses.size:
            return losses
        low = np.asarray(self.low)
        scaled: Losses = (losses - low) / (np.asarray(self.high) - low)
        return scaled

    def hypervolume(self, losses: Losses) -> float:
        """The volume that the rows dominate, up to the reference point; 0 for no rows."""
        if not losses.size:
            return 0.0
        scaled = self.normalise(losses)
        scaled = scaled[(scaled < self.REFERENCE).all(1)]
        if len(scaled) == 0:
            return 0.0
        if scaled.shape[1] == 1:
            return float(self.REFERENCE - scaled.min())
        return float(moocore.hypervolume(scaled, ref=[self.REFERENCE] * scaled.shape[1]))

    def hypervolume_history(self, losses: Losses) -> list[float]:
        """The hypervolume after each row, in order; only a row that no earlier one dominates can
        add to it, so the others cost one comparison."""
        history: list[float] = []
        kept = np.zeros((0, len(self.low)))
        for start in range(0, len(losses), _BLOCK):
            block = losses[start : start + _BLOCK]
            # Most rows of a long run are covered from the start: one look for a whole block.
            early = np.asarray((kept[:, None, :] <= block[None, :, :]).all(2).any(0))
            for row, skip in zip(block, early, strict=True):
                if skip or bool((kept <= row).all(1).any()):
                    history.append(history[-1])
                    continue
                kept = np.vstack([kept[~(kept >= row).all(1)], row])
                history.append(self.hypervolume(kept))
        return history


def knee(losses: Losses) -> int | None:
    """The row of a front that is farthest below the plane through the front's ends.

    Columns are scaled to the front's own span; with one objective it is the least; None for no
    rows. The distance is the sum of the normalised columns, the normal of that plane (Das 1999).
    """
    if not losses.size:
        return None
    low, high = losses.min(0), losses.max(0)
    span = np.where(high > low, high - low, 1.0)
    return int(np.argmin(((losses - low) / span).sum(1)))
