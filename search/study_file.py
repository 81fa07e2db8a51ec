"""A YAML file with the place of every key, and errors that point at it in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..primitives.nearest import nearest

Key = tuple[str | int, ...]


class StudyError(ValueError):
    """A study that is refused. The message is one line: file:line:column: key: what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as in YAML 1.2 and JSON."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class StudyFile:
    """The parsed file: `data` with overrides in place, `text` as it is frozen into the run."""

    path: Path
    text: str
    data: dict[str, Any]
    root: yaml.Node = field(compare=False)
    overridden: frozenset[str]

    @classmethod
    def read(cls, path: Path | str, overrides: Mapping[str, Any]) -> StudyFile:
        """Raises StudyError: no such file, bad YAML, no mapping, a key that stands twice."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StudyError(f"{path}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(f"{path}: cannot be read: {_reason(error)}") from None
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise StudyError(f"{path}:1:1: a study is a mapping of keys to values")
            _refuse_duplicates(path, root, set())
            data = loader.construct_document(root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            problem = " ".join((error.problem or error.context or "no YAML").split())
            raise StudyError(f"{path}{place}: not valid YAML: {problem}") from None
        except yaml.YAMLError as error:
            raise StudyError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise StudyError(f"{path}: it is nested too deep") from None
        for dotted, value in overrides.items():
            _override(path, data, dotted, value)
        if overrides:
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        return cls(path, text, data, root, frozenset(overrides))

    def error(self, key: Key, sentence: str) -> StudyError:
        """The error at a key, or at the nearest key above it that the file has."""
        mark, _ = self._locate(key)
        name = ".".join(str(part) for part in key)
        where = f"{self.path}:{mark.line + 1}:{mark.column + 1}"
        if name in self.overridden:
            where = str(self.path)
        sentence = " ".join(sentence.split())
        return StudyError(f"{where}: {name}: {sentence}" if name else f"{where}: {sentence}")

    def explain(
        self,
        error: ValidationError,
        model: type[BaseModel],
        keys: Callable[[Key], list[str] | None] = lambda key: None,
    ) -> StudyError:
        """The first of pydantic's errors, as one line in our words.

        `keys` says which keys a mapping may have where the model does not tell."""
        details = error.errors(include_url=False)
        # A misspelt key gives two errors, unknown and missing; the unknown one tells more.
        detail = next((d for d in details if d["type"] != "missing"), details[0])
        key: Key = tuple(detail["loc"])
        given = self._given(key)
        if detail["type"] == "extra_forbidden":
            allowed = keys(key[:-1]) or _fields(key[:-1], model)
            here = given[-1:] == key[-1:]
            what = "there is no such key" if here else f"there is no {key[-1]!r}"
            near = nearest(str(key[-1]), allowed) or "."
            return self.error(given, f"{what}{near} Allowed: {', '.join(allowed)}")
        if detail["type"] == "missing":
            return self.error((*given, key[-1]), "this key is missing")
        message = str(detail["msg"])
        for prefix in ("Value error, ", "Assertion failed, "):
            message = message.removeprefix(prefix)
        message = message.replace("Input should be", "it should be")
        value = detail.get("input")
        if isinstance(value, str | int | float | bool) and repr(value) not in message:
            message += f", not {value!r}"
        return self.error(given, message)

    def _given(self, key: Key) -> Key:
        """The part of pydantic's location that the file has; it also names union members."""
        data: Any = self.data
        given: list[str | int] = []
        for part in key:
            inside = part in data if isinstance(data, dict) else _is_index(data, part)
            if not inside:
                continue
            data = data[part]
            given.append(part)
        return tuple(given)

    def _locate(self, key: Key) -> tuple[yaml.Mark, bool]:
        node: yaml.Node = self.root
        mark = node.start_mark
        for part in key:
            if isinstance(node, yaml.MappingNode):
                found = next((kv for kv in node.value if kv[0].value == str(part)), None)
                if found is None:
                    return mark, False
                mark, node = found[0].start_mark, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    return mark, False
                node = node.value[part]
                mark = node.start_mark
            else:
                return mark, False
        return mark, True


def _is_index(data: Any, part: str | int) -> bool:
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _refuse_duplicates(path: Path, node: yaml.Node, looked: set[int]) -> None:
    # An alias is the node of its anchor, maybe one that it stands in.
    if id(node) in looked:
        return
    looked.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(path, child, looked)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.Mark] = {}
    for key, child in node.value:
        mark = key.start_mark
        if isinstance(key.value, str):
            if key.value in seen:
                raise StudyError(
                    f"{path}:{mark.line + 1}:{mark.column + 1}: {key.value}: this key stands "
                    f"twice, first in line {seen[key.value].line + 1}"
                )
            seen[key.value] = mark
        _refuse_duplicates(path, child, looked)


def _override(path: Path, data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            raise StudyError(f"{path}: {dotted}: {part} has no keys of its own")
        data = below
    data[last] = value


def _fields(key: Key, annotation: Any) -> list[str]:
    """The keys of the model at a location, found through optional, list and mapping types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not key:
            return list(annotation.model_fields)
        field = annotation.model_fields.get(str(key[0]))
        return _fields(key[1:], field.annotation) if field else []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for argument in arguments:
            if found := _fields(key, argument):
                return found
        return []
    if hasattr(annotation, "__metadata__"):
        return _fields(key, arguments[0])
    if origin in (list, tuple, dict, Mapping) and key:
        return _fields(key[1:], arguments[-1] if origin is dict else arguments[0])
    return []
