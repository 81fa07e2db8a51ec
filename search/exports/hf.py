"""The format `hf`: a model that transformers loads where Mendel is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...genome.blueprint import Blueprint
from ...genome.encoded import classes_of, encode
from ...genome.files import to_dict
from ...genome.genome import BYTE_VOCAB
from ...genome.resolve import blueprint
from ...primitives.base import BidirectionalError
from ...proxies.checkpoint import save_tensors
from ..terminal import Mistake
from .bundle import bundle
from .card import card
from .genome import write_design
from .order import Order
from .proof import write
from .tokenizer import settings, tokenizer
from .weights import Weights, find

WEIGHTS = "model.safetensors"
REFERENCE = "verify.safetensors"
"""Tokens, and the logits that the trained model gave for them."""
PREFIX = "model."
"""Before the names of the model's weights in the file."""

ROOT = "search.exports.modeling_mendel"
AUTO_MAP = {
    "AutoConfig": "configuration_mendel.MendelConfig",
    "AutoModelForCausalLM": "modeling_mendel.MendelForCausalLM",
}

DEFAULT_LENGTH = 2048
"""`max_position_embeddings` where nothing was trained."""

REFERENCE_TOKENS = 40

FILES = (
    "`config.json` holds the blueprint that the model is built from, `modeling_mendel.py`, "
    "`configuration_mendel.py` and `mendel_*.py` the code, with nothing but torch and transformers "
    "behind it (Triton too, where a GPU runs its kernels; Python 3.11 or newer); `genome.yaml` and "
    "`genome.json` the design, `costs.json` what it costs, `scores.json` what it and the baselines "
    "of the same budget scored, `provenance.json` how that came about and the sha256 of each file. "
    "`mendel verify` proves the folder."
)

LOAD = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```"""

FRESH = """```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
```"""

BYTES = (
    "`AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` loads the tokenizer (without "
    "the flag transformers asks whether it may read the model's configuration): the UTF-8 bytes of "
    "a text are its tokens, and the zero byte, which ends each document of a training text, is "
    "begin, end and padding."
)

NO_TOKENIZER = (
    "There is no tokenizer: the alphabet is the {vocab} tokens of the model's task, which are no "
    "text."
)

FOREIGN_TOKENIZER = (
    "There is no tokenizer: the model has {vocab:,} tokens and nothing here says what they are."
)

PADDING = (
    "`generate` decodes with a cache (greedy, sampling, beams). Rows may be padded to the left, "
    "or, without a cache, to the right; an `attention_mask` tells it, and a padded row gives what "
    "it gives alone. Columns hidden between tokens are refused."
)

TRAINING = (
    "In training mode the loss includes what operators add to it. Call `model.after_step()` after "
    "each step of the optimiser: experts adjust their balance and nGPT's weights return to the "
    "sphere; other models do nothing there. Train on rows without padding where slots choose among "
    "a row's tokens (`tokens=`): in training they choose among all of its columns."
)


def write_hf(order: Order, folder: Path) -> dict[str, Any]:
    """Write the model. Raises Mistake where the genome is not causal or weights do not fit."""
    source = order.source
    plan = blueprint(source.genome)
    try:
        plan.require_causal()
    except BidirectionalError as error:
        raise Mistake(f"--format hf is for causal language models: {error}") from None
    weights = find(order)
    for name, text in bundle([ROOT], classes_of(plan)).items():
        (folder / name).write_text(text, encoding="utf-8")
    is_text = source.genome.vocab == BYTE_VOCAB if weights is None else weights.byte_text
    write(folder / "config.json", config(plan, weights, is_text))
    write(folder / "generation_config.json", generation(is_text))
    if is_text:
        write(folder / "tokenizer.json", tokenizer())
        length = DEFAULT_LENGTH if weights is None else weights.length
        write(folder / "tokenizer_config.json", settings(length))
    if weights is not None:
        tensors = {PREFIX + name: tensor for name, tensor in weights.tensors.items()}
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
        save_tensors(reference(order, weights), folder / REFERENCE, {})
    vocab = None if weights is None else weights.vocab
    write_design(order, folder, vocab)
    text = card(
        source,
        weights=_whose(weights),
        files=FILES,
        vocab=vocab,
        uses=("mendel verify .", "mendel show genome.yaml"),
        before=_front_matter(),
        more=_usage(weights, is_text, source.genome.vocab),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return {"weights": None if weights is None else weights.facts()}


def config(plan: Blueprint, weights: Weights | None, is_text: bool) -> dict[str, Any]:
    """The content of config.json."""
    genome = plan.genome
    found = {
        "architectures": ["MendelForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "mendel",
        "dtype": "float32",
        "vocab_size": genome.vocab if weights is None else weights.vocab,
        "hidden_size": genome.width,
        "num_hidden_layers": len(genome.slots),
        "max_position_embeddings": DEFAULT_LENGTH if weights is None else weights.length,
        "tie_word_embeddings": genome.tied,
        "trained_on": None if weights is None else weights.task,
        "use_cache": True,
        "genome": to_dict(genome),
        "blueprint": encode(plan),
    }
    return found | (_special() if is_text else {})


def generation(is_text: bool) -> dict[str, Any]:
    """The content of generation_config.json: greedy, with the cache."""
    return {"do_sample": False, "use_cache": True} | (_special() if is_text else {})


def _special() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def reference(order: Order, weights: Weights) -> dict[str, Tensor]:
    """Tokens (2, T) and the trained model's logits (2, T, A) for them, in float32."""
    model = weights.model(order.source.genome)
    generator = torch.Generator().manual_seed(0)
    length = min(REFERENCE_TOKENS, weights.length)
    tokens = torch.randint(weights.vocab, (2, length), generator=generator)
    with torch.no_grad():
        logits = model(tokens)[0]
    return {"tokens": tokens, "logits": logits.contiguous()}


def _whose(weights: Weights | None) -> str:
    if weights is None:
        return "No weights are in this folder: nothing was trained, or nothing was kept."
    facts = weights.facts()
    return (
        f"The weights are those of {weights.name}, trained on {weights.task} for {weights.step} "
        f"steps ({facts['tokens']:,} tokens of sequences of {weights.length}), seed "
        f"{facts['seed']}."
    )


def _front_matter() -> list[str]:
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mendel, architecture-search]",
        "---",
        "",
    ]


def _usage(weights: Weights | None, is_text: bool, vocab: int) -> list[str]:
    if is_text:
        words = BYTES
    elif weights is not None:
        words = NO_TOKENIZER.format(vocab=weights.vocab)
    else:
        words = FOREIGN_TOKENIZER.format(vocab=vocab)
    paragraphs = [LOAD if weights is not None else FRESH, words, PADDING, TRAINING]
    return ["## Use", "", *(line for text in paragraphs for line in (text, ""))]
