"""Multi-head latent attention against transformers, and its two forms against each other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.notation import parse
from mendel.genome.rules import violations
from mendel.primitives.attention.latent import LatentAttention, LatentConfig
from mendel.primitives.attention.patterns import Chunk, Window
from mendel.primitives.attention.score import ScoreForm
from mendel.primitives.base import Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError
from mendel.primitives.rope import PLAIN, RopeForm

WIDTH, HEADS, TOKENS = 48, 6, 37
COMMON: dict[str, Any] = {
    "width": WIDTH,
    "heads": HEADS,
    "head_dim": 10,
    "value_dim": 7,
    "latent": 16,
    "rope_dim": 4,
    "q_rank": 0,
    "pattern": Window(),
    "score": ScoreForm(),
    "rope_theta": 100.0,
    "rope_channels": 4,
    "rope_form": PLAIN,
    "gate": "none",
    "bias": False,
    "borrows": False,
}
NO_ROPE = {"rope_theta": 0.0, "rope_channels": 0}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "q-rank": {"q_rank": 12},
    "shared-key-without-rope": NO_ROPE,
    "no-shared-key": {**NO_ROPE, "rope_dim": 0},
    "sliding": {"pattern": Window(9)},
    "narrow-window": {"pattern": Window(3), "value_dim": 12},
    "sinks": {"pattern": Window(5, 2)},
    "dilated": {"pattern": Window(4, dilation=3)},
    "chunked": {"pattern": Chunk(8)},
    "gate-bias-sinks": {
        "gate": "sigmoid",
        "bias": True,
        "score": ScoreForm(sinks=True, cap=5.0),
        "q_rank": 12,
        "rope_form": RopeForm("linear", 4.0),
    },
    "mixture-of-heads": {"score": ScoreForm(active=2, shared=1)},
}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> LatentAttention:
    torch.manual_seed(0)
    module = LatentConfig(**{**COMMON, **changes}).build().to(dtype)
    assert isinstance(module, LatentAttention)
    return module


def inputs(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: LatentAttention, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(pieces, 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


def copy(ours: LatentAttention, theirs: nn.Module) -> None:
    """DeepSeek's weights, with the rows of rotary pairs (2i, 2i + 1) moved to (i, i + R/2)."""
    config = ours.config
    halves = torch.arange(config.rope_dim).view(-1, 2).T.flatten()
    head = torch.cat((torch.arange(config.head_dim), config.head_dim + halves))
    per_head = (torch.arange(HEADS)[:, None] * config.query_dim + head).flatten()
    own = torch.cat((torch.arange(config.latent), config.latent + halves))
    get = theirs.get_parameter
    if config.q_rank:
        assert ours.q_up is not None
        assert ours.q_norm is not None
        queries = get("q_a_proj.weight")
        ours.q_up.weight.copy_(get("q_b_proj.weight")[per_head])
        ours.q_norm.get_parameter("weight").copy_(get("q_a_layernorm.weight"))
    else:
        queries = get("q_proj.weight")[per_head]
    ours.entry.weight.copy_(torch.cat((queries, get("kv_a_proj_with_mqa.weight")[own])))
    ours.kv_norm.get_parameter("weight").copy_(get("kv_a_layernorm.weight"))
    ours.kv_up.weight.copy_(get("kv_b_proj.weight"))
    ours.exit.weight.copy_(get("o_proj.weight"))


