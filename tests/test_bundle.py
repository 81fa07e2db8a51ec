"""The code of an export: any design's own modules, the same function, nothing else imported."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from mendel.genome import presets
from mendel.genome.build import build
from mendel.genome.check import wide_space
from mendel.genome.encoded import EncodedError, classes_of, decode, encode
from mendel.genome.genome import Genome
from mendel.genome.notation import parse
from mendel.genome.resolve import blueprint
from mendel.genome.sample import sample_valid
from mendel.search.exports.bundle import BundleError, bundle, flatten
from mendel.search.exports.tokenizer import settings, tokenizer

SAMPLES = 24
CORE = ["genome.model", "genome.encoded"]


def designs() -> dict[str, Genome]:
    found = {name: presets.load(name, 32) for name in presets.names()}
    space = wide_space(32)
    rng = np.random.default_rng(11)
    return found | {f"sample {i}": sample_valid(space, rng) for i in range(SAMPLES)}


DESIGNS = designs()


def traits(genome: Genome) -> set[str]:
    """What decides which code a design needs: its operators' classes and its header."""
    sizes = ("slots", "width", "vocab")
    header = [f.name for f in fields(genome) if f.name not in sizes]
    return {*classes_of(blueprint(genome)), *(f"{k}={getattr(genome, k)}" for k in header)}


def bringing() -> list[str]:
    """The designs that have a trait which none before them has."""
    seen: set[str] = set()
    names = []
    for name, genome in DESIGNS.items():
        own = traits(genome)
        if own - seen:
            names.append(name)
            seen |= own
    return names


class Alone:
    """A bundle imported as a package of its own."""

    def __init__(self, folder: Path, genome: Genome) -> None:
        self.name = folder.name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for name, text in bundle(CORE, classes_of(blueprint(genome))).items():
            (folder / name).write_text(text)

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.name}.{name}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path / f"bundle{abs(hash(tmp_path))}"
    for name in set(sys.modules) - before:
        if name.startswith("bundle"):
            del sys.modules[name]


@torch.no_grad()
@pytest.mark.parametrize("name", bringing())
def test_the_bundle_is_the_same_model(name: str, place: Path) -> None:
    genome = DESIGNS[name]
    plan = blueprint(genome)
    written = json.loads(json.dumps(encode(plan)))
    assert decode(written, classes_of(plan)) == plan
    alone = Alone(place, genome)
    read = alone.module("mendel_genome_encoded").decode(
        written, alone.module("mendel_parts").CLASSES
    )
    torch.manual_seed(0)
    own = build(genome, 32).eval()
    torch.manual_seed(0)
    other = alone.module("mendel_genome_model").LanguageModel(read, 32).eval()
    assert type(other).__module__.startswith("bundle")
    x = torch.randint(32, (2, 13))
    assert torch.equal(other(x)[0], own(x)[0])


def test_nothing_but_torch_and_transformers_is_needed(tmp_path: Path) -> None:
    """Over everything that any of the designs needs, as transformers itself reads imports."""
    classes = {k: c for g in DESIGNS.values() for k, c in classes_of(blueprint(g)).items()}
    texts = bundle(["search.exports.modeling_mendel"], classes)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    needed = {p for name in texts for p in get_imports(tmp_path / name)}
    assert needed - set(sys.stdlib_module_names) == {"torch", "transformers"}
    for name in texts:
        assert {f"{m}.py" for m in get_relative_imports(tmp_path / name)} <= set(texts)
    assert not [n for n in texts if "catalogue" in n or n.startswith("mendel_proxies")]
    assert "mendel_kernels_triton_matrix_state.py" in texts


def test_a_small_design_takes_few_files() -> None:
    small = len(bundle(CORE, classes_of(blueprint(parse("swiglu > relu2")))))
    large = len(bundle(CORE, classes_of(blueprint(parse("mamba2 > gqa > kan")))))
    assert small < large


def test_a_kernel_is_found_beside_the_backend(place: Path) -> None:
    alone = Alone(place, parse("{width=16} mamba2(key_dim=8)"))
    backend = alone.module("mendel_kernels_backend")
    if backend.HAS_TRITON:
        kernel = backend.kernels("matrix_state")
        assert kernel.__module__ == f"{alone.name}.mendel_kernels_triton_matrix_state"


def test_only_import_lines_change() -> None:
    source = Path(str(sys.modules["mendel.genome.model"].__file__)).read_text().splitlines()
    flat = flatten("genome.model").text.splitlines()
    changed = [new for old, new in zip(source, flat, strict=True) if old != new]
    assert changed
    assert all(line.startswith("from .mendel_") for line in changed)


def test_what_is_no_module_or_class_is_refused() -> None:
    with pytest.raises(BundleError, match=r"genome\.nothing is no module"):
        flatten("genome.nothing")
    with pytest.raises(BundleError, match="pathlib is no module of mendel"):
        bundle(CORE, {"pathlib.Path": Path})
    written = encode(blueprint(parse("{width=16} mha(heads=2)")))
    with pytest.raises(EncodedError, match="which is no class of this model"):
        decode(written, {})
    with pytest.raises(EncodedError, match="the blueprint is a tuple"):
        decode([], {})
    with pytest.raises(TypeError, match="list has no form"):
        encode([1])
    assert decode(encode(blueprint(parse("kan"))), classes_of(blueprint(parse("kan"))))


def test_numbers_that_are_not_finite_come_back() -> None:
    assert encode((float("inf"), 1.0, 1)) == [{"float": "inf"}, 1.0, 1]


@pytest.fixture(scope="module")
def bytes_of_text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(64)))
    return AutoTokenizer.from_pretrained(folder)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\0 a\0\0")
@example(" don't , stop . Ā ĀĀ\r\n\t  ")
def test_text_becomes_its_bytes_and_comes_back(bytes_of_text: Any, text: str) -> None:
    ids = bytes_of_text(text).input_ids
    assert ids == list(text.encode())
    assert bytes_of_text.decode(ids) == text


def test_the_tokenizer_pads_to_the_left(bytes_of_text: Any) -> None:
    found = bytes_of_text(["a", "bcd"], padding=True)
    assert found.input_ids == [[0, 0, 97], [98, 99, 100]]
    assert found.attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert len(bytes_of_text) == 256
