"""The presets: published designs at any size."""

import pytest

from mendel.genome import presets
from mendel.genome.notation import show
from mendel.genome.presets import PresetError
from mendel.genome.resolve import primitive_of
from mendel.genome.rules import violations


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


def test_mistakes() -> None:
    with pytest.raises(PresetError) as caught:
        presets.load("transformer")
    assert str(caught.value) == (
        f"no preset is named 'transformer'; there are {', '.join(presets.names())}; "
        "did you mean transformer++?"
    )
    with pytest.raises(PresetError, match=r"^depth is a number of slots from 1 to 512, not 0$"):
        presets.load("mamba2", depth=0)
    with pytest.raises(PresetError):
        presets.load("../mamba2")
