"""Genomes as JSON and YAML: dictionaries with a grammar version.

{"grammar": 1, "width": 64, "position": "rope", ..., "slots": [
    {"op": "mamba2"},
    {"parallel": [{"op": "gqa", "genes": {"kv_heads": 2}, "features": "a"}, {"op": "mamba2"}],
     "join": "mean"},
    {"parallel": [{"op": "mha"}], "join": "mean", "tokens": 0.5}]}

A slot's `tokens` stand there where some pass it by, also with one operator.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..primitives.base import Gene, GeneError, show_gene
from ..primitives.catalogue import find
from ..primitives.nearest import nearest
from .genome import GRAMMAR_VERSION, Genome, Op, Slot
from .header import (
    HEADER,
    JOIN,
    LABEL,
    MAX_SLOTS,
    SLOT,
    TOKENS,
    header_of,
    slot_of,
    with_header,
)

_SUFFIXES = (".json", ".yaml", ".yml")
_TOO_MUCH = "it is nested too deep, or a number has too many digits"


class GenomeFileError(ValueError):
    """A file or dictionary that is no genome: one line that names the key path."""


def to_dict(genome: Genome) -> dict[str, Any]:
    """The genome as plain dictionaries and lists; `from_dict(to_dict(genome)) == genome`."""
    return {
        "grammar": GRAMMAR_VERSION,
        **header_of(genome),
        "slots": [_slot_to_dict(slot) for slot in genome.slots],
    }


def from_dict(data: Any) -> Genome:
    """The genome that a dictionary describes; absent header genes take their defaults.

    Raises GenomeFileError. What goes together is not judged here: see `rules.violations`.
    """
    data = _mapping(data, "the genome")
    if "grammar" not in data:
        raise GenomeFileError(f"grammar is missing: write grammar: {GRAMMAR_VERSION}")
    version = data["grammar"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise GenomeFileError(f"grammar is a whole number of at least 1, not {_show(version)}")
    if version > GRAMMAR_VERSION:
        raise GenomeFileError(
            f"grammar {version} is newer than this version of mendel, which reads grammar "
            f"{GRAMMAR_VERSION}"
        )
    _only(data, ["grammar", *(axis.name for axis in HEADER), "slots"], "")
    if "slots" not in data:
        raise GenomeFileError("slots is missing: a list of slots")
    slots = data["slots"]
    if not isinstance(slots, list):
        raise GenomeFileError(f"slots is a list, not {_show(slots)}")
    if len(slots) > MAX_SLOTS:
        raise GenomeFileError(f"slots has {len(slots)} entries; a genome has at most {MAX_SLOTS}")
    header = {axis.name: data[axis.name] for axis in HEADER if axis.name in data}
    read = [_slot_from_dict(slot, f"slots[{i}]") for i, slot in enumerate(slots)]
    try:
        return with_header(header, read)
    except GeneError as error:
        raise GenomeFileError(str(error)) from None


def load(path: str | Path) -> Genome:
    """The genome in a `.json`, `.yaml` or `.yml` file.

    Raises GenomeFileError with the path and the key path.
    """
    path = Path(path)
    suffix = _suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GenomeFileError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise GenomeFileError(f"{path}: is not a text file in UTF-8") from None
    try:
        return from_dict(parse_json(text) if suffix == ".json" else _parse_yaml(text))
    except GenomeFileError as error:
        raise GenomeFileError(f"{path}: {error}") from None


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises GenomeFileError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise GenomeFileError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise GenomeFileError(_TOO_MUCH) from None


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise GenomeFileError(f"{where}not YAML: {problem}") from None
    except (ValueError, RecursionError):
        raise GenomeFileError(_TOO_MUCH) from None


def text_of(genome: Genome, path: Path) -> str:
    """The contents of a `.json`, `.yaml` or `.yml` file with the genome. Raises GenomeFileError."""
    data = to_dict(genome)
    if _suffix(path) == ".json":
        return json.dumps(data, indent=2) + "\n"
    return yaml.safe_dump(data, sort_keys=False)


def dump(genome: Genome, path: str | Path) -> None:
    """Write the genome to a `.json`, `.yaml` or `.yml` file. Raises GenomeFileError."""
    path = Path(path)
    text = text_of(genome, path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GenomeFileError(f"{path}: cannot be written: {error.strerror}") from None


def _suffix(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise GenomeFileError(f"{path}: a genome file ends in {', '.join(_SUFFIXES)}")
    return path.suffix


def _slot_to_dict(slot: Slot) -> dict[str, Any]:
    ops = [_op_to_dict(op) for op in slot.branches]
    if len(ops) == 1 and slot.join == JOIN.default and slot.tokens == TOKENS.default:
        return ops[0]
    tokens = {} if slot.tokens == TOKENS.default else {"tokens": slot.tokens}
    return {"parallel": ops, "join": slot.join, **tokens}


def _op_to_dict(op: Op) -> dict[str, Any]:
    data: dict[str, Any] = {"op": op.name}
    if op.genes:
        data["genes"] = dict(op.genes)
    if op.weights is not None:
        data["weights"] = op.weights
    if op.features is not None:
        data["features"] = op.features
    return data


def _slot_from_dict(data: Any, where: str) -> Slot:
    data = _mapping(data, where)
    if "parallel" not in data:
        return Slot((_op_from_dict(data, where),))
    _only(data, ["parallel", *(axis.name for axis in SLOT)], where)
    branches = data["parallel"]
    if not isinstance(branches, list) or not branches:
        raise GenomeFileError(
            f"{where}.parallel is a list of one operator or more, not {_show(branches)}"
        )
    ops = [_op_from_dict(op, f"{where}.parallel[{i}]") for i, op in enumerate(branches)]
    genes: dict[str, Gene] = {}
    for axis in SLOT:
        try:
            genes[axis.name] = axis.check(data.get(axis.name, axis.default))
        except GeneError as error:
            raise GenomeFileError(f"{where}.{axis.name}: {error}") from None
    return slot_of(ops, genes)


def _op_from_dict(data: Any, where: str) -> Op:
    data = _mapping(data, where)
    if "op" not in data:
        raise GenomeFileError(f"{where}.op is missing: the name of a primitive")
    _only(data, ["op", "genes", "weights", "features"], where)
    name = data["op"]
    if not isinstance(name, str):
        raise GenomeFileError(f"{where}.op is the name of a primitive, not {_show(name)}")
    try:
        primitive, _ = find(name)
    except GeneError as error:
        raise GenomeFileError(f"{where}.op: {error}") from None
    genes: dict[str, Gene] = {}
    for axis, value in _mapping(data.get("genes", {}), f"{where}.genes").items():
        try:
            genes[axis] = primitive.axis(axis).check(value)
        except GeneError as error:
            raise GenomeFileError(f"{where}.genes.{axis}: {error}") from None
    labels = {
        key: _label(data[key], f"{where}.{key}") for key in ("weights", "features") if key in data
    }
    return Op(name, tuple(genes.items()), labels.get("weights"), labels.get("features"))


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str) or not LABEL.fullmatch(value):
        raise GenomeFileError(
            f"{where} is a label of up to 32 letters, digits and underscores, not {_show(value)}"
        )
    return value


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise GenomeFileError(f"{where} is a mapping, not {_show(data)}")
    for key in data:
        if not isinstance(key, str):
            raise GenomeFileError(f"{where} has the key {_show(key)}, which is no text")
    return data


def _only(data: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    allowed = list(allowed)
    for key in data:
        if key not in allowed:
            path = f"{where}.{key}" if where else key
            raise GenomeFileError(
                f"{path} is unknown; allowed are {', '.join(allowed)}{nearest(key, allowed)}"
            )


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    if value is None or isinstance(value, bool | int | float):
        return show_gene(value)
    return f"a {'list' if isinstance(value, list) else 'mapping'}"
