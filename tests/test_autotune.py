"""Launches: the lists, the choice by time, what is kept on disk, pins; every configuration."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mendel.kernels import autotune
from mendel.kernels.autotune import (
    Choices,
    Config,
    case_key,
    file_of,
    kinds,
    read_mode,
    read_pins,
    rounded,
    store,
    stored,
    times,
    tuned,
    use_tuning,
)
from mendel.kernels.backend import HAS_TRITON
from mendel.kernels.launches import CHOICES

CPU = torch.device("cpu")
KERNEL = SimpleNamespace(cache_key="0123456789abcdef" * 4)
X = torch.zeros(3)
ONE, TWO = Config((64, 32), 4, 2), Config((32, 32), 8, 1)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENDEL_TUNING_FOLDER", str(tmp_path / "tuning"))
    monkeypatch.setattr(autotune, "_warned", set())


def launched(name: str = "matrix_state.states", limits: tuple[int, ...] = (128, 128)) -> Config:
    got = tuned(name, KERNEL, X, lambda c: c, limits=limits, sizes=(3,), exact=(128,))
    return Config((got["TILE_K"], got["TILE_V"]), got["num_warps"], got["num_stages"])


def test_the_lists_are_short_and_say_what_the_kernels_take() -> None:
    for name, choices in CHOICES.items():
        assert 2 <= len(choices.configs) <= 5, name
        assert len(set(choices.configs)) == len(choices.configs), name
        for config in choices.configs:
            assert len(config.tiles) == len(choices.tiles), name
            assert config.warps in (1, 2, 4, 8, 16), name
            assert 1 <= config.stages <= 4, name
            for tile, side in zip(choices.tiles, config.tiles, strict=True):
                # No tensor core multiplies along the tokens of a scan.
                assert side >= (4 if tile == "TILE_T" else 16), name
                assert side & (side - 1) == 0, name


def test_text_form() -> None:
    for config in (ONE, TWO, Config((), 1, 3)):
        assert Config.parse(str(config)) == config
    with pytest.raises(ValueError, match="like 64x32/4/2"):
        Config.parse("64x32/4")


def test_tiles_do_not_exceed_what_there_is() -> None:
    choices = Choices(("TILE_K", "TILE_V"), (ONE, TWO, Config((64, 32), 8, 1)))
    assert choices.within((32, 16)) == (Config((32, 16), 4, 2), Config((32, 16), 8, 1))
    assert launched(limits=(16, 32)).tiles == (16, 32)


def test_the_default_without_a_gpu_in_every_mode() -> None:
    default = CHOICES["matrix_state.states"].configs[0]
    for mode in ("off", "stored", "on"):
        with use_tuning(mode):
            assert launched() == default
    assert not autotune.folder().exists()


def test_pins_nest_and_end() -> None:
    default = launched()
    with use_tuning(pins={"matrix_state.states": TWO}):
        assert launched() == TWO
        with use_tuning("off", pins={"step": Config((16,), 4, 1)}):
            assert launched() == TWO
        assert launched(limits=(16, 16)).tiles == (16, 16)
    assert launched() == default


def test_a_clock_times_no_launch_and_keeps_what_is_off() -> None:
    for mode, inside in (("on", "stored"), ("stored", "stored"), ("off", "off")):
        with use_tuning(mode), autotune.untimed_launches():  # type: ignore[arg-type]
            assert autotune._now().mode == inside


def test_pins_by_the_environment() -> None:
    assert read_pins("step=16/4/1, matrix_state.states=64x32/4/2") == {
        "step": Config((16,), 4, 1),
        "matrix_state.states": ONE,
    }
    with pytest.raises(ValueError, match="no kernel is named 'steps'; there are matrix_state"):
        read_pins("steps=16/4/1")
    with pytest.raises(ValueError, match=r"step has 1 tiles \(TILE_V\), not 64x32/4/2"):
        read_pins("step=64x32/4/2")
    with pytest.raises(ValueError, match="off, stored or on, not 'maybe'"):
        read_mode("maybe")


def test_a_pin_of_the_environment_is_taken() -> None:
    code = (
        "import torch\n"
        "from mendel.kernels.autotune import tuned\n"
        "print(tuned('step', None, torch.zeros(1), lambda c: c['TILE_V'], limits=(128,),"
        " sizes=(), exact=()))\n"
    )
    env = {**os.environ, "MENDEL_TUNING_PIN": "step=16/4/1", "MENDEL_TUNING": "off"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "16"


def test_the_fastest_is_kept_and_found_again() -> None:
    slow = {ONE: 0.01, TWO: 0.0}
    took = times((ONE, TWO), lambda config: time.sleep(slow[config]), CPU)
    key = case_key("op", KERNEL, X, (5, 100), (64, True))
    store(CPU, key, took)
    assert stored(CPU, key, (ONE, TWO)) == TWO
    row = json.loads(file_of(CPU, key).read_text())
    assert row["key"] == key
    assert row["ms"][str(ONE)] >= 10 > row["ms"][str(TWO)]
    # A configuration that the list has lost is no choice any more.
    assert stored(CPU, key, (ONE,)) is None
    store(CPU, "another", {ONE: 1.0})
    assert stored(CPU, key, (ONE, TWO)) == TWO
    assert not list(file_of(CPU, key).parent.glob("*.new"))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_what_does_not_fit_the_device_is_no_candidate() -> None:
    from triton.runtime.errors import OutOfResources

    def call(config: Config) -> None:
        if config == ONE:
            raise OutOfResources(200_000, 100_000, "shared memory")

    assert list(times((ONE, TWO), call, CPU)) == [TWO]
    assert times((ONE,), call, CPU) == {}


def test_the_key_has_all_that_a_choice_depends_on() -> None:
    base = case_key("op", KERNEL, X, (5, 100), (64, True))
    assert base == case_key("op", KERNEL, X, (7, 128), (64, True))
    other = SimpleNamespace(cache_key="f" * 64)
    for key in (
        case_key("op2", KERNEL, X, (5, 100), (64, True)),
        case_key("op", other, X, (5, 100), (64, True)),
        case_key("op", KERNEL, X.half(), (5, 100), (64, True)),
        case_key("op", KERNEL, X, (5, 129), (64, True)),
        case_key("op", KERNEL, X, (5, 100), (64, False)),
    ):
        assert key != base
    for part in ("sizes 8 128", "exact 64 True", "float32", "cpu", torch.__version__, "01234567"):
        assert part in base
    assert [rounded(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2}', '{"format": 2, "key": "k", "config": "fast"}', "\xff"]
)
def test_a_damaged_file_is_ignored_with_one_warning(text: str) -> None:
    path = file_of(CPU, "k")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="it is not read"):
        assert stored(CPU, "k", (ONE,)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.write_text(text + " ")
        assert stored(CPU, "k", (ONE,)) is None
        store(CPU, "k", {ONE: 1.0})
    assert stored(CPU, "k", (ONE,)) == ONE


def test_what_another_format_or_another_case_wrote_is_no_choice() -> None:
    path = file_of(CPU, "k")
    path.parent.mkdir(parents=True)
    for change in ({"format": 1}, {"key": "another"}):
        path.write_text(json.dumps({"format": 2, "key": "k", "config": str(ONE), **change}))
        assert stored(CPU, "k", (ONE,)) is None


STORES = """
import sys, torch
from mendel.kernels.autotune import Config, store
for i in range(20):
    store(torch.device("cpu"), f"{sys.argv[1]} {i}", {Config((16,), 4, 1): 1.0})
