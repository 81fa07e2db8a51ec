"""`mendel scale`, and the cost of training in `mendel show`, for real."""

from pathlib import Path

import pytest
from command_line import Call, caller, loads

from mendel.genome.devices import DEVICES
from mendel.genome.files import load

SMALL = "[mamba2(key_dim=8) > swiglu]*3 > mha > swiglu"


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


def test_scale_writes_a_genome_that_show_reads(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("scale", SMALL, "--params", "350M", "--vocab", "50k", "--out", "big.yaml")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "that were asked for" in out
    assert "the whole genome of 8 slots stands" in out
    assert lines[-1] == "Written to big.yaml."
    genome = load(tmp_path / "big.yaml")
    assert genome.vocab == 50_000
    shown = loads(call("show", "big.yaml", "--json"))
    scaled = loads(call("scale", SMALL, "--params", "350M", "--vocab", "50k", "--json"))
    assert shown == {key: scaled[key] for key in shown}
    assert abs(shown["params"] / 350e6 - 1) <= 0.05
    assert set(scaled) - set(shown) == {
        "asked",
        "asked_active",
        "deviation",
        "aspect",
        "usual_aspect",
        "done",
    }


def test_scale_takes_presets_published_models_and_options(call: Call) -> None:
    preset = loads(call("scale", "samba-like", "--params", "1.3B", "--width", "2048", "--json"))
    assert preset["genome"]["width"] == 2048
    # The published window, not that of the small motif.
    assert "window" not in preset["notation"]
    active = loads(call("scale", "mixtral-8x7b", "--params", "1B", "--active", "--json"))
    assert abs(active["active_params"] / 1e9 - 1) <= 0.05
    assert active["params"] > 2e9
    deep = loads(call("scale", "mamba2", "--params", "124m", "--depth", "40", "--json"))
    assert len(deep["slots"]) == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--params", "big"], "--params is a number of at least 0"),
        (["--params", "0"], "--params is at least 1, not '0'"),
        (["--params", "1e30"], "no width and depth come within 5% of 1e+30 parameters"),
        (["--params", "1"], "no width and depth come within 5% of 1 parameters"),
        (["--params", "1B", "--width", "1000"], "no heads that divide a width of 1000"),
        (["--params", "1B", "--depth", "9"], "gives no depth of 9 slots; nearest: 8 or 10"),
        (["--params", "1B", "--depth", "8", "--width", "64"], "pin one of them"),
        (
            ["--params", "1B", "--vocab", "1"],
            "vocab is a whole number from 2 to 16777216, not",
        ),
        (["--params", "1B", "--vocab", "50257.5"], "--vocab is a whole number, not '50257.5'"),
        (["--params", "1B", "--out", "a.txt"], "a.txt: the file's name ends in .yaml, .yml, .json"),
        (["--params", "1B", "--out", "gone/a.yaml"], "gone is no folder"),
        (["--params", "1B", "--aspect", "0"], "the aspect is a number above 0, not 0"),
        (["--params", "1B", "--device", "K80"], "no device is named 'K80'"),
    ],
)
def test_a_size_that_cannot_be_had_is_one_line(
    call: Call, tmp_path: Path, options: list[str], words: str
) -> None:
    given = options if "--out" in options else [*options, "--out", "never.yaml"]
    code, out, err = call("scale", SMALL, *given)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_preset_is_repeated_anyway(call: Call) -> None:
    code, out, err = call("scale", "mamba2", "--params", "350M", "--stretch")
    assert (code, out) == (2, "")
    assert "a preset's motif is repeated" in err


def test_scale_writes_over_no_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine", encoding="utf-8")
    code, _, err = call("scale", SMALL, "--params", "350M", "--out", "mine.yaml")
    assert (code, "mine.yaml exists already" in err) == (2, True)
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "mine"


def test_show_says_what_training_costs(call: Call) -> None:
    _, out, _ = call("show", "llama-3.1-8b", "--context", "8192", "--tokens", "15T")
    words = "Training on 15.0T tokens, 1,868 per active parameter, in sequences of 8,192: 7.7e23"
    assert words in " ".join(out.split())
    assert "One device at 40% of its peak: A100 " in out
    assert "Weights, gradients and AdamW take 128 GB" in out
    one = call("show", "llama-3.1-8b", "--device", "h200", "--mfu", "0.5")[1]
    assert "One device at 50% of its peak: H200 " in one
    found = loads(call("show", "llama-3.1-8b", "--ratio", "40", "--json"))["training"]
    assert found["tokens"] == 40 * 8_030_261_248
    assert [row["device"] for row in found["devices"]] == [device.name for device in DEVICES]
    row = found["devices"][0]
    assert row["hours"] == pytest.approx(found["flops"] / (row["peak_flops"] * 0.4) / 3600)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "1B", "--ratio", "20"], "--tokens and --ratio say the same"),
        (["--tokens", "many"], "--tokens is a number of at least 0"),
        (["--ratio", "0"], "--ratio is a number of tokens above 0, not 0"),
        (["--mfu", "1.5"], "--mfu is a share above 0 and at most 1, not 1.5"),
        (["--device", "TPU"], "no device is named 'TPU'"),
        (["--device", ""], "no device is named ''"),
    ],
)
def test_mistakes_about_training_are_one_line(call: Call, options: list[str], words: str) -> None:
    code, _, err = call("show", "mha > swiglu", *options)
    assert code == 2
    assert words in err
