"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from ..proxies.corpus import STDLIB, read_corpus
from ..proxies.task import ProxyError
from .units import bytes_text

State = Literal["ok", "note", "missing"]
"""`missing` stops a search, `note` costs speed or a feature."""

LEAST_DISK = 2 * 2**30
LEAST_MEMORY = 2 * 2**30
CORPUS_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `hint` says how to get what is missing."""

    name: str
    state: State
    found: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(folder: Path) -> list[Finding]:
    """Everything about this machine that a search needs; `folder` is where runs would go."""
    return [*_python(), *_packages(), *_devices(), *_machine(folder), *_corpus()]


def _python() -> Iterator[Finding]:
    least = (3, 11)
    state: State = "ok" if sys.version_info >= least else "missing"
    hint = "" if state == "ok" else "install Python 3.11 or newer"
    yield Finding("python", state, platform.python_version(), hint)
    yield Finding("mendel", "ok", version("mendel"))


def _packages() -> Iterator[Finding]:
    """Each requirement of this installation, read from its own metadata."""
    for line in requires("mendel") or []:
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        name = requirement.split("[")[0].rstrip("<>=!~,.0123456789 ")
        name = name.split("<")[0].split(">")[0].split("=")[0].split("!")[0].split("~")[0].strip()
        extra = condition.split("extra ==")[1].strip(" '\"") if "extra ==" in condition else ""
        if extra == "test" or ("linux" in condition and not sys.platform.startswith("linux")):
            continue
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            wanted = f"mendel[{extra}]" if extra else requirement
            yield Finding(
                name, "note" if extra else "missing", "not installed", f"pip install '{wanted}'"
            )


def _devices() -> Iterator[Finding]:
    cuda = torch.cuda.is_available()
    if cuda:
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            yield Finding(
                f"cuda:{i}",
                "ok",
                f"{facts.name}, {bytes_text(facts.total_memory)}, "
                f"compute capability {facts.major}.{facts.minor}",
            )
    else:
        build = torch.version.cuda
        hint = (
            "no NVIDIA driver or device was found; searches run on the CPU"
            if build
            else "this torch is built for CPUs; see pytorch.org for a build with CUDA"
        )
        yield Finding("cuda", "note", "none", hint)
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if cuda
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    yield Finding(
        "bf16",
        "ok" if native else "note",
        f"native on the {'GPU' if cuda else 'CPU'}" if native else "not native here",
        "" if native else "training uses fp32",
    )
    yield _triton(cuda)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    yield Finding(
        "C++ compiler",
        "ok" if compiler else "note",
        compiler or "none",
        "" if compiler else "train: {compile: true} needs one (apt install g++)",
    )


def _triton(cuda: bool) -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("triton kernels", "note", "not installed", "pip install triton (Linux)")
    if cuda:
        return Finding("triton kernels", "ok", "can run on the GPU")
    return Finding(
        "triton kernels", "note", "interpreter only", "kernels need a CUDA device; the chunked "
        "forms in torch are used"
    )  # fmt: skip


def _machine(folder: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{cores} for this process, {os.cpu_count()} in the machine")
    memory = psutil.virtual_memory()
    enough = memory.available >= LEAST_MEMORY
    yield Finding(
        "memory",
        "ok" if enough else "note",
        f"{bytes_text(memory.available)} free of {bytes_text(memory.total)}",
        "" if enough else "use fewer workers (--workers 1) or the serial executor",
    )
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK | os.X_OK)
    roomy = free >= LEAST_DISK
    state: State = "missing" if not writable else "ok" if roomy else "note"
    hint = "" if roomy else "free some space, or name another folder in the study's runs:"
    if not writable:
        hint = "name a folder that can be written in the study's runs:"
    yield Finding("disk", state, f"{bytes_text(free)} free for {folder}", hint)
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared).free
        small = room < 512 * 2**20
        yield Finding(
            "shared memory",
            "note" if small else "ok",
            f"{bytes_text(room)} free in /dev/shm",
            "ray is slower below 512 MiB (docker: --shm-size=2g)" if small else "",
        )


def _corpus() -> Iterator[Finding]:
    try:
        corpus = read_corpus(None, max_bytes=CORPUS_SAMPLE)
    except ProxyError as error:
        yield Finding("text", "missing", "none", f"{error}; name a text in the study instead")
        return
    count = len(corpus.documents)
    yield Finding("text", "ok", f"{STDLIB}: {bytes_text(corpus.bytes)} read from {count} files")
