"""Patterns that positions decide: masks, caches and costs against the definition, layers against
independent implementations.

Float32 tolerance 1e-5 of the output's scale: the same products summed in another order agree to
about sqrt(terms) * 2^-24, a tenth of that at these sizes.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_parts import error
from torch import Tensor

from mendel.kernels.backend import Unsupported, use_backend, used_backends
from mendel.primitives.attention.attend import attend
from mendel.primitives.attention.bigbird import Blocks
from mendel.primitives.attention.distance import DistanceForm
from mendel.primitives.attention.flex import block_mask
from mendel.primitives.attention.keyvalues import KeyValues, extend, init_cache
from mendel.primitives.attention.patterns import (
    Chunk,
    HeadPattern,
    Pattern,
    PerHead,
    Summaries,
    Window,
    count,
    pattern_problem,
    positions,
)
from mendel.primitives.attention.weigh import Score
from mendel.primitives.base import State
from mendel.primitives.position import ContextError

PATTERNS: dict[str, HeadPattern] = {
    "full": Window(),
    "window": Window(7),
    "window-1": Window(1),
    "sinks": Window(6, sinks=3),
    "many-sinks": Window(3, sinks=8),
    "dilated": Window(4, dilation=3),
    "column": Window(dilation=5),
    "chunk": Chunk(8),
    "summaries": Summaries(6, 2),
    "all-summaries": Summaries(4, 4),
    "one-summary": Summaries(5, 1),
    "bigbird": Blocks(4, 2, 1, 2),
    "window-of-blocks": Blocks(4, 1, 0, 0),
    "random": Blocks(2, 1, 0, 1, seed=3),
}
CONTEXTS = (1, 2, 5, 23, 64, 97)


def definition(pattern: HeadPattern, tokens: int) -> Tensor:
    """The mask (T, T) from each pattern's formula, one pair at a time."""

    def sees(i: int, j: int) -> bool:
        if j > i:
            return False
        match pattern:
            case Window():
                near = pattern.window is None or i - j < pattern.window * pattern.dilation
                return (near and (i - j) % pattern.dilation == 0) or j < pattern.sinks
            case Chunk():
                return i // pattern.chunk == j // pattern.chunk
            case Summaries():
                return j == i or j % pattern.stride >= pattern.stride - pattern.width
            case Blocks():
                ours, theirs = i // pattern.size, j // pattern.size
                near = ours - theirs < pattern.near or theirs < pattern.first
                return near or theirs in pattern.row(ours, 0)
        raise AssertionError(pattern)

    return torch.tensor([[sees(i, j) for j in range(tokens)] for i in range(tokens)])


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v under a mask (T, T), head by head and query by query."""
    batch, heads, tokens, width = q.shape
    out = torch.zeros(batch, heads, tokens, v.shape[-1], dtype=q.dtype)
    for h in range(heads):
        g = h * k.shape[1] // heads
        for t in range(tokens):
            at = mask[t].nonzero().flatten()
            scores = torch.einsum("bk,bsk->bs", q[:, h, t], k[:, g, at]) / width**0.5
            if slopes is not None:
                scores = scores - slopes[h] * (t - at)
            out[:, h, t] = torch.einsum("bs,bsv->bv", scores.softmax(-1), v[:, g, at])
    return out


@pytest.mark.parametrize("name", PATTERNS)
def test_visible_is_the_formula(name: str) -> None:
    at = torch.arange(CONTEXTS[-1])
    assert torch.equal(PATTERNS[name].sees(at, at), definition(PATTERNS[name], CONTEXTS[-1]))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_what_follows_from_the_mask(name: str, context: int) -> None:
    """The average, the positions of a step and of a piece, and that a cache keeps what it must."""
    pattern, mask = PATTERNS[name], definition(PATTERNS[name], context)
    assert pattern.seen(context) == pytest.approx(mask.sum().item() / context, rel=1e-12)
    size = pattern.kept(context)
    assert 1 <= size <= context
    for t in range(context):
        step = {*positions(pattern.past(t, t + 1)).tolist(), t}
        assert step == set(mask[t].nonzero().flatten().tolist())
        for end in {min(t + 2, context), min(t + 5, context), context} - {t}:
            piece = set(positions(pattern.past(t, end)).tolist())
            needed = set(mask[t:end, :t].any(0).nonzero().flatten().tolist())
            live = positions(pattern.live(t, size))
            assert needed <= piece <= set(live.tolist()), (t, end)
            slots = pattern.slots(live, size).tolist()
            assert slots == [pattern.slot(at, size) for at in live.tolist()]
            assert len(set(slots)) == len(live) <= size
        later = mask[t:].any(0)[: t + 1].sum().item()
        assert later <= size


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cache_is_no_larger_than_what_is_needed_at_once(name: str) -> None:
    """The most positions that the tokens from some step on still see: windows, chunks, summaries
    and blocks keep no more. BigBird keeps whole blocks, a strided column one that nobody reads."""
    pattern, context = PATTERNS[name], 96
    mask = definition(pattern, context)
    needed = max(int(mask[t:, : t + 1].any(0).sum()) for t in range(context))
    slack = pattern.block() or 0 if isinstance(pattern, Blocks) else 0
    if isinstance(pattern, Window) and pattern.window is None:
        slack = pattern.dilation
    assert needed <= pattern.kept(context) <= needed + slack


@pytest.mark.parametrize("slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("tokens", [1, 6, 23, 61])
@pytest.mark.parametrize("name", PATTERNS)
def test_whole_sequences_are_the_formula(name: str, tokens: int, slopes: bool) -> None:
    """Outputs and gradients in float64, of the form for training and of the whole mask."""
    pattern = PATTERNS[name]
    torch.manual_seed(0)
    shapes = ((4, 6), (2, 6), (2, 6))
    given = [torch.randn(2, n, tokens, k, dtype=torch.float64).requires_grad_() for n, k in shapes]
    position = DistanceForm("alibi", 24, 4, 6).build().double() if slopes else None
    values = position.slopes.double() if position is not None else None  # type: ignore[union-attr]
    want = expected(*given, definition(pattern, tokens), values)
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum(), given)
    for backend in ("chunked", "definition"):
        with use_backend(backend):  # type: ignore[arg-type]
            out = attend(given[0], KeyValues(*given[1:]), pattern, Score(), position)
        got = torch.autograd.grad((out * weight).sum(), given)
        assert error(out, want) < 1e-12
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


SPLITS = ([1] * 61, [20, 1, 1, 30, 9], [3, 40, 18], [61], [8, 8, 45], [1, 2, 4, 8, 16, 30])
MIXED: dict[str, Pattern] = {
    **PATTERNS,
    "strided-heads": PerHead((Window(6), Window(dilation=5))),
    "fixed-heads": PerHead((Chunk(6), Summaries(6, 2))),
}


@pytest.mark.parametrize("slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("name", MIXED)
def test_a_cache_gives_what_the_whole_sequence_does(name: str, slopes: bool) -> None:
    """In pieces of any length, and beyond the context that it was made for where it has room."""
    pattern, tokens = MIXED[name], 61
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 6, dtype=torch.float64) for n in (4, 2, 2))
    position = DistanceForm("alibi", 24, 4, 6).build().double() if slopes else None
    whole = attend(q, KeyValues(k, v), pattern, Score(), position)
    for made in (tokens, 24):
        for split in SPLITS:
            buffers = init_cache(pattern, 2, 2, 6, made, torch.float64, "cpu")
            state, out = State(0, buffers), []
            try:
                for piece in split:
                    part = slice(state.length, state.length + piece)
                    new = KeyValues(k[:, :, part], v[:, :, part], part.stop)
                    seen = extend(state, new, pattern)
                    out.append(attend(q[:, :, part], seen, pattern, Score(), position))
                    state = State(part.stop, state.tensors)
            except ContextError:
                assert made < tokens
                assert state.length + piece > made
            if out:
                done = torch.cat(out, 2)
                assert error(done, whole[:, :, : done.shape[2]]) < 1e-12, (made, split)


def test_a_random_block_is_kept_until_its_last_reader() -> None:
    """The cache of BigBird is well below the context, and every block is read where it was put."""
    pattern = Blocks(16, 2, 1, 3)
    for context in (256, 4096):
        kept = pattern.kept(context)
        assert kept < 0.7 * context
        assert pattern.room(kept) >= context
    assert Blocks(16, 2, 1, 0).kept(10**5) == 3 * 16


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attentions_mask_is_the_patterns(name: str) -> None:
    pattern, tokens = PATTERNS[name], 150
    mask = block_mask(pattern, tokens, torch.device("cpu"))
    rows = torch.arange(tokens)
    zero = torch.zeros((), dtype=torch.int64)
    got = mask.mask_mod(zero, zero, rows[:, None], rows)
    want = definition(pattern, tokens)
    assert torch.equal(got, want)
    # The blocks that it does not skip are those in which the mask has a pair.
    size = mask.BLOCK_SIZE[0]
    blocks = -(-tokens // size)
    padded = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    padded[:tokens, :tokens] = want
    some = padded.unflatten(0, (blocks, size)).unflatten(2, (blocks, size)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "full"])
@torch.no_grad()
def test_flex_attention_gives_the_patterns_outputs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned on the CPU, where torch computes the whole mask; not traced, as the shape checks of
    the test run cannot be."""
    module = "torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    monkeypatch.setattr(module, True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 37, 16) for n in (4, 2, 2))
    whole = attend(q, KeyValues(k, v), PATTERNS[name], Score(), None)
    with use_backend("flex"), used_backends() as used:
        flex = attend(q, KeyValues(k, v), PATTERNS[name], Score(), None)
    assert used == {"attention": {"flex"}}
    assert error(flex, whole) < 1e-5


