"""Norms and residual forms of the backbone: formulas, initial values, costs, every written form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.files import dump, from_dict, load, to_dict
from mendel.genome.genome import NORMS, PLACEMENTS, RESIDUALS
from mendel.genome.graph import graph
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse, show
from mendel.genome.repair import repair
from mendel.genome.residual import layer_scale
from mendel.genome.rules import violations
from mendel.genome.space import Space
from mendel.genome.space_check import SpaceError, read_space
from mendel.genome.star import StarError, write
from mendel.genome.variation import mutate

SLOTS = "mha(features=@a) > swiglu > [mamba2 | mha(features=@a)](join=norm) > moe > gated-deltanet"
FORMS = [
    (residual, norm, placement)
    for residual in RESIDUALS
    for norm in NORMS
    for placement in PLACEMENTS
    if residual != "reversible" or placement != "post" or norm == "none"
]


def genome(residual: str, norm: str = "rmsnorm", placement: str = "pre", slots: str = SLOTS):  # type: ignore[no-untyped-def]
    return parse(f"{{width=32, residual={residual}, norm={norm}, placement={placement}}} {slots}")


def made(notation: str, seed: int = 0) -> LanguageModel:
    """The model in float64 with every number of its norms and scalings drawn at random."""
    torch.manual_seed(seed)
    model = build(parse(notation), 40).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "final_norm", "entry")):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


def normed(kind: str, module: torch.nn.Module, x: Tensor) -> Tensor:
    """A norm by its formula, with the module's numbers."""
    p = dict(module.named_parameters())
    if kind == "none":
        return x
    if kind == "dyt":
        return p["weight"] * torch.tanh(p["alpha"] * x) + p["bias"]
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + (1e-6 if kind == "rmsnorm" else 1e-5)).sqrt()
    return x * p["weight"] + p.get("bias", 0)


@pytest.mark.parametrize("residual", ["plain", "layerscale", "rezero"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("embedding", [False, True])
def test_the_model_is_the_papers_formula(
    residual: str, norm: str, placement: str, embedding: bool
) -> None:
    """Slot by slot with the operators as they are (their own tests judge them), in float64."""
    model = made(
        f"{{width=32, residual={residual}, norm={norm}, placement={placement},"
        f" embedding_norm={str(embedding).lower()}}} mha > swiglu"
    )
    tokens = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(1))
    x = model.embedding.weight[tokens]
    if norm == "dyt":
        x = x * model.entry.scale
    if norm == "none":
        x = x * 32**0.5
    if embedding:
        x = normed(norm, model.entry.norm, x)
    for operator, block in zip(model.operators, model.blocks, strict=True):
        scale = 1.0 if residual == "plain" else block.scale
        if norm == "none" or placement == "pre":
            x = x + scale * operator(normed(norm, block.before, x))[0]
        elif placement == "post":
            x = normed(norm, block.after, x + scale * operator(x)[0])
        else:
            y = normed(norm, block.after, operator(normed(norm, block.before, x))[0])
            x = x + scale * y
    if norm != "none" and placement != "post":
        x = normed(norm, model.final_norm, x)
    expected = x @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("residual", "norm", "placement"), FORMS)
def test_both_forms_agree_and_parameters_are_counted(
    residual: str, norm: str, placement: str
) -> None:
    found = genome(residual, norm, placement)
    found = replace(found, position="learned", tied=False, embedding_norm=placement != "post")
    model = build(found, 50)
    assert cost(found, 10, vocab=50).total.params == sum(p.numel() for p in model.parameters())
    assert difference(found, 3) <= TOLERANCE


