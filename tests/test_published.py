"""Published models: parameters, active parameters and caches as published, and as the
models of `transformers` have them on the meta device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published_references import REFERENCES

from mendel.genome import published
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.notation import parse
from mendel.genome.presets import PresetError
from mendel.genome.rules import violations

PARAMS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "jamba-v0.1": 51_570_323_328,
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_404_352,
}
ACTIVE = {"mixtral-8x7b": 12_879_925_248, "jamba-v0.1": 12_110_311_296}
ROUNDED_ACTIVE = {"deepseek-v2-lite": 2.66, "deepseek-v2": 21.38, "deepseek-v3": 37.55}
"""Thousand millions, embeddings included."""

CONTEXT = 262_144
CACHED = {
    "llama-2-7b": 524_288,
    "llama-3.1-8b": 131_072,
    "mistral-7b": 131_072,
    "mixtral-8x7b": 131_072,
    "deepseek-v2-lite": 31_104,
    "deepseek-v2": 69_120,
    "deepseek-v3": 70_272,
}
"""Bytes of one token's keys and values, or latents, in 16 bits."""

AUTO: Any = transformers.AutoModelForCausalLM


def test_every_model_is_proved_by_a_figure_or_a_reference() -> None:
    assert set(published.names()) == set(PARAMS) | set(REFERENCES) | set(SAMBA)


@pytest.mark.parametrize("name", published.names())
def test_every_model_is_valid_and_counted_in_under_a_second(name: str) -> None:
    model = published.describe(name)
    assert model.summary.endswith(".")
    assert model.source
    start = time.process_time()
    genome = model.genome()
    assert violations(genome) == []
    total = cost(genome, CONTEXT).total
    assert time.process_time() - start < 1
    assert total.params >= total.active_params > 0


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_as_published(name: str) -> None:
    total = cost(published.load(name)).total
    assert total.params == PARAMS[name]
    if name in ROUNDED_ACTIVE:
        assert round(total.active_params / 1e9, 2) == ROUNDED_ACTIVE[name]
    else:
        assert total.active_params == ACTIVE.get(name, PARAMS[name])


@pytest.mark.parametrize("name", REFERENCES)
def test_parameters_are_those_of_the_reference(name: str) -> None:
    with torch.device("meta"):
        theirs = AUTO.from_config(REFERENCES[name]())
    # `parameters` has a tied table once.
    assert cost(published.load(name)).total.params == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_at_256k_is_as_published(name: str) -> None:
    assert cost(published.load(name), CONTEXT, torch.bfloat16).total.state_bytes == (
        CACHED[name] * CONTEXT
    )


@pytest.mark.parametrize(
    ("name", "layers", "ranks"),
    [
        ("rwkv7-0.1b", 12, (64, 64, 32, 128)),
        ("rwkv7-0.4b", 24, (64, 64, 32, 128)),
        ("rwkv7-1.5b", 24, (96, 96, 64, 256)),
        ("rwkv7-2.9b", 32, (96, 96, 64, 320)),
    ],
)
def test_rwkv7_has_the_papers_count_and_a_state_that_does_not_grow(
    name: str, layers: int, ranks: tuple[int, int, int, int]
) -> None:
    """arXiv 2503.14456, appendix: ranks of decay, rate, values and gate."""
    genome = published.load(name)
    width = genome.width
    total = cost(genome, CONTEXT, torch.bfloat16).total
    ends = 2 * width * 65536 + 4 * width
    layer = width * (12 * width + 2 * sum(ranks) + 19)
    assert total.params == ends + layers * layer - (2 * width * ranks[2] + width)
    # Matrices of 64 x 64 in float32, and the last token of both mixers.
    assert total.state_bytes == layers * (width * 64 * 4 + 2 * width * 2)


SAMBA = {"samba-421m": (1536, 12), "samba-1.3b": (2304, 18)}
"""Width, and as many layers as heads."""


@pytest.mark.parametrize("name", SAMBA)
def test_samba_is_made_of_mamba_and_mistrals_layers(name: str) -> None:
    """Its sizes are those of microsoft/Samba, its layers those of other models."""
    width, layers = SAMBA[name]
    with torch.device("meta"):
        mamba = transformers.MambaConfig(hidden_size=width, num_hidden_layers=1)
        mixer = transformers.MambaModel(mamba).layers[0].mixer
        mistral = transformers.MistralConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers // 2,
            num_attention_heads=layers,
            num_key_value_heads=layers,
            tie_word_embeddings=True,
        )
        rest = AUTO.from_config(mistral)
    mlp = 3 * width * width * 8 // 3
    others = sum(p.numel() for p in mixer.parameters()) + mlp + 2 * width
    total = cost(published.load(name)).total.params
    assert total == sum(p.numel() for p in rest.parameters()) + layers // 2 * others
    assert f"{total // 10**6}m" == name[6:] or f"{total / 1e9:.1f}b" == name[6:]


