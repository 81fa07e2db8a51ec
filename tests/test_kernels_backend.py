"""The choice of a backend: one place, pinned or by device, never a fallback in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mendel.kernels import backend
from mendel.kernels.backend import (
    Unsupported,
    backends,
    choose,
    current,
    use_backend,
    used_backends,
)
from mendel.kernels.diagonal_scan import diagonal_scan


def test_chunked_is_the_default_on_a_cpu() -> None:
    assert choose("matrix_state", "cpu") == "chunked"
    assert current("delta_rule", torch.device("cpu")) == "chunked"


def test_pinning_nests_and_ends() -> None:
    with use_backend("definition"):
        assert choose("matrix_state", "cpu") == "definition"
        with use_backend("chunked"):
            assert choose("matrix_state", "cpu") == "chunked"
        assert choose("matrix_state", "cpu") == "definition"
    assert choose("matrix_state", "cpu") == "chunked"


def test_a_pin_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_backend("definition"):
        raise KeyError
    assert choose("short_conv", "cpu") == "chunked"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no operator is named 'matmul'"):
        backends("matmul")


def test_what_a_backend_lacks_is_refused_with_what_serves_it() -> None:
    x = torch.zeros(1, 4, 2)
    with (
        use_backend("triton"),
        pytest.raises(Unsupported, match=r"triton backend does not serve.*definition and chunked"),
    ):
        diagonal_scan(x, x)


def test_what_ran_is_recorded() -> None:
    x = torch.zeros(1, 4, 2)
    with used_backends() as used:
        diagonal_scan(x, x)
        with use_backend("definition"):
            diagonal_scan(x, x)
        assert current("matrix_state", "cpu", "none") == "chunked"
    diagonal_scan(x, x)
    assert used == {"diagonal_scan": {"chunked", "definition"}}


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert choose("matrix_state", "cuda", "none") == "chunked"
    with use_backend("triton"), pytest.raises(Unsupported, match="Triton is not installed"):
        choose("matrix_state", "cuda", "none")


def test_triton_is_imported_by_its_kernels_only() -> None:
    code = (
        "import sys, torch\n"
        "from mendel.kernels import bench, delta_rule, diagonal_scan, matrix_state, short_conv\n"
        "x = torch.zeros(1, 4, 1, 4)\n"
        "matrix_state.matrix_state(x, x, x)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
