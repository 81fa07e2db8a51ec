"""Memory that holds NaN until it is written: what a kernel leaves out is seen in its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and `torch.empty_like` give, inside the block."""
    with (
        patch.object(torch, "empty", _filled(torch.empty)),
        patch.object(torch, "empty_like", _filled(torch.empty_like)),
    ):
        yield


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*given: Any, **options: Any) -> Tensor:
        made = make(*given, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return filled
