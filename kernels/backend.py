"""The one place that chooses how an operator is computed.

Three backends: `definition`, the loop over time that reads like the formula; `chunked`, few large
torch operations, for training and decoding anywhere; `triton`, kernels for CUDA devices. The choice
depends on the operator, its form and the device, never on whether something failed: a case that the
chosen backend cannot serve raises `Unsupported`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Backend = Literal["definition", "chunked", "triton"]

OPS = ("matrix_state", "delta_rule", "diagonal_scan", "short_conv")

_pinned: ContextVar[Backend | None] = ContextVar("mendel_backend", default=None)


class Unsupported(ValueError):
    """A backend does not serve a case. The message says why, and which backends do serve it."""

    def __init__(self, op: str, backend: Backend, reason: str, others: tuple[Backend, ...]) -> None:
        served = " and ".join(others)
        super().__init__(
            f"{op}: the {backend} backend does not serve this case: {reason}; {served} "
            f"{'do' if len(others) > 1 else 'does'} (use_backend({others[-1]!r}))"
        )
        self.op = op
        self.backend = backend
        self.reason = reason
        self.others = others


def backends(op: str, form: str | None = None) -> tuple[Backend, ...]:
    """The backends that an operator (in one of its forms) has, on some device."""
    if op not in OPS:
        raise ValueError(f"no operator is named {op!r}; there are {', '.join(OPS)}")
    return ("definition", "chunked")


def choose(op: str, device: torch.device | str, form: str | None = None) -> Backend:
    """The backend for a call: the pinned one, or the device's default.

    `form` names a case of the operator that has kernels of its own; for `matrix_state` the kind of
    decay (none, fixed, scalar, vector). Raises `Unsupported` where a pinned backend does not exist
    for the operator.
    """
    there = backends(op, form)
    pinned = _pinned.get()
    if pinned is None:
        return "chunked"
    if pinned not in there:
        name = op if form is None else f"{op} ({form})"
        raise Unsupported(name, pinned, "it has no kernel", there)
    return pinned


def current(op: str, device: torch.device | str, form: str | None = None) -> Backend:
    """The backend that a call would use now: what a measurement writes down."""
    return choose(op, device, form)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Pin the backend of every operator inside the block, in this thread or task."""
    token = _pinned.set(name)
    try:
        yield
    finally:
        _pinned.reset(token)
