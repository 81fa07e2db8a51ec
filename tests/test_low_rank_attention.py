"""Linformer, Nystromformer and Synthesizer against transformers and loops from the papers.

Float64 tolerance 1e-10 of the scale, float32 1e-5: the same sums in another order.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from mendel.genome.check import TOLERANCE, difference
from mendel.genome.notation import parse
from mendel.primitives.attention.axes import configure
from mendel.primitives.attention.landmarks import pseudo_inverse
from mendel.primitives.attention.linformer import Linformer
from mendel.primitives.attention.nystrom import Nystrom
from mendel.primitives.attention.synthesizer import Synthesizer
from mendel.primitives.base import Gene, GeneError, Operator, Site, State, show_gene
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError

WIDTH, HEADS, TOKENS = 24, 4, 37

Genes = dict[str, Gene]
BLOCKS: Genes = {"segment": 5, "landmarks": 3, "max_length": 60}
MEANS: Genes = {"landmarks": 10, "max_length": 50}

CAUSAL: dict[str, tuple[str, Genes]] = {
    "linformer": ("linformer", BLOCKS),
    "linformer-gqa": ("linformer", {**BLOCKS, "kv_heads": 2, "gate": "sigmoid", "bias": True}),
    "linformer-1": ("linformer", {"segment": 1, "landmarks": 2, "max_length": 37}),
    "linformer-whole": ("linformer", {"segment": 64}),
    "nystrom": ("nystromformer", MEANS),
    "nystrom-gqa": ("nystromformer", {**MEANS, "kv_heads": 2, "value_taps": 4, "bias": True}),
    "nystrom-1": ("nystromformer", {"landmarks": 40, "max_length": 40, "heads": 2}),
    "nystrom-whole": ("nystromformer", {"landmarks": 2, "max_length": 80}),
    "dense": ("synthesizer-dense", {"max_length": 40}),
    "dense-gqa": ("synthesizer-dense", {"max_length": 37, "kv_heads": 1, "gate": "sigmoid"}),
    "random": ("synthesizer-random", {"max_length": 40}),
    "fixed": ("synthesizer-random", {"max_length": 40, "table": "fixed"}),
    "factors": ("synthesizer-random", {"max_length": 40, "table_rank": 3}),
    "fixed-factors": ("synthesizer-random", {"max_length": 40, "table_rank": 3, "table": "fixed"}),
}
BOTH_WAYS: dict[str, tuple[str, Genes]] = {
    "linformer": ("linformer-bidirectional", {**BLOCKS, "kv_heads": 2}),
    "nystrom": ("nystromformer-bidirectional", {"landmarks": 8, "value_taps": 5}),
    "nystrom-gqa": ("nystromformer-bidirectional", {"landmarks": 37, "kv_heads": 2}),
    "dense": ("synthesizer-dense", {"max_length": 40, "causal": False}),
    "random": ("synthesizer-random", {"max_length": 40, "causal": False, "table_rank": 3}),
}


def build(
    name: str, genes: Genes, dtype: torch.dtype = torch.float64, position: str = "rope"
) -> Operator:
    _, full = resolve(name, {"heads": HEADS, **genes})
    torch.manual_seed(0)
    module = configure(Site(WIDTH, position), full).build().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert isinstance(module, Operator)
    return module


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def finished(module: Linformer | Nystrom | Synthesizer, x: Tensor, out: Tensor) -> Tensor:
    """Gate and projection of the heads' outputs (B, T, H, K)."""
    c, flat = module.config, out.flatten(2)
    if c.gate == "sigmoid":
        weight, bias = module.entry.weight[-c.query_width :], module.entry.bias
        gate = x @ weight.T
        flat = flat * torch.sigmoid(gate if bias is None else gate + bias[-c.query_width :])
    return module.exit(flat)  # type: ignore[no-any-return]


