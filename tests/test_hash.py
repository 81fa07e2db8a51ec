"""One hash per model: what changes nothing changes no hash, what changes the model does."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest

from mendel.genome.check import wide_space
from mendel.genome.genome import Genome, Slot
from mendel.genome.graph import graph
from mendel.genome.hash import canonical_form, canonical_hash
from mendel.genome.notation import parse, show
from mendel.genome.resolve import configs, genes_of, primitive_of, sites
from mendel.genome.sample import sample_valid
from mendel.genome.space import Space

TINY = Space.model_validate(
    {
        "width": 32,
        "depth": [1, 4],
        "position": ["rope", "none"],
        "norm": ["rmsnorm", "none"],
        "placement": ["pre", "post"],
        "residual": ["plain", "reversible", "ngpt"],
        "embedding_norm": [False, True],
        "join": ["mean", "norm", "top1"],
        "tokens": [1.0, 0.5],
        "operators": {"mha": {"window": [32, 64]}, "mqa": {}, "mingru": {}, "swiglu": {}},
        "pattern": "free",
        "parallel": {"branches": 2, "share": 0.6},
        "sharing": {"weights": True, "features": True},
    }
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mqa", "attention(kv_heads=1)"),
        ("mha(heads=4)", "mha"),
        ("mha(window=64)", "mha(window=128)"),
        ("mha(kv_heads=4)", "mha"),
        ("{position=rope} mha(position=none)", "{position=alibi} mha(position=none)"),
        ("{position=rope} mamba2 > swiglu", "{position=none} mamba2 > swiglu"),
        ("[mha | mamba2]", "[mamba2 | mha]"),
        ("[mha](join=sum)", "mha"),
        ("{norm=none} mha", "{norm=none, placement=sandwich} mha"),
        ("{norm=none} [mha | mqa]", "{norm=none} [mha | mqa](join=norm)"),
        ("{residual=ngpt} mha", "{residual=ngpt, norm=layernorm, placement=post} mha"),
        ("{residual=ngpt} mha(qk_norm=true)", "{residual=ngpt} mha"),
        ("{residual=ngpt} mha", "{residual=ngpt, embedding_norm=true} mha"),
        ("{norm=none} mha", "{norm=none, embedding_norm=true} mha"),
        (
            "[mha | mamba2] > mha(weights=@a) > mha(weights=@a)",
            "[mamba2 | mha] > mha(weights=@b) > mha(weights=@b)",
        ),
        ("mha(weights=@a) > mha(features=@k)", "mha*2"),
        ("[mha(weights=@a) | mha] > mha(weights=@a)", "[mha | mha(weights=@a)] > mha(weights=@a)"),
        (
            "[mha(weights=@a) | mha(weights=@b)] > [mha(weights=@b) | mha(weights=@a)]",
            "[mha(weights=@a) | mha(weights=@b)] > [mha(weights=@a) | mha(weights=@b)]",
        ),
    ],
)
def test_what_changes_nothing(one: str, other: str) -> None:
    assert canonical_hash(parse(one)) == canonical_hash(parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mha", "mqa"),
        ("mha > swiglu", "swiglu > mha"),
        ("mha", "{width=128} mha"),
        ("mha", "{vocab=512} mha"),
        ("mha", "{tied=false} mha"),
        ("mha", "{norm=layernorm} mha"),
        ("mha", "{placement=post} mha"),
        ("mha", "{norm=none} mha"),
        ("mha", "{embedding_norm=true} mha"),
        ("mha", "{residual=rezero} mha"),
        ("{residual=layerscale} mha", "{residual=rezero} mha"),
        ("{norm=none} mha", "{residual=ngpt} mha"),
        ("{residual=ngpt} [mha | mqa]", "{residual=ngpt} [mha | mqa](join=norm)"),
        ("mha", "{position=alibi} mha"),
        ("mamba2", "{position=learned} mamba2"),
        ("{position=sinusoidal} mamba2", "{position=learned} mamba2"),
        ("swa(window=64)", "swa(window=128)"),
        ("[mha | mamba2]", "[mha | mamba2](join=sum)"),
        ("[mha | mamba2](join=gate)", "[mha | mamba2](join=top1)"),
        ("mha", "[mha](tokens=0.5)"),
        ("[mha](tokens=0.25) > mha", "mha > [mha](tokens=0.25)"),
        ("[mha | mamba2]", "mha > mamba2"),
        ("mha*2", "mha(weights=@a) > mha(weights=@a)"),
        ("mha*2", "mha(features=@a) > mha(features=@a)"),
        ("mha(weights=@a) > mha(weights=@a)", "mha(features=@a) > mha(features=@a)"),
        (
            "mha(weights=@a)*2 > mha(weights=@b)*2",
            "[mha(weights=@a) > mha(weights=@b)]*2",
        ),
        ("[mha(weights=@a) | mha] > mha(weights=@a)", "[mha | mha] > mha"),
        (
            "[mha(weights=@a) | mha(weights=@a)] > [mha(weights=@b) | mha(weights=@b)]",
            "[mha(weights=@a) | mha(weights=@b)] > [mha(weights=@b) | mha(weights=@a)]",
        ),
    ],
)
def test_what_changes_the_model(one: str, other: str) -> None:
    assert canonical_hash(parse(one)) != canonical_hash(parse(other))


def test_sharing_that_only_its_pattern_tells_apart() -> None:
    """Two ways to cross two weight groups with two feature groups; every operator looks alike."""
    lenders = "[mha(features=@k) | mha(features=@l)]"
    row = "[mha(weights=@{}, features=@k) | mha(weights=@{}, features=@l)]"
    same = parse(f"{lenders} > {row.format('a', 'b')} > {row.format('a', 'b')}")
    turned = parse(f"{lenders} > {row.format('a', 'b')} > {row.format('b', 'a')}")
    both = parse(f"{lenders} > {row.format('b', 'a')} > {row.format('b', 'a')}")
    assert canonical_hash(same) == canonical_hash(both)
    assert canonical_hash(same) != canonical_hash(turned)


def scrambled(genome: Genome, rng: np.random.Generator) -> Genome:
    """The same model in other words: branches in another order, names by axes, other labels."""
    slots = []
    for slot in genome.slots:
        ops = [
            replace(
                op,
                name=primitive_of(op).name,
                genes=tuple(genes_of(op).items()),
                weights=op.weights and f"w_{op.weights}",
                features=op.features and f"{op.features}_{op.features}",
            )
            for op in slot.branches
        ]
        join = slot.join if len(ops) > 1 else "sum"
        if join != "chain":
            ops = [ops[i] for i in rng.permutation(len(ops))]
        slots.append(Slot(tuple(ops), join, slot.tokens))
    return replace(genome, slots=tuple(slots))


@pytest.mark.parametrize("space", [TINY, wide_space()], ids=["tiny", "wide"])
def test_the_same_model_in_other_words(space: Space) -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        genome = sample_valid(space, rng)
        assert canonical_hash(scrambled(genome, rng)) == canonical_hash(genome), show(genome)


def explicit(genome: Genome) -> Any:
    """The model spelled out, by trying every order of every slot's branches."""
    rows = list(zip(genome.slots, configs(genome), sites(genome), strict=True))
    alone = {"weights": set(), "features": set()}
    for kind, labels in alone.items():
        given = [getattr(op, kind) for *_, op in genome.ops()]
        labels.update(label for label in given if given.count(label) == 1)
    forms = []
    for orders in itertools.product(
        *(itertools.permutations(range(len(slot.branches))) for slot in genome.slots)
    ):
        numbers: dict[tuple[str, str], int] = {}
        form = []
        for (slot, row, _), order in zip(rows, orders, strict=True):
            ops = []
            for j in order:
                op = slot.branches[j]
                ops.append(repr(row[j]))
                for kind in ("weights", "features"):
                    label = getattr(op, kind)
                    shared = label is not None and label not in alone[kind]
                    ops.append(
                        str(numbers.setdefault((kind, label), len(numbers)) if shared else -1)
                    )
            join = slot.join if len(order) > 1 else ""
            if join == "norm" and genome.norm == "none" and genome.residual != "ngpt":
                join = "mean"
            form.append((tuple(ops), join, slot.tokens))
        forms.append(tuple(form))
    normed = genome.norm != "none" and genome.residual != "ngpt"
    return (
        genome.width,
        genome.residual,
        genome.norm if normed else "",
        genome.placement if normed else "",
        normed and genome.embedding_norm,
        genome.tied,
        genome.vocab,
        genome.position if genome.position in ("learned", "sinusoidal") else "",
        min(forms),
    )


