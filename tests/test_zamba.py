"""Zamba2 against the model of `transformers`; what its block, its chain and its places promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference_weights import VOCAB, Weights, check, error, joined, load, of, scatter, tokens
from torch import Tensor

from mendel.genome import imported, presets
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import parse
from mendel.genome.reversible import plain_streams
from mendel.genome.rules import violations
from mendel.genome.small import small
from mendel.genome.space_check import read_space
from mendel.genome.variation import mutate
from mendel.primitives.attention.shared_block import SharedBlock, SharedBlockConfig
from mendel.primitives.base import Carry, own_params

SMALL: dict[str, Any] = {
    "model_type": "zamba2",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_state": 16,
    "intermediate_size": 96,
    "adapter_rank": 6,
    "rms_norm_eps": 1e-6,
    # Their smallest step size, which the genome has not.
    "time_step_min": 1e-12,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
}


def _mamba(t: Weights) -> Weights:
    own = {
        "dt.A_log": t["A_log"],
        "dt.bias": t["dt_bias"],
        "skip": t["D"],
        "conv.weight": t["conv1d.weight"].squeeze(1),
        "conv.bias": t["conv1d.bias"],
    }
    found = own | joined(t, "norm", "norm") | joined(t, "in_proj", "in_proj")
    return found | joined(t, "out_proj", "out_proj")


def _block(t: Weights, exits: list[Tensor], calls: list[int]) -> Weights:
    """A block of theirs and the maps after its calls; `calls` are their numbers among all."""
    attention, mlp = of(t, "self_attn"), of(t, "feed_forward")
    # Their scores are divided by sqrt(K / 2).
    attention["q_proj.weight"] = attention["q_proj.weight"] * 2**0.5
    found = {
        "norm.weight": t["input_layernorm.weight"],
        "inner_norm.weight": t["pre_ff_layernorm.weight"],
    }
    for name, value in joined(attention, "entry", "q_proj", "k_proj", "v_proj").items():
        found[f"attention.{name}"] = value
    found["attention.exit.weight"] = attention["o_proj.weight"]
    found["mlp.entry.weight"] = mlp["gate_up_proj.weight"]
    found["mlp.exit.weight"] = mlp["down_proj.weight"]
    for place, (call, exit_) in enumerate(zip(calls, exits, strict=True)):
        found[f"places.{place}.exit.weight"] = exit_
        adapter = of(mlp, f"gate_up_proj_adapter_list.{call}")
        found[f"places.{place}.mlp.down.weight"] = adapter["0.weight"]
        found[f"places.{place}.mlp.up.0.weight"] = adapter["1.weight"]
        parts = [of(attention, f"linear_{kind}_adapter_list.{call}") for kind in "qkv"]
        if not parts[0]:
            continue
        found[f"places.{place}.attention.down.weight"] = torch.cat([p["0.weight"] for p in parts])
        for i, part in enumerate(parts):
            factor = 1.0 if i else 2**0.5
            found[f"places.{place}.attention.up.{i}.weight"] = factor * part["1.weight"]
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"num_mem_blocks": 2, "mamba_ngroups": 2},
        {"use_shared_attention_adapter": True},
        {"use_mem_rope": True},
        {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True},
        # A third block is called once, so that it shares with nobody.
        {
            "num_mem_blocks": 3,
            "num_hidden_layers": 5,
            "layers_block_type": SMALL["layers_block_type"][:5],
        },
    ],
    ids=["two blocks", "adapters on attention", "rope", "both", "a block that is called once"],
)
def test_the_imported_genome_gives_the_logits_of_the_library(more: dict[str, Any]) -> None:
    values = {**SMALL, **more}
    torch.manual_seed(0)
    theirs = transformers.Zamba2ForCausalLM(
        transformers.Zamba2Config(**values, use_cache=False, attn_implementation="eager")
    )
    w = scatter(theirs)
    found = imported.read(values)
    assert found.differs == ("a least step size in the library's Mamba-2 (time_step_min=1e-12)",)
    layers, blocks = values["layers_block_type"], values.get("num_mem_blocks", 1)
    hybrids = [i for i, kind in enumerate(layers) if kind == "hybrid"]
    operators: list[Weights] = []
    norms = []
    for i, kind in enumerate(layers):
        layer = of(w, f"model.layers.{i}")
        if kind == "hybrid":
            call = hybrids.index(i)
            if call < blocks:
                calls = list(range(call, len(hybrids), blocks))
                exits = [w[f"model.layers.{hybrids[n]}.linear.weight"] for n in calls]
                operators.append(_block(of(layer, "shared_transformer"), exits, calls))
            layer = of(layer, "mamba_decoder")
        operators.append(_mamba(of(layer, "mamba")))
        norms.append(layer["input_layernorm.weight"])
    ends = {
        "embedding.weight": w["model.embed_tokens.weight"],
        "final_norm.weight": w["model.final_layernorm.weight"],
    }
    ours = load(found.genome, operators, norms, ends)
    # In float64, where theirs rounds its step sizes and states to float32 and nothing else: in
    # float32 each of the two is up to 3e-5 from its own float64 here.
    check(ours.double(), theirs.double()(tokens()).logits)


def test_a_scaling_of_rope_is_told() -> None:
    """The block has no axes of it."""
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    found = imported.read({**SMALL, "use_mem_rope": True, "rope_parameters": scaled})
    assert "a scaling of RoPE (linear)" in found.differs


SHARED = (
    "{width=32} gqa(heads=2) > [shared-block(heads=2, rank=3, weights=@a) | mamba2(heads=2)]"
    "(join=chain) > [shared-block(heads=2, rank=3, weights=@a) | mamba2(heads=2)](join=chain)"
    " > swiglu > shared-block(heads=2, rank=3, weights=@a)"
)


def test_places_have_their_own_parts_and_costs_count_the_rest_once() -> None:
    genome = parse(SHARED)
    model = build(genome)
    blocks = [part for part in model.operators if isinstance(part, SharedBlock)]
    assert [len(block.places) for block in blocks] == [3]
    assert cost(genome).total.params == sum(p.numel() for p in model.parameters())
    config = blocks[0].config
    assert isinstance(config, SharedBlockConfig)
    assert own_params(config) == sum(p.numel() for p in blocks[0].places[0].parameters())
    costs = cost(genome).slots
    mamba = cost(parse("{width=32} mamba2(heads=2)")).slots[0].params
    assert costs[2].params == mamba + own_params(config)
    # Alone in its slot, the block norms its input itself: the slot has no norm.
    assert costs[4].params == own_params(config)


def test_every_place_of_a_shared_block_has_a_gradient_of_its_own() -> None:
    torch.manual_seed(0)
    model = build(parse(SHARED))
    block = next(part for part in model.operators if isinstance(part, SharedBlock))
    model(tokens(12) % 32)[0].square().mean().backward()
    found = [[p.grad for p in place.parameters()] for place in block.places]
    for row in zip(*found, strict=True):
        assert all(g is not None and g.abs().max() > 0 for g in row)
        assert not torch.equal(row[0], row[1])


def test_the_block_reads_what_the_embedding_made_of_the_token() -> None:
    """At the last slot two sequences that differ in one early token differ by that token's
    embedding too, where no mixer between could have carried it: there is none."""
    torch.manual_seed(0)
    genome = parse("{width=32, position=none} swiglu > shared-block(heads=2, adapters=none)")
    model = build(genome).double().eval()
    block = model.operators[1]
    x = tokens(9) % 32
    with torch.no_grad():
        e = model.embedding(x)
        h = e + model.operators[0](model.blocks[0].before(e))[0]
        u = block.norm(torch.cat((h, e), -1))
        y = block.attention.exit(block.attention.forward_heads(u)[0])
        y = block.places[0].exit(block.mlp(block.inner_norm(y))[0])
        expected = (model.final_norm(h + y)) @ model.embedding.weight.T
        assert error(model(x)[0], expected) < 1e-12


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_a_chain_is_its_branches_one_after_the_other(placement: str) -> None:
    torch.manual_seed(0)
    genome = parse(
        f"{{width=32, placement={placement}}} [gqa(heads=2) | mamba2(heads=2) | gla(heads=2)]"
        "(join=chain)"
    )
    model = build(genome).double().eval()
    x = tokens(9) % 32
    block, (one, two, three) = model.blocks[0], model.operators
    with torch.no_grad():
        e = model.embedding(x)
        a = one(block.before(e))[0]
        b = two(block.before(e + a))[0]
        c = three(block.before(e + b))[0]
        stream = block.after(e + c) if placement == "post" else e + block.after(c)
        expected = model.final_norm(stream) @ model.embedding.weight.T
        assert error(model(x)[0], expected) < 1e-12


@pytest.mark.parametrize("join", ["chain", "sum"])
def test_what_is_handed_on_goes_from_branch_to_branch_of_a_chain_alone(join: str) -> None:
    """Scores of RealFormer: the second branch adds those of the first, the next slot the last."""
    torch.manual_seed(0)
    block = "realformer(heads=2)"
    genome = parse(f"{{width=32}} [{block} | {block}](join={join}) > {block}")
    model = build(genome).double().eval()
    x = tokens(9) % 32
    chain = join == "chain"
    with torch.no_grad():
        e = model.embedding(x)
        first, second = Carry(None), Carry(None)
        a = model.operators[0](model.blocks[0].before(e), None, first)[0]
        if chain:
            second = Carry(first.later)
        b = model.operators[1](model.blocks[0].before(e + a if chain else e), None, second)[0]
        h = e + (b if chain else a + b)
        mean = [(p + q) / 2 for p, q in zip(first.later, second.later, strict=True)]
        last = Carry(second.later if chain else mean)
        h = h + model.operators[2](model.blocks[1].before(h), None, last)[0]
        expected = model.final_norm(h) @ model.embedding.weight.T
        assert error(model(x)[0], expected) < 1e-12


def test_a_search_puts_a_branch_anywhere_in_a_chain() -> None:
    space = read_space(
        {
            "width": 32,
            "depth": 1,
            "operators": {"mamba2": {"heads": [2]}, "gla": {"heads": [2]}},
            "pattern": "free",
            "parallel": {"branches": 2, "share": 0.5},
            "join": ["chain"],
        }
    )
    genome, rng = parse("{width=32} mamba2(heads=2)"), np.random.default_rng(0)
    made = [mutate(genome, space, rng, ["parallel"])[0].slots[0] for _ in range(32)]
    orders = {tuple(op.name for op in slot.branches) for slot in made}
    assert {("gla", "mamba2"), ("mamba2", "gla")} <= orders


def test_in_small_a_model_shares_what_it_shared() -> None:
    hybrid = "[shared-block(heads=8, weights=@{}) | mamba2](join=chain)"
    a, b = hybrid.format("a"), hybrid.format("b")
    assert small(parse(f"{{width=512}} {a}*2 > mamba2*2")) == parse(
        "{width=64} [shared-block(weights=@a) | mamba2(key_dim=16)](join=chain)*2"
        " > mamba2(key_dim=16)*2"
    )
    # One of two blocks that are called alone shares with nobody.
    lone = small(parse(f"{{width=512}} {a} > {b} > mamba2*20 > {a} > {b}"))
    assert [op.weights for *_, op in lone.ops()] == [None] * 5


@pytest.mark.parametrize(("width", "depth"), [(64, 6), (64, 8), (768, 24)])
def test_the_preset_shares_its_block(width: int, depth: int) -> None:
    genome = presets.load("zamba-like", width, depth)
    blocks = [op for *_, op in genome.ops() if op.name == "zamba2-block"]
    assert len(blocks) > 1
    assert all(op.weights is not None for op in blocks)


def test_order_means_something_in_a_chain_alone() -> None:
    def hashes(join: str) -> set[str]:
        both = ("gqa(heads=2) | mamba2(heads=2)", "mamba2(heads=2) | gqa(heads=2)")
        return {canonical_hash(parse(f"[{branches}](join={join})")) for branches in both}

    assert len(hashes("chain")) == 2
    assert len(hashes("sum")) == 1
    assert not hashes("chain") & hashes("sum")


EVERYWHERE = (
    "swiglu > [shared-block(heads=2, rank=3, weights=@a) | mamba2(heads=2)](join=chain{tokens})"
    " > shared-block(heads=2, adapters=all) > [gqa(heads=2) | shared-block(heads=2, rank=3,"
    " weights=@a)](join=chain) > [shared-block(heads=2, rank=3, weights=@a) | gqa(heads=2)]"
    "(join=top1)"
)


@pytest.mark.parametrize("tokens_", ["", ", tokens=0.5"], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("residual", ["plain", "rezero", "reversible", "ngpt"])
def test_decoding_equals_the_whole_pass_in_every_residual_form(residual: str, tokens_: str) -> None:
    genome = parse(f"{{width=32, residual={residual}}} {EVERYWHERE.format(tokens=tokens_)}")
    assert violations(genome) == []
    model = build(genome)
    assert cost(genome).total.params == sum(p.numel() for p in model.parameters())
    for seed in range(3):
        assert difference(genome, seed) < TOLERANCE


def test_a_reversible_backbone_has_the_gradients_of_the_plain_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those that reach the embedding through the blocks that read it."""

    def gradients(genome: Genome) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build(genome).double()
        model(tokens(11) % 32)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    genome = parse(f"{{width=32, residual=reversible}} {EVERYWHERE.format(tokens='')}")
    ours = gradients(genome)
    monkeypatch.setattr(
        "mendel.genome.model.reversible_streams",
        lambda step, parts, x: plain_streams(step, len(parts), x),
    )
    expected = gradients(genome)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(ours[name], gradient) < 1e-10, name
