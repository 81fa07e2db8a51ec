"""Configurations of published models, as `transformers` writes them, read as genomes.

A pure function of a file's contents: neither the library nor a tensor is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...primitives.base import GeneError
from ...primitives.nearest import unknown
from ..files import GenomeFileError, parse_json
from ..genome import Genome
from . import deltas, dense, experts, hybrids, listed, mamba, recurrent, remote, zamba
from .fields import ConfigurationError as ConfigurationError
from .fields import Family, Fields, shown

FILE = "config.json"
"""The name under which a model's folder holds its configuration."""


FAMILIES: dict[str, Family] = {
    "llama": dense.llama,
    "mistral": dense.mistral,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
    "phi3": dense.phi3,
    "gemma": dense.gemma,
    "gemma2": dense.gemma2,
    "gemma3_text": dense.gemma3,
    "mixtral": experts.mixtral,
    "qwen3_moe": experts.qwen3_moe,
    "qwen2_moe": experts.qwen2_moe,
    "qwen3_next": deltas.qwen3_next,
    "olmoe": experts.olmoe,
    "llama4_text": experts.llama4,
    "gpt_oss": experts.gpt_oss,
    "deepseek_v2": experts.deepseek_v2,
    "deepseek_v3": experts.deepseek_v3,
    "mamba": mamba.mamba,
    "mamba2": mamba.mamba2_model,
    "jamba": hybrids.jamba,
    "falcon_h1": hybrids.falcon_h1,
    "granitemoehybrid": hybrids.granite,
    "bamba": hybrids.bamba,
    "zamba2": zamba.zamba2,
    "lfm2": listed.lfm2,
    "nemotron_h": listed.nemotron_h,
    "recurrent_gemma": recurrent.recurrent_gemma,
    "xlstm": recurrent.xlstm,
    "rwkv7": remote.rwkv7,
    "samba": remote.samba,
    "kimi_linear": deltas.kimi_linear,
}
"""The families by `model_type`."""

REFUSED = {
    "zamba": "its Mamba has heads with projections of their own for B, C and the step sizes",
    "olmo2": "it norms what a layer adds, and not what the layer reads",
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
        text = dict(text)
        if "tie_word_embeddings" in values:
            # The outer flag decides for the whole model.
            text["tie_word_embeddings"] = values["tie_word_embeddings"]
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
