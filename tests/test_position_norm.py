"""Positions and norms against transformers and the papers' formulas."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama import modeling_llama as llama

from mendel.primitives.base import GeneError
from mendel.primitives.norm import dyt_alpha, make_norm, norm_params
from mendel.primitives.position import ContextError, LearnedPosition, Rotary, alibi_slopes


@pytest.mark.parametrize("start", [0, 5, 1000])
def test_rope_is_llamas(start: int) -> None:
    settings = LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 19, 4, 12)
    cos, sin = llama.LlamaRotaryEmbedding(settings)(q, torch.arange(start, start + 19)[None])
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotary = Rotary(12, 700.0)
    for x, turned in zip((q, k), expected, strict=True):
        # Theirs multiplies position and frequency in float32: 1000 * 2^-24 is 6e-5 of an angle.
        torch.testing.assert_close(rotary(x, start), turned, atol=2e-4 if start else 1e-5, rtol=0)


@pytest.mark.parametrize("position", [0, 3, 40000])
def test_rope_turns_pairs_by_the_papers_angle(position: int) -> None:
    """Channels i and i + K/2 as a complex number times exp(1j * p * theta^(-2i/K)), in float64."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    y = Rotary(8, 10000.0)(x, position)
    for i in range(4):
        angle = torch.tensor(position * 10000.0 ** (-2 * i / 8), dtype=torch.float64)
        turned = torch.complex(x[..., i], x[..., i + 4]) * torch.polar(
            torch.ones_like(angle), angle
        )
        # The angle itself is exact to position * 2^-52.
        torch.testing.assert_close(y[..., i], turned.real, atol=1e-10, rtol=0)
        torch.testing.assert_close(y[..., i + 4], turned.imag, atol=1e-10, rtol=0)


def test_rope_sees_relative_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    rotary = Rotary(16, 10000.0)
    scores = [(rotary(q, p + 7) * rotary(k, p)).sum() for p in (0, 1, 300, 9000)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4))


@pytest.mark.parametrize("order", [(10, 3000), (3000, 10)])
def test_rope_tables_serve_any_order_of_lengths_and_dtypes(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shared = Rotary(8, 10000.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        for tokens in order:
            x = torch.randn(1, tokens, 2, 8, dtype=dtype)
            assert shared(x, 0).dtype == dtype
            assert torch.equal(shared(x, 0), Rotary(8, 10000.0)(x, 0))


def test_rope_keeps_its_angles_in_bf16() -> None:
    """A table rounded to 8 bits would be wrong by a fifth of a turn at token 300."""
    torch.manual_seed(0)
    rotary, x = Rotary(8, 10000.0).to(torch.bfloat16), torch.randn(1, 300, 2, 8)
    low = rotary(x.to(torch.bfloat16), 0).float()
    high = rotary(x.to(torch.bfloat16).float(), 0)
    # One rounding of the result to 8 bits.
    torch.testing.assert_close(low, high, rtol=2**-8, atol=2**-8)


def test_rope_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="width of 5 is odd"):
        Rotary(5, 10000.0)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 33])
def test_alibi_slopes_are_blooms(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs)


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    with pytest.raises(ValueError, match="at least one head"):
        alibi_slopes(0)


def test_learned_positions_continue_and_end() -> None:
    table = LearnedPosition(16, length=10)
    assert table(4).shape == (4, 16)
    assert torch.equal(torch.cat((table(4), table(6, 4))), table.table)
    with pytest.raises(ContextError, match="end at 10 tokens; this call needs 11"):
        table(1, 10)
    assert LearnedPosition.params(16, 10) == sum(p.numel() for p in table.parameters())
    default = LearnedPosition(16)
    assert LearnedPosition.params(16) == default.table.numel()


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "dyt", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind, 24)
    assert norm_params(kind, 24) == sum(p.numel() for p in norm.parameters())
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm, x = norm.to(dtype), torch.randn(3, 5, 24).to(dtype)
    y, numbers = x.double(), {n: p.double() for n, p in norm.named_parameters()}
    if kind == "dyt":
        y = torch.tanh(numbers["alpha"] * y)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdim=True)
    if kind in ("rmsnorm", "layernorm"):
        y = y / (y.square().mean(-1, keepdim=True) + (1e-6 if kind == "rmsnorm" else 1e-5)).sqrt()
    y = y * numbers.get("weight", 1.0) + numbers.get("bias", 0.0)
    assert norm(x).dtype == dtype
    # A few roundings of values of order 1.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x).double(), y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 3, 4, 24)], ids=str)
def test_rmsnorms_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = make_norm("rmsnorm", 24).double(), nn.RMSNorm(24, eps=1e-6).double()
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, weight = torch.randn(2, *shape, dtype=torch.float64)
    x[0] = 0.0
    got = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (norm(leaf) * weight).sum().backward()
        got.append((leaf.grad, norm.weight.grad))
    torch.testing.assert_close(got[0], got[1])


def test_rmsnorm_is_llamas() -> None:
    torch.manual_seed(0)
    theirs, ours, x = llama.LlamaRMSNorm(24), make_norm("rmsnorm", 24), torch.randn(2, 3, 24)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "before_attention", "elsewhere"),
    [(64, 1.0, 1.0), (1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (8192, 0.2, 0.05)],
)
def test_dyt_begins_as_published_for_llama(
    width: int, before_attention: float, elsewhere: float
) -> None:
    assert dyt_alpha(width, True) == before_attention
    assert dyt_alpha(width, False) == elsewhere
    assert make_norm("dyt", 8).alpha.item() == 0.5
    assert make_norm("dyt", 8, 0.25).alpha.item() == 0.25


def test_an_unknown_norm_gets_a_sentence() -> None:
    for call in (make_norm, norm_params):
        with pytest.raises(GeneError, match="norm is one of rmsnorm, layernorm, dyt, none, not b"):
            call("batchnorm", 8)


def test_a_fresh_learned_table_is_of_the_embeddings_size() -> None:
    torch.manual_seed(0)
    table = LearnedPosition(64).table
    assert table.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
