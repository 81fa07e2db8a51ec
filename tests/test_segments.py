"""Segment recurrence against the paper's equations in float64 and against XLNet's memory.

Float64 tolerance 1e-10 of the scale, float32 1e-5: the same sums in another order.
"""

import pytest
import torch
from torch import Tensor
from transformers import XLNetConfig
from transformers.models.xlnet import modeling_xlnet as xlnet

from mendel.genome.check import TOLERANCE, difference
from mendel.genome.notation import parse
from mendel.primitives.attention.axes import configure
from mendel.primitives.attention.segments import SegmentAttention, Segments
from mendel.primitives.base import Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve

WIDTH, HEADS, TOKENS = 24, 4, 37

CASES: dict[str, dict[str, Gene]] = {
    "none": {"position": "none", "segment": 5, "memory": 7},
    "rope": {"position": "rope", "segment": 8, "memory": 8, "kv_heads": 2, "qk_norm": True},
    "alibi": {"position": "alibi", "segment": 4, "memory": 9, "gate": "sigmoid", "bias": True},
    "xl": {"position": "xl", "segment": 8, "memory": 8},
    "no-memory": {"position": "xl", "segment": 8, "memory": 0},
    "segment-1": {"position": "alibi", "segment": 1, "memory": 6},
    "long-memory": {"position": "xl", "segment": 4, "memory": 30, "kv_heads": 1},
    "one-segment": {"position": "xl", "segment": 64, "memory": 3},
    "scores": {"score": "differential", "position": "rope", "segment": 6, "memory": 6},
    "sigmoid": {"score": "sigmoid", "position": "alibi", "segment": 6, "memory": 6},
}


def build(genes: dict[str, Gene], dtype: torch.dtype = torch.float64) -> SegmentAttention:
    _, full = resolve("transformer-xl", {"heads": HEADS, **genes})
    torch.manual_seed(0)
    module = configure(Site(WIDTH), full).build().to(dtype)
    assert isinstance(module, SegmentAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def projected(module: SegmentAttention, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, (B, heads, T, K), of tokens whose first has position `first`, from the weights."""
    c = module.config
    weight, bias = module.entry.weight, module.entry.bias
    mixed = x @ weight.T if bias is None else x @ weight.T + bias
    heads = mixed[..., : c.mixed_width].unflatten(-1, (-1, c.head_dim))
    q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], 2)
    if module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rotary is not None:
        q, k = module.rotary(q, first), module.rotary(k, first)
    repeat = c.heads // c.kv_heads
    k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def position_scores(module: SegmentAttention, q: Tensor, t: int, keys: range) -> Tensor:
    """What the position adds to the scores (B, H, S) of the query q (B, H, K) at position t."""
    c = module.config
    distance = torch.tensor([t - s for s in keys], dtype=q.dtype)
    if c.position == "alibi":
        slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / c.heads) for h in range(c.heads)])
        return (-slopes[:, None] * distance)[None].expand(q.shape[0], -1, -1)
    if c.position != "xl":
        return torch.zeros(q.shape[0], c.heads, len(keys), dtype=q.dtype)
    parameters = dict(module.position.named_parameters())  # type: ignore[union-attr]
    rate = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=q.dtype) / WIDTH)
    angle = distance[:, None] * rate
    relative = torch.cat((angle.sin(), angle.cos()), -1) @ parameters["relative.weight"].T
    relative = relative.unflatten(-1, (c.heads, -1))
    biased = q + parameters["position"]
    return torch.einsum("bhk,shk->bhs", biased, relative) / c.head_dim**0.5


def recurrence(module: SegmentAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, segment by segment and token by token, with stopped gradients."""
    c = module.config
    assert isinstance(c.pattern, Segments)
    size, memory = c.pattern.segment, c.pattern.memory
    content: Tensor | float = 0.0
    if c.position == "xl":
        content = dict(module.position.named_parameters())["content"]  # type: ignore[union-attr]
    rows = []
    for start in range(0, x.shape[1], size):
        first = max(0, start - memory)
        segment = x[:, start : start + size]
        extended = torch.cat((x[:, first:start].detach(), segment), 1)
        q = projected(module, segment, start)[0]
        _, k, v = projected(module, extended, first)
        for i in range(segment.shape[1]):
            t = start + i
            seen = t + 1 - first
            scores = torch.einsum("bhk,bhsk->bhs", q[:, :, i] + content, k[:, :, :seen])
            scores = scores / c.head_dim**0.5
            scores = scores + position_scores(module, q[:, :, i], t, range(first, t + 1))
            rows.append(torch.einsum("bhs,bhsk->bhk", scores.softmax(-1), v[:, :, :seen]))
    out = torch.stack(rows, 1).flatten(2)
    if c.gate == "sigmoid":
        weight, bias = module.entry.weight, module.entry.bias
        out = out * torch.sigmoid(x @ weight[c.mixed_width :].T + bias[c.mixed_width :])
    return module.exit(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("scores", "sigmoid")])
def test_it_is_the_papers_recurrence_with_its_stopped_gradients(name: str) -> None:
    module, x = build(CASES[name]), inputs().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    expected = recurrence(module, x)
    leaves = [x, *module.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for state in (None, module.init_state(2, TOKENS, x.dtype)):
        y, _ = module(x, state)
        got = torch.autograd.grad((y * weight).sum(), leaves)
        assert error(y, expected) < 1e-10
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_is_the_whole(name: str) -> None:
    module, x = build(CASES[name]), inputs()
    whole = module(x)[0]
    for pieces in ([1] * TOKENS, [8, 1, 20, 1, 7], [30, 7], [3, 5, 8, 21]):
        state: State | None = module.init_state(2, TOKENS, x.dtype)
        size = state.bytes()
        out = []
        for part in x.split(pieces, 1):
            y, state = module(part, state)
            out.append(y)
        assert state is not None
        assert state.bytes() == size == 2 * module.config.cost(TOKENS, x.dtype).state_bytes
        assert error(torch.cat(out, 1), whole) < 1e-10, pieces


def test_no_gradient_reaches_an_earlier_segment() -> None:
    module, x = build(CASES["xl"]), inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0][:, 20].square().sum(), x)
    reached = [t for t in range(TOKENS) if gradient[:, t].abs().max() > 0]
    assert reached == [16, 17, 18, 19, 20]
    # It is read all the same: tokens 8 to 15 are the memory.
    with torch.no_grad():
        changed = x.detach().clone()
        changed[:, 8] += 1.0
        assert (module(changed)[0] - module(x)[0])[:, 20].abs().max() > 1e-6
        changed = x.detach().clone()
        changed[:, 7] += 1.0
        assert (module(changed)[0] - module(x)[0])[:, 20].abs().max() == 0