@pytest.mark.parametrize("residual", [r for r in RESIDUALS if r != "rezero"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_gets_a_gradient(residual: str, norm: str) -> None:
    torch.manual_seed(0)
    model = build(genome(residual, norm))
    model(torch.randint(256, (8, 30)))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if name not in ("embedding.weight",):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_rezero_begins_as_the_identity_and_learns_its_scalars_first() -> None:
    torch.manual_seed(0)
    model = build(genome("rezero", "none"))
    tokens = torch.randint(256, (8, 30))
    table = model.embedding.weight
    torch.testing.assert_close(model(tokens)[0], table[tokens] * 32**0.5 @ table.T)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(tokens)[0].square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            learns = name.endswith("scale") or name.startswith("embedding") or step == 1
            assert bool(parameter.grad.abs().max() > 0) == learns, (step, name)
        optimizer.step()


def test_layer_scale_begins_as_published_for_its_depth() -> None:
    """0.1 up to 18 blocks of two slots, 1e-5 up to 24, 1e-6 beyond (CaiT, section 2)."""
    depths = {1: 0.1, 36: 0.1, 37: 1e-5, 48: 1e-5, 49: 1e-6, 200: 1e-6}
    assert {slots: layer_scale(slots) for slots in depths} == depths
    block = build(genome("layerscale", slots="[mha > swiglu]*2")).blocks[3]
    assert torch.equal(block.scale, torch.full((32,), 0.1))


def test_dyt_begins_otherwise_before_mixers() -> None:
    torch.manual_seed(0)
    model = build(
        parse("{width=2048, norm=dyt, placement=sandwich} lfm2-conv > mlp(expansion=0.1)")
    )
    alphas = {n: p.item() for n, p in model.named_parameters() if n.endswith("alpha")}
    assert alphas == {
        "blocks.0.before.alpha": 1.0,
        "blocks.0.after.alpha": 0.5,
        "blocks.1.before.alpha": 0.5,
        "blocks.1.after.alpha": 0.5,
        "final_norm.alpha": 0.5,
    }
    assert model.entry.scale.item() == pytest.approx(2048**0.5)


def test_dyt_in_bf16_keeps_its_dtype() -> None:
    model = build(genome("plain", "dyt")).to(torch.bfloat16)
    assert model(torch.zeros(1, 3, dtype=torch.int64))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("norm", NORMS)
def test_written_forms_read_back(tmp_path: Path, residual: str, norm: str) -> None:
    found = genome(residual, norm)
    assert parse(show(found)) == found
    assert from_dict(to_dict(found)) == found
    for name in ("g.yaml", "g.json"):
        dump(found, tmp_path / name)
        assert load(tmp_path / name) == found
    assert ("residual" in show(found)) == (residual != "plain")


def test_a_file_from_before_the_field_is_plain() -> None:
    old = {"grammar": 1, "width": 32, "norm": "layernorm", "slots": [{"op": "mha"}]}
    assert from_dict(old) == parse("{width=32, norm=layernorm} mha")


def test_star_has_plain_genomes_only() -> None:
    assert write(parse("mha > swiglu"))
    with pytest.raises(StarError, match="cannot say residual=ngpt"):
        write(parse("{residual=ngpt} mha > swiglu"))


def test_a_norm_after_the_addition_cannot_be_reversed() -> None:
    bad = genome("reversible", placement="post")
    found = violations(bad)
    assert [v.rule for v in found] == ["reversible"]
    assert str(found[0]) == (
        "genome: residual=reversible undoes each slot's addition, which a norm after it "
        "(placement=post) does not let; residual=reversible goes with placement=pre or sandwich"
    )
    assert repair(bad) == genome("reversible", placement="pre")
    assert violations(genome("reversible", "none", "post")) == []


OPERATORS = {"operators": {"mha": {}, "swiglu": {}}, "depth": 2, "width": 32}


def test_repair_keeps_to_the_space_where_it_must_change_the_header() -> None:
    bad = parse("{width=32, residual=reversible, placement=post} mha > swiglu")
    post = {"placement": ["post"], **OPERATORS}
    for more, name, value in (
        ({"placement": ["post", "sandwich"], "residual": ["reversible"]}, "placement", "sandwich"),
        ({"residual": ["reversible", "rezero"]}, "residual", "rezero"),
        ({"residual": ["reversible"], "norm": ["rmsnorm", "none"]}, "norm", "none"),
    ):
        fixed = repair(bad, Space.model_validate(post | more))
        assert fixed == replace(bad, **{name: value})


def test_a_space_that_holds_nothing_but_what_cannot_be_reversed_is_refused() -> None:
    with pytest.raises(SpaceError) as caught:
        read_space({**OPERATORS, "placement": "post", "residual": "reversible"})
    assert str(caught.value) == (
        "space.residual: reversible undoes each slot's addition, which a norm after it does not "
        "let: give placement pre or sandwich, or another residual, too"
    )
    with pytest.raises(SpaceError, match="residual is one of plain, layerscale"):
        read_space({**OPERATORS, "residual": "highway"})


def test_header_mutations_reach_every_form_and_stay_valid() -> None:
    space = Space.model_validate(
        {
            **OPERATORS,
            "residual": list(RESIDUALS),
            "norm": list(NORMS),
            "placement": ["pre", "post"],
        }
    )
    assert space.size() == 5 * 4 * 2
    found, rng = parse("{width=32} mha > swiglu"), np.random.default_rng(0)
    seen = set()
    for _ in range(120):
        found, _ = mutate(found, space, rng, ["header"])
        assert violations(found) == []
        seen.add((found.residual, found.norm))
    assert seen == {(r, n) for r in RESIDUALS for n in NORMS}


@pytest.mark.parametrize(
    ("header", "norms"),
    [("norm=none", 0), ("residual=ngpt", 4), ("norm=dyt", 3), ("residual=reversible", 3)],
)
def test_the_graph_has_the_norms_that_there_are(header: str, norms: int) -> None:
    made = graph(parse(f"{{{header}}} mha > swiglu"))
    assert sum(data["kind"] == "norm" for _, data in made.nodes(data=True)) == norms


def test_the_graph_of_a_reversible_genome_has_two_streams() -> None:
    made = graph(parse("{residual=reversible, norm=none} mha > swiglu > mqa"))
    edges = set(made.edges)
    assert {
        ("embedding", "slot0.0"),
        ("embedding", "slot0.add"),
        ("embedding", "slot1.add"),
    } <= edges
    assert {("slot0.add", "slot1.0"), ("slot0.add", "slot2.add"), ("slot1.add", "slot2.0")} <= edges
    assert {("slot2.add", "add"), ("slot1.add", "add"), ("add", "head")} <= edges
