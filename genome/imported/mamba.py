"""Models of Mamba layers alone: the library's configurations, and those of the authors' package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..genome import Genome
from .fields import ConfigurationError, Fields, alone, op, shown
from .parts import layer_count, mamba2

MAMBA: Mapping[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MAMBA2: Mapping[str, Any] = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
AUTHORS: Mapping[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
"""`MambaConfig` of the package mamba_ssm, whose files have no model_type."""

STARTS = (
    "time_step_scale",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_init_scheme",
)
"""They decide how weights begin."""


def mamba(f: Fields) -> Genome:
    """`MambaConfig`."""
    _common(f)
    f.epsilon("layer_norm_epsilon")
    width = f.whole("hidden_size")
    expand = f.number("expand")
    inner = f.get("intermediate_size")
    if inner not in (None, int(expand * width)):
        raise f.refuse("intermediate_size", f"expand={expand:g} makes it {int(expand * width)}")
    layer = op(
        "mamba",
        state=f.whole("state_size"),
        expand=expand,
        rank=dt_rank(f, "time_step_rank"),
        conv=f.whole("conv_kernel"),
    )
    return f.genome(alone(layer) * layer_count(f, None), position="none")


def dt_rank(f: Fields, name: str) -> int:
    """The rank gene: 0 for a sixteenth of the width, rounded up, which `auto` means."""
    rank = f.get(name)
    if rank in (None, "auto"):
        return 0
    return 0 if f.whole(name) == -(-f.whole("hidden_size") // 16) else f.whole(name)


def mamba2_model(f: Fields) -> Genome:
    """`Mamba2Config`."""
    _common(f)
    f.known("time_step_rank")
    layer = mamba2(
        f,
        inner=int(f.number("expand") * f.whole("hidden_size")),
        heads="num_heads",
        head_dim="head_dim",
        state="state_size",
        groups="n_groups",
        taps="conv_kernel",
        epsilon="layer_norm_epsilon",
    )
    return f.genome(alone(layer) * layer_count(f, None), position="none")


def _common(f: Fields) -> None:
    f.never("use_bias", why="Mamba's projections have no biases in a genome")
    f.always("use_conv_bias", why="a genome's Mamba has a bias on the convolution")
    f.neutral("hidden_act", "silu", what="the activation after the convolution")
    f.known(*STARTS)


def authors(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The library's configuration for a file of the package mamba_ssm, and its model_type.

    Raises ConfigurationError for what that package has and the genome not.
    """
    f = Fields(values, AUTHORS)
    f.never("d_intermediate", why="only stacks of Mamba layers without MLPs are read")
    f.never("attn_layer_idx", why="only stacks of Mamba layers without attention are read")
    f.always("rms_norm", why="only RMSNorm is read")
    f.known("attn_cfg", "fused_add_norm")
    ssm = f.get("ssm_cfg")
    if not isinstance(ssm, Mapping):
        raise ConfigurationError(f"ssm_cfg is a mapping, not {shown(ssm)}")
    layer = ssm.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2") or set(ssm) - {"layer"}:
        raise ConfigurationError("ssm_cfg holds nothing but layer, Mamba1 or Mamba2")
    multiple = f.whole("pad_vocab_size_multiple")
    width = f.whole("d_model")
    common = {
        "vocab_size": -(-f.whole("vocab_size") // multiple) * multiple,
        "hidden_size": width,
        "num_hidden_layers": f.whole("n_layer"),
        "tie_word_embeddings": f.flag("tie_embeddings"),
        **{name: values[name] for name in f.unread()},
    }
    if layer == "Mamba1":
        return "mamba", common
    return "mamba2", common | {"num_heads": 2 * width // 64, "n_groups": 1}
