"""Positions inside attention: against transformers, and against float64 formulas."""

import math
from typing import Any

import pytest
import torch
from attention_parts import (
    HEADS,
    TOKENS,
    WIDTH,
    build,
    causal_mask,
    check_forms_and_cost,
    check_gradients,
    config,
    copy_projections,
    error,
    inputs,
)
from torch import Tensor, nn
from transformers import (
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    RoFormerConfig,
    T5Config,
    XLNetConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.roformer import modeling_roformer as roformer
from transformers.models.t5 import modeling_t5 as t5
from transformers.models.xlnet import modeling_xlnet as xlnet

from mendel.primitives.attention.distance import DistanceForm, T5Buckets
from mendel.primitives.base import Gene, GeneError
from mendel.primitives.position import Rotary, SinusoidalPosition, added_position
from mendel.primitives.rope import RopeForm, sections

HEAD = WIDTH // HEADS


def compare(ours: nn.Module, y: Tensor, expected: Tensor, pairs: dict[str, Any]) -> None:
    """Outputs, and gradients by the names of ours; `pairs` gives theirs after the backward pass."""
    assert error(y, expected) < 1e-5
    weight = torch.randn_like(y)
    for out in (expected, y):
        (out * weight).sum().backward()
    check_gradients(ours, nn.Identity(), {name: make() for name, make in pairs.items()})  # type: ignore[arg-type]


def halves(channels: int) -> Tensor:
    """Where interleaved pairs' channels stand in the half-split layout: 0, 2, 4, .., 1, 3, 5, .."""
    return torch.cat((torch.arange(0, channels, 2), torch.arange(1, channels, 2)))


def split_halves(weight: Tensor, channels: int) -> Tensor:
    """Rows of a projection to heads, the first `channels` of every head from pairs to halves."""
    by_head = weight.unflatten(0, (HEADS, HEAD))
    turned = by_head[:, :channels][:, halves(channels)]
    return torch.cat((turned, by_head[:, channels:]), 1).flatten(0, 1)


def test_partial_rotary_is_gpt_js() -> None:
    """Theirs turns channels 2i and 2i + 1, which our layout keeps in the two halves."""
    settings = GPTJConfig(n_embd=WIDTH, n_head=HEADS, rotary_dim=4, attn_implementation="eager")
    torch.manual_seed(0)
    reference, x = gptj.GPTJAttention(settings, 0).eval(), inputs()
    ours = build({"position": "rope", "rope_fraction": 0.5})
    q, k, v, o = (getattr(reference, f"{n}_proj").weight for n in ("q", "k", "v", "out"))
    copy_projections(ours, split_halves(q, 4), split_halves(k, 4), v, o)
    mask = causal_mask()
    expected = reference(x, attention_mask=mask, position_ids=torch.arange(TOKENS)[None])[0]
    # One table for the batch.
    compare(
        ours,
        ours(x)[0],
        expected,
        {
            "entry.weight": lambda: torch.cat(
                [split_halves(q.grad, 4), split_halves(k.grad, 4), v.grad]
            )
        },
    )


def test_partial_rotary_is_neoxs() -> None:
    settings = GPTNeoXConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = neox.GPTNeoXAttention(settings, 0).eval(), inputs()
    ours = build({"position": "rope", "rope_fraction": 0.25, "bias": True})

    def by_kind(fused: Tensor) -> Tensor:
        return fused.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)

    with torch.no_grad():
        ours.entry.weight.copy_(by_kind(reference.query_key_value.weight))
        ours.entry.bias.copy_(by_kind(reference.query_key_value.bias))
        ours.exit.load_state_dict(reference.dense.state_dict())
    angles = neox.GPTNeoXRotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    expected = reference(x, causal_mask(), position_embeddings=angles)[0]
    fused = reference.query_key_value.weight
    compare(ours, ours(x)[0], expected, {"entry.weight": lambda: by_kind(fused.grad)})


