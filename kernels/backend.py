"""The one place that chooses how an operator is computed.

Four backends: `definition`, the loop over time that reads like the formula (attention: the whole
mask); `chunked`, few large torch operations, for training and decoding anywhere; `triton`, kernels
for CUDA devices; `flex`, torch's FlexAttention, which compiles a mask for them. The choice
depends on the operator, its form, its size and the device, never on whether something failed: a
pinned backend that cannot serve a case raises `Unsupported`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

Backend = Literal["definition", "chunked", "triton", "flex"]

OPS = (
    *("matrix_state", "delta_rule", "diagonal_scan", "complex_scan", "selective_scan"),
    *("short_conv", "long_conv", "attention", "rms_norm", "linear_cross_entropy", "moe_permute"),
)

TRITON_FORMS: dict[str, tuple[str | None, ...]] = {
    "matrix_state": ("none", "fixed", "scalar", "vector", "preread"),
    "delta_rule": (None, "vector", "diagonal-low-rank"),
    "diagonal_scan": (None,),
    "complex_scan": (None,),
    "selective_scan": (None,),
    "short_conv": (None,),
    "rms_norm": (None,),
    "linear_cross_entropy": (None,),
    "moe_permute": (None,),
}
"""The operators and their forms that have Triton kernels, in `triton_<operator>.py`."""

FLEX_FORMS: dict[str, tuple[str, ...]] = {"attention": ("pattern",)}
"""The operators and their forms that FlexAttention serves."""

WIDEST = 256
"""The widest head (K or V) of the Triton kernels."""
STEP_TOKENS = 3
"""Tokens that a step of a matrix state takes without a gradient: the one to decode, and two that
were guessed. More go in chunks."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HAS_TRITON = find_spec("triton") is not None

_pinned: ContextVar[Backend | None] = ContextVar("mendel_backend", default=None)
_used: ContextVar[dict[str, set[Backend]] | None] = ContextVar("mendel_used", default=None)


class Unsupported(ValueError):
    """A backend does not serve a case. The message says why, and which backends do serve it."""

    def __init__(self, op: str, backend: Backend, reason: str, others: tuple[Backend, ...]) -> None:
        super().__init__(
            f"{op}: the {backend} backend does not serve this case: {reason}; "
            f"{' and '.join(others)} do (use_backend({others[-1]!r}))"
        )
        self.op = op
        self.backend = backend
        self.reason = reason
        self.others = others


def backends(op: str, form: str | None = None) -> tuple[Backend, ...]:
    """The backends that an operator, in one of its forms, has here on some device."""
    if op not in OPS:
        raise ValueError(f"no operator is named {op!r}; there are {', '.join(OPS)}")
    if HAS_TRITON and form in TRITON_FORMS.get(op, ()):
        return ("definition", "chunked", "triton")
    if form in FLEX_FORMS.get(op, ()):
        return ("definition", "chunked", "flex")
    return ("definition", "chunked")


def current(
    op: str,
    device: torch.device | str,
    form: str | None = None,
    *,
    width: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Backend:
    """The backend that a call would use now: the pinned one, or the default of the case.

    The default is `triton` on a CUDA device for the forms that have kernels, heads of at most
    `WIDEST` and the dtypes of `TRITON_DTYPES`, `flex` there for the forms of `FLEX_FORMS`, else
    `chunked`. `form` names a case of the operator; for `matrix_state` the kind of decay (none,
    fixed, scalar, vector), or `preread`, a vector decay with reads before writes; for `delta_rule`
    None, `vector` or `diagonal-low-rank`; for `short_conv` and `rms_norm` None, or
    `wide`, more taps or channels than a program of their kernels holds. Raises `Unsupported` where
    a pinned backend does not exist for the form.
    """
    there = backends(op, form)
    chosen = _pinned.get()
    if chosen is None:
        if "flex" in there and torch.device(device).type == "cuda":
            return "flex"
        serves = "triton" in there and width <= WIDEST and dtype in TRITON_DTYPES
        return "triton" if serves and torch.device(device).type == "cuda" else "chunked"
    if chosen not in there:
        name = op if form is None else f"{op}, form {form}"
        if op in FLEX_FORMS:
            name = f"{op}, case {form}"
        reason = "it has no kernel" if HAS_TRITON or chosen == "flex" else "Triton is not installed"
        raise Unsupported(name, chosen, reason, there)
    return chosen


def choose(
    op: str,
    device: torch.device | str,
    form: str | None = None,
    *,
    width: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Backend:
    """`current`, for the call that is about to use it: `used_backends` sees the choice."""
    backend = current(op, device, form, width=width, dtype=dtype)
    used = _used.get()
    if used is not None:
        used.setdefault(op, set()).add(backend)
    return backend


def pinned() -> Backend | None:
    """The pinned backend, or None."""
    return _pinned.get()


@contextmanager
def used_backends() -> Iterator[dict[str, set[Backend]]]:
    """The backends that the operators called inside the block took: what a measurement writes."""
    used: dict[str, set[Backend]] = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def kernels(op: str, entry: str | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The entry into an operator's Triton kernels: the only place that imports Triton.

    `entry` names it where a module has several; it is `op` where None.
    """
    # By this module's own name, because an export puts both beside each other under longer names.
    module = import_module(f"{__name__.removesuffix('backend')}triton_{op}")
    return cast(Callable[..., tuple[Tensor, Tensor]], getattr(module, entry or op))


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Pin the backend of every operator inside the block, in this thread or task."""
    token = _pinned.set(name)
    try:
        yield
    finally:
        _pinned.reset(token)


def without_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """An operator that autocast leaves alone.

    Autocast would multiply in bfloat16 what the operator has just made float32, and so round the
    sums and the state that a sequence carries for ever.
    """

    @functools.wraps(op)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        device = next(tensors).device.type
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return exact
