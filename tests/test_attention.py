"""Attention against independent implementations and its formula, its genes, cost and cache.

Float32 tolerance 1e-5 of the output's scale: the same products summed in another order agree to
about sqrt(terms) * 2^-24, a tenth of that at these sizes.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
)
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mpt import modeling_mpt as mpt

from mendel.primitives.attention.attend import attend
from mendel.primitives.attention.axes import configure_plain as configure
from mendel.primitives.attention.distance import Alibi, DistanceForm
from mendel.primitives.attention.keyvalues import KeyValues
from mendel.primitives.attention.layer import Attention, AttentionConfig
from mendel.primitives.attention.patterns import Window
from mendel.primitives.attention.weigh import Score
from mendel.primitives.base import Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError

WIDTH = 48
TOKENS = 37
HEADS = 6

CASES: dict[str, dict[str, Gene]] = {
    "mha": {},
    "gqa": {"kv_heads": 2},
    "mqa-alibi": {"kv_heads": 1, "position": "alibi"},
    "sliding": {"pattern": "sliding", "window": 9},
    "sliding-alibi": {"pattern": "sliding", "window": 9, "position": "alibi", "kv_heads": 3},
    "window-1": {"pattern": "sliding", "window": 1},
    "conv": {"conv": 4, "pattern": "sliding", "window": 16},
    "conv-1": {"conv": 1},
    "bias-in": {"bias": True, "bias_at": "inputs", "gate": "sigmoid"},
    "bias-out": {"bias": True, "bias_at": "output"},
    "everything": {
        "kv_heads": 2,
        "head_dim": 10,
        "qk_norm": True,
        "norm_over": "all",
        "gate": "sigmoid",
        "bias": True,
        "conv": 3,
        "rope_theta": 500.0,
    },
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""float64 for the same reason as float32; bf16 has 8 bits, lost at other places in other orders."""


def config(genes: dict[str, Gene] | None = None, position: str = "rope") -> AttentionConfig:
    _, full = resolve("attention", {"heads": HEADS, **(genes or {})})
    return configure(Site(WIDTH, position), full)


