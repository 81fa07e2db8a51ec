"""Layers of flash-linear-attention as fields of its configurations, or why a layer is none.

Each reader takes a config of ours and gives the fields, or the reason as the end of a sentence
about the library. Fields and parameters are those of `fla/layers/*.py` and
`fla/models/*/configuration_*.py` of fla-org/flash-linear-attention, read in August 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...primitives.attention.latent import LatentConfig
from ...primitives.attention.layer import AttentionConfig
from ...primitives.attention.patterns import Pattern, Window
from ...primitives.attention.score import ScoreForm
from ...primitives.diagonal.selective import SelectiveConfig
from ...primitives.recurrence.delta import DeltaConfig
from ...primitives.recurrence.matrix_state import RecurrenceConfig
from ...primitives.recurrence.rwkv7 import Rwkv7Config
from ...primitives.rope import RopeForm

Fields = dict[str, Any]

_PLAIN: Mapping[str, object] = {
    "rotary": False,
    "shift": "none",
    "feature": "none",
    "normaliser": False,
    "bonus": False,
}
_MAMBA2: Mapping[str, object] = {
    **_PLAIN,
    "decay": "scalar",
    "decay_form": "dt",
    "activation": "silu",
    "skip": True,
    "gate": "silu",
    "norm": "gated-rmsnorm",
}
_GATED: Mapping[str, object] = {
    **_PLAIN,
    "activation": "none",
    "skip": False,
    "conv": 0,
    "gate": "silu",
    "norm": "rmsnorm",
}
_LINEAR: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "vector": ("gla", {**_GATED, "decay_form": "sigmoid", "decay_rank": 16}),
    "fixed": ("retnet", {**_GATED, "rotary": True}),
}
"""By our axis `decay`: the library's model, and what its layer has."""

ROTARY_KEYS = 256
"""The most channels of a key that retnet's layer turns."""


def ratio(channels: int, width: int) -> float:
    """Channels over the width, such that the library, which rounds down, finds the channels."""
    share = channels / width
    if share.is_integer():
        return int(share)
    return share if int(width * share) == channels else math.nextafter(share, math.inf)


def differs(config: object, wanted: Mapping[str, object]) -> str:
    """The first field that is not as wanted, as an axis and its value; empty where all are."""
    for name, value in wanted.items():
        found = getattr(config, name)
        if found != value:
            return f"{name}={str(found).lower() if isinstance(found, bool) else found}"
    return ""


def _window(pattern: Pattern) -> bool:
    """Full attention, or a sliding window and nothing else."""
    return isinstance(pattern, Window) and pattern == Window(pattern.window)


def attention(c: AttentionConfig) -> Fields | str:
    """The fields of an entry of `attn`, but its layers."""
    if not _window(c.pattern):
        return "attention is full or has a sliding window there"
    if c.score != ScoreForm() or c.gate != "none" or c.conv:
        return "attention has a plain softmax, no gate and no convolution there"
    if c.norm_over != "head" or not c.norm_scales:
        return "attention norms the queries and keys of every head, with scales, there"
    if c.exit_bias:
        return "attention has biases on queries, keys and values only there (bias_at=inputs)"
    if c.heads * c.head_dim != c.width:
        return f"{c.heads} heads of {c.head_dim} channels are {c.width} channels there"
    if c.position != "rope" or c.rope_channels != c.head_dim:
        return "attention turns all channels by RoPE there"
    if c.rope_form != RopeForm():
        return f"there is no rope_scaling={c.rope_form.scaling} there"
    assert isinstance(c.pattern, Window)
    return {
        "num_heads": c.heads,
        "num_kv_heads": c.kv_heads,
        "qkv_bias": c.entry_bias,
        "window_size": c.pattern.window,
        "rope_theta": c.rope_theta,
    }


def latent(c: LatentConfig) -> Fields | str:
    """The model `mla`."""
    if not _window(c.pattern):
        return "attention is full or has a sliding window there"
    if c.score != ScoreForm() or c.gate != "none" or c.bias:
        return "latent attention has a plain softmax, no gate and no biases there"
    if not c.rope_dim or c.rope_channels != c.rope_dim or c.rope_form != RopeForm():
        return "latent attention has a rotary key, turned by plain RoPE, there"
    assert isinstance(c.pattern, Window)
    return {
        "model_type": "mla",
        "num_heads": c.heads,
        "q_lora_rank": c.q_rank or None,
        "kv_lora_rank": c.latent,
        "qk_nope_head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_dim,
        "qk_head_dim": c.query_dim,
        "v_head_dim": c.value_dim,
        "window_size": c.pattern.window,
        "rope_theta": c.rope_theta,
    }


def mamba(c: SelectiveConfig) -> Fields | str:
    """The model `mamba`, a stack."""
    own = _mamba_layer(c)
    if isinstance(own, str):
        return own
    return {"model_type": "mamba", **own, "dt_rank": c.rank, "hidden_act": "silu"}


def samba(c: SelectiveConfig) -> Fields | str:
    """The model `samba`, whose rank has another name."""
    own = _mamba_layer(c)
    if isinstance(own, str):
        return own
    # `hidden_act` is the MLP's there.
    return {"model_type": "samba", **own, "time_step_rank": c.rank, "hidden_act": "swish"}