def heads_of(module: Linformer | Nystrom, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, K), turned."""
    c = module.config
    used = c.query_width + 2 * c.kv_width
    bias = module.entry.bias
    mixed = x @ module.entry.weight[:used].T
    if bias is not None:
        mixed = mixed + bias[:used]
    q, k, v = mixed.unflatten(-1, (-1, c.head_dim)).split([c.heads, c.kv_heads, c.kv_heads], 2)
    assert module.rotary is not None
    q, k = module.rotary(q, 0), module.rotary(k, 0)
    repeat = c.heads // c.kv_heads
    return q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)


def linformer(module: Linformer, x: Tensor) -> Tensor:
    """Equation 7, token by token; causal: E and F of the blocks before the token's own."""
    c = module.config
    q, k, v = heads_of(module, x)
    rows = []
    for t in range(x.shape[1]):
        stop = t - t % c.block if c.causal else x.shape[1]
        keys = torch.einsum("rs,bshk->brhk", module.key_map[:, :stop], k[:, :stop])
        values = torch.einsum("rs,bshk->brhk", module.value_map[:, :stop], v[:, :stop])
        if stop == 0:
            keys, values = keys[:, :0], values[:, :0]
        if c.causal:
            keys = torch.cat((keys, k[:, stop : t + 1]), 1)
            values = torch.cat((values, v[:, stop : t + 1]), 1)
        weights = (torch.einsum("bhk,bshk->bhs", q[:, t], keys) / c.head_dim**0.5).softmax(-1)
        rows.append(torch.einsum("bhs,bshk->bhk", weights, values))
    return finished(module, x, torch.stack(rows, 1))


def iterated_inverse(a: Tensor) -> Tensor:
    """Equation 11 of one matrix, six steps from A^T / (|A|_1 |A|_inf)."""
    z = a.T / (a.abs().sum(0).max() * a.abs().sum(1).max())
    eye = torch.eye(a.shape[0], dtype=a.dtype)
    for _ in range(6):
        z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
    return z


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)


