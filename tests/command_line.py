"""Calling commands as the shell does, for the tests of the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mendel.search.cli import run

Call = Callable[..., tuple[int, str, str]]


def caller(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """What runs a command in a folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MENDEL_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


def loads(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out, parse_constant=pytest.fail)