@torch.no_grad()
def test_memory_and_relative_positions_are_xlnets() -> None:
    """XLNet's attention over mems: u, v and R as in Transformer-XL; two segments of 8 tokens."""
    settings = XLNetConfig(
        d_model=WIDTH, n_head=HEADS, d_inner=8, n_layer=1, attn_type="uni", dropout=0.0
    )
    torch.manual_seed(0)
    theirs = xlnet.XLNetRelativeAttention(settings).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = build({"segment": 8, "memory": 8}, torch.float32)
    flat = [getattr(theirs, name).flatten(1).T for name in "qkv"]
    ours.entry.weight.copy_(torch.cat(flat))
    ours.exit.weight.copy_(theirs.o.flatten(1))
    position = dict(ours.position.named_parameters())  # type: ignore[union-attr]
    position["content"].copy_(theirs.r_w_bias)
    position["position"].copy_(theirs.r_r_bias)
    position["relative.weight"].copy_(theirs.r.flatten(1).T)

    x = inputs(16, torch.float32)
    first, second = x.transpose(0, 1).split(8)
    encoding = xlnet.XLNetModel(settings).relative_positional_encoding(8, 16, bsz=2)
    hidden = torch.ones(8, 16).triu(9)[:, :, None, None]
    q = torch.einsum("ibh,hnd->ibnd", second, theirs.q)
    k, v = (
        torch.einsum("ibh,hnd->ibnd", torch.cat((first, second)), getattr(theirs, n)) for n in "kv"
    )
    r = torch.einsum("ibh,hnd->ibnd", encoding, theirs.r)
    out = theirs.rel_attn_core(q, k, v, r, attn_mask=hidden)
    expected = torch.einsum("ibnd,hnd->ibh", out, theirs.o).transpose(0, 1)
    assert error(ours(x)[0][:, 8:], expected) < 1e-5


@pytest.mark.parametrize("segment", [1, 3, 8])
@pytest.mark.parametrize("memory", [0, 2, 8, 20])
@pytest.mark.parametrize("context", [1, 8, 31])
def test_the_pattern_is_what_it_counts(segment: int, memory: int, context: int) -> None:
    pattern, at = Segments(segment, memory), torch.arange(context)
    mask = pattern.sees(at, at)
    assert pattern.seen(context) == pytest.approx(mask.sum().item() / context)
    for t in range(context):
        assert mask[t].nonzero().flatten().tolist() == [*pattern.past(t, t + 1)[0], t]
    most = max(int(row.sum()) for row in mask)
    assert most <= pattern.kept(context) <= segment + memory


def test_slots_with_residual_scores_agree() -> None:
    """RealFormer over segments: scores of both slots meet block by block in both forms."""
    genome = parse(
        "{width=32} transformer-xl(residual_scores=true, segment=4, memory=8) > swiglu > "
        "transformer-xl(residual_scores=true, segment=4, memory=8)"
    )
    assert difference(genome, 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"conv": 3}, "pattern=transformer-xl goes with conv=0"),
        ({"causal": False}, "pattern=transformer-xl goes with causal=true"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        build(genes)


def test_it_neither_borrows_nor_lends() -> None:
    _, full = resolve("transformer-xl", {})
    with pytest.raises(GeneError, match="borrows no keys and values"):
        configure(Site(WIDTH, borrows=True), full)