def test_rope_is_roformers() -> None:
    settings = RoFormerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = roformer.RoFormerSelfAttention(settings).eval(), inputs()
    ours = build({"position": "rope", "bias": True})
    q, k, v = (getattr(reference, n).weight for n in ("query", "key", "value"))
    copy_projections(ours, split_halves(q, HEAD), split_halves(k, HEAD), v, torch.eye(WIDTH))
    with torch.no_grad():
        biases = [getattr(reference, n).bias for n in ("query", "key", "value")]
        parts = [split_halves(b, HEAD) for b in biases[:2]]
        ours.entry.bias.copy_(torch.cat([*parts, biases[2]]))
        ours.exit.bias.zero_()
    table = roformer.RoFormerSinusoidalPositionalEmbedding(64, HEAD)
    with torch.no_grad():
        table.weight.copy_(table.create_weight())
    angles = table(x.shape[:2])[None, None]
    expected = reference(x, causal_mask(), angles)[0]
    compare(
        ours,
        ours(x)[0],
        expected,
        {
            "entry.weight": lambda: torch.cat(
                [split_halves(q.grad, HEAD), split_halves(k.grad, HEAD), v.grad]
            )
        },
    )


SCALINGS: dict[str, tuple[RopeForm, dict[str, Any]]] = {
    "linear": (RopeForm("linear", 8.0), {"rope_type": "linear", "factor": 8.0}),
    # Theirs grows with the length of the call; at 4 times the original length with factor 1 its
    # base is that of the fixed form with factor 4.
    "ntk": (RopeForm("ntk", 4.0), {"rope_type": "dynamic", "factor": 1.0}),
    "yarn": (
        RopeForm("yarn", 4.0, 512),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "yarn-long": (
        RopeForm("yarn", 40.0, 4096),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    ),
    "yarn-unrounded": (
        RopeForm("yarn", 32.0, 4096, rounded=False),
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    ),
    "yarn-short": (
        RopeForm("yarn", 2.0, 8),
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    ),
}


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_transformers(name: str, theta: float, head_dim: int) -> None:
    form, parameters = SCALINGS[name]
    settings = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    length = 4 * 512 if name == "ntk" else None
    rate, temperature = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](settings, seq_len=length)
    # Theirs is computed in float32.
    torch.testing.assert_close(
        form.frequencies(head_dim, theta), rate.double(), rtol=1e-5, atol=1e-12
    )
    assert form.temperature == pytest.approx(temperature, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_scaled_rope_is_llamas_and_cached_keys_stay_right(name: str) -> None:
    form, parameters = SCALINGS[name]
    settings = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 500.0, **parameters},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = llama.LlamaAttention(settings, 0), inputs()
    genes: dict[str, Gene] = {
        "kv_heads": 2,
        "rope_theta": 500.0,
        "rope_scaling": name,
        "rope_factor": form.factor,
        "rope_original": 512,
    }
    ours = build(genes)
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    angles = llama.LlamaRotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    assert error(ours(x)[0], reference(x, angles, causal_mask())[0]) < 1e-5
    check_forms_and_cost(genes)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    """Pairs that turn over 32 times in the original length stay; below once, they are divided."""
    form = RopeForm("yarn", 4.0, 4096)
    plain, scaled = RopeForm().frequencies(64, 1e4), form.frequencies(64, 1e4)
    turns = plain * 4096 / (2 * math.pi)
    # The ramp ends at the next whole index on either side.
    assert torch.equal(scaled[turns > 64], plain[turns > 64])
    torch.testing.assert_close(scaled[turns < 0.5], plain[turns < 0.5] / 4)
    between = (scaled < plain) & (scaled > plain / 4)
    assert between.sum() > 5