def test_no_collision_and_no_miss_among_random_genomes() -> None:
    """2,000 genomes of a space so small that many of them are the same model."""
    rng = np.random.default_rng(0)
    by_hash: dict[str, Any] = {}
    by_form: dict[Any, str] = {}
    for _ in range(2000):
        genome = sample_valid(TINY, rng)
        found, form = canonical_hash(genome), explicit(genome)
        assert by_hash.setdefault(found, form) == form, show(genome)
        assert by_form.setdefault(form, found) == found, show(genome)
    assert 300 < len(by_hash) < 1900


def test_no_collision_in_a_wide_space() -> None:
    space, rng = wide_space(), np.random.default_rng(1)
    forms = {}
    for _ in range(300):
        genome = sample_valid(space, rng)
        form = canonical_form(genome)
        assert forms.setdefault(canonical_hash(genome), form) == form
    assert len(forms) > 250


def test_every_process_finds_the_same_hash() -> None:
    text = "{width=32} [mha(weights=@a) | mamba2] > swiglu(expansion=2) > mha(weights=@a)"
    code = (
        "from mendel.genome.hash import canonical_hash\n"
        "from mendel.genome.notation import parse\n"
        f"print(canonical_hash(parse({text!r})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert found.stdout.strip() == canonical_hash(parse(text))
    assert len(found.stdout.strip()) == 16


def test_the_graph() -> None:
    made = graph(parse("[mha(features=@k) | mamba2](join=sum) > swiglu > mha(features=@k)"))
    assert nx.is_directed_acyclic_graph(made)
    kinds = [kind for _, kind in made.nodes(data="kind")]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "embedding": 1,
        "norm": 4,
        "operator": 4,
        "join": 1,
        "add": 3,
        "head": 1,
    }
    assert made.nodes["slot0.join"]["join"] == "sum"
    assert made.nodes["slot2.0"]["config"].borrows
    features = [(a, b) for a, b, kind in made.edges(data="kind") if kind == "features"]
    assert features == [("slot0.0", "slot2.0")]
    data = made.edge_subgraph((a, b) for a, b, k in made.edges(data="kind") if k == "data")
    assert all(nx.has_path(data, "embedding", n) and nx.has_path(data, n, "head") for n in data)
    assert set(data) == set(made)


@pytest.mark.parametrize(("placement", "norms"), [("pre", 3), ("post", 2), ("sandwich", 5)])
def test_the_graph_has_the_norms_of_the_placement(placement: str, norms: int) -> None:
    for more in (0, 1):
        header = f"{{placement={placement}, embedding_norm={str(more == 1).lower()}}}"
        made = graph(parse(f"{header} mha > swiglu"))
        assert [kind for _, kind in made.nodes(data="kind")].count("norm") == norms + more