@pytest.mark.parametrize(
    ("name", "total", "active"), [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)]
)
def test_gpt_oss_is_as_its_model_card_has_it(name: str, total: float, active: float) -> None:
    # The card's active parameters are without the embedding, with the head.
    genome = published.load(name)
    found = cost(genome).total
    assert round(found.params / 1e9, 2) == total
    assert round((found.active_params - genome.vocab * genome.width) / 1e9, 2) == active


def test_gpt_osss_windows_hold_128_tokens() -> None:
    genome = published.load("gpt-oss-20b")
    sizes = [cost(genome, n, torch.bfloat16).total.state_bytes for n in (128, 1128)]
    # Half of the 24 layers grow: eight heads of 64 channels, keys and values.
    assert sizes[1] - sizes[0] == 1000 * 12 * 2 * 8 * 64 * 2


def test_mistrals_first_cache_ends_with_its_window() -> None:
    total = cost(published.load("mistral-7b-v0.1"), CONTEXT, torch.bfloat16).total
    assert total.state_bytes == 131_072 * 4096


def test_jambas_cache_is_that_of_four_attentions_and_28_states() -> None:
    # Keys and values as published, 4 GiB; a state of 16 float32 and three bf16 inputs of the
    # convolution in each of 8192 channels.
    total = cost(published.load("jamba-v0.1"), CONTEXT, torch.bfloat16).total
    assert total.state_bytes == 4 * 2**30 + 28 * 8192 * (16 * 4 + 3 * 2)


@pytest.mark.parametrize(
    "notation",
    [
        "{width=64, position=none} jamba-mamba > mixtral(experts=16, renormalise=false)",
        "{width=64} mla(heads=2, head_dim=16, latent=32, rope_dim=8, q_rank=24)",
        "{width=64} moe(experts=8, top_k=2, expansion=0.25, shared=1, score=sigmoid, scale=2.5)",
        "{width=64} [gqa(heads=4, kv_heads=2) | mamba2(heads=3, expand=1.5, norm=none)](join=sum)",
        "{width=64, position=none} kda(heads=2, key_dim=16) > mla(heads=2, latent=32, rope_dim=8)",
        "{width=64, position=none} mamba2(heads=8, key_dim=16, groups=2) > relu2(expansion=5.25)",
    ],
)
def test_the_operators_work_at_a_small_size(notation: str) -> None:
    genome = parse(notation)
    assert difference(genome, seed=1) <= TOLERANCE
    assert sum(p.numel() for p in build(genome).parameters()) == cost(genome).total.params


def test_recurrentgemmas_cache_ends_with_the_window() -> None:
    # Eight windows of 2048 keys and values of 256 channels; 18 states of 2560 channels in float32
    # with three bf16 inputs of the convolution each.
    sizes = [cost(published.load("recurrentgemma-2b"), n, torch.bfloat16) for n in (2048, CONTEXT)]
    assert [size.total.state_bytes for size in sizes] == [
        8 * 2048 * 2 * 256 * 2 + 18 * 2560 * (4 + 3 * 2)
    ] * 2


def test_the_share_of_attention() -> None:
    shares = {n: published.attention_count(published.load(n)) for n in published.names()}
    assert shares["llama-2-7b"] == (32, 32)
    assert shares["jamba-v0.1"] == (4, 32)
    assert shares["mamba-2.8b"] == (0, 64)
    assert shares["nemotron-h-8b"] == (4, 28)
    assert shares["nemotron-h-47b"] == (5, 50)
    assert shares["nemotron-h-56b"] == (10, 64)
    assert shares["falcon-h1-0.5b"] == (36, 72)
    assert shares["recurrentgemma-2b"] == (8, 26)
    assert shares["qwen3-next-80b-a3b"] == (12, 48)
    assert shares["xlstm-7b"] == (0, 32)
    assert shares["kimi-linear-48b-a3b"] == (7, 27)


def test_the_readme_counts_them() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(published.names())} published models at their true size" in readme


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(PresetError) as caught:
        published.load("llama-3.1-8")
    assert str(caught.value) == (
        "no published model is named 'llama-3.1-8'; did you mean llama-3.1-8b or llama-2-7b?"
    )
