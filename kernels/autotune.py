"""How a Triton kernel is launched: tiles, warps and stages, by a short list and, if asked, by time.

`launches.py` holds a list per kernel, its default first. `MENDEL_TUNING`, or `use_tuning`, says how
one of the list is taken:

    off      the default
    stored   what was timed before on this device for this case, else the default; the rule
    on       the same, and what was not timed before is timed now

`stored` is the rule because a search meets hundreds of cases and timing one compiles its kernel
several times. Nothing is timed for tensors that are not on a CUDA device, so in Triton's
interpreter, nor while a CUDA graph is captured. `MENDEL_TUNING_PIN`, or `use_tuning(pins=...)`,
fixes kernels by name whatever the mode: `MENDEL_TUNING_PIN="step=16/4/1,matrix_state.states=..."`.

Choices are JSON, a folder per device and a file per case, in `MENDEL_TUNING_FOLDER`, else
`mendel/tuning` in the user's cache folder (XDG). A choice holds for one kernel and its source, the
sizes rounded up to powers of two, widths and flags exactly, the dtypes of all tensors, the device
with its capability, and the versions of Triton and torch: another of any of these is another case.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

R = TypeVar("R")

Mode = Literal["off", "stored", "on"]
FORMAT = 2
"""Of the files; one of another format is not read."""
REPEATS = 9
"""Of one configuration; the median counts. The first call, which compiles, is apart."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: the sides of its tiles, warps of a program, pipeline stages."""

    tiles: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        """`64x32/4/2`; `-` stands for no tiles."""
        return f"{'x'.join(map(str, self.tiles)) or '-'}/{self.warps}/{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Config:
        found = re.fullmatch(r"(-|\d+(?:x\d+)*)/(\d+)/(\d+)", text)
        if found is None:
            raise ValueError(f"a configuration is like 64x32/4/2 or -/4/1, not {text!r}")
        tiles = () if found[1] == "-" else tuple(map(int, found[1].split("x")))
        return cls(tiles, int(found[2]), int(found[3]))

    def within(self, limits: tuple[int, ...]) -> Config:
        """With tiles of at most `limits`, the sides that cover the whole width."""
        return Config(tuple(map(min, self.tiles, limits)), self.warps, self.stages)


