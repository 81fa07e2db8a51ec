"""Attention layers by pattern: against transformers, against loops of the papers' equations in
float64, any split of a sequence, counted costs.

Tolerances as in `attention_parts`.
"""

from collections.abc import Callable

import pytest
import torch
from attention_parts import (
    HEADS,
    TOKENS,
    WIDTH,
    build,
    check_forms_and_cost,
    config,
    copy_projections,
    error,
    inputs,
)
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig
from transformers.masking_utils import create_chunked_causal_mask
from transformers.models.big_bird import modeling_big_bird as big_bird
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.longformer import modeling_longformer as longformer

from mendel.primitives.attention.axes import configure
from mendel.primitives.attention.bigbird import Blocks
from mendel.primitives.attention.layer import Attention
from mendel.primitives.attention.longformer import Longformer
from mendel.primitives.attention.patterns import PerHead, Window
from mendel.primitives.base import BidirectionalError, Gene, GeneError, Site
from mendel.primitives.catalogue import resolve

CASES: dict[str, dict[str, Gene]] = {
    "sinks": {"pattern": "sliding", "window": 5, "sinks": 3},
    "sinks-alibi": {"pattern": "sliding", "window": 5, "sinks": 3, "position": "alibi"},
    "global": {"pattern": "global", "window": 4, "globals": 2, "kv_heads": 2},
    "dilated": {"pattern": "dilated", "window": 4, "dilation": 3, "gate": "sigmoid"},
    "dilated-xl": {"pattern": "dilated", "window": 4, "dilation": 3, "position": "xl"},
    "chunked": {"pattern": "chunked", "window": 8, "kv_heads": 3, "qk_norm": True},
    "chunked-t5": {"pattern": "chunked", "window": 8, "position": "t5", "t5_buckets": 8},
    "strided": {"pattern": "strided", "stride": 6, "kv_heads": 2},
    "strided-alibi": {"pattern": "strided", "stride": 6, "position": "alibi", "conv": 3},
    "fixed": {"pattern": "fixed", "stride": 6, "summary": 2, "bias": True},
    "fixed-t5": {"pattern": "fixed", "stride": 6, "summary": 2, "position": "t5", "t5_buckets": 8},
    "bigbird": {"pattern": "bigbird", "window": 8, "block": 4, "random": 2, "kv_heads": 2},
    "bigbird-alibi": {"pattern": "bigbird", "window": 5, "block": 4, "position": "alibi"},
    "multi-scale": {"pattern": "multi-scale", "window": 16, "kv_heads": 3},
    "multi-scale-sinks": {"pattern": "multi-scale", "window": 16, "sink_logits": True},
    "adaptive-span": {"pattern": "adaptive-span", "window": 12, "ramp": 4},
    "adaptive-span-alibi": {
        "pattern": "adaptive-span",
        "window": 12,
        "ramp": 4,
        "position": "alibi",
        "kv_heads": 2,
    },
    "sigmoid-sinks": {"pattern": "sliding", "window": 5, "sinks": 3, "score": "sigmoid"},
    "sigmoid-fixed": {"pattern": "fixed", "stride": 6, "summary": 2, "score": "sigmoid"},
    "talking-dilated": {"pattern": "dilated", "window": 4, "talking_heads": True},
    "differential-bigbird": {
        "pattern": "bigbird",
        "window": 8,
        "block": 4,
        "score": "differential",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_any_split_equals_the_whole_and_costs_are_counted(name: str) -> None:
    check_forms_and_cost(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    module = build(CASES[name])
    module(inputs())[0].square().sum().backward()
    for label, parameter in module.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


def test_state_bytes_are_those_of_what_is_kept() -> None:
    """Two key-value heads of 8 channels, keys and values, float32, 1,000 tokens."""
    per_token = 2 * 8 * 4
    wanted: list[tuple[dict[str, Gene], int]] = [
        ({"pattern": "full"}, 2 * 1000),
        ({"pattern": "sliding", "window": 64, "sinks": 4}, 2 * 68),
        ({"pattern": "global", "window": 64, "globals": 4}, 2 * 68),
        ({"pattern": "dilated", "window": 64, "dilation": 3}, 2 * (63 * 3 + 1)),
        ({"pattern": "chunked", "window": 64}, 2 * 64),
        ({"pattern": "strided", "stride": 32}, 33 + 1000),
        # 31 whole blocks of 8 summaries, none in the 8 tokens after them, the token itself.
        ({"pattern": "fixed", "stride": 32, "summary": 8}, 32 + 31 * 8 + 1),
        ({"pattern": "multi-scale", "window": 64}, 32 + 64),
        ({"pattern": "adaptive-span", "window": 64}, 2 * 64),
        ({"pattern": "bigbird", "window": 64, "block": 16, "random": 0}, 2 * 5 * 16),
    ]
    for genes, kept in wanted:
        cost = config({"kv_heads": 2, **genes}).cost(1000, torch.float32)
        assert cost.state_bytes == kept * per_token, genes


def heads_of(module: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, T, K) without position."""
    counts = [module.config.heads, module.config.kv_heads, module.config.kv_heads]
    mixed = module.entry(x).unflatten(-1, (-1, module.config.head_dim)).transpose(1, 2)
    q, k, v = mixed.split(counts, 1)
    return q, k, v


def loop(
    module: Attention,
    x: Tensor,
    seen: Callable[[int, int], list[int]],
    weight: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """sum_j w_j exp(q_i k_j / sqrt(K)) v_j / sum_j w_j exp(...) over the j that `seen(head, i)`
    names, token by token and head by head; `weight(head, distance)` is 1 if not given."""
    q, k, v = heads_of(module, x)
    width, groups = module.config.head_dim, module.config.heads // module.config.kv_heads
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        for i in range(x.shape[1]):
            top = torch.zeros(x.shape[0], width, dtype=x.dtype)
            bottom = torch.zeros(x.shape[0], 1, dtype=x.dtype)
            for j in seen(h // groups, i):
                score = (q[:, h, i] * k[:, h // groups, j]).sum(-1, keepdim=True) / width**0.5
                e = score.exp() if weight is None else score.exp() * weight(h, i - j)
                top, bottom = top + e * v[:, h // groups, j], bottom + e
            out[:, h, i] = top / bottom
    y: Tensor = module.exit(out.transpose(1, 2).flatten(2))
    return y


LOOPS: dict[str, tuple[dict[str, Gene], Callable[[int, int], list[int]]]] = {
    # Xiao et al., 2309.17453, 3.2: the first tokens and the latest.
    "streaming-llm": (
        {"pattern": "sliding", "window": 5, "sinks": 3},
        lambda g, i: sorted({*range(min(3, i + 1)), *range(max(0, i - 4), i + 1)}),
    ),
    # Beltagy et al., 2004.05150, figure 2c.
    "dilated": (
        {"pattern": "dilated", "window": 4, "dilation": 3},
        lambda g, i: [j for j in (i - 9, i - 6, i - 3, i) if j >= 0],
    ),
    # Child et al., 1904.10509, 4.2: A(1) = {t..i}, t = max(0, i - l), and A(2) = {j: (i - j) mod l
    # = 0}.
    "strided": (
        {"pattern": "strided", "stride": 6, "kv_heads": 2},
        lambda g, i: (
            list(range(max(0, i - 6), i + 1))
            if g == 0
            else [j for j in range(i + 1) if (i - j) % 6 == 0]
        ),
    ),
    # A(1) = {j: floor(j / l) = floor(i / l)}; A(2) = {j: j mod l in {t..l}}, t = l - c, and i.
    "fixed": (
        {"pattern": "fixed", "stride": 6, "summary": 2, "kv_heads": 2},
        lambda g, i: (
            [j for j in range(i + 1) if j // 6 == i // 6]
            if g == 0
            else [j for j in range(i + 1) if j % 6 >= 4 or j == i]
        ),
    ),
    # Guo et al., 1912.00544: another window per head; here 4, 8 and 16.
    "multi-scale": (
        {"pattern": "multi-scale", "window": 16, "kv_heads": 3},
        lambda g, i: list(range(max(0, i + 1 - (4, 8, 16)[g]), i + 1)),
    ),
    "both-ways": (
        {"pattern": "sliding", "window": 4, "sinks": 2, "causal": False, "kv_heads": 2},
        lambda g, i: [j for j in range(TOKENS) if abs(i - j) < 4 or j < 2 or i < 2],
    ),
    "full-both-ways": ({"causal": False}, lambda g, i: list(range(TOKENS))),
    "multi-scale-both-ways": (
        {"pattern": "multi-scale", "window": 8, "causal": False, "kv_heads": 2},
        lambda g, i: [j for j in range(TOKENS) if abs(i - j) < (4, 8)[g]],
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_layer_is_its_papers_loop(name: str) -> None:
    """Outputs and gradients in float64."""
    genes, seen = LOOPS[name]
    module, x = (
        build({"position": "none", **genes}, dtype=torch.float64),
        inputs(dtype=torch.float64),
    )
    weight = torch.randn_like(x)
    ours, theirs = module(x)[0], loop(module, x, seen)
    assert error(ours, theirs) < 1e-12
    parameters = list(module.parameters())
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), parameters),
        torch.autograd.grad((theirs * weight).sum(), parameters),
        strict=True,
    ):
        assert error(got, wanted) < 1e-11


def test_adaptive_span_is_the_papers() -> None:
    """Sukhbaatar et al., 1905.07799, equations 3 to 6, with the spans' gradients."""
    genes: dict[str, Gene] = {
        "position": "none",
        "pattern": "adaptive-span",
        "window": 12,
        "ramp": 4,
        "span_penalty": 0.01,
    }
    module, x = build(genes, dtype=torch.float64), inputs(dtype=torch.float64)
    assert module.span is not None
    with torch.no_grad():
        # No mask bends at a whole distance, where its gradient is a convention.
        module.span.share.copy_(torch.tensor([0.02, 0.1, 0.3, 0.52, 0.77, 0.9]))
    spans = 12 * module.span.share

    def mask(head: int, distance: int) -> Tensor:
        return ((4 + spans[head] - distance) / 4).clamp(0, 1)

    seen = lambda g, i: range(max(0, i - 11), i + 1)  # noqa: E731
    ours, theirs = module(x)[0], loop(module, x, seen, mask)  # type: ignore[arg-type]
    assert error(ours, theirs) < 1e-12
    weight = torch.randn_like(x)
    parameters = list(module.parameters())
    got = torch.autograd.grad((ours * weight).sum(), parameters)
    wanted = torch.autograd.grad((theirs * weight).sum(), parameters)
    for (label, _), a, b in zip(module.named_parameters(), got, wanted, strict=True):
        assert error(a, b) < 1e-11, label
    loss = module.auxiliary_loss()
    assert loss is not None
    assert loss.item() == pytest.approx(0.01 * 12 * 2.61 / 6)
    (gradient,) = torch.autograd.grad(loss, [module.span.share])
    torch.testing.assert_close(gradient, torch.full((6,), 0.02, dtype=torch.float64))


def test_a_span_out_of_bounds_counts_as_the_bound_and_comes_back() -> None:
    genes: dict[str, Gene] = {"pattern": "adaptive-span", "window": 12, "ramp": 4}
    module, x = build(genes, dtype=torch.float64), inputs(dtype=torch.float64)
    assert module.span is not None
    results = []
    for share in (-0.5, 0.0):
        nn.init.constant_(module.span.share, share)
        y = module(x)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), [module.span.share])
        results.append((y, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().min() > 0


def test_chunks_are_llama_4s() -> None:
    settings = Llama4TextConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=WIDTH // HEADS,
        num_hidden_layers=4,
        attention_chunk_size=9,
        use_qk_norm=False,
        attn_temperature_tuning=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = llama4.Llama4TextAttention(settings, 0), inputs()
    genes: dict[str, Gene] = {"pattern": "chunked", "window": 9, "kv_heads": 2, "rope_theta": 500.0}
    ours = build(genes)

    def halves(weight: Tensor) -> Tensor:
        """Their RoPE turns neighbouring channels, ours those half a head apart."""
        pairs = weight.unflatten(0, (-1, WIDTH // HEADS // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    q, k = (halves(getattr(reference, f"{n}_proj").weight) for n in "qk")
    copy_projections(ours, q, k, reference.v_proj.weight, reference.o_proj.weight)
    positions = torch.arange(TOKENS)[None]
    turns = llama4.Llama4TextRotaryEmbedding(settings)(x, positions)
    mask = create_chunked_causal_mask(settings, x, None, None, positions)
    with torch.no_grad():
        assert error(ours(x)[0], reference(x, turns, mask)[0]) < 1e-5


def longformer_of(genes: dict[str, Gene]) -> Longformer:
    torch.manual_seed(0)
    full = {"heads": HEADS, "pattern": "global", "causal": False, "bias": True, **genes}
    module = configure(Site(WIDTH), resolve("attention", full)[1]).build()
    assert isinstance(module, Longformer)
    return module


@pytest.mark.parametrize(("tokens", "first"), [(48, 1), (48, 3), (16, 2)])
def test_longformer_is_transformers(tokens: int, first: int) -> None:
    """Outputs, and the gradients of all six projections: block by block (48 tokens), in one piece
    (16)."""
    settings = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[8],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    reference, x = longformer.LongformerSelfAttention(settings, 0), inputs(tokens)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = longformer_of({"window": 5, "globals": first})
    kinds = ("query", "key", "value")
    with torch.no_grad():
        for suffix, linear in (("", ours.entry), ("_global", ours.across)):
            theirs = [getattr(reference, kind + suffix) for kind in kinds]
            linear.weight.copy_(torch.cat([t.weight for t in theirs]))
            linear.bias.copy_(torch.cat([t.bias for t in theirs]))
        ours.exit.weight.copy_(torch.eye(WIDTH))
        ours.exit.bias.zero_()
    is_global = torch.arange(tokens).expand(2, -1) < first
    wanted = reference(
        x,
        attention_mask=10000.0 * is_global,
        is_index_masked=torch.zeros(2, tokens, dtype=torch.bool),
        is_index_global_attn=is_global,
        is_global_attn=True,
    )[0]
    got = ours(x)[0]
    assert error(got, wanted) < 1e-5
    weight = torch.randn_like(x)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    for suffix, linear in (("", ours.entry), ("_global", ours.across)):
        theirs = [getattr(reference, kind + suffix).weight.grad for kind in kinds]
        assert linear.weight.grad is not None
        assert error(linear.weight.grad, torch.cat(theirs)) < 1e-5


def test_longformers_causal_form_is_a_window_with_sinks() -> None:
    genes: dict[str, Gene] = {"window": 5, "globals": 2}
    assert config({**genes, "pattern": "global"}) == config(
        {"pattern": "sliding", "window": 5, "sinks": 2}
    )


@torch.no_grad()
def test_both_directions_of_bigbird_are_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the blocks that ours drew put in place of those that theirs would draw."""
    settings = BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=4,
        num_random_blocks=2,
        attention_probs_dropout_prob=0.0,
        use_bias=False,
    )
    tokens, pattern = 64, Blocks(4, 2, 1, 2, causal=False)
    blocks = tokens // 4
    torch.manual_seed(0)
    reference, x = big_bird.BigBirdBlockSparseAttention(settings, 1).eval(), inputs(tokens)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    drawn = []
    for block in range(1, blocks - 1):
        fixed = {0, blocks - 1, block - 1, block, block + 1}
        drawn.append([other for other in pattern.row(block, blocks) if other not in fixed])
    assert all(len(row) == 2 for row in drawn)
    ours = build(
        {
            "pattern": "bigbird",
            "window": 8,
            "block": 4,
            "globals": 4,
            "random": 2,
            "causal": False,
            "position": "none",
        }
    )
    assert ours.config.pattern == pattern
    weights = [getattr(reference, kind).weight for kind in ("query", "key", "value")]
    copy_projections(ours, *weights, torch.eye(WIDTH))
    monkeypatch.setattr(
        reference,
        "_bigbird_block_rand_mask_with_head",
        lambda **_: [torch.tensor(drawn).numpy()] * HEADS,
    )
    masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, tokens), 4)
    blocked, band, from_mask, to_mask = masks
    wanted = reference(
        x,
        band_mask=band,
        from_mask=from_mask,
        to_mask=to_mask,
        from_blocked_mask=blocked,
        to_blocked_mask=blocked,
    )[0]
    assert error(ours(x)[0], wanted) < 1e-5


def test_what_reads_later_tokens_has_no_state() -> None:
    for genes in ({"causal": False}, {"causal": False, "pattern": "sliding", "window": 5}):
        module, settings = build(genes), config(genes)
        assert not settings.causal
        assert settings.cost(64, torch.float32).state_bytes == 0
        with pytest.raises(BidirectionalError):
            module.init_state(1, 8, torch.float32)


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"pattern": "strided", "kv_heads": 1}, "kv_heads=1 is odd"),
        ({"pattern": "fixed", "stride": 4, "summary": 5}, "summary=5 is more than the stride 4"),
        ({"pattern": "fixed", "talking_heads": True}, "goes with talking_heads=false"),
        ({"pattern": "multi-scale", "score": "differential"}, "heads of a pair would see"),
        ({"pattern": "strided", "position": "xl"}, "does not go with position=xl"),
        ({"pattern": "chunked", "causal": False}, "reads earlier tokens only"),
        ({"causal": False, "conv": 3}, "goes with conv=0"),
        ({"causal": False, "position": "t5"}, "biases of earlier tokens only"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        config(genes)


@pytest.mark.parametrize(
    "genes", [{"kv_heads": 2}, {"qk_norm": True}, {"gate": "sigmoid"}, {"logit_cap": 5.0}]
)
def test_longformer_has_nothing_else(genes: dict[str, Gene]) -> None:
    with pytest.raises(GeneError, match="has the projections of Longformer, without"):
        longformer_of(genes)


def test_the_windows_of_multi_scale_double() -> None:
    pattern = config({"pattern": "multi-scale", "window": 32}).pattern
    assert pattern == PerHead(tuple(Window(w) for w in (1, 2, 4, 8, 16, 32)))
    assert config({"pattern": "multi-scale", "kv_heads": 1}).pattern == Window(128)