TRACED = """
import torch
from torch.nn.attention.flex_attention import flex_attention
from mendel.primitives.attention.bigbird import Blocks
from mendel.primitives.attention.flex import MOST, block_mask
from mendel.primitives.attention.patterns import Chunk, Summaries, Window
torch.manual_seed(0)
patterns = [Window(n) for n in range(1, 12)] + [
    Window(6, sinks=3), Window(4, dilation=3), Window(dilation=5), Window(5, sinks=2, causal=False),
    Chunk(8), Summaries(6, 2), Blocks(4, 2, 1, 2), Blocks(4, 2, 1, 2, causal=False),
]
compiled = torch.compile(flex_attention, backend="eager", fullgraph=True, dynamic=False)
q, k = torch.randn(1, 2, 37, 16), torch.randn(1, 1, 37, 16)
at = torch.arange(37)
for pattern in patterns:
    mask = block_mask(pattern, 37, q.device)
    with torch._dynamo.config.patch(recompile_limit=MOST, accumulated_recompile_limit=MOST):
        out = compiled(q, k, k, block_mask=mask, enable_gqa=True)
    sees = pattern.sees(at, at, 37)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, sees, enable_gqa=True)
    assert (out - want).abs().max() < 1e-5 * want.abs().max(), pattern
print("traced", len(patterns))
"""


