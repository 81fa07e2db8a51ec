"""Every configuration of the lists, laid out for chips that are not there: it fits, it multiplies.

The defaults are compiled to machine code in `test_kernels_triton.py` and its neighbour; the others
go as far as the allocation of shared memory, which takes a fraction of the time.
"""

from __future__ import annotations

import compiled
import pytest
from compiled import CHIPS, KERNELS, SHARED_KIB, WITHOUT_PRODUCTS, lay_out

from mendel.kernels.autotune import Config
from mendel.kernels.backend import HAS_TRITON
from mendel.kernels.launches import CHOICES

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def test_every_list_has_its_kernels() -> None:
    assert KERNELS.keys() == CHOICES.keys()


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


@pytest.mark.parametrize("capability", [80, 90])
def test_the_layout_is_the_compilers(capability: int) -> None:
    config = Config((128, 64), 8, 1)
    compiled_for_it = compiled.compile_for("matrix_state.outputs", 0, config, capability)
    found = lay_out("matrix_state.outputs", 0, config, capability)
    assert found.shared == compiled_for_it.metadata.shared > 0
    assert found.matrix
