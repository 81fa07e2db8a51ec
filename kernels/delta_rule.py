"""The (gated) delta rule: a state that forgets what a key held before it writes.

S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * S_t^T q_t.

DeltaNet (arXiv 2102.11174; chunks 2406.06484) without decay, Gated DeltaNet (2412.06464) with one.
The keys are taken as they are: a layer that wants them of length 1 normalises them.
"""

from __future__ import annotations

from . import definitions
from .backend import choose
from .letters import BHKV, BTH, BTHK, BTHV


def delta_rule(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    beta: BTH,
    log_decay: BTH | None = None,
    state: BHKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[BTHV, BHKV]:
    """The outputs of all tokens and the state after the last.

    `beta` is the writing strength; `log_decay` is g, the natural logarithm of the decay, at most 0;
    `state` continues a sequence (None: zeros); `scale=None` is K**-0.5. The output has v's dtype,
    the state float32 at least. Raises `Unsupported` where a pinned backend does not serve the case.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    choose("delta_rule", q.device)
    return definitions.delta_rule(q, k, v, beta, log_decay, state, scale)
