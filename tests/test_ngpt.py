"""nGPT's normalised form: the paper's formula, the sphere after every step, every operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse
from mendel.primitives.base import GeneError
from mendel.primitives.catalogue import names
from mendel.primitives.sphere import Scale, unit
from mendel.proxies.recall import RecallSettings, make_recall
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.train import Training

WIDTH = 32
WIDE = 64


def made(slots: str, header: str = "", vocab: int = 40) -> LanguageModel:
    """In float64, with scalings that are not their initial values."""
    torch.manual_seed(0)
    model = build(parse(f"{{width={WIDTH}, residual=ngpt{header}}} {slots}"), vocab).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".value"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def norm(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def turned(x: Tensor, theta: float = 10000.0) -> Tensor:
    """RoPE on (B, T, H, K): channels i and i + K/2 as a complex number, token by token."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    rate = theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * rate
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag), -1)


def paper(model: LanguageModel, tokens: Tensor, heads: int, groups: int) -> Tensor:
    """The equations of arXiv 2410.01131, sections 2.1 to 2.6, for attention and SwiGLU in turn."""
    p = dict(model.named_parameters())
    d = WIDTH
    h = p["embedding.weight"][tokens]
    for i in range(len(model.operators)):
        entry, exit_ = (p[f"operators.{i}.{n}.weight"] for n in ("entry", "exit"))
        if i % 2 == 0:
            k_dim = d // heads
            q, k, v = torch.split(h @ entry.T, [d, groups * k_dim, groups * k_dim], -1)
            q, k, v = (t.unflatten(-1, (-1, k_dim)) for t in (q, k, v))
            s_qk = p[f"operators.{i}.qk_scale.value"].view(groups, -1) * (1 / d**-0.5)
            share = heads // groups
            q = norm(turned(q)) * s_qk.repeat_interleave(share, 0)
            k = norm(turned(k)) * s_qk
            out = []
            for t in range(tokens.shape[1]):
                row = []
                for head in range(heads):
                    g = head // share
                    scores = k_dim**0.5 * torch.einsum(
                        "bk,bsk->bs", q[:, t, head], k[:, : t + 1, g]
                    )
                    row.append(torch.einsum("bs,bsk->bk", scores.softmax(-1), v[:, : t + 1, g]))
                out.append(torch.cat(row, -1))
            y = torch.stack(out, 1) @ exit_.T
        else:
            gate, up = (h @ entry.T).chunk(2, -1)
            s_gate, s_up = p[f"operators.{i}.scale.value"].chunk(2)
            gate, up = gate * s_gate * d**0.5, up * s_up
            y = (F.silu(gate) * up) @ exit_.T
        alpha = (p[f"blocks.{i}.rate.value"] * (0.05 / d**-0.5)).abs()
        h = norm(h + alpha * (norm(y) - h))
    head = p.get("head.weight", p["embedding.weight"])
    return h @ head.T * (p["logit_scale.value"] * (1 / d**-0.5))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_model_is_the_papers(heads: int, groups: int, tied: str) -> None:
    """Logits and every gradient, in float64."""
    attention = f"gqa(heads={heads}, kv_heads={groups})"
    model = made(f"[{attention} > swiglu]*2", f", tied={tied}")
    tokens = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(2, 13, 40, dtype=torch.float64)
    results = []
    for logits in (model(tokens)[0], paper(model, tokens, heads, groups)):
        model.zero_grad()
        (logits * weight).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append((logits.detach(), grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    assert all(grad.abs().max() > 0 for grad in results[0][1].values())


def test_scalings_begin_as_published() -> None:
    """alpha 0.05, s_qk, s_u, s_v and s_z 1; kept at 1/sqrt(D), and at 1 for s_u and s_v."""
    model = build(parse(f"{{width={WIDTH}, residual=ngpt}} mha > swiglu"), 40)
    scales = {n: m for n, m in model.named_modules() if isinstance(m, Scale)}
    found = {n: (m().unique().tolist(), m.value.unique().tolist()) for n, m in scales.items()}
    small = pytest.approx([WIDTH**-0.5])
    assert found == {
        "operators.0.qk_scale": (pytest.approx([1.0]), small),
        "operators.1.scale": ([1.0], [1.0]),
        "blocks.0.rate": (pytest.approx([0.05]), small),
        "blocks.1.rate": (pytest.approx([0.05]), small),
        "logit_scale": (pytest.approx([1.0]), small),
    }
    assert scales["operators.0.qk_scale"]().shape == (4, WIDTH // 4)
    assert scales["logit_scale"].value.shape == (40,)


def test_neither_norm_nor_placement_stands_in_the_model() -> None:
    plain = build(parse("{residual=ngpt} mha > swiglu"))
    other = build(parse("{residual=ngpt, norm=layernorm, placement=sandwich} mha > swiglu"))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in other.named_parameters()]


def worst(model: LanguageModel) -> float:
    """How far the length of any vector on the sphere is from 1."""
    lengths = [
        model.get_parameter(name).detach().norm(dim=dim).flatten()
        for name, dim in model.on_sphere.items()
    ]
    return float((torch.cat(lengths) - 1).abs().max())


@pytest.mark.parametrize(
    "slots",
    [
        "[gqa > swiglu]*2",
        "mamba2 > swiglu > gated-deltanet > geglu > lstm",
        "rwkv6 > moe(shared=1) > [hgrn | mha](join=norm)",
        "mha(features=@k) > swiglu(weights=@m) > mha(features=@k) > swiglu(weights=@m)",
        "[mha | mamba2](join=top1) > [swiglu](tokens=0.5) > [mha | gqa](join=gate)",
    ],
)
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_vectors_stay_on_the_sphere_after_every_step(slots: str, position: str) -> None:
    genome = parse(f"{{width={WIDTH}, residual=ngpt, tied=false, position={position}}} {slots}")
    task = make_recall(RecallSettings(length=16, train_examples=64, test_examples=16), 0)
    training = Training(genome, task, TrainConfig(lr=0.05), steps=4, batch=8, seed=0)
    model = training.model
    moved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # A sum of D squares of about 1/D each, rounded to 2^-24.
    assert worst(model) <= 1e-6
    for step in range(1, 5):
        training.advance(step)
        assert worst(model) <= 1e-6, step
    streams: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: None)
        keep = block.residual
        block.residual = lambda *read, keep=keep: streams.append(keep(*read)) or streams[-1]  # type: ignore[method-assign]
    with torch.no_grad():
        model(task.train_batch(0, 4).inputs)
    assert len(streams) == len(genome.slots)
    for h in streams:
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(h.shape[:-1]), rtol=0, atol=1e-6)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, moved[n])]
    # The last learned positions are beyond the task's sequences, but the first are not.
    assert set(changed) == set(moved)