@pytest.mark.parametrize("grid", [(1, 3), (4, 5)], ids=str)
def test_rope_over_patches_is_qwen2_vls(grid: tuple[int, int]) -> None:
    """M-RoPE with the frame, row and column of every token of a row-major video."""
    rows, columns = grid
    tokens, head = 3 * rows * columns - 2, 24
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, tokens, 4, head)
    index = torch.arange(tokens)
    places = torch.stack([index // (rows * columns), index // columns % rows, index % columns])
    rate = 10000.0 ** -(torch.arange(0, head, 2).double() / head)
    angle = torch.cat([places[..., None] * rate] * 2, -1)
    # (3, B, T, K), of which theirs picks the sections.
    cos, sin = (f[:, None].expand(-1, 2, -1, -1).float() for f in (angle.cos(), angle.sin()))
    merged = [_by_section(t, sections(head)) for t in (cos, sin)]
    expected = qwen2_vl.apply_rotary_pos_emb(q, k, *merged, unsqueeze_dim=2)
    rotary = Rotary(head, 10000.0, RopeForm(grid=grid))
    for x, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotary(x, 0), turned, rtol=0, atol=1e-5)


def _by_section(table: Tensor, parts: list[int]) -> Tensor:
    """Of (3, B, T, K) the frame's, row's and column's channels, in each of the two halves."""
    pieces = table.split(parts * 2, -1)
    return torch.cat([piece[i % 3] for i, piece in enumerate(pieces)], -1)


def test_sections_are_qwen2_vls() -> None:
    assert sections(128) == [16, 24, 24]
    assert all(sum(sections(k)) == k // 2 and min(sections(k)) > 0 for k in range(8, 200, 2))


def test_rope_over_patches_turns_by_frame_row_and_column() -> None:
    """Every pair as a complex number times exp(1j * place * w_i), token by token in float64."""
    torch.manual_seed(0)
    rows, columns, head = 3, 4, 16
    x = torch.randn(1, 30, 1, head, dtype=torch.float64)
    y = Rotary(head, 100.0, RopeForm(grid=(rows, columns)))(x[:, 5:], 5)
    frames, heights, widths = sections(head)
    for t in range(5, 30):
        frame, rest = divmod(t, rows * columns)
        places = [frame] * frames + [rest // columns] * heights + [rest % columns] * widths
        for i, place in enumerate(places):
            angle = torch.tensor(place * 100.0 ** (-2 * i / head), dtype=torch.float64)
            pair = torch.complex(x[0, t, 0, i], x[0, t, 0, i + head // 2])
            turned = pair * torch.polar(torch.ones_like(angle), angle)
            assert abs(turned.real - y[0, t - 5, 0, i]) < 1e-12
            assert abs(turned.imag - y[0, t - 5, 0, i + head // 2]) < 1e-12


def test_buckets_are_t5s() -> None:
    for buckets, reach in ((32, 128), (8, 20), (2, 5), (33, 1000)):
        ours = T5Buckets(DistanceForm("t5", WIDTH, HEADS, HEAD, buckets, reach))
        distance = torch.arange(-5, 2000)[None]
        theirs = t5.T5Attention._relative_position_bucket(-distance, False, buckets, reach)
        assert torch.equal(ours.buckets(distance), theirs)


def test_relative_buckets_are_t5s_attention() -> None:
    settings = T5Config(
        d_model=WIDTH,
        num_heads=HEADS,
        d_kv=HEAD,
        is_decoder=True,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    torch.manual_seed(0)
    reference = t5.T5Attention(settings, has_relative_attention_bias=True, layer_idx=0)
    x, ours = inputs(), build({"position": "t5", "t5_buckets": 8, "t5_reach": 20})
    # Theirs leaves 1 / sqrt(K) to the queries' weights.
    scale = HEAD**0.5
    copy_projections(
        ours,
        reference.q.weight * scale,
        reference.k.weight,
        reference.v.weight,
        reference.o.weight,
    )
    assert isinstance(ours.position, T5Buckets)
    with torch.no_grad():
        ours.position.table.copy_(reference.relative_attention_bias.weight)
    expected = reference(x, mask=causal_mask())[0]
    compare(
        ours,
        ours(x)[0],
        expected,
        {
            "entry.weight": lambda: torch.cat(
                (reference.q.weight.grad / scale, reference.k.weight.grad, reference.v.weight.grad)
            ),
            "position.table": lambda: reference.relative_attention_bias.weight.grad,
        },
    )


def test_the_relative_encoding_is_xlnets() -> None:
    """Transformer-XL's, as XLNet computes it, without its residual norm and segments."""
    settings = XLNetConfig(d_model=WIDTH, n_head=HEADS, dropout=0.0, attn_type="uni")
    torch.manual_seed(0)
    reference, x = xlnet.XLNetRelativeAttention(settings), inputs()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = build({"position": "xl"})

    def rows(weight: Tensor) -> Tensor:
        return weight.flatten(1).T

    names = ("q", "k", "v")
    copy_projections(ours, *(rows(getattr(reference, n)) for n in names), reference.o.flatten(1))
    assert ours.position is not None
    with torch.no_grad():
        state = {
            "content": reference.r_w_bias,
            "position": reference.r_r_bias,
            "relative.weight": rows(reference.r),
        }
        ours.position.load_state_dict(state)
    reference.layer_norm = nn.Identity()
    distances = torch.arange(TOKENS, -1, -1.0)
    rate = 10000.0 ** -(torch.arange(0, WIDTH, 2.0) / WIDTH)
    table = xlnet.XLNetModel.positional_embedding(distances, rate, 2)
    mask = torch.ones(TOKENS, TOKENS).triu(1)[:, :, None, None]
    steps = x.transpose(0, 1)
    out = reference(steps, None, mask, None, table, None)[0]
    expected = (out - steps).transpose(0, 1)
    compare(
        ours,
        ours(x)[0],
        expected,
        {
            "entry.weight": lambda: torch.cat([rows(getattr(reference, n).grad) for n in names]),
            "position.content": lambda: reference.r_w_bias.grad,
            "position.position": lambda: reference.r_r_bias.grad,
            "position.relative.weight": lambda: rows(reference.r.grad),
        },
    )


LAYERS: dict[str, dict[str, Gene]] = {
    "t5": {"position": "t5", "t5_buckets": 6, "t5_reach": 12, "kv_heads": 2},
    "t5-window": {"position": "t5", "pattern": "sliding", "window": 9},
    "xl": {"position": "xl", "kv_heads": 2},
    "xl-window": {"position": "xl", "pattern": "sliding", "window": 9, "qk_norm": True},
    "xl-differential": {"position": "xl", "score": "differential"},
    "xl-wide": {"position": "xl", "head_dim": 10},
    "partial": {"position": "rope", "rope_fraction": 0.4, "head_dim": 12, "qk_norm": True},
    "ntk": {"position": "rope", "rope_scaling": "ntk", "pattern": "sliding", "window": 9},
    "rope3d": {"position": "rope3d", "grid_height": 2, "grid_width": 3, "kv_heads": 2},
    "rope3d-yarn": {"position": "rope3d", "rope_scaling": "yarn", "rope_original": 16},
}


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_agree_and_cost_what_they_count(name: str) -> None:
    check_forms_and_cost(LAYERS[name])


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_are_the_papers(width: int) -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i + 1) = cos of it, sines first; / sqrt(D)."""
    position = SinusoidalPosition(width).double()
    table = position(9, 3000)
    for p in range(9):
        for i in range(width):
            channel = 2 * i if i < (width + 1) // 2 else 2 * (i - (width + 1) // 2)
            angle = (p + 3000) * 10000.0 ** (-channel / width)
            wave = math.sin(angle) if i < (width + 1) // 2 else math.cos(angle)
            # The angle is exact to 3000 * 2^-53.
            assert float(table[p, i]) == pytest.approx(wave * width**-0.5, abs=1e-11)
    assert not list(position.parameters())
    assert not position.state_dict()


def test_added_positions_by_name() -> None:
    assert added_position("rope", 8) is None
    assert isinstance(added_position("sinusoidal", 8), SinusoidalPosition)


def test_added_positions_leave_nothing_inside() -> None:
    for added in ("learned", "sinusoidal"):
        assert config({}, position=added) == config({"position": "none"})
    for inside in ("t5", "xl", "alibi"):
        assert config({}, position=inside) == config({"position": inside})


def test_genes_without_effect_leave_the_config_equal() -> None:
    assert config({"rope_factor": 9.0, "rope_original": 70, "grid_width": 3}) == config({})
    assert config({"rope_scaling": "yarn", "rope_factor": 1.0}) == config({})
    assert config({"rope_rounded": False}) == config({})
    linear: dict[str, Gene] = {"rope_scaling": "linear"}
    assert config({**linear, "rope_rounded": False}) == config(linear)
    linear: dict[str, Gene] = {"rope_scaling": "linear"}
    assert config({**linear, "rope_original": 70}) == config(linear)
    none: dict[str, Gene] = {"position": "none"}
    assert config({**none, "rope_scaling": "yarn", "rope_fraction": 0.5}) == config(none)
    assert config({**none, "t5_buckets": 7}) == config(none)


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"rope_fraction": 0.1}, "is no pair of channels"),
        ({"position": "rope3d", "rope_fraction": 0.5}, "needs 8 of them, not 4"),
        ({"rope_scaling": "yarn", "rope_theta": 1.0}, "with rope_theta=1 all agree"),
        ({"position": "t5", "t5_reach": 16}, "t5_reach=16 lies among the 16 distances"),
    ],
)
def test_what_does_not_go_together_gets_a_sentence(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        config(genes)
