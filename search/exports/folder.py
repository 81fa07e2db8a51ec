"""Write an export whole or not at all: scratch folder, hashes, reading back, the final place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...genome.files import load
from ...genome.notation import parse
from ...genome.notation import show as notation
from ..new_files import remove_empty
from ..terminal import Mistake
from .facts import provenance
from .formats import DEFAULT, FORMATS
from .order import Order
from .proof import PROVENANCE, differences, is_export, read_facts, seal


def export(order: Order, out: Path, to: str = DEFAULT, *, force: bool = False) -> Path:
    """Write the folder, read it back, compare, and only then put it in its place.

    Raises Mistake where there is no such format, where `out` is not empty and `force` is not given
    or it is no folder of ours, and where the format refuses the order.
    """
    if to not in FORMATS:
        raise Mistake(f"--format is one of {', '.join(FORMATS)}, not {to!r}")
    if (order.proxy is not None or order.seed is not None) and not FORMATS[to].weights:
        with_weights = [f.name for f in FORMATS.values() if f.weights]
        raise Mistake(f"--proxy and --seed choose weights: for --format {', '.join(with_weights)}")
    _require_free(out, force)
    if out.resolve() == Path.cwd():
        raise Mistake(f"{out} is the folder that this command runs in; name one inside it")
    missing = [folder for folder in out.parents if not folder.exists()]
    scratch = out.with_name(f".{out.name}.{os.getpid()}.part")
    older = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        scratch.mkdir(parents=True)
        more = FORMATS[to].write(order, scratch)
        seal(scratch, {**provenance(order, to), **more})
        check(order, scratch)
        if out.exists():
            # A crash between the two leaves the old folder under this name.
            out.rename(older)
        scratch.rename(out)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        raise Mistake(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        remove_empty(missing)
    return out


def _require_free(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise Mistake(f"{out} exists already and is no folder; choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise Mistake(f"{out} exists already and is not empty; take another folder or --force")
    if not is_export(out):
        raise Mistake(f"{out} exists and is no exported design; --force replaces only those")


def check(order: Order, folder: Path) -> None:
    """Read everything back; raises RuntimeError where it is not what was meant."""
    genome = order.source.genome
    for path in (folder / "genome.yaml", folder / "genome.json"):
        if path.exists() and load(path) != genome:
            raise RuntimeError(f"{path}: what was written is not the genome that was meant")
    if parse(notation(genome)) != genome:
        raise RuntimeError(f"{folder}: the notation does not give the genome back")
    wrong = differences(folder, read_facts(folder))
    if wrong:
        raise RuntimeError(f"{folder / PROVENANCE}: {wrong[0]} while it was written")
