"""Which model of flash-linear-attention a genome is, and its configuration; or why it is none.

The library's models are of two shapes. Most have layers of a mixer and a SwiGLU: one kind of mixer
of their own, and attention in the layers that the field `attn` names. Mamba and Mamba-2 are stacks
of themselves.
"""

from __future__ import annotations

from dataclasses import replace

from ...genome.genome import Genome, Slot
from ...genome.header import HEADER, JOIN
from ...genome.residual import norms_of
from ...genome.resolve import config_of, groups, primitive_of, sites
from ...primitives.attention.layer import AttentionConfig
from ...primitives.base import Config, show_gene
from ...primitives.channel.mlp import MlpConfig
from ...primitives.channel.rwkv import RwkvChannelConfig
from ...primitives.norm import LAYERNORM_EPS, RMSNORM_EPS
from ...primitives.recurrence.rwkv7 import Rwkv7Config
from .fla_layers import NATIVE, STACKS, Fields, Reader, attention, rwkv7

MULTIPLE = 256
"""Samba's inner width follows from a ratio and is rounded up to a multiple of this."""


_CARRIED = frozenset(("width", "vocab", "tied", "position", "norm", "placement", "residual"))
"""Header genes that are looked at, or go into the configuration."""


class NotExpressible(ValueError):
    """A genome that no model of the library is: one sentence that names the slot or the gene."""

    def __init__(self, sentence: str, slot: int = -1) -> None:
        super().__init__(sentence)
        self.slot = slot


def fla_config(genome: Genome) -> Fields:
    """The configuration, as `config.json` has it. Raises NotExpressible."""
    _require_no_sharing(genome)
    configs: list[Config] = []
    for i, (slot, row) in enumerate(zip(genome.slots, sites(genome), strict=True)):
        if len(slot.branches) > 1:
            raise _no(i, "operators side by side, where a layer of the library has one")
        if replace(slot, join=str(JOIN.default)) != Slot(slot.branches):
            raise _no(i, "not every token goes through it as in a layer of the library")
        configs.append(config_of(slot.branches[0], row[0]))
    ops = [slot.branches[0] for slot in genome.slots]
    names = [op.name for op in ops]
    mixes = [primitive_of(op).kind == "mixer" for op in ops]
    if any(isinstance(config, Rwkv7Config) for config in configs):
        _require_header(genome, "layernorm")
        return _written(genome, _rwkv7(configs, names, genome.embedding_norm), LAYERNORM_EPS)
    _require_header(genome, "rmsnorm")
    stack = STACKS.get(type(configs[0]))
    if stack is not None and (len(mixes) == 1 or mixes[1]):
        own = _stack(configs, names, stack)
    else:
        own = _alternating(configs, names, mixes, genome.width)
    return _written(genome, own, RMSNORM_EPS)


def _written(genome: Genome, own: Fields, epsilon: float) -> Fields:
    """The fields of a model with those that every model has."""
    return {
        "model_type": own.pop("model_type"),
        "vocab_size": genome.vocab,
        "hidden_size": genome.width,
        **own,
        "tie_word_embeddings": genome.tied,
        "norm_eps": epsilon,
        "fuse_norm": True,
        "fuse_cross_entropy": True,
    }


def _no(slot: int, why: str) -> NotExpressible:
    return NotExpressible(f"slot {slot}: {why}", slot)


def _require_header(genome: Genome, kind: str) -> None:
    """The header of the library's models: with RWKV-7 another norm, and one after the embedding."""
    norm, placement = norms_of(genome)
    asked = {"norm": norm, "placement": placement, "residual": genome.residual}
    for gene, allowed in {"residual": "plain", "norm": kind, "placement": "pre"}.items():
        if asked[gene] != allowed:
            raise NotExpressible(
                f"{gene}={asked[gene]}: every layer of the library has {gene}={allowed}"
            )
    carried = _CARRIED if kind == "rmsnorm" else {*_CARRIED, "embedding_norm"}
    for axis in HEADER:
        found = getattr(genome, axis.name)
        if axis.name not in carried and found != axis.default:
            raise NotExpressible(f"{axis.name}={show_gene(found)}: the library has no such model")
    if genome.position not in ("rope", "none"):
        raise NotExpressible(f"position={genome.position}: the library has no positions but RoPE's")


def _require_no_sharing(genome: Genome) -> None:
    shared: dict[int, str] = {}
    for kind in ("weights", "features"):
        for label, places in groups(genome, kind).items():
            if len(places) > 1:
                shared |= {slot: f"{kind}=@{label}" for slot, _ in places}
    if shared:
        first = min(shared)
        raise _no(first, f"{shared[first]} is shared, and layers of the library share nothing")


def _stack(configs: list[Config], names: list[str], read: Reader) -> Fields:
    own = read(configs[0])
    if isinstance(own, str):
        raise _no(0, f"{names[0]}: {own}")
    for i, config in enumerate(configs):
        if config != configs[0]:
            raise _no(
                i,
                f"{names[i]} is not the {names[0]} of slot 0: a model of the library without a "
                "SwiGLU after each mixer has one kind of layer",
            )
    return {"num_hidden_layers": len(configs), **own}


