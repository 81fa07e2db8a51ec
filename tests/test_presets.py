"""The presets: published designs at any size."""

import pytest
import torch

from mendel.genome import presets
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.notation import show
from mendel.genome.presets import PresetError
from mendel.genome.resolve import is_causal, primitive_of
from mendel.genome.rules import violations
from mendel.primitives.base import BidirectionalError

HYBRIDS = (
    "granite-like",
    "hymba-like",
    "lite-transformer",
    "r-transformer",
    "lstm-attention",
    "mamba-moe",
    "conformer-like",
    "moeut-like",
)


def test_the_baselines_are_there() -> None:
    assert set(presets.names()) >= {
        "transformer++",
        "mamba2",
        "striped",
        "jamba-like",
        "griffin-like",
        "samba-like",
        "retnet",
        "gated-deltanet",
        *HYBRIDS,
        "dpmamba-like",
    }


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is_and_is_valid(name: str) -> None:
    preset = presets.describe(name)
    assert preset.name == name
    assert preset.summary.endswith(".")
    assert "arXiv" in preset.source
    genome = presets.load(name)
    assert (genome.width, len(genome.slots)) == (preset.header["width"], preset.depth)
    for width in (64, 128, 768):
        for depth in (1, 2, 5, 13, 24):
            genome = presets.load(name, width, depth)
            assert (genome.width, len(genome.slots)) == (width, depth)
            assert violations(genome) == []


def test_the_motif_repeats_and_is_cut() -> None:
    assert show(presets.load("transformer++", depth=5)) == "{width=64} [mha > swiglu]*2 > mha"
    assert show(presets.load("striped", 1024, 6)) == (
        "{width=1024} mamba2 > swiglu > mha > swiglu > mamba2 > swiglu"
    )
    assert show(presets.load("mamba2", 512, 3)) == "{width=512, position=none} mamba2*3"


def test_small_widths_take_the_small_motif() -> None:
    for name in presets.names():
        small = presets.describe(name).small
        if small is not None:
            assert show(presets.load(name, small["below"])) != show(
                presets.load(name, small["below"] - 1)
            )
    assert "key_dim=32" in show(presets.load("mamba2", 64))
    assert "key_dim" not in show(presets.load("mamba2", 512))


def test_the_hybrids_are_hybrids_at_six_slots() -> None:
    for name in ("striped", "jamba-like", "griffin-like", "samba-like"):
        ops = presets.load(name, depth=6).ops()
        mixers = {row.name for row in (primitive_of(op) for *_, op in ops) if row.kind == "mixer"}
        assert len(mixers) == 2


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("name", HYBRIDS)
def test_both_forms_of_a_hybrid_agree(name: str, width: int) -> None:
    genome = presets.load(name, width)
    assert is_causal(genome)
    assert difference(genome, seed=1) <= TOLERANCE


@pytest.mark.parametrize("width", [64, 512])
def test_a_bidirectional_preset_reads_later_tokens_and_does_not_decode(width: int) -> None:
    genome = presets.load("dpmamba-like", width, depth=3)
    assert not is_causal(genome)
    torch.manual_seed(0)
    model = build(genome)
    tokens = torch.randint(256, (2, 11))
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 256
    with torch.no_grad():
        first, second = (model(t)[0][:, 0] for t in (tokens, later))
    assert (first - second).abs().max() > 0
    with pytest.raises(BidirectionalError):
        model.init_state(2, 11)


def test_granite_has_one_attention_in_ten_mixers() -> None:
    ops = [op for *_, op in presets.load("granite-like", 1024, 40).ops()]
    assert [i // 2 for i, op in enumerate(ops) if op.name == "gqa"] == [5, 15]
    assert sum(op.name == "mamba2" for op in ops) == 18
    assert sum(op.name == "moe" for op in ops) == 20


def test_hymba_shares_keys_and_values_between_two_neighbours_in_every_repetition() -> None:
    genome = presets.load("hymba-like", depth=20)
    shared: dict[str, list[int]] = {}
    for i, _, op in genome.ops():
        if op.features is not None:
            shared.setdefault(op.features, []).append(i)
    assert shared == {"a": [2, 4], "b": [6, 8], "c": [12, 14], "d": [16, 18]}
    full = [i for i, _, op in genome.ops() if op.name == "gqa" and "pattern" not in dict(op.genes)]
    assert full == [0, 10]
    cut = presets.load("hymba-like", depth=7)
    assert [i for i, _, op in cut.ops() if op.features is not None] == [2, 4]


def test_the_parallel_presets_are_parallel() -> None:
    assert "(join=norm)" in show(presets.load("hymba-like"))
    assert show(presets.load("lite-transformer", depth=1)).startswith(
        "{width=64, norm=layernorm} ["
    )
    for name in ("hymba-like", "lite-transformer"):
        slots = presets.load(name).slots
        assert [len(slot.branches) for slot in slots] == [2, 1] * (len(slots) // 2)


def test_mistakes() -> None:
    with pytest.raises(PresetError) as caught:
        presets.load("transformer")
    assert str(caught.value) == (
        f"no preset is named 'transformer'; there are {', '.join(presets.names())}; "
        "did you mean transformer++ or r-transformer?"
    )
    with pytest.raises(PresetError, match=r"^depth is a number of slots from 1 to 512, not 0$"):
        presets.load("mamba2", depth=0)
    with pytest.raises(PresetError):
        presets.load("../mamba2")