"""


def test_two_processes_lose_no_choice() -> None:
    both = [subprocess.Popen([sys.executable, "-c", STORES, name]) for name in ("one", "other")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    config = Config((16,), 4, 1)
    for name in ("one", "other"):
        for i in range(20):
            assert stored(CPU, f"{name} {i}", (config,)) == config


def test_dtypes_of_all_tensors_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selective scan's dt, B and C may have others than x, on which compiled code depends."""
    assert kinds(X, None, 3, X.half(), "flag") == ("float32", "none", "float16")
    if not HAS_TRITON:
        return
    scan = import_module("mendel.kernels.triton_selective_scan")
    seen = []

    def tuned(*given: object, exact: tuple[object, ...], **options: object) -> None:
        seen.append(exact)

    monkeypatch.setattr(scan, "tuned", tuned)
    x, b = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
    for other in (b, b.bfloat16()):
        scan._launch("forward", None, x, 4, (x, other, None), print)
    assert seen[0] != seen[1]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MENDEL_TUNING_FOLDER", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="the choice is not kept"):
        store(CPU, "k", {ONE: 1.0})


def test_tensors_that_a_call_rewrites_are_put_back() -> None:
    """The timing itself, on the CPU: what a device adds is only another clock."""
    total = torch.ones(2)
    choices = Choices(("TILE_K", "TILE_V"), (ONE, TWO))
    config = autotune._timed(
        choices, (ONE, TWO), X, lambda c: total.add_(c["TILE_K"]), "key", (total, None)
    )
    assert config in (ONE, TWO)
    assert torch.equal(total, torch.ones(2))
    assert stored(CPU, "key", (ONE, TWO)) == config


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_configuration_equals_the_definition() -> None:
    """In the interpreter, float32, widths of several tiles: 1e-5, as the defaults are held to."""
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_config_cases.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, float] = json.loads(ran.stdout)
    assert len(found) == 4 * 12
    for name, error in found.items():
        assert math.isfinite(error), name
        assert error < 1e-5, name