def test_a_step_leaves_the_sphere_where_nothing_brings_back() -> None:
    """What `after_step` does is seen: without it the same step ends beside the sphere."""
    model = made("mha > swiglu").float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.randint(40, (2, 9)))[0].square().sum().backward()
    optimizer.step()
    assert worst(model) > 0.01
    model.after_step()
    assert worst(model) <= 1e-6


def test_on_the_sphere_are_the_maps_of_the_stream_and_no_others() -> None:
    """Readers by rows (axis 1), writers by columns (axis 0); inner maps, taps and decays not."""
    model = made("mha > swiglu > rwkv7 > mamba > moe(shared=1)", ", position=learned, tied=false")
    assert model.on_sphere == {
        "embedding.weight": 1,
        "head.weight": 1,
        "position.table": 1,
        "operators.0.entry.weight": 1,
        "operators.0.exit.weight": 0,
        "operators.1.entry.weight": 1,
        "operators.1.exit.weight": 0,
        "operators.2.in_proj.weight": 1,
        "operators.2.out_proj.weight": 0,
        "operators.3.in_proj.weight": 1,
        "operators.3.out_proj.weight": 0,
        "operators.4.router.weight": 1,
        "operators.4.experts.entry": 2,
        "operators.4.experts.exit": 1,
        "operators.4.shared.entry.weight": 1,
        "operators.4.shared.exit.weight": 0,
    }


@pytest.mark.parametrize("name", names())
def test_every_operator_works_in_the_form(name: str) -> None:
    """Costs are the real ones, gradients reach everything, and its maps are on the sphere.

    An operator without linear maps over channels (it mixes tokens alone) has none there; one that
    cannot have the form says so.
    """
    genome = parse(f"{{width={WIDE}, residual=ngpt}} {name} > mha")
    torch.manual_seed(0)
    refusal = ""
    try:
        model = build(genome, 40).train()
    except GeneError as error:
        refusal = str(error)
    if refusal:
        assert "normalised backbone" in refusal
        return
    assert cost(genome, 9, vocab=40).total.params == sum(p.numel() for p in model.parameters())
    own = {n: dim for n, dim in model.on_sphere.items() if n.startswith("operators.0.")}
    maps = [m for m in model.operators[0].modules() if isinstance(m, nn.Linear)]
    if any(WIDE in (m.in_features, m.out_features) for m in maps):
        assert own, "no map that reads from or writes to the stream was found"
    assert worst(model) <= 1e-6
    loss = model(torch.randint(40, (4, 37)))[0].square().sum()
    extra = model.auxiliary_loss()
    (loss if extra is None else loss + extra).backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label


@pytest.mark.parametrize(
    "slots",
    ["mha > swiglu > mamba2", "[gqa(features=@a) | mamba2](join=norm) > moe > gqa(features=@a)"],
)
def test_both_forms_agree(slots: str) -> None:
    genome = parse(f"{{width=32, residual=ngpt}} {slots}")
    assert difference(genome, 2, torch.float64) <= 1e-10
    assert difference(genome, 2) <= TOLERANCE


def test_a_vector_of_zeros_stays() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_bf16_and_autocast_have_one_dtype_in_attention() -> None:
    model = made("gqa > swiglu").float()
    tokens = torch.randint(40, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens)[0].float()
    torch.testing.assert_close(mixed, model(tokens)[0], rtol=0, atol=0.05)
    assert model.to(torch.bfloat16)(tokens)[0].dtype == torch.bfloat16
