"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..source import Source


@dataclass(frozen=True)
class Order:
    """A design to take along, and whose weights go with it where the format has weights.

    `proxy` names the training of a trial, `seed` that of a training's folder; None leaves the
    choice to `weights.find`.
    """

    source: Source
    proxy: str | None = None
    seed: int | None = None