@dataclass(frozen=True)
class Choices:
    """The configurations of one kernel, the default first; `tiles` are its names for the sides."""

    tiles: tuple[str, ...]
    configs: tuple[Config, ...]

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (the lists are constants of the program)
    def within(self, limits: tuple[int, ...]) -> tuple[Config, ...]:
        """The different ones of them where tiles are at most `limits`."""
        return tuple(dict.fromkeys(config.within(limits) for config in self.configs))

    def constants(self, config: Config) -> dict[str, int]:
        """What a launch passes to the kernel."""
        return {
            **dict(zip(self.tiles, config.tiles, strict=True)),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


@dataclass
class _State:
    """The mode and the pins of the process, and what was chosen under them."""

    mode: Mode
    pins: dict[str, Config]
    chosen: dict[tuple[Any, ...], Config] = field(default_factory=dict)


_state: _State | None = None


def kinds(*given: object) -> tuple[str, ...]:
    """The dtypes of what tensors a kernel is given, for `tuned`; of one that is absent, none."""
    return tuple(
        str(t.dtype)[6:] if isinstance(t, Tensor) else "none"
        for t in given
        if t is None or isinstance(t, Tensor)
    )


def read_mode(text: str) -> Mode:
    for mode in get_args(Mode):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise ValueError(f"MENDEL_TUNING is off, stored or on, not {text!r}")


def read_pins(text: str) -> dict[str, Config]:
    """`name=64x32/4/2` between commas. Raises ValueError for an unknown kernel or a wrong form."""
    pins = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, config = part.partition("=")
        pins[name] = Config.parse(config)
    return checked_pins(pins)


def checked_pins(pins: Mapping[str, Config]) -> dict[str, Config]:
    from .launches import CHOICES

    for name, config in pins.items():
        if name not in CHOICES:
            raise ValueError(f"no kernel is named {name!r}; there are {', '.join(CHOICES)}")
        names = CHOICES[name].tiles
        if len(names) != len(config.tiles):
            raise ValueError(f"{name} has {len(names)} tiles ({', '.join(names)}), not {config}")
    return dict(pins)


def _now() -> _State:
    global _state
    if _state is None:
        mode = read_mode(os.environ.get("MENDEL_TUNING", "stored"))
        _state = _State(mode, read_pins(os.environ.get("MENDEL_TUNING_PIN", "")))
    return _state


@contextmanager
def use_tuning(
    mode: Mode | None = None, pins: Mapping[str, Config] | None = None
) -> Iterator[None]:
    """Another mode, or further pins, inside the block.

    For the whole process, not for a task: backward passes run in threads of autograd's own.
    """
    global _state
    before = _now()
    pins = {**before.pins, **checked_pins({} if pins is None else pins)}
    _state = _State(before.mode if mode is None else read_mode(mode), pins)
    if before.mode == "on" and _state.mode == "stored" and pins == before.pins:
        # Also what could not be written to disk.
        _state.chosen.update(before.chosen)
    try:
        yield
    finally:
        _state = before


@contextmanager
def untimed_launches() -> Iterator[None]:
    """For the inside of a clock: what was not timed in the warm-up is not timed in the block."""
    with use_tuning("stored" if _now().mode == "on" else None):
        yield


def tuned(
    name: str,
    kernel: Any,
    on: Tensor,
    call: Callable[[dict[str, int]], R],
    *,
    limits: tuple[int, ...],
    sizes: tuple[int, ...],
    exact: tuple[Any, ...],
    rewritten: tuple[Tensor | None, ...] = (),
) -> R:
    """`call` with the constants of the configuration that is chosen for the case.

    `on` has the device and the dtype of the case, `limits` are the sides that cover whole widths,
    `sizes` what only decides how much work there is, `exact` everything else, the `kinds` of the
    other tensors too. `call` is repeated where it is timed: tensors that it reads and writes are
    `rewritten`, and are put back.
    """
    from .launches import CHOICES

    choices, state = CHOICES[name], _now()
    pin = state.pins.get(name)
    if pin is not None:
        return call(choices.constants(pin.within(limits)))
    configs = choices.within(limits)
    if state.mode == "off" or not on.is_cuda or len(configs) == 1:
        return call(choices.constants(configs[0]))
    case = (name, limits, sizes, exact, on.dtype, on.device)
    config = state.chosen.get(case)
    if config is None:
        key = case_key(name, kernel, on, sizes, exact)
        config = stored(on.device, key, configs)
        if config is None and state.mode == "on" and not torch.cuda.is_current_stream_capturing():
            config = _timed(choices, configs, on, call, key, rewritten)
        elif config is None:
            config = configs[0]
        state.chosen[case] = config
    return call(choices.constants(config))


def _timed(
    choices: Choices,
    configs: tuple[Config, ...],
    on: Tensor,
    call: Callable[[dict[str, int]], object],
    key: str,
    rewritten: tuple[Tensor | None, ...],
) -> Config:
    kept = [(t, t.clone()) for t in rewritten if t is not None]
    took = times(configs, lambda config: call(choices.constants(config)), on.device)
    for tensor, copy in kept:
        tensor.copy_(copy)
    if not took:
        # The launch itself says why.
        return configs[0]
    store(on.device, key, took)
    return min(took, key=lambda config: took[config])


def times(
    configs: tuple[Config, ...], call: Callable[[Config], object], device: torch.device
) -> dict[Config, float]:
    """The median seconds of those that fit the device, in the order of the list."""
    found = {}
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    for config in configs:
        try:
            call(config)
            found[config] = statistics.median(clock(lambda: call(config), device))  # noqa: B023
        except _too_large():
            continue
    return found


def _too_large() -> tuple[type[Exception], ...]:
    """What a program raises that asks for more shared memory or registers than there are."""
    from triton.runtime import errors

    return tuple(
        getattr(errors, name) for name in ("OutOfResources", "PTXASError") if hasattr(errors, name)
    )


def _cuda_seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """By events, and with a cold cache: what a kernel reads was written long ago in real use."""
    with torch.cuda.device(device):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * size, dtype=torch.uint8, device=device)
        pairs = []
        for _ in range(REPEATS):
            flush.zero_()
            first, second = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            first.record()
            call()
            second.record()
            pairs.append((first, second))
        torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1000 for first, second in pairs]


def _cpu_seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def rounded(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


@functools.cache
def _device_name(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} sm_{major}{minor}"


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return _device_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _versions() -> str:
    return f"triton {version('triton')}, torch {torch.__version__}"


def case_key(
    name: str, kernel: Any, on: Tensor, sizes: tuple[int, ...], exact: tuple[Any, ...]
) -> str:
    """All that a choice depends on, readable; `cache_key` hashes a kernel and what it calls."""
    return "; ".join(
        (
            name,
            "sizes " + " ".join(str(rounded(size)) for size in sizes),
            "exact " + " ".join(map(str, exact)),
            str(on.dtype)[6:],
            device_name(on.device),
            _versions(),
            "source " + kernel.cache_key[:16],
        )
    )


def folder() -> Path:
    """Where choices are kept."""
    given = os.environ.get("MENDEL_TUNING_FOLDER")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mendel" / "tuning"


def file_of(device: torch.device, key: str) -> Path:
    """A file per case, so that no process overwrites what another one has timed."""
    kind = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).lower()
    return folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def stored(device: torch.device, key: str, configs: tuple[Config, ...]) -> Config | None:
    """The choice that was kept for the case, if it still is one of the kernel's configurations."""
    path = file_of(device, key)
    try:
        record = json.loads(path.read_text())
        if record["format"] != FORMAT or record["key"] != key:
            return None
        config = Config.parse(record["config"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn_once(path, f"it is not read: {type(error).__name__}: {error}")
        return None
    return config if config in configs else None


def store(device: torch.device, key: str, took: dict[Config, float]) -> None:
    """Keep the fastest. Where nothing can be written, nothing is."""
    best = min(took, key=lambda config: took[config])
    path = file_of(device, key)
    record = {
        "format": FORMAT,
        "key": key,
        "config": str(best),
        "ms": {str(config): 1000 * seconds for config, seconds in took.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(name, path)
    except OSError as error:
        _warn_once(path.parent, f"the choice is not kept: {error}")


_warned: set[Path] = set()


def _warn_once(path: Path, what: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"choices of launches in {path}: {what}", stacklevel=3)
