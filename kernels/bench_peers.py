"""What the bench times beside our own backends: torch's, and other libraries where installed.

A peer gets the same inputs and passes the same check; what it cannot be asked for is left out. What
a call raises, because a library has changed or does not serve a shape, is recorded as its refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bench_cases import Call, Case, function_of, pinned


@dataclass(frozen=True)
class Peer:
    """`make()` gives the call, and imports what it needs."""

    name: str
    make: Callable[[], Call]
    compiles: bool = False
    """torch compiles it first, for tens of seconds."""


def _sdpa(backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (o.transpose(1, 2),)

    return call


def _flex() -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        tokens = q.shape[1]
        if tokens not in masks:
            masks[tokens] = create_block_mask(
                causal, None, None, tokens, tokens, device=str(q.device)
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = compiled(q, k, v, block_mask=masks[tokens])
        return (o.transpose(1, 2),)

    return call


def _compiled(case: Case) -> Call:
    """torch.compile of our own chunked form."""
    return pinned(torch.compile(function_of(case), dynamic=False), "chunked")


def _torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """All logits at once, as a model without the fused loss has them."""
    logits = hidden.flatten(0, 1) @ weight.mT
    return (F.cross_entropy(logits.float(), targets.flatten()),)


def _fla(path: str, name: str, **names: str) -> Call:
    """A function of flash-linear-attention; `names` are its arguments by ours."""

    def call(**given: Any) -> tuple[Tensor, ...]:
        function = getattr(import_module(f"fla.ops.{path}"), name)
        # Dtypes that differ from the values' are refused there.
        renamed = {names.get(key, key): value for key, value in given.items()}
        state = renamed.pop("state", None)
        found: tuple[Tensor, ...] = function(
            **renamed, initial_state=state, output_final_state=True
        )
        return found[:2]

    return call


def _mamba_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    """S6 of mamba-ssm, channels before tokens there; it takes no state."""
    module = import_module("mamba_ssm.ops.selective_scan_interface")
    y, last = module.selective_scan_fn(
        *(t.mT for t in (x, dt)), a, *(t.mT for t in (b, c)), return_last_state=True
    )
    return y.mT, last


def _mamba_ssd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    """Mamba-2's scan with steps of 1, whose decay per head is then our fixed one."""
    module = import_module("mamba_ssm.ops.triton.ssd_combined")
    steps = torch.ones(q.shape[:3], device=q.device, dtype=q.dtype)
    y, last = module.mamba_chunk_scan_combined(
        v, steps, log_decay, k, q * q.shape[-1] ** -0.5, 64, return_final_states=True
    )
    return y, last.mT


def _causal_conv(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, ...]:
    module = import_module("causal_conv1d")
    return (module.causal_conv1d_fn(x.mT, weight).mT,)


FLA: dict[tuple[str, str | None], tuple[str, Callable[[], Call]]] = {
    ("matrix_state", "none"): (
        "fla chunk_simple_gla",
        lambda: _without_decay(_fla("simple_gla", "chunk_simple_gla")),
    ),
    ("matrix_state", "fixed"): (
        "fla chunk_simple_gla",
        lambda: _fla("simple_gla", "chunk_simple_gla", log_decay="g_gamma"),
    ),
    ("matrix_state", "scalar"): (
        "fla chunk_simple_gla",
        lambda: _fla("simple_gla", "chunk_simple_gla", log_decay="g"),
    ),
    ("matrix_state", "vector"): ("fla chunk_gla", lambda: _fla("gla", "chunk_gla", log_decay="g")),
    ("matrix_state", "preread"): (
        "fla chunk_rwkv6",
        lambda: _fla("rwkv6", "chunk_rwkv6", q="r", log_decay="w", bonus="u"),
    ),
    ("delta_rule", None): (
        "fla chunk_gated_delta_rule",
        lambda: _fla("gated_delta_rule", "chunk_gated_delta_rule", log_decay="g"),
    ),
    ("delta_rule", "vector"): ("fla chunk_kda", lambda: _fla("kda", "chunk_kda", log_decay="g")),
    ("delta_rule", "diagonal-low-rank"): (
        "fla chunk_dplr_delta_rule",
        lambda: _fla("generalized_delta_rule", "chunk_dplr_delta_rule", log_decay="gk"),
    ),
    ("diagonal_scan", None): (
        "fla fused_recurrent_hgrn",
        lambda: _fla("hgrn", "fused_recurrent_hgrn", b="x", log_a="g"),
    ),
}
"""Of flash-linear-attention, by operator and form: names and arguments as of its version 0.6."""


def _without_decay(call: Call) -> Call:
    def without(log_decay: None = None, **given: Any) -> tuple[Tensor, ...]:
        return call(**given)

    return without


OTHERS: dict[tuple[str, str | None], tuple[str, str, Call]] = {
    ("matrix_state", "fixed"): ("mamba_ssm", "mamba-ssm SSD", _mamba_ssd),
    ("selective_scan", None): ("mamba_ssm", "mamba-ssm selective_scan_fn", _mamba_scan),
    ("short_conv", None): ("causal_conv1d", "causal-conv1d", _causal_conv),
}
"""By operator and form: the package that must be there, the name, the call."""

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def peers(case: Case, device: str) -> Iterator[Peer]:
    """The peers of a case that can be imported here. None for decoding, which starts with a state
    that most of them take in other forms."""
    if case.tokens == 1:
        return
    if case.op == "attention":
        for name, backend in SDPA.items():
            if device == "cuda" or name in ("sdpa flash", "sdpa math"):
                yield Peer(name, lambda backend=backend: _sdpa(backend))  # type: ignore[misc]
        if device == "cuda":
            yield Peer("FlexAttention", _flex, compiles=True)
        return
    if case.op == "linear_cross_entropy":
        yield Peer("torch, all logits", lambda: _torch_loss)
    if device == "cuda":
        yield Peer("torch.compile", lambda: _compiled(case), compiles=True)
    key = (case.op, case.form)
    if device == "cuda" and key in FLA and find_spec("fla") is not None:
        name, make = FLA[key]
        yield Peer(name, make)
    if device == "cuda" and key in OTHERS and find_spec(OTHERS[key][0]) is not None:
        _, name, call = OTHERS[key]
        yield Peer(name, lambda: call)