def landmark_values(q: Tensor, k: Tensor, v: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    """K~ and pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V of one head, (T, K) each."""
    q_mean, k_mean = (torch.stack([s.mean(0) for s in t.split(segments)]) for t in (q, k))
    return k_mean, iterated_inverse(softmax(q_mean, k_mean)) @ (softmax(q_mean, k) @ v)


def nystrom(module: Nystrom, x: Tensor) -> Tensor:
    """Equation 13 per head; causal: over the whole segments before a token, beside its own."""
    c, tokens = module.config, x.shape[1]
    q, k, v = heads_of(module, x)
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(c.heads):
            one = q[b, :, h], k[b, :, h], v[b, :, h]
            if not c.causal:
                size = -(-tokens // c.landmarks)
                segments = [min(size, tokens - at) for at in range(0, tokens, size)]
                if len(segments) == tokens:
                    out[b, :, h] = softmax(one[0], one[1]) @ one[2]
                else:
                    k_mean, u = landmark_values(*one, segments)
                    out[b, :, h] = softmax(one[0], k_mean) @ u
                continue
            for t in range(tokens):
                stop = t - t % c.segment
                keys, values = one[1][stop : t + 1], one[2][stop : t + 1]
                count = stop // c.segment
                if count:
                    before = (part[:stop] for part in one)
                    k_mean, u = landmark_values(*before, [c.segment] * count)
                    keys, values = torch.cat((k_mean, keys)), torch.cat((u, values))
                # A landmark counts as the tokens of its segment.
                counts = torch.ones(len(keys), dtype=x.dtype)
                counts[:count] = c.segment
                scores = (keys @ one[0][t] / c.head_dim**0.5).exp() * counts
                out[b, t, h] = scores / scores.sum() @ values
    if module.taps is not None:
        taps = module.taps.view(c.kv_heads, c.head_dim, -1)
        taps = taps.repeat_interleave(c.heads // c.kv_heads, 0)
        for t in range(tokens):
            for i in range(c.taps):
                s = t + i - (c.taps - 1 if c.causal else c.taps // 2)
                if 0 <= s < tokens:
                    out[:, t] = out[:, t] + taps[..., i] * v[:, s]
    return finished(module, x, out)


def synthesizer(module: Synthesizer, x: Tensor) -> Tensor:
    """Equations 2 to 6, token by token."""
    c, tokens = module.config, x.shape[1]
    weight, bias = module.entry.weight[: c.kv_width], module.entry.bias
    assert bias is None
    v = (x @ weight.T).unflatten(-1, (c.kv_heads, -1)).repeat_interleave(c.heads // c.kv_heads, 2)
    rows = []
    for t in range(tokens):
        stop = t + 1 if c.causal else tokens
        heads = []
        for h in range(c.heads):
            if module.hidden is not None:
                span = slice(h * c.head_dim, (h + 1) * c.head_dim)
                hidden = x[:, t] @ module.hidden.weight[span].T + module.hidden.bias[span]
                scores = hidden.relu() @ module.columns[h].T + module.shift[h]
            elif c.rank:
                scores = (module.rows[h, t] @ module.columns[h].T)[None]
            else:
                scores = module.columns[h, t][None]
            weights = scores[:, :stop].softmax(-1).expand(x.shape[0], -1)
            heads.append(torch.einsum("bs,bsk->bk", weights, v[:, :stop, h]))
        rows.append(torch.stack(heads, 1))
    return finished(module, x, torch.stack(rows, 1))


def reference(module: Operator, x: Tensor) -> Tensor:
    if isinstance(module, Linformer):
        return linformer(module, x)
    if isinstance(module, Nystrom):
        return nystrom(module, x)
    assert isinstance(module, Synthesizer)
    return synthesizer(module, x)


@pytest.mark.parametrize("form", [*CAUSAL, *(f"{name}-both" for name in BOTH_WAYS)])
def test_it_is_the_papers_formula(form: str) -> None:
    name, genes = BOTH_WAYS[form[:-5]] if form.endswith("-both") else CAUSAL[form]
    module, x = build(name, genes), inputs().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    expected = reference(module, x)
    named = {"x": x, **dict(module.named_parameters())}

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        wanted = list(named.values())
        return torch.autograd.grad(
            (y * weight).sum(), wanted, allow_unused=True, materialize_grads=True
        )

    wanted = gradients(expected)
    states = [None] if form.endswith("-both") else [None, module.init_state(2, TOKENS, x.dtype)]
    for state in states:
        y, _ = module(x, state)
        assert error(y, expected) < 1e-10
        for label, ours, theirs in zip(named, gradients(y), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=label)


@pytest.mark.parametrize("form", CAUSAL)
@torch.no_grad()
def test_any_split_is_the_whole_and_costs_what_is_counted(form: str) -> None:
    name, genes = CAUSAL[form]
    module, x = build(name, genes), inputs()
    whole = module(x)[0]
    _, full = resolve(name, {"heads": HEADS, **genes})
    counted = configure(Site(WIDTH, "rope"), full).cost(TOKENS, x.dtype)
    for pieces in ([1] * TOKENS, [8, 1, 20, 1, 7], [30, 7], [3, 5, 2, 6, 21], [1, 35, 1]):
        state: State | None = module.init_state(2, TOKENS, x.dtype)
        out = []
        with FlopCounterMode(display=False) as counter:
            for part in x.split(pieces, 1):
                y, state = module(part, state)
                out.append(y)
        assert state is not None
        assert state.bytes() == 2 * counted.state_bytes
        assert error(torch.cat(out, 1), whole) < 1e-10, pieces
        if len(pieces) == TOKENS:
            real = counter.get_total_flops()
            # The counter counts a batch of two, of which factored tables are made once.
            wanted = 2 * TOKENS * counted.flops_per_token
            if "factors" in form:
                wanted -= 2 * HEADS * 3 * TOKENS * (TOKENS + 1) / 2
            assert real == pytest.approx(wanted)


@pytest.mark.parametrize("form", CAUSAL)
@torch.no_grad()
def test_a_longer_sequence_than_the_tables_or_the_state_is_refused(form: str) -> None:
    name, genes = CAUSAL[form]
    module = build(name, genes)
    length = module.config.length  # type: ignore[union-attr]
    x = inputs(length + 1)
    sentence = f"end at {length} tokens; this call needs {length + 1}"
    with pytest.raises(ContextError, match=sentence):
        module(x)
    state = module.init_state(2, length + 1, x.dtype)
    _, held = module(x[:, :length], state)
    with pytest.raises(ContextError, match=sentence):
        module(x[:, length:], held)
    if form not in ("linformer", "linformer-gqa", "linformer-1"):
        # Linformer's state has room for any length once a block can end.
        short = module.init_state(2, 4, x.dtype)
        with pytest.raises(ContextError, match="holds 4 tokens; this call needs 5"):
            module(x[:, :5], short)


@pytest.mark.parametrize(("heads", "option"), [(1, "original"), (4, "exact")])
@pytest.mark.parametrize("landmarks", [4, 8, 32])
@pytest.mark.parametrize("taps", [None, 5])
def test_nystromformer_is_transformers(
    heads: int, option: str, landmarks: int, taps: int | None
) -> None:
    """The reference's first option takes the norm of the largest matrix in the batch for all of
    them, so that it is the paper's for one sequence and head only; its second is the paper's."""
    tokens, batch = 32, 1 if option == "original" else 2
    settings = NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_landmarks=landmarks,
        segment_means_seq_len=tokens,
        conv_kernel_size=taps or 3,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = NystromformerSelfAttention(settings).eval()
    theirs.init_option = option
    theirs.conv_kernel_size = taps
    ours = build(
        "nystromformer-bidirectional",
        {"heads": heads, "landmarks": landmarks, "value_taps": taps or 0, "bias": True},
        torch.float32,
        position="none",
    )
    assert isinstance(ours, Nystrom)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.3)
        parts = (theirs.query, theirs.key, theirs.value)
        ours.entry.weight.copy_(torch.cat([p.weight for p in parts]))
        ours.entry.bias.copy_(torch.cat([p.bias for p in parts]))
        # The reference's projection back is in another module.
        ours.exit.weight.copy_(torch.eye(WIDTH))
        ours.exit.bias.zero_()
        if taps:
            assert ours.taps is not None
            # One filter per head there, one per channel here.
            filters = theirs.conv.weight.view(heads, taps)
            ours.taps.copy_(filters.repeat_interleave(WIDTH // heads, 0))
    x = inputs(tokens, torch.float32)[:batch].requires_grad_()
    y, expected = ours(x)[0], theirs(x)[0]
    assert error(y, expected) < 1e-5
    cotangent = torch.randn(x.shape)
    (got,) = torch.autograd.grad((y * cotangent).sum(), x)
    (wanted,) = torch.autograd.grad((expected * cotangent).sum(), x)
    assert error(got, wanted) < 1e-5


def test_the_iteration_nears_the_pseudo_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (2 * torch.eye(6) + torch.rand(3, 6, 6, generator=generator)).double().softmax(-1)
    assert error(pseudo_inverse(a), torch.linalg.pinv(a)) < 1e-3


@torch.no_grad()
def test_nystrom_with_a_landmark_per_token_is_softmax_attention() -> None:
    """pinv(A) A = 1, so u = V: the causal form is softmax attention, up to the iteration."""
    module = build("nystromformer", {"landmarks": 12, "max_length": 12, "heads": 1})
    assert isinstance(module, Nystrom)
    # A key that is its query: matrices near 1, which six steps invert well.
    module.entry.weight[:WIDTH] *= 2.0
    module.entry.weight[WIDTH : 2 * WIDTH] = module.entry.weight[:WIDTH]
    x = inputs(12)
    q, k, v = heads_of(module, x)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    expected = finished(module, x, torch.einsum("bhts,bshk->bthk", weights, v))
    assert error(module(x)[0], expected) < 1e-3


def test_a_fixed_table_is_no_parameter_and_is_saved() -> None:
    module = build("synthesizer-random", {"max_length": 8, "table": "fixed"})
    assert "columns" not in dict(module.named_parameters())
    assert module.state_dict()["columns"].shape == (HEADS, 8, 8)


@pytest.mark.parametrize("name", ["linformer", "nystromformer"])
def test_the_cost_is_not_quadratic(name: str) -> None:
    """Sequences eight times as long, with tables that grow along: FLOPs per token stay."""
    flops = []
    for tokens in (256, 2048):
        genes: Genes = {"max_length": tokens, "landmarks": 16, "heads": 4, "segment": 16}
        _, full = resolve(name, genes)
        module = configure(Site(WIDTH), full).build()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(1, tokens, WIDTH))
        flops.append(counter.get_total_flops() / tokens)
    assert flops[1] < (1.1 if name == "linformer" else 3.0) * flops[0]


@pytest.mark.parametrize("form", CAUSAL)
def test_it_is_a_slot_of_a_model(form: str) -> None:
    name, genes = CAUSAL[form]
    written = ", ".join(f"{k}={show_gene(v)}" for k, v in {**genes, "max_length": 40}.items())
    assert difference(parse(f"{{width=32}} {name}({written}) > swiglu"), 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "genes", "sentence"),
    [
        ("linformer", {"position": "alibi"}, "goes with position=rope, rope3d or none"),
        ("linformer", {"qk_norm": True}, "goes with qk_norm=false"),
        ("linformer", {"score": "sigmoid"}, "goes with score=softmax"),
        ("nystromformer", {"conv": 3}, "goes with conv=0"),
        ("nystromformer-bidirectional", {"value_taps": 4}, "value_taps=4 is even"),
        ("synthesizer-dense", {"position": "rope"}, "makes no keys that position=rope"),
        ("synthesizer-random", {"talking_heads": True}, "goes with talking_heads=false"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    name: str, genes: Genes, sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        build(name, genes)
