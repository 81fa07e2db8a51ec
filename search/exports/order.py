"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..source import Source


@dataclass(frozen=True)
class Order:
    """A design to take along. `proxy` names the training whose weights go with it, where the format
    has weights; None leaves the choice to the format."""

    source: Source
    proxy: str | None = None
