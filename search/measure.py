"""Measured objectives: latency, throughput and peak memory of the stand-alone model.

A fresh model is built from the genome and nothing of the search is around it. Times are taken after
warm-up, as the median of repeats with the 10th and 90th percentiles, by CUDA events on a GPU and
the performance counter elsewhere. Weights are random: no time here depends on their values, apart
from the routing of experts. Slots that some tokens pass by let their share through, evenly: whether
a random router's logit is above 0 would decide by lot what such a slot costs.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from ..genome.build import build
from ..genome.genome import Genome
from ..genome.model import LanguageModel
from ..genome.resolve import is_causal
from ..genome.routing import Depth
from ..kernels.autotune import untimed_launches
from ..kernels.backend import used_backends
from ..primitives.base import DTYPES
from ..proxies.train import TimeLimit
from .objectives import Goal, LatencySettings, TrainingSettings
from .records import Measurement
from .slot_times import REPEATS, slot_times

WARM_UP = 3
LEAST_REPEATS, MOST_REPEATS = 10, 50
ENOUGH_SECONDS = 2.0
"""Repeats end at the least number where they have taken so long."""
SAMPLE_SECONDS = 0.002
"""How often the resident set is looked at."""
ROUND = 10
"""Tokens that a time in decoding is the mean of, where a slot is left out for some of them."""


def measure(
    genome: Genome, goals: Sequence[Goal], device: str, seed: int, deadline: float | None
) -> dict[str, dict[str, Any]]:
    """Per label of a measured goal its Measurement as JSON.

    `deadline` is a reading of `time.monotonic()`, looked at between repeats; raises TimeLimit."""
    found: dict[str, dict[str, Any]] = {}
    for goal in goals:
        if goal.objective.stage != "measured":
            continue
        torch.manual_seed(seed)
        with used_backends() as used:
            one = _one(genome, goal, torch.device(device), deadline)
        one["conditions"]["backend"] = {op: "+".join(sorted(b)) for op, b in sorted(used.items())}
        found[goal.label] = one
    return found


def _one(
    genome: Genome, goal: Goal, device: torch.device, deadline: float | None
) -> dict[str, Any]:
    settings, name = goal.settings, goal.objective.name
    if isinstance(settings, LatencySettings):
        run = _prefill if name == "latency_prefill" else _decode
        times, slots = run(genome, settings, device, deadline)
        return {**_summary(times, "s", settings, device), "slots": slots}
    assert isinstance(settings, TrainingSettings)
    if name == "peak_memory":
        samples, how = _peak_memory(genome, settings, device, deadline)
        return _summary(samples, "bytes", settings, device, how)
    step = _training_step(genome, settings, device)
    tokens = settings.batch * settings.length
    rates = [tokens / t for t in _repeat(step, device, deadline)]
    return _summary(rates, "tokens/s", settings, device)


def _stand_alone(genome: Genome, dtype: str, device: torch.device) -> LanguageModel:
    return build(genome).to(device=device, dtype=DTYPES[dtype])


def _reader(genome: Genome, settings: LatencySettings, device: torch.device) -> LanguageModel:
    """The model of a latency, in whose slots as many tokens enter as their share says."""
    model = _stand_alone(genome, settings.dtype, device).eval()
    for part in model.modules():
        if isinstance(part, Depth):
            part.logits = _Evenly(part, settings.batch, device)  # type: ignore[method-assign]
    return model


class _Evenly:
    """A router's logits with the signs that let its share of the tokens in: in a row as evenly as
    can be, and of one column's tokens as evenly over the rows."""

    def __init__(self, router: Depth, batch: int, device: torch.device) -> None:
        self.plain, self.share = router.logits, router.tokens
        self.signs = torch.empty(batch, 0, 1, device=device)
        self.seen = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        began = self.seen
        self.seen += x.shape[1]
        if self.seen > self.signs.shape[1]:
            # Of many tokens at once, so that few of the timed calls make any.
            self.signs = self._signs(2 * self.seen)
        return self.plain(x).abs() * self.signs[:, began : self.seen]

    def _signs(self, columns: int) -> torch.Tensor:
        batch, device = self.signs.shape[0], self.signs.device
        place = torch.arange(batch)[:, None] + torch.arange(columns + 1)
        whole = (place.double() * self.share + 1e-9).floor()
        return torch.where(whole.diff(dim=1) > 0, 1.0, -1.0).unsqueeze(-1).to(device)