def build(genes: dict[str, Gene] | None = None, dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    module = config(genes).build().to(dtype)
    assert isinstance(module, Attention)
    return module


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: Attention, x: Tensor, pieces: Sequence[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(list(pieces), 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


def copy_projections(to: Attention, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    with torch.no_grad():
        to.entry.weight.copy_(torch.cat((q, k, v)))
        to.exit.weight.copy_(o)


def causal_mask(tokens: int) -> Tensor:
    """(1, 1, T, T), what transformers' eager attention adds to its scores."""
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.zeros(tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)[
        None, None
    ]


@torch.no_grad()
def test_gqa_with_rope_is_llamas() -> None:
    settings = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = llama.LlamaAttention(settings, 0), inputs()
    ours = build({"kv_heads": 2, "rope_theta": 500.0})
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    angles = llama.LlamaRotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    assert error(ours(x)[0], reference(x, angles, causal_mask(TOKENS))[0]) < 1e-5


@torch.no_grad()
def test_the_window_is_mistrals() -> None:
    settings = MistralConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=WIDTH // HEADS,
        sliding_window=9,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = mistral.MistralAttention(settings, 0), inputs()
    ours = build({"kv_heads": 2, "pattern": "sliding", "window": 9})
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    positions = torch.arange(TOKENS)[None]
    angles = mistral.MistralRotaryEmbedding(settings)(x, positions)
    mask = create_sliding_window_causal_mask(settings, x, None, None, positions)
    assert error(ours(x)[0], reference(x, angles, mask)[0]) < 1e-5


@torch.no_grad()
def test_alibi_with_biases_is_blooms() -> None:
    settings = BloomConfig(
        hidden_size=WIDTH, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0
    )
    torch.manual_seed(0)
    reference, x = bloom.BloomAttention(settings, 0).eval(), inputs()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = build({"position": "alibi", "bias": True})

    def by_kind(fused: Tensor) -> Tensor:
        return fused.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)

    ours.entry.weight.copy_(by_kind(reference.query_key_value.weight))
    ours.entry.bias.copy_(by_kind(reference.query_key_value.bias))
    ours.exit.load_state_dict(reference.dense.state_dict())
    alibi = bloom.build_alibi_tensor(torch.ones(2, TOKENS), HEADS, torch.float32)
    expected = reference(x, torch.zeros_like(x), alibi, causal_mask(TOKENS))[0]
    assert error(ours(x)[0], expected) < 1e-5


@torch.no_grad()
def test_alibi_is_mpts() -> None:
    settings = MptConfig(d_model=WIDTH, n_heads=HEADS)
    torch.manual_seed(0)
    reference, x = mpt.MptAttention(settings, 0).eval(), inputs()
    ours = build({"position": "alibi"})
    ours.entry.load_state_dict(reference.Wqkv.state_dict())
    ours.exit.load_state_dict(reference.out_proj.state_dict())
    alibi = mpt.build_mpt_alibi_tensor(HEADS, TOKENS)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    assert error(ours(x)[0], reference(x, alibi, attention_mask=mask)[0]) < 1e-5


class Given(nn.Module):
    """Stands for a projection, with these outputs."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs


@torch.no_grad()
def test_the_convolution_acts_on_queries_keys_and_values() -> None:
    ours, x = build({"conv": 3}), inputs()
    assert ours.taps is not None
    plain = build()
    plain.exit.load_state_dict(ours.exit.state_dict())
    mixed = ours.entry(x).transpose(1, 2)
    convolved = F.conv1d(F.pad(mixed, (2, 0)), ours.taps[:, None], groups=mixed.shape[1])
    plain.entry = Given(convolved.transpose(1, 2))
    assert error(ours(x)[0], plain(x)[0]) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_equals_the_parallel_form(name: str, dtype: torch.dtype) -> None:
    module, x = build(CASES[name], dtype), inputs(dtype=dtype)
    whole, none = module(x)
    assert none is None
    assert whole.dtype == dtype
    for pieces in ([1] * TOKENS, [TOKENS], [8, 1, 20, 1, 7], [1, 9, 9, 18], [30, 7]):
        split, state = decode(module, x, pieces)
        assert state.length == TOKENS
        assert error(split, whole) < TOLERANCE[dtype], pieces


@pytest.mark.parametrize("name", CASES)
def test_counted_cost_is_the_real_one(name: str) -> None:
    module, counted = build(CASES[name]), config(CASES[name]).cost(TOKENS, torch.float32)
    x = inputs(batch=1)
    assert counted.params == sum(p.numel() for p in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, state = decode(module, x, [1] * TOKENS)
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)
    assert state.bytes() == counted.state_bytes


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    module = build(CASES[name])
    module(inputs())[0].square().sum().backward()
    for label, parameter in module.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label


def test_zero_key_value_heads_means_as_many_as_heads() -> None:
    _, genes = resolve("mha", {"heads": 2})
    assert configure(Site(WIDTH), genes) == config({"heads": 2, "kv_heads": 2}, position="none")


def test_genes_without_effect_leave_the_config_equal() -> None:
    assert config({"window": 7}) == config()
    assert config({"position": "none", "rope_theta": 7.0}) == config({"position": "none"})
    assert config(position="learned") == config({"position": "none"})
    assert config({"position": "rope"}, position="alibi") == config()


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"heads": 6, "kv_heads": 4}, "kv_heads=4 does not divide heads=6"),
        ({"heads": 5}, "heads=5 does not divide the width 48"),
        ({"heads": 16, "kv_heads": 1}, "head_dim=3 is odd"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        config(genes)


@pytest.mark.parametrize("genes", [{}, {"pattern": "sliding", "window": 64}], ids=["full", "ring"])
@torch.no_grad()
def test_a_full_cache_refuses_one_token_more(genes: dict[str, Gene]) -> None:
    module, x = build(genes), inputs()
    state = module.init_state(2, TOKENS - 1, torch.float32)
    before = [t.clone() for t in state.tensors.values()]
    with pytest.raises(ContextError, match="holds 36 tokens; this call needs 37"):
        module(x, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors.values(), strict=True))
    _, full = module(x[:, 1:], state)
    with pytest.raises(ContextError, match="holds 36 tokens; this call needs 37"):
        module(x[:, :1], full)


ATTEND: dict[str, tuple[int, int, int, int | None, bool]] = {
    # heads, key-value heads, tokens, window, ALiBi
    "full": (4, 2, 19, None, False),
    "alibi": (6, 3, 19, None, True),
    "masked": (4, 1, 19, 7, False),
    "banded": (4, 2, 40, 8, False),
    "banded-odd": (4, 4, 43, 8, False),
    "banded-alibi": (6, 2, 33, 8, True),
    "banded-of-1": (2, 1, 9, 1, False),
    "at-the-threshold": (2, 1, 20, 5, False),
}


@pytest.mark.parametrize("name", ATTEND)
def test_attention_over_a_sequence_is_its_formula(name: str) -> None:
    """Outputs and gradients against a loop over tokens and heads, in float64."""
    heads, groups, tokens, window, alibi = ATTEND[name]
    torch.manual_seed(0)
    shapes = ((heads, 6), (groups, 6), (groups, 6))
    given = [torch.randn(2, n, tokens, k, dtype=torch.float64).requires_grad_() for n, k in shapes]
    position = Alibi(DistanceForm("alibi", 6 * heads, heads, 6)).double() if alibi else None
    slopes = None if position is None else position.slopes
    q, k, v = given
    rows = []
    for t in range(tokens):
        first = 0 if window is None else max(0, t - window + 1)
        row = []
        for h in range(heads):
            seen = (slice(None), h * groups // heads, slice(first, t + 1))
            scores = (k[seen] @ q[:, h, t, :, None]).squeeze(-1) / 6**0.5
            if slopes is not None:
                scores = scores - slopes[h] * (t - torch.arange(first, t + 1))
            row.append((scores.softmax(-1).unsqueeze(1) @ v[seen]).squeeze(1))
        rows.append(torch.stack(row, 1))
    expected = torch.stack(rows, 2)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    out = attend(q, KeyValues(k, v), Window(window), Score(), position)
    got = torch.autograd.grad((out * weight).sum(), given)
    assert error(out, expected) < 1e-12
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "sliding-alibi", "everything"])
@torch.no_grad()
def test_a_cache_may_be_narrower_than_the_model(name: str) -> None:
    module, x = build(CASES[name]), inputs()
    state: State | None = module.init_state(2, TOKENS, torch.bfloat16)
    out = []
    for part in x.split([8, 1, 20, 1, 7], 1):
        y, state = module(part, state)
        out.append(y)
    # Keys and values rounded to 8 bits.
    assert error(torch.cat(out, 1), module(x)[0]) < 6e-2


def test_inference_mode_leaves_nothing_behind_that_training_refuses() -> None:
    module, x = build({"rope_theta": 31.0}), inputs()
    with torch.inference_mode():
        module(x)
    module(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
