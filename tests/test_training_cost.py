"""What training costs: the figures of publications, and the operations that torch counts."""

import pytest
import torch
from flop_count import counter

from mendel.genome import published
from mendel.genome.build import build
from mendel.genome.cost import cost
from mendel.genome.devices import COMMON, DEVICES, DeviceError, find_device
from mendel.genome.notation import parse
from mendel.genome.resolve import configs
from mendel.genome.training_cost import BYTES_PER_PARAMETER, TrainingCost, training_cost
from mendel.primitives.attention.latent import LatentConfig
from mendel.primitives.base import training_flops

LLAMA_1B = "{width=2048, vocab=128256} [gqa(heads=32, kv_heads=8) > swiglu(expansion=4)]*16"
"""The Transformer of Bae et al., arXiv 2510.04800."""


def without_head(found: TrainingCost) -> float:
    return found.tokens * (found.flops_per_token - found.head_flops)


def test_llama_1b_is_as_published() -> None:
    # 60B tokens in sequences of 8K cost 4.5e20 there, the embedding and the head left out.
    found = training_cost(parse(LLAMA_1B), 8192, tokens=60e9)
    assert without_head(found) == pytest.approx(4.5e20, rel=0.01)


def test_gpt_3_is_as_published() -> None:
    # Brown et al., arXiv 2005.14165, table D.1: 3.14e23 for 300B tokens, attention left out.
    genome = parse("{width=12288, position=learned, norm=layernorm, vocab=50257} "
                   "[mha(heads=96, bias=true) > gelu-mlp]*96")  # fmt: skip
    assert cost(genome).total.params == pytest.approx(175e9, rel=0.01)
    found = training_cost(genome, 1, tokens=300e9)
    assert found.flops == pytest.approx(3.14e23, rel=0.01)


@pytest.mark.parametrize("context", [1, 2048, 8192])
def test_it_is_the_formula_of_dense_models(context: int) -> None:
    genome = published.load("llama-2-7b")
    width, layers, vocab = 4096, 32, 32000
    norms = (2 * layers + 1) * width
    dense = cost(genome).total.params - 2 * vocab * width - norms
    attention = 12 * layers * width * (context + 1) / 2
    found = training_cost(genome, context)
    assert found.flops_per_token == pytest.approx(6 * dense + attention + 6 * vocab * width)
    assert found.head_flops == 6 * vocab * width


@pytest.mark.parametrize(
    "text", ["mha > swiglu", "mamba2(key_dim=8) > gelu-mlp", "mha > moe(experts=4, top_k=2)"]
)
def test_a_step_has_three_forward_passes(text: str) -> None:
    genome = parse(f"{{width=32}} {text}")
    model = build(genome)
    tokens = torch.randint(0, 256, (1, 1))
    with counter() as counted:
        logits = model(tokens)[0]
        logits.sum().backward()
    # The gradients of the table's output have no product where the inputs are looked up.
    assert counted.get_total_flops() == pytest.approx(
        training_cost(genome, 1).flops_per_token, rel=0.05
    )


@pytest.mark.parametrize("text", ["mla", "mla(q_rank=16)", "mla(rope_dim=4, value_dim=12)"])
def test_latent_attention_trains_in_another_form_than_it_decodes(text: str) -> None:
    tokens = 48
    config = configs(parse(f"{{width=64}} {text} > swiglu"))[0][0]
    assert isinstance(config, LatentConfig)
    layer = config.build()
    with counter() as counted, torch.no_grad():
        layer(torch.zeros(1, tokens, 64))
    # The kernel computes all pairs of tokens, with values as wide as keys.
    heads, keys, values = config.heads, config.query_dim, config.value_dim
    seen = (tokens + 1) / 2
    pairs = 2 * heads * (2 * max(keys, values) * tokens - (keys + values) * seen)
    expected = tokens * (training_flops(config, tokens) + pairs)
    assert counted.get_total_flops() == pytest.approx(expected)
    decoding = config.cost(tokens, torch.bfloat16).flops_per_token
    assert training_flops(config, tokens) < decoding


def test_reversible_backbones_compute_their_slots_once_more() -> None:
    plain = training_cost(parse("{width=32} mha > swiglu"))
    again = training_cost(parse("{width=32, residual=reversible} mha > swiglu"))
    assert again.head_flops == plain.head_flops
    slots = plain.flops_per_token - plain.head_flops
    assert again.flops_per_token == pytest.approx(plain.head_flops + slots * 4 / 3)


def test_tokens_follow_the_active_parameters() -> None:
    genome = published.load("mixtral-8x7b")
    found = training_cost(genome)
    assert found.tokens == 20 * 12_879_925_248
    assert found.memory == BYTES_PER_PARAMETER * 46_702_792_704
    given = training_cost(genome, tokens=1e12)
    assert given.ratio == pytest.approx(1e12 / 12_879_925_248)
    assert training_cost(genome, ratio=40).flops == pytest.approx(2 * found.flops)


def test_hours_and_memory_of_devices() -> None:
    found = training_cost(parse(LLAMA_1B), 8192, tokens=60e9)
    h100 = find_device("h100")
    # 4.47e20, and 0.95e20 for the head.
    assert found.seconds(h100, 0.5) / 3600 == pytest.approx(304, rel=0.01)
    # 1,236M parameters: 19.8 GB.
    assert found.fits(find_device("RTX 4090"))
    assert not found.fits(find_device("TPU-v5e"))
    assert not training_cost(published.load("deepseek-v3")).fits(h100)
    assert {device.name for device in DEVICES} >= {*COMMON, "H200", "B200", "MI300X"}
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    assert all(device.source and device.memory < device.peak for device in DEVICES)
    with pytest.raises(DeviceError, match=r"no device is named 'H10O'; there are .*H100"):
        find_device("H10O")