def test_every_mask_can_be_compiled() -> None:
    """What a GPU needs: torch traces each mask, and does not stop at its eighth one."""
    done = subprocess.run(
        [sys.executable, "-c", TRACED], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout == "traced 19\n", done.stderr


def test_flex_attention_refuses_what_it_does_not_do() -> None:
    q = torch.randn(1, 2, 9, 16)
    kv, position = KeyValues(q, q), DistanceForm("alibi", 32, 2, 16).build()
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("full", (q, kv, Window(), Score(), None)),
        ("biased", (q, kv, Window(3), Score(), position)),
        ("scores", (q, kv, Window(3), Score(cap=5.0), None)),
        ("double", (q.double(), KeyValues(q, q), Window(3), Score(), None)),
        ("narrow", (q[..., :8], KeyValues(q[..., :8], q), Window(3), Score(), None)),
    ]
    for case, arguments in cases:
        with use_backend("flex"), pytest.raises(Unsupported, match=f"attention, case {case}"):
            attend(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "full"])
def test_flex_attention_on_a_gpu(name: str) -> None:
    """Forward and gradients of the compiled kernel. Its float32 products may be TF32: 10 bits."""
    torch.manual_seed(0)
    shapes = ((4, 32), (2, 32), (2, 32))
    given = [torch.randn(2, n, 300, k, device="cuda").requires_grad_() for n, k in shapes]
    results = []
    for backend in ("chunked", "flex"):
        with use_backend(backend):  # type: ignore[arg-type]
            out = attend(given[0], KeyValues(*given[1:]), PATTERNS[name], Score(), None)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for ours, theirs in zip(*results, strict=True):
        assert error(theirs, ours) < 1e-2


