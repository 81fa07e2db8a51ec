"""Configurations of published models, as `transformers` writes them, read as genomes.

A pure function of a file's contents: neither the library nor a tensor is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...primitives.base import GeneError
from ...primitives.nearest import unknown
from ..files import GenomeFileError, parse_json
from ..genome import Genome
from . import dense, experts, hybrids, kimi, listed, mamba, qwen, recurrent, remote
from .fields import ConfigurationError as ConfigurationError
from .fields import Fields, shown

FILE = "config.json"
"""The name under which a model's folder holds its configuration."""


@dataclass(frozen=True)
class Family:
    """How the configurations of one model_type are read."""

    reference: str
    """The class whose defaults `defaults` are: of `transformers`, or with `fla.` before it of
    flash-linear-attention."""
    read: Callable[[Fields], Genome]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", dense.llama, dense.LLAMA),
    "mistral": Family("MistralConfig", dense.mistral, dense.MISTRAL),
    "qwen2": Family("Qwen2Config", dense.qwen2, dense.QWEN2),
    "qwen3": Family("Qwen3Config", dense.qwen3, dense.QWEN3),
    "phi3": Family("Phi3Config", dense.phi3, dense.PHI3),
    "gemma": Family("GemmaConfig", dense.gemma, dense.GEMMA),
    "gemma2": Family("Gemma2Config", dense.gemma2, dense.GEMMA2),
    "gemma3_text": Family("Gemma3TextConfig", dense.gemma3, dense.GEMMA3),
    "mixtral": Family("MixtralConfig", experts.mixtral, experts.MIXTRAL),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        qwen.qwen3_moe,
        qwen.QWEN3_MOE,
        {"num_experts": "num_local_experts"},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        qwen.qwen2_moe,
        qwen.QWEN2_MOE,
        {"num_local_experts": "num_experts"},
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        qwen.qwen3_next,
        qwen.QWEN3_NEXT,
        {"num_local_experts": "num_experts"},
    ),
    "gpt_oss": Family("GptOssConfig", qwen.gpt_oss, qwen.GPT_OSS),
    "deepseek_v2": Family("DeepseekV2Config", experts.deepseek_v2, experts.DEEPSEEK_V2),
    "deepseek_v3": Family("DeepseekV3Config", experts.deepseek_v3, experts.DEEPSEEK_V3),
    "mamba": Family("MambaConfig", mamba.mamba, mamba.MAMBA),
    "mamba2": Family("Mamba2Config", mamba.mamba2_model, mamba.MAMBA2),
    "jamba": Family("JambaConfig", hybrids.jamba, hybrids.JAMBA),
    "falcon_h1": Family("FalconH1Config", hybrids.falcon_h1, hybrids.FALCON_H1),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        hybrids.granite,
        hybrids.GRANITE,
        {"layers_block_type": "layer_types"},
    ),
    "bamba": Family("BambaConfig", hybrids.bamba, hybrids.BAMBA),
    "lfm2": Family(
        "Lfm2Config",
        listed.lfm2,
        listed.LFM2,
        {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        listed.nemotron_h,
        listed.NEMOTRON_H,
        {
            "layer_types": "layers_block_type",
            "attention_head_dim": "head_dim",
            "num_query_groups": "num_key_value_heads",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_conv_bias": "use_conv_bias",
            "mamba_dt_limit": "time_step_limit",
            "num_local_experts": "n_routed_experts",
        },
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        recurrent.recurrent_gemma,
        recurrent.RECURRENT_GEMMA,
        {"_block_types": "block_types"},
    ),
    "xlstm": Family("xLSTMConfig", recurrent.xlstm, recurrent.XLSTM),
    "rwkv7": Family("fla.RWKV7Config", remote.rwkv7, remote.RWKV7),
    "samba": Family("fla.SambaConfig", remote.samba, remote.SAMBA),
    "kimi_linear": Family("KimiLinearConfig", kimi.kimi_linear, kimi.KIMI_LINEAR, kimi.ALIASES),
}
"""The families by `model_type`."""

REFUSED = {
    "zamba2": "its attention blocks share all weights but low-rank adapters, and read the "
    "embeddings beside the stream",
    "olmoe": "it norms the queries and the keys of all heads together",
    "olmo2": "it norms the queries and the keys of all heads together",
    "falcon_mamba": "it norms B, C and the step sizes without learned scales",
}
"""What no genome has of families that are asked for."""


@dataclass(frozen=True)
class Imported:
    """What a configuration is as a genome."""

    family: str
    """Its model_type."""
    genome: Genome
    differs: tuple[str, ...]
    """What of the model the genome does not have: nothing of the language model that has parameters
    or is cached."""
    unread: tuple[str, ...]
    """Fields of the file that are not known here, and may mean something."""


def read(values: Any) -> Imported:
    """The genome of a configuration's contents. Raises ConfigurationError with one sentence."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"a configuration is a mapping, not {shown(values)}")
    kind = values.get("model_type")
    if kind is None and "d_model" in values and "ssm_cfg" in values:
        kind, values = mamba.authors(values)
    known = ", ".join(FAMILIES)
    if not isinstance(kind, str):
        raise ConfigurationError(f"model_type is {shown(kind)}; it is one of {known}")
    if kind in REFUSED:
        raise ConfigurationError(f"model_type {kind!r} is no genome: {REFUSED[kind]}")
    text = values.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if kind not in FAMILIES and isinstance(inner, str) and inner in FAMILIES:
        found = read(text)
        return replace(found, differs=(*found.differs, f"{kind}'s parts beside its language model"))
    if kind not in FAMILIES:
        sentence = f"model_type {kind!r} is not read"
        raise ConfigurationError(unknown(sentence, kind, FAMILIES, f"there are {known}"))
    family = FAMILIES[kind]
    fields = Fields(values, family.defaults, family.aliases)
    try:
        genome = family.read(fields)
    except GeneError as error:
        raise ConfigurationError(str(error)) from None
    except OverflowError:
        raise ConfigurationError("a number in it is larger than any model's") from None
    return Imported(kind, genome, tuple(fields.differs), tuple(fields.unread()))


def load(path: str | Path) -> Imported:
    """The genome of a configuration file, or of the one in a folder.

    Raises ConfigurationError with the path.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not a text file in UTF-8") from None
    try:
        return read(parse_json(text))
    except (GenomeFileError, ConfigurationError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
