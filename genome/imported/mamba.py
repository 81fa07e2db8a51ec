"""Models of Mamba layers alone: the library's configurations, and those of the authors' package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..genome import Genome, Op
from .fields import ConfigurationError, Fields, alone, family, op, shown
from .parts import conv_bias, layer_count, mamba2

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
    *("time_step_scale", "time_step_min", "time_step_max", "time_step_floor"),
    "time_step_init_scheme",
)
"""They decide how weights begin."""


@family(
    "MambaConfig", base={},
    vocab_size=50280, hidden_size=768, state_size=16, num_hidden_layers=32, layer_norm_epsilon=1e-5,
    expand=2, conv_kernel=4, use_bias=False, use_conv_bias=True, tie_word_embeddings=True,
    hidden_act="silu",
)  # fmt: skip
def mamba(f: Fields) -> Genome:
    """Mamba layers."""
    return _model(f, mamba1(f))


def mamba1(f: Fields) -> Op:
    """Mamba by the fields that the library and flash-linear-attention share."""
    f.never("use_bias", why="Mamba's projections have no biases in a genome")
    conv_bias(f, "use_conv_bias")
    f.neutral("hidden_act", "silu", "swish", what="the activation after the convolution")
    f.known(*STARTS)
    width, expand = f.whole("hidden_size"), f.number("expand")
    # It is Mamba's inner width, whatever the name says.
    inner = int(expand * width)
    f.same("intermediate_size", inner, f"expand={expand:g} makes it {inner}")
    rank = dt_rank(f, "time_step_rank")
    conv = f.whole("conv_kernel")
    return op("mamba", state=f.whole("state_size"), expand=expand, rank=rank, conv=conv)


def dt_rank(f: Fields, name: str) -> int:
    """The rank gene: 0 for a sixteenth of the width, rounded up, which `auto` means."""
    rank = f.get(name)
    if rank in (None, "auto"):
        return 0
    return 0 if f.whole(name) == -(-f.whole("hidden_size") // 16) else f.whole(name)


@family(
    "Mamba2Config", base={},
    num_heads=128, head_dim=64, vocab_size=32768, hidden_size=4096, state_size=128,
    num_hidden_layers=64, layer_norm_epsilon=1e-5, expand=2, conv_kernel=4, n_groups=8,
    use_bias=False, use_conv_bias=True, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
def mamba2_model(f: Fields) -> Genome:
    """Mamba-2 layers."""
    f.never("use_bias", why="Mamba's projections have no biases in a genome")
    conv_bias(f, "use_conv_bias")
    f.neutral("hidden_act", "silu", what="the activation after the convolution")
    f.known("time_step_rank", *STARTS)
    layer = mamba2(
        f,
        inner=int(f.number("expand") * f.whole("hidden_size")),
        heads="num_heads",
        head_dim="head_dim",
        state="state_size",
        groups="n_groups",
        taps="conv_kernel",
    )
    return _model(f, layer)


def _model(f: Fields, layer: Op) -> Genome:
    slots = alone(layer) * layer_count(f)
    return f.genome(slots, position="none", epsilon="layer_norm_epsilon")


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