@pytest.mark.parametrize(
    ("lender", "borrower", "word"),
    [
        (Window(), Summaries(6, 2), None),
        (Window(), PerHead((Window(2), Window(4))), None),
        (Window(16), Chunk(16), None),
        (Window(16, sinks=4), Window(8, sinks=2), None),
        (Window(9), Window(3, dilation=4), None),
        (Window(9), Window(4, dilation=3), "sees 10 tokens and the lender keeps 9"),
        (Window(16), Window(8, sinks=2), "sees the first 2 tokens and the lender keeps 16"),
        (Chunk(8), Window(8), "does not keep every token"),
        (Window(7), Chunk(8), "does not keep every token"),
        (Window(causal=False), Window(), "one reads later tokens"),
    ],
)
def test_which_caches_serve_which_patterns(
    lender: Pattern, borrower: Pattern, word: str | None
) -> None:
    problem = pattern_problem(lender, borrower)
    assert (problem is None) if word is None else (problem is not None and word in problem)


@pytest.mark.parametrize(
    ("lender", "borrower"),
    [
        (Window(), Summaries(6, 2)),
        (Window(), PerHead((Window(2), Chunk(4)))),
        (Window(), Blocks(4, 2, 1, 2)),
        (Window(16), Chunk(16)),
        (Window(16, sinks=4), Window(8, sinks=2)),
        (Window(9), Window(3, dilation=4)),
        (Chunk(8), Chunk(8)),
        (PerHead((Window(6), Window(dilation=5))), PerHead((Window(6), Window(dilation=5)))),
    ],
)
def test_a_borrower_reads_its_pattern_from_anothers_cache(
    lender: Pattern, borrower: Pattern
) -> None:
    assert pattern_problem(lender, borrower) is None
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 61, 6, dtype=torch.float64) for n in (4, 2, 2))
    whole = attend(q, KeyValues(k, v), borrower, Score(), None)
    for split in SPLITS:
        state, out = State(0, init_cache(lender, 2, 2, 6, 61, torch.float64, "cpu")), []
        for piece in split:
            part = slice(state.length, state.length + piece)
            seen = extend(state, KeyValues(k[:, :, part], v[:, :, part], part.stop), lender)
            out.append(attend(q[:, :, part], seen, borrower, Score(), None))
            state = State(part.stop, state.tensors)
        assert error(torch.cat(out, 2), whole) < 1e-12, split


@pytest.mark.parametrize("causal", [True, False])
def test_what_inference_keeps_serves_training(causal: bool) -> None:
    """Tables and layouts are kept over calls."""
    q = torch.randn(1, 2, 50, 8).requires_grad_()
    for pattern in (Blocks(2, 2, 1, 1, seed=77, causal=causal), Window(5, sinks=1, causal=causal)):
        with torch.inference_mode():
            attend(q, KeyValues(q, q), pattern, Score(), None)
        attend(q, KeyValues(q, q), pattern, Score(), None).sum().backward()


def test_a_long_context_is_counted_quickly() -> None:
    """No list of all pairs of blocks: 16,384 blocks."""
    assert 0.4 < Blocks(16, 8, 1, 3).kept(1 << 18) / (1 << 18) < 0.6


def test_the_count_of_ranges() -> None:
    assert count((range(3), range(4, 10, 2))) == 6
    assert positions((range(3), range(4, 10, 2))).tolist() == [0, 1, 2, 4, 6, 8]
