"""A disk that takes no more: one line that names the file, exit code 2, nothing half-written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Call, caller
from exported import trained


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system takes no larger file from this process, and says so by an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


CONFIG = (
    '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,'
    ' "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256}'
)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("big.yaml", ("scale", "mamba2", "--params", "1M", "--out", "big.yaml")),
        ("drawn.svg", ("show", "mamba2", "--svg", "drawn.svg")),
        ("study.yaml", ("init", "study.yaml")),
        ("read.json", ("import", "config.json", "--out", "read.json")),
        ("design", ("export", "mamba2", "--out", "design")),
        ("deep/design", ("export", "mamba2", "--out", "deep/design", "--format", "hf")),
        ("t/plan.json", ("train", "mamba2", "--proxy", "in-context-recall", "--out", "t")),
    ],
)
def test_a_file_is_named_and_nothing_stays(
    name: str, arguments: tuple[str, ...], tmp_path: Path, call: Call
) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    with files_of_at_most(100):
        code, _, err = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert name in err.split(":")[1]
    assert "File too large" in err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_weights_that_find_no_room(tmp_path: Path, call: Call) -> None:
    trained(tmp_path / "training")
    before = sorted(tmp_path.iterdir())
    # Room for every file of code, not for the weights.
    with files_of_at_most(60_000):
        code, _, err = call("export", "training", "--format", "hf", "--out", "model")
    assert (code, err) == (2, "mendel: model cannot be written: File too large\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_training_goes_on_when_there_is_room(tmp_path: Path, call: Call) -> None:
    task = ("--proxy", "in-context-recall", "--set", "length=16", "--batch", "2", "--steps", "3")
    train = ("train", "{width=64} mamba2 > swiglu", *task, "--out", "t")
    with files_of_at_most(60_000):
        code, _, err = call(*train)
    assert (code, err) == (2, "mendel: t/seed-0/checkpoint.safetensors: File too large\n")
    assert list((tmp_path / "t" / "seed-0").iterdir()) == []
    assert call(*train)[0] == 0