@pytest.mark.parametrize("q_rank", [0, 12])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_it_is_deepseeks(version: str, q_rank: int) -> None:
    """Outputs of both forms and gradients, float32."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    settings: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": q_rank or None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 10,
        "v_head_dim": 7,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    x, at = inputs(torch.float32), torch.arange(TOKENS)[None]
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(hidden, torch.finfo(torch.float32).min)
    mask = mask[None, None]
    torch.manual_seed(2)
    if version == "v2":
        second = DeepseekV2Config(**settings, head_dim=4)
        theirs: nn.Module = v2.DeepseekV2Attention(second, 0)
        angles: Any = v2.DeepseekV2RotaryEmbedding(second)(x, at)
        call = {"position_embeddings": angles, "attention_mask": mask}
    else:
        third = DeepseekV3Config(**settings)
        theirs = v3.DeepseekV3Attention(third, 0)
        angles = v3.DeepseekV3RotaryEmbedding(third)(x, at)
        call = {"position_embeddings": angles, "attention_mask": mask}
    for name, parameter in theirs.named_parameters():
        if "layernorm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    ours = build(torch.float32, q_rank=q_rank)
    with torch.no_grad():
        copy(ours, theirs)
    expected = theirs(x, **call)[0]
    out = ours(x)[0]
    assert error(out, expected) < 1e-5
    with torch.no_grad():
        for pieces in ([1] * TOKENS, [20, 17]):
            assert error(decode(ours, x, pieces)[0], expected) < 1e-5
    expected.square().sum().backward()
    out.square().sum().backward()
    gradients = build(torch.float32, q_rank=q_rank)
    with torch.no_grad():
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
        copy(gradients, theirs)
    for wanted, got in zip(gradients.parameters(), ours.parameters(), strict=True):
        assert got.grad is not None
        assert error(got.grad, wanted) < 1e-5


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_both_forms_agree(name: str) -> None:
    module, x = build(**CASES[name]), inputs()
    whole = module(x)[0]
    for pieces in ([1] * TOKENS, [TOKENS], [1, 9, 9, 18], [8, 1, 20, 1, 7]):
        split, state = decode(module, x, pieces)
        assert state.length == TOKENS
        assert error(split, whole) < 1e-12, pieces


@pytest.mark.parametrize("name", CASES)
def test_counted_cost_is_the_real_one(name: str) -> None:
    module = build(**CASES[name])
    counted = module.config.cost(TOKENS, torch.float64)
    assert counted.params == sum(p.numel() for p in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, state = decode(module, inputs(batch=1), [1] * TOKENS)
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)
    assert state.bytes() == counted.state_bytes
    module(inputs())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_the_cache_is_the_latent_and_the_rotary_key() -> None:
    module = build()
    assert module.init_state(1, 100, torch.bfloat16).bytes() == 100 * (16 + 4) * 2
    assert module.config.cost(100, torch.bfloat16).state_bytes == 100 * (16 + 4) * 2
    with torch.no_grad(), pytest.raises(ContextError, match="holds 36 tokens; this call needs 37"):
        module(inputs(), module.init_state(2, TOKENS - 1, torch.float64))


def configure(genes: dict[str, Gene], position: str = "rope") -> LatentConfig:
    primitive, full = resolve("mla", genes)
    config = primitive.configure(Site(64, position), full)
    assert isinstance(config, LatentConfig)
    return config


def test_zeros_mean_deepseeks_proportions() -> None:
    config = configure({})
    sizes = config.head_dim, config.value_dim, config.latent, config.rope_dim, config.rope_channels
    assert sizes == (16, 16, 64, 8, 8)
    without = configure({}, "none")
    assert (without.rope_dim, without.rope_channels) == (0, 0)
    kimi = configure({"position": "none", "rope_dim": 8})
    assert (kimi.rope_dim, kimi.rope_channels) == (8, 0)


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"pattern": "multi-scale"}, "one cache for all heads"),
        ({"causal": False}, "not causal=false"),
        ({"position": "alibi"}, "not alibi"),
        ({"kv_heads": 2}, "kv_heads=0"),
        ({"qk_norm": True}, "qk_norm=false"),
        ({"conv": 3}, "conv=0"),
        ({"rope_scaling": "yarn"}, "yarn here warms"),
        ({"score": "differential"}, "softmax or sigmoid"),
        ({"rope_dim": 3}, "odd"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        configure(genes)


@pytest.mark.parametrize(
    "second", ["", ", head_dim=8, latent=32, rope_dim=4", ", pattern=sliding, window=8"]
)
def test_latents_can_be_shared_across_slots(second: str) -> None:
    first = ", latent=32, rope_dim=4" if "latent" in second else ""
    genome = parse(f"{{width=32}} mla(features=@k{first}) > swiglu > mla(features=@k{second})")
    assert not violations(genome)
    assert difference(genome, 1) <= TOLERANCE
    apart = parse("{width=32} mla > swiglu > mla")
    if not second:
        assert 2 * cost(genome, 50).total.state_bytes == cost(apart, 50).total.state_bytes


@pytest.mark.parametrize(
    ("borrower", "sentence"),
    [("mla(latent=8, features=@k)", "latent=32"), ("mha(features=@k)", "kv=latent lends latents")],
)
def test_what_cannot_be_shared_gets_a_sentence(borrower: str, sentence: str) -> None:
    genome = parse(f"{{width=32}} mla(features=@k) > {borrower}")
    with pytest.raises(AssertionError, match=sentence):
        assert not [v.sentence for v in violations(genome)]
