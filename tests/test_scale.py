"""Genomes taken to a size: what they reach, what stays, and what cannot be had."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mendel.genome import presets, published
from mendel.genome.aspect import ASPECTS, aspect_of, usual_aspect
from mendel.genome.build import build
from mendel.genome.check import wide_space
from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.notation import parse, show
from mendel.genome.resolve import configs, groups
from mendel.genome.rules import InvalidGenome, violations
from mendel.genome.sample import sample_valid
from mendel.genome.scale import BOUND, ScaleError, ladder, scale, scale_preset
from mendel.genome.widen import LARGEST_HEAD, SMALLEST_HEAD, SPREAD, widen
from mendel.primitives.base import Config, GeneError

HEADS = ("head_dim", "value_dim")


def head_sizes(config: Config) -> list[int]:
    """Channels of the heads of a config that has some; one head is the whole width by design."""
    if getattr(config, "heads", 0) == 1:
        return []
    inner = [getattr(config, name, None) for name in ("memory", "attention")]
    found = [getattr(c, name, 0) for c in (config, *inner) if c is not None for name in HEADS]
    return [size for size in found if size]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in presets.names() for size in (124e6, 1.3e9)),
        *((name, size) for name in ("striped", "hymba-like") for size in (350e6, 7e9)),
    ],
)
def test_presets_reach_every_size(name: str, size: float) -> None:
    found = scale_preset(name, size)
    total = cost(found.genome).total
    assert abs(total.params / size - 1) <= BOUND
    assert (found.params, found.deviation) == (total.params, total.params / size - 1)
    assert violations(found.genome) == []
    assert found.genome.width % 64 == 0
    for config in {c for row in configs(found.genome) for c in row}:
        for channels in head_sizes(config):
            assert SMALLEST_HEAD / SPREAD <= channels <= LARGEST_HEAD
    assert 0.4 < found.aspect / found.usual_aspect < 2.5


def test_a_size_has_one_answer() -> None:
    assert scale_preset("griffin-like", 124e6) == scale_preset("griffin-like", 124e6)


# The last model of each family, and the one whose layers have no order.
LAST = {published.describe(name).summary: name for name in published.names()}


@pytest.mark.parametrize("name", [*LAST.values(), "nemotron-h-47b"])
def test_published_models_at_their_own_size_are_themselves(name: str) -> None:
    genome = published.load(name)
    total = cost(genome).total
    found = scale(genome, total.params)
    assert found.genome == genome
    assert found.deviation == 0
    if total.active_params != total.params:
        assert scale(genome, total.active_params, active=True).genome == genome


def test_a_preset_at_a_width_has_the_motif_for_it() -> None:
    # Fewer experts, which the small motif has, would come to the size.
    with pytest.raises(ScaleError, match="the nearest has 7,958,514,304"):
        scale_preset("granite-like", 3e9, width=4096)


def test_repeats_of_a_preset_share_as_the_preset_does() -> None:
    pairs = groups(scale_preset("hymba-like", 350e6).genome, "features")
    assert len(pairs) > 4
    assert all(len(members) == 2 for members in pairs.values())
    # Two layers' weights are those of the whole depth.
    deep = scale_preset("moeut-like", 124e6)
    assert len(groups(deep.genome, "weights")) == 4
    assert 0.4 < deep.aspect / deep.usual_aspect < 2.5


def test_large_states_stay_large() -> None:
    made = scale(published.load("xlstm-7b"), 1.3e9).genome
    sizes = {size for row in configs(made) for config in row for size in head_sizes(config)}
    assert sizes
    assert all(400 < size < 640 for size in sizes)


def test_scaling_again_changes_little() -> None:
    first = scale(parse("[mamba2(key_dim=8) > swiglu]*3 > [mha > swiglu]"), 350e6)
    again = scale(first.genome, 350e6)
    assert abs(again.genome.width / first.genome.width - 1) < 0.15
    assert abs(again.params / first.params - 1) < BOUND
    exact = scale(first.genome, first.params)
    assert exact.genome == first.genome


def test_the_published_shapes_come_out() -> None:
    found = scale_preset("transformer++", 124e6, vocab=50257)
    assert (found.genome.width, len(found.genome.slots)) == (768, 24)
    assert show(found.genome) == "{width=768, vocab=50257} [mha(heads=12) > swiglu]*12"


@pytest.mark.parametrize(
    ("text", "width", "wanted"),
    [
        ("gqa(kv_heads=2)", 1024, "gqa(heads=16, kv_heads=8)"),
        ("mqa", 1024, "mqa(heads=16)"),
        ("mha(heads=1)", 1024, "mha(heads=16)"),
        # Heads of 16 grow to 64 before they become more.
        ("mha", 128, "mha"),
        ("mha", 192, "mha"),
        ("mha", 512, "mha(heads=8)"),
        ("moh", 1024, "moh(active_heads=8, heads=16, shared_heads=4)"),
        ("mla(head_dim=16, latent=32, rope_dim=8)", 1024,
         "mla(head_dim=64, heads=16, latent=128, rope_dim=32)"),
        ("mla(head_dim=16, latent=32, rope_dim=8, q_rank=48)", 512,
         "mla(head_dim=64, heads=8, latent=128, q_rank=384, rope_dim=32)"),
        # A key width goes up to the name's own, or 64.
        ("mamba2(key_dim=16)", 256, "mamba2(key_dim=64)"),
        ("mamba2(key_dim=16)", 2048, "mamba2"),
        ("gla(key_dim=8)", 2048, "gla(key_dim=64)"),
        # But not where the features of keys bear no more than 32.
        ("based", 2048, "based"),
        ("gla(decay=scalar, feature=taylor, key_dim=16)", 2048,
         "gla(decay=scalar, feature=taylor, key_dim=16)"),
        ("linear-attention(feature=taylor)", 2048,
         "linear-attention(feature=taylor, key_dim=16)"),
        ("gla(heads=2)", 2048, "gla(heads=64)"),
        ("gla(heads=8)", 2048, "gla"),
        ("kda(heads=1, expand=1.5)", 128, "kda(expand=1.5, heads=2)"),
        ("rwkv7(rank=16)", 2048, "rwkv7"),
        ("mlstm(heads=1)", 512, "mlstm(heads=8)"),
        ("titans-lmm", 1024, "titans-lmm"),
        ("lstm", 1024, "lstm"),
        ("swa(window=32)", 1024, "swa(heads=16, window=32)"),
        ("moe(experts=4, top_k=1, expansion=0.5)", 1024, "moe(expansion=0.5, experts=4, top_k=1)"),
    ],
)  # fmt: skip
def test_what_a_width_does_to_an_operator(text: str, width: int, wanted: str) -> None:
    # The mixer beside keeps a genome of a channel mixer valid.
    found = widen(parse(f"{{width=64}} {text} > fnet"), width)
    assert found is not None
    assert show(found) == f"{{width={width}}} {wanted} > fnet"
    assert violations(found) == violations(parse(f"{{width=64}} {text} > fnet"))


def test_a_width_that_heads_do_not_divide() -> None:
    assert widen(parse("gqa(heads=4, kv_heads=1) > swiglu"), 1000) is None
    with pytest.raises(ScaleError, match="no heads that divide a width of 1000"):
        scale(parse("mha > swiglu"), 1e9, width=1000)


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "kimi-linear-48b-a3b", "hymba-like", "jamba-v0.1", "nemotron-h-8b"]
)
def test_results_build(name: str) -> None:
    made = (
        scale_preset(name, 124e6) if name in presets.names() else scale(published.load(name), 1e9)
    )
    with torch.device("meta"):
        model = build(made.genome)
    assert sum(p.numel() for p in model.parameters()) == made.params


def test_random_genomes_scale() -> None:
    space = wide_space()
    for seed in range(4):
        genome = sample_valid(space, np.random.default_rng(seed))
        found = scale(genome, 300e6)
        assert violations(found.genome) == []
        assert abs(found.deviation) <= BOUND


def test_active_parameters_and_pins() -> None:
    genome = parse("[mha > moe(experts=8, top_k=2)]*4")
    total, active = scale(genome, 1e9), scale(genome, 1e9, active=True)
    assert abs(active.active_params / 1e9 - 1) <= BOUND
    assert active.params > 2 * total.params
    assert scale(genome, 1e9, width=1024).genome.width == 1024
    assert len(scale(genome, 1e9, depth=20).genome.slots) == 20
    # Far from the usual aspect too.
    shallow = scale(genome, 1e9, depth=4, active=True).genome
    assert (len(shallow.slots), shallow.width > 3000) == (4, True)
    wide, deep = (scale(genome, 1e9, aspect=aspect) for aspect in (200, 20))
    assert aspect_of(wide.genome) / aspect_of(deep.genome) > 6


def test_the_usual_aspect_is_that_of_the_table() -> None:
    assert [usual_aspect(size) for size, _ in ASPECTS] == pytest.approx([a for _, a in ASPECTS])
    assert usual_aspect(1e6) == ASPECTS[0][1]
    assert usual_aspect(1e12) == ASPECTS[-1][1]
    # Counted in layers of two slots, Mamba's shapes are those of the table.
    for name in ("mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b"):
        genome = published.load(name)
        assert aspect_of(genome) in [aspect for _, aspect in ASPECTS]


def test_widths_are_those_that_devices_like() -> None:
    widths = ladder(20000)
    assert widths == sorted(widths)
    assert {768, 1024, 2048, 2560, 4096, 5120, 7168, 8192, 16384} <= set(widths)
    assert all(width % 64 == 0 for width in widths)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda g: scale(g, 1),
            r"5% of 1 parameters; the nearest has [\d,]+ \(width 64, 2 slots\); n",
        ),
        (lambda g: scale(g, 1e17), "come within 5%"),
        (lambda g: scale(g, float("nan")), "at least 1 parameter, not nan"),
        (lambda g: scale(g, 1e9, aspect=0.0), "the aspect is a number above 0, not 0"),
        (lambda g: scale(g, 1e9, width=512, depth=4), "pin one of them"),
        (lambda g: scale(g, 1e9, depth=5), "no depth of 5 slots; nearest: 4 or 6"),
        (lambda g: scale(g, 1e13, depth=2), "no width and depth as pinned come within"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(call: Callable[[Genome], object], words: str) -> None:
    with pytest.raises(ScaleError, match=words):
        call(parse("[mha > swiglu]*3"))


def test_invalid_genomes_and_widths_are_refused() -> None:
    with pytest.raises(InvalidGenome):
        scale(parse("swiglu"), 1e6)
    with pytest.raises(GeneError, match="width"):
        scale(parse("mha > swiglu"), 1e9, width=1 << 20)


def test_the_lines_say_what_was_done() -> None:
    found = scale(parse("[mha(heads=2) > swiglu]*3"), 124e6)
    repeats = len(found.genome.slots) // 2
    assert found.done[0] == (
        f"the motif of 2 slots stands {repeats} times, before 3 times: {2 * repeats} slots"
    )
    assert found.done[1] == f"width 64 -> {found.genome.width}"
    assert found.done[2].startswith("mha: heads 2 -> ")
    table = scale(parse("{vocab=200000} [mha > swiglu]*3"), 124e6).done[-1]
    assert table.startswith("the vocabulary of 200,000 takes")
    same = Genome(64, parse("[mha > swiglu]*3").slots)
    assert scale(same, cost(same).total.params).done == (
        "the motif of 2 slots stands 3 times, as before",
        "the width stays 64",
    )