def _mamba_layer(c: SelectiveConfig) -> Fields | str:
    if c.inner_norms or c.gate != "silu" or not c.causal or not c.conv:
        return "Mamba has a convolution, a silu gate and no norms inside there"
    return {
        "state_size": c.rows,
        "expand": ratio(c.inner, c.width),
        "conv_kernel": c.conv,
        "use_bias": False,
        "use_conv_bias": True,
    }


def mamba2(c: RecurrenceConfig) -> Fields | str:
    """The model `mamba2`, a stack."""
    wrong = differs(c, _MAMBA2)
    if wrong or not c.conv:
        return f"{wrong or 'conv=0'} is not that of Mamba-2, which alone is stacked there"
    return {
        "model_type": "mamba2",
        "state_size": c.key_dim,
        "head_dim": c.value_dim,
        "n_groups": c.groups,
        "expand": ratio(c.inner, c.width),
        "conv_kernel": c.conv,
        "use_bias": False,
        "use_conv_bias": True,
        "rmsnorm": True,
        "norm_before_gate": False,
        "hidden_act": "silu",
    }


def linear(c: RecurrenceConfig) -> Fields | str:
    """The models `gla` and `retnet`."""
    if c.decay not in _LINEAR:
        return (
            f"decay={c.decay}: of these recurrences the library has GLA (vector) and RetNet "
            "(fixed) with a SwiGLU after each"
        )
    kind, wanted = _LINEAR[c.decay]
    wrong = differs(c, {**wanted, "groups": c.heads})
    if wrong:
        return f"{wrong} is not that of the library's {kind}"
    if c.rotary and c.key_dim > ROTARY_KEYS:
        return f"keys of {c.key_dim} channels: retnet has at most {ROTARY_KEYS} there"
    return {
        "model_type": kind,
        "num_heads": c.heads,
        "expand_k": ratio(c.heads * c.key_dim, c.width),
        "expand_v": ratio(c.inner, c.width),
        "use_short_conv": False,
        "use_output_gate": True,
    }


def delta(c: DeltaConfig) -> Fields | str:
    """The models `delta_net`, `gated_deltanet` and `gated_deltaproduct`."""
    if c.decay == "vector":
        return "Kimi Delta Attention has a bias in its gate there, and here it has none"
    wrong = differs(c, {"activation": "silu", "qk_norm": "l2", "norm": "rmsnorm", "gate_rank": 0})
    if wrong or c.gate not in ("none", "silu"):
        return f"{wrong or f'gate={c.gate}'} is not that of the library's delta rules"
    if c.groups != c.heads and (c.steps > 1 or c.decay == "none"):
        return f"groups={c.groups}: every head has queries and keys of its own there"
    own: Fields = {
        "use_short_conv": bool(c.conv),
        "conv_size": c.conv or 4,
        "allow_neg_eigval": c.negative_eigenvalues,
    }
    gated = c.gate == "silu"
    if c.steps > 1:
        kind: Fields = {
            "model_type": "gated_deltaproduct",
            "num_heads": c.heads,
            "head_dim": c.key_dim,
            "expand_v": ratio(c.value_dim, c.key_dim),
            "num_householder": c.steps,
            "use_forget_gate": c.decay == "scalar",
            "use_output_gate": gated,
        }
    elif c.decay == "scalar":
        kind = {
            "model_type": "gated_deltanet",
            "num_heads": c.groups,
            "num_v_heads": c.heads,
            "head_dim": c.key_dim,
            "expand_v": ratio(c.value_dim, c.key_dim),
            "use_gate": gated,
        }
    else:
        kind = {
            "model_type": "delta_net",
            "num_heads": c.heads,
            "expand_k": ratio(c.keys, c.width),
            "expand_v": ratio(c.inner, c.width),
            "use_gate": gated,
            "qk_norm": "l2",
            "qk_activation": "silu",
        }
    return {**kind, **own}


def rwkv7(c: Rwkv7Config) -> Fields | str:
    """The layers of the model `rwkv7` behind the first, where values are mixed."""
    if c.shift != "static" or c.inner != c.width:
        return "RWKV-7 has static token shifts and is as wide as the stream there"
    return {
        "model_type": "rwkv7",
        "head_dim": c.head_dim,
        "decay_low_rank_dim": c.rank,
        "a_low_rank_dim": c.rank,
        "gate_low_rank_dim": c.gate_rank,
        "v_low_rank_dim": c.value_rank,
        "hidden_act": "sqrelu",
        "norm_bias": True,
    }


Reader = Callable[[Any], Fields | str]

STACKS: Mapping[type, Reader] = {SelectiveConfig: mamba, RecurrenceConfig: mamba2}
"""Mixers of models without MLPs."""

NATIVE: Mapping[type, Reader] = {
    SelectiveConfig: samba,
    RecurrenceConfig: linear,
    DeltaConfig: delta,
    LatentConfig: latent,
}
"""Mixers of models with a SwiGLU after each, where attention may take some of the layers."""