def _tokens(genome: Genome, batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(genome.vocab, (batch, length), device=device)


def _prefill(
    genome: Genome, settings: LatencySettings, device: torch.device, deadline: float | None
) -> tuple[list[float], list[float]]:
    """Seconds of the repeats, and of each slot."""
    model = _reader(genome, settings, device)
    tokens = _tokens(genome, settings.batch, settings.context, device)
    state = None
    causal = is_causal(genome)

    def prepare() -> None:
        nonlocal state
        # A design that reads later tokens has no state: it reads the context in one pass.
        state = model.init_state(settings.batch, settings.context) if causal else None

    with torch.inference_mode():
        times = _repeat(lambda: model(tokens, state), device, deadline, prepare)

        def whole() -> None:
            prepare()
            model(tokens, state)

        return times, slot_times(model, whole, device)


def _decode(
    genome: Genome, settings: LatencySettings, device: torch.device, deadline: float | None
) -> tuple[list[float], list[float]]:
    """One token after another, which the context grows by. As `_prefill`."""
    model = _reader(genome, settings, device)
    tokens = _tokens(genome, settings.batch, settings.context, device)
    token = tokens[:, :1]
    count = 1 if all(slot.tokens == 1 for slot in genome.slots) else ROUND
    with torch.inference_mode():
        room = count * (WARM_UP + MOST_REPEATS) + REPEATS
        state = model.init_state(settings.batch, settings.context + room)
        _, state = model(tokens, state)

        def step() -> None:
            nonlocal state
            _, state = model(token, state)

        def steps() -> None:
            for _ in range(count):
                step()

        times = [seconds / count for seconds in _repeat(steps, device, deadline)]
        return times, slot_times(model, step, device)


def _training_step(
    genome: Genome, settings: TrainingSettings, device: torch.device
) -> Callable[[], object]:
    model = _stand_alone(genome, settings.dtype, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = _tokens(genome, settings.batch, settings.length + 1, device)

    def step() -> None:
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        extra = model.auxiliary_loss()
        (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.after_step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _repeat(
    call: Callable[[], object],
    device: torch.device,
    deadline: float | None,
    prepare: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each repeat of `call`, after warm-up; `prepare` is outside the clock."""
    for _ in range(WARM_UP):
        _look_at(deadline, 0)
        prepare()
        call()
    began = time.perf_counter()
    times: list[float] = []
    # Kernels whose launches are to be tuned were tuned in the warm-up.
    with untimed_launches():
        while len(times) < MOST_REPEATS:
            if len(times) >= LEAST_REPEATS and time.perf_counter() - began > ENOUGH_SECONDS:
                break
            _look_at(deadline, len(times))
            prepare()
            times.append(_timed(call, device))
    return times


def _look_at(deadline: float | None, step: int) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeLimit(step)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def _peak_memory(
    genome: Genome, settings: TrainingSettings, device: torch.device, deadline: float | None
) -> tuple[list[float], str]:
    """The most that model, gradients, optimiser and activations hold in two training steps.

    CUDA: the allocator's maximum above what it held before. CPU: the largest increase of the
    resident set above that before the model was built, sampled by a thread; memory that the
    allocator kept from earlier work is not seen, so it is a lower bound.
    """
    repeats: list[float] = []
    for _ in range(LEAST_REPEATS // 3):
        _look_at(deadline, len(repeats))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            _two_steps(genome, settings, device)
            torch.cuda.synchronize(device)
            repeats.append(float(torch.cuda.max_memory_allocated(device) - before))
        else:
            with _ResidentSet() as resident:
                _two_steps(genome, settings, device)
            repeats.append(float(resident.increase))
    how = "allocator" if device.type == "cuda" else "increase of the resident set"
    return repeats, how


def _two_steps(genome: Genome, settings: TrainingSettings, device: torch.device) -> None:
    step = _training_step(genome, settings, device)
    step()
    step()


class _ResidentSet:
    """The largest increase of this process' resident set inside the block."""

    def __enter__(self) -> _ResidentSet:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.increase = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.increase = max(self.increase, self._process.memory_info().rss - self._before)


def _summary(
    samples: Sequence[float],
    unit: str,
    settings: LatencySettings | TrainingSettings,
    device: torch.device,
    how: str | None = None,
) -> dict[str, Any]:
    low, median, high = (float(v) for v in np.percentile(samples, [10, 50, 90]))
    conditions: dict[str, Any] = {
        "device": device_name(device),
        **settings.model_dump(),
        "threads": torch.get_num_threads(),
        "warm_up": WARM_UP,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if how is not None:
        conditions["measured_as"] = how
    measured = Measurement(median, low, high, unit, len(samples), conditions)
    return {**vars(measured)}


def device_name(device: torch.device | str) -> str:
    """`cpu (AMD EPYC ...)` or the name of the CUDA device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_cpu_name()})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
