"""Every launch of every kernel for chips that are not there: it compiles, it fits, it multiplies.

The defaults become machine code, from which their registers are read; the others go as far as the
allocation of shared memory, which takes a fraction of the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import MATRIX_INSTRUCTION, SHARED_KIB, TILE_PRODUCT, compiled
from compiled_launches import CHIPS, KERNELS, WIDTH, WITHOUT_PRODUCTS, lay_out, source
from machine_code import usage
from offsets import wrapping_offsets

from mendel.kernels.autotune import Config
from mendel.kernels.backend import HAS_TRITON, WIDEST
from mendel.kernels.bench_cases import FORMS
from mendel.kernels.launches import CHOICES

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EVERY = [(name, i) for name, kernels in KERNELS.items() for i in range(len(kernels))]
WITH_HEADS = [name for name, kernels in KERNELS.items() if WIDTH in kernels[0][2].values()]

STACK = {"moe_permute": 8}
"""Bytes of a thread's that may lie in memory: two numbers beside 32 registers, where the assembler
of Triton 3.7 keeps no more."""


def test_every_list_has_its_kernels() -> None:
    assert KERNELS.keys() == CHOICES.keys()


@pytest.mark.parametrize("capability", list(SHARED_KIB))
@pytest.mark.parametrize(("name", "i"), EVERY)
def test_the_default_compiles(name: str, i: int, capability: int) -> None:
    """In bfloat16 at K = V = 128: tensor cores where it multiplies tiles, 64-bit offsets; on sm_90
    nothing spills (but for `STACK`) and every scheduler has two warps to choose from."""
    made, options = source(name, i, CHOICES[name].configs[0])
    found = compiled(made, options, capability)
    assert found.metadata.shared <= SHARED_KIB[capability] * 1024
    assert (MATRIX_INSTRUCTION[capability] in found.asm["ptx"]) == (name not in WITHOUT_PRODUCTS)
    assert wrapping_offsets(found.asm["ttir"]) == []
    taken = usage(found.asm["cubin"])
    assert taken.registers > 0
    if capability == 90:
        assert (taken.counts["wgmma"] > 0) == (name not in WITHOUT_PRODUCTS)
        assert taken.stack <= STACK.get(name, 0)
        assert bool(taken.stored or taken.loaded) <= bool(taken.stack)
        assert taken.warps_per_scheduler(options["num_warps"], found.metadata.shared) >= 2


@pytest.mark.parametrize("name", list(KERNELS))
def test_every_configuration_fits(name: str) -> None:
    """On all three chips; kernels by halves, which take long, and kernels without products of
    tiles, which chips do not lay out differently, on the one with the least memory."""
    for capability in CHIPS.get(name, tuple(SHARED_KIB)):
        for config in CHOICES[name].configs[1:]:
            for i in range(len(KERNELS[name])):
                found = lay_out(name, i, config, capability)
                assert found.shared <= SHARED_KIB[capability] * 1024, (config, capability)
                assert found.matrix == (name not in WITHOUT_PRODUCTS), (config, capability)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_every_width_fits(name: str) -> None:
    """Narrow, odd and the widest heads, the widest in float32 too; pointers of views, whose loads
    are not ahead of their use."""
    for width, inputs, aligned in (
        *((16, "bf16", True), (24, "bf16", True), (80, "bf16", True), (WIDEST, "bf16", True)),
        *((WIDEST, "fp32", True), (WIDEST, "bf16", False)),
    ):
        config = CHOICES[name].configs[0]
        found = lay_out(name, 0, config, 80, width=width, inputs=inputs, aligned=aligned)
        assert found.shared <= SHARED_KIB[80] * 1024, (width, inputs, aligned)
        assert found.matrix == (name not in WITHOUT_PRODUCTS), (width, inputs, aligned)


def test_what_the_operators_launch() -> None:
    """All forms, training and decoding: what a GPU would be asked to compile.

    The lists above are written by hand; this is what Triton is given.
    """
    script = Path(__file__).with_name("launched.py")
    ran = subprocess.run(
        [sys.executable, str(script), "bfloat16", "16"], capture_output=True, text=True, timeout=600
    )
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row for row in rows if row["wrong"]] == [], ran.stderr[-2000:]
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert {(row["op"], row["form"]) for row in rows} == set(FORMS)
    seen = {kernel for row in rows for kernel in row["kernels"]}
    assert seen == {f"triton_{m}.{f}" for kernels in KERNELS.values() for m, f, _ in kernels}
    for row in rows:
        if row["tokens"] == 1 and row["op"] in ("matrix_state", "delta_rule"):
            assert row["kernels"] == ["triton_step._step"]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_layout_is_the_compilers(capability: int) -> None:
    config = Config((128, 64), 8, 1)
    found = compiled(*source("matrix_state.outputs", 0, config), capability)
    laid = lay_out("matrix_state.outputs", 0, config, capability)
    assert laid.shared == found.metadata.shared > 0
    assert TILE_PRODUCT[capability] in laid.products