def _rwkv7(configs: list[Config], names: list[str], norm_first: bool) -> Fields:
    """RWKV-7 and its channel mixing in turn; only the first layer keeps its values as they are."""
    for i, config in enumerate(configs):
        mixer = i % 2 == 0
        if not isinstance(config, Rwkv7Config if mixer else RwkvChannelConfig):
            part = "mixer" if mixer else "channel mixing"
            raise _no(i, f"{names[i]} stands where the library's RWKV-7 has its {part}")
        if isinstance(config, RwkvChannelConfig) and (config.receptance or config != configs[1]):
            raise _no(i, f"{names[i]} is not the channel mixing that all layers have there")
        if isinstance(config, Rwkv7Config):
            wanted = "lend" if i == 0 else "mix"
            if config.value_mix != wanted:
                raise _no(i, f"{names[i]}: value_mix={config.value_mix} is {wanted} there")
            if i > 2 and config != configs[2]:
                raise _no(i, f"{names[i]} is not that of slot 2: all layers are the same there")
    if len(configs) % 2:
        raise _no(len(configs) - 1, "the library has a channel mixing after every mixer")
    last = configs[-2]
    assert isinstance(last, Rwkv7Config)
    first = configs[0]
    assert isinstance(first, Rwkv7Config)
    if replace(last, value_mix="lend", value_rank=0) != first:
        raise _no(2, f"{names[2]} has other sizes than that of slot 0: all are the same there")
    own = rwkv7(last)
    if isinstance(own, str):
        raise _no(0, f"{names[0]}: {own}")
    channel = configs[1]
    assert isinstance(channel, RwkvChannelConfig)
    layers: Fields = {"num_hidden_layers": len(configs) // 2, "intermediate_size": channel.inner}
    return layers | own | {"norm_first": norm_first, "attn": None}


def _alternating(configs: list[Config], names: list[str], mixes: list[bool], width: int) -> Fields:
    """Layers of a mixer and a SwiGLU. Of what is wrong the first slot is named."""
    failures: list[NotExpressible] = []
    own: Fields = {}
    try:
        _require_swiglu(configs, names, mixes)
    except NotExpressible as error:
        failures.append(error)
    try:
        inner = getattr(configs[1] if len(configs) > 1 else None, "inner", 0)
        own = _layers(configs[::2], names[::2], inner, width)
    except NotExpressible as error:
        failures.append(error)
    if failures:
        raise min(failures, key=lambda error: error.slot)
    return own


def _require_swiglu(configs: list[Config], names: list[str], mixes: list[bool]) -> None:
    """Every second slot is the same SwiGLU."""
    for i, config in enumerate(configs):
        if i % 2 == 0:
            if not mixes[i]:
                raise _no(i, f"{names[i]} stands where a layer of the library has its mixer")
            continue
        swiglu = isinstance(config, MlpConfig) and config.gated and config.activation == "silu"
        if not swiglu or getattr(config, "bias", False):
            raise _no(
                i,
                f"{names[i]} stands where a layer of the library has its SwiGLU, which has no "
                "biases",
            )
        if config != configs[1]:
            raise _no(i, "its inner width is not that of slot 1: the library has one for all")
    if len(configs) % 2:
        raise _no(len(configs) - 1, "the library has a SwiGLU after every mixer")


def _layers(mixers: list[Config], names: list[str], inner: int, width: int) -> Fields:
    """Layers of a mixer, in slot 2 i of layer i, and a SwiGLU of an inner width."""
    specs: dict[int, Fields] = {}
    own: Fields = {}
    native = -1
    for i, (config, name) in enumerate(zip(mixers, names, strict=True)):
        if isinstance(config, AttentionConfig):
            spec = attention(config)
            if isinstance(spec, str):
                raise _no(2 * i, f"{name}: {spec}")
            specs[i] = spec
        elif not own:
            own, native = _native(config, name, i), i
        elif config != mixers[native]:
            raise _no(
                2 * i,
                f"{name} is not the {names[native]} of slot {2 * native}: beside attention a model "
                "of the library has one kind of mixer",
            )
        if specs and own.get("model_type") == "mla":
            raise _no(2 * i, "latent attention stands beside no other mixer there")
    if not own and all(config == mixers[0] for config in mixers):
        own = {"model_type": "transformer", **specs[0], "qk_norm": _qk_norm(mixers[0])}
    elif not own:
        # Its Transformer has one kind of attention; a model whose own mixer no layer takes has
        # many.
        own = {"model_type": "gla", "attn": _attn(mixers, names, specs)}
    elif own["model_type"] != "mla":
        # Written also where there is none: Samba's own default has attention.
        own["attn"] = _attn(mixers, names, specs) if specs else None
    own |= {"num_hidden_layers": len(mixers), "fuse_swiglu": True}
    if own["model_type"] != "samba":
        return own | {"intermediate_size": inner, "hidden_act": "swish"}
    if inner % MULTIPLE:
        raise _no(1, f"an inner width of {inner}: in Samba it is a multiple of {MULTIPLE}")
    return own | {"hidden_ratio": 3 * inner / (2 * width)}


def _native(config: Config, name: str, layer: int) -> Fields:
    """The fields of a mixer that is no attention over heads."""
    read = NATIVE.get(type(config))
    own = "the library has no model of this mixer" if read is None else read(config)
    if isinstance(own, str):
        raise _no(2 * layer, f"{name}: {own}")
    return own


def _qk_norm(config: Config) -> bool:
    return isinstance(config, AttentionConfig) and config.qk_norm


def _attn(mixers: list[Config], names: list[str], specs: dict[int, Fields]) -> object:
    """One entry for every kind of attention, with the layers that have it; alone if it is one."""
    kinds: list[tuple[Fields, list[int]]] = []
    for layer, spec in specs.items():
        if _qk_norm(mixers[layer]):
            raise _no(2 * layer, f"{names[layer]}: qk_norm=true is only in a Transformer there")
        known = next((layers for kind, layers in kinds if kind == spec), None)
        if known is None:
            kinds.append((spec, [layer]))
        else:
            known.append(layer)
    entries = [{"layers": layers, **kind} for kind, layers in kinds]
    return entries[0] if len(entries) == 1 else entries
