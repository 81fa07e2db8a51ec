"""One trainer for every task: a seeded training that stops at rungs, resumes and is saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..genome.build import build
from ..genome.genome import Genome
from ..genome.model import LanguageModel
from . import checkpoint
from .recipe import TrainConfig, autocast, learning_rate, make_optimizer, resolve_dtype
from .task import IGNORE, ProxyError, Task, leak

DIVERGED_FACTOR = 4.0
"""A loss above this multiple of the first one (or of a uniform guess, whichever is more) ..."""
DIVERGED_STEPS = 10
"""... for so many steps in a row is divergence; a loss that is not finite is at once."""
MOST_LOGITS = 2**27
"""Above so many logits of a step (512 MiB in float32, and their gradient likewise) none are stored.
Below, storing them is as good and faster."""
CURVE_RECORDS = 100
"""About so many records of the training loss per training."""

OnStep = Callable[[int], None]


class Diverged(RuntimeError):
    """The loss was not finite, or stayed far above where it began."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"diverged at step {step}: loss {loss:g}")
        self.step = step
        self.loss = loss

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, float]]:
        # The default would give the message to __init__ when another process takes it over.
        return type(self), (self.step, self.loss)


class TimeLimit(RuntimeError):
    """The deadline passed between two steps; the training stands at `step` and can go on."""

    def __init__(self, step: int) -> None:
        super().__init__(f"out of time at step {step}")
        self.step = step

    def __reduce__(self) -> tuple[type[TimeLimit], tuple[int]]:
        return type(self), (self.step,)


class _Run:
    """One model at one peak learning rate."""

    def __init__(
        self,
        genome: Genome,
        task: Task,
        config: TrainConfig,
        peak: float,
        steps: int,
        batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.task, self.config, self.peak = task, config, peak
        self.steps, self.batch, self.device = steps, batch, device
        self.dtype = resolve_dtype(config.dtype, device)
        # Weights are drawn on the CPU, so that they are the same on every device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: LanguageModel = build(genome, task.vocab)
        self.model.to(device)
        self._stores_logits = batch * task.length * task.vocab <= MOST_LOGITS
        call = self.model if self._stores_logits else self.model.hidden
        self._forward: Callable[[Tensor], Any] = torch.compile(call) if config.compile else call
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self._parameters, config)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self._limit = math.inf
        self._high = 0
        self._recorded: list[float] = []
        """Losses since the last record of the curve."""
        self._unread: list[Tensor] = []
        # Reading a loss waits for the device: free on a CPU, dear on an accelerator.
        self._read_every = 1 if device.type == "cpu" else 16
        self._record_every = max(1, steps // CURVE_RECORDS)

    def advance(self, to_step: int, deadline: float | None, on_step: OnStep | None) -> list[float]:
        """Train to a step; the losses of the steps done. Raises Diverged or TimeLimit."""
        losses: list[float] = []
        began = time.perf_counter()
        before = self.seconds
        self.model.train()
        try:
            while self.step < to_step:
                if deadline is not None and time.monotonic() >= deadline:
                    losses += self._read()
                    raise TimeLimit(self.step)
                lr = self._step()
                record = self.step % self._record_every == 0 or self.step == self.steps
                if record or len(self._unread) >= self._read_every:
                    losses += self._read()
                if record:
                    self.seconds = before + time.perf_counter() - began
                    self._record(lr)
                if on_step is not None:
                    on_step(self.step)
            losses += self._read()
        finally:
            self.seconds = before + time.perf_counter() - began
        return losses

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            found = self._forward(inputs)
            if not self._stores_logits:
                return self.model.loss(found, targets, IGNORE)
        logits: Tensor = found[0]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)

    def _step(self) -> float:
        """One step of the optimiser, at the learning rate that is returned."""
        lr = learning_rate(self.config, self.peak, self.step, self.steps)
        data = self.task.train_batch(self.step, self.batch)
        inputs = data.inputs.to(self.device, non_blocking=True)
        targets = data.targets.to(self.device, non_blocking=True)
        loss = self._loss(inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        extra = self.model.auxiliary_loss()
        (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.model.after_step()
        self.step += 1
        self._unread.append(loss.detach())
        return lr

    def _read(self) -> list[float]:
        """Fetch the losses that are still on the device and look for divergence."""
        if not self._unread:
            return []
        values: list[float] = torch.stack(self._unread).tolist()
        first = self.step - len(values) + 1
        self._unread.clear()
        for step, loss in enumerate(values, first):
            if not math.isfinite(loss):
                raise Diverged(step, loss)
            if math.isinf(self._limit):
                self._limit = DIVERGED_FACTOR * max(loss, math.log(self.task.vocab))
            self._high = self._high + 1 if loss > self._limit else 0
            if self._high >= DIVERGED_STEPS:
                raise Diverged(step, loss)
        self._recorded += values
        return values

    def _record(self, lr: float) -> None:
        mean = sum(self._recorded) / len(self._recorded)
        self._recorded.clear()
        self.curve.append({**self.place(), "loss": mean, "lr": lr})

    def place(self) -> dict[str, Any]:
        """Where the training stands: step, tokens, seconds."""
        tokens = self.step * self.batch * self.task.length
        return {"step": self.step, "tokens": tokens, "seconds": self.seconds}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and the optimiser's moments. A shared tensor stands once."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[f"weight.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}.{name}"] = value
        for name, buffer in self.model.named_buffers():
            found[f"buffer.{name}"] = buffer
        return found

    def facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "limit": None if math.isinf(self._limit) else self._limit,
            "high": self._high,
            "recorded": self._recorded,
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take the place of the saved run, which has the same genome, task and recipe."""
        left = dict(tensors)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(left.pop(f"weight.{name}"))
                moments = {
                    key: left.pop(f"optimizer.{key}.{name}").to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{key}.{name}" in left
                }
                if moments:
                    self.optimizer.state[parameter] = moments
            for name, buffer in self.model.named_buffers():
                buffer.copy_(left.pop(f"buffer.{name}"))
        if left:
            raise KeyError(next(iter(left)))
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.curve = facts["curve"]
        self._limit = math.inf if facts["limit"] is None else facts["limit"]
        self._high, self._recorded = facts["high"], facts["recorded"]


class Training:
    """The training of a genome on a task: one schedule over `steps`, of which a rung is a prefix.

    `seed` draws the weights; the task's own seed draws the data and its order. On a CPU with a
    fixed number of threads the weights at each step are the same bits every time, whether or not
    the training was saved and loaded on the way; on CUDA, up to the order of atomic sums.
    Nothing random happens in a step. The number of threads is the caller's business.

    Where `train.lr` is a list, the first `advance` trains every rate from the same weights on the
    same batches for `ceil(train.grid * steps)` steps and goes on with the one whose mean loss over
    the last quarter of them is lowest; a rate that diverges is out. `lr` is the rate chosen,
    `grid` the outcome per rate, and `spent_steps` counts the steps of all rates.

    `curve` has records of `step`, `tokens`, `seconds`, `loss` (mean training loss since the record
    before, nats) and `lr`, and, for each evaluation, of `step`, `tokens`, `seconds` and `eval`
    (the task's metrics).

    Raises GeneError where the genome is invalid and ProxyError where it reads later tokens and the
    task predicts them, or the device lacks the dtype.
    """

    def __init__(
        self,
        genome: Genome,
        task: Task,
        train: TrainConfig,
        steps: int,
        batch: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        problem = leak(genome, task.name, task.bidirectional)
        if problem is not None:
            raise ProxyError(problem)
        self.genome, self.task, self.train = genome, task, train
        self.steps, self.batch, self.seed = steps, batch, seed
        self.device = torch.device(device)
        self.grid: list[dict[str, Any]] = []
        self._grid_seconds = 0.0
        rates = train.rates()
        self._run: _Run | None = self._start(rates[0]) if len(rates) == 1 else None

    def _start(self, peak: float) -> _Run:
        return _Run(
            self.genome,
            self.task,
            self.train,
            peak,
            self.steps,
            self.batch,
            self.seed,
            self.device,
        )

    def _chosen(self) -> _Run:
        if self._run is None:
            raise ProxyError("the training has not chosen its learning rate yet: advance it first")
        return self._run

    @property
    def step(self) -> int:
        """Steps done by the chosen rate."""
        return 0 if self._run is None else self._run.step

    @property
    def lr(self) -> float:
        """The peak learning rate in use."""
        return self._chosen().peak

    @property
    def model(self) -> LanguageModel:
        return self._chosen().model

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [] if self._run is None else self._run.curve

    @property
    def seconds(self) -> float:
        """Time in training steps, all rates together; without evaluation."""
        return self._grid_seconds + (0.0 if self._run is None else self._run.seconds)

    @property
    def spent_steps(self) -> int:
        """Steps done by all rates together."""
        lost: int = sum(row["steps"] for row in self.grid if not row["chosen"])
        return self.step + lost

    @property
    def tokens(self) -> int:
        """Training tokens read, all rates together."""
        return self.spent_steps * self.batch * self.task.length

    def advance(
        self, to_step: int, deadline: float | None = None, on_step: OnStep | None = None
    ) -> None:
        """Train until `to_step` steps are done in all; nothing where they are done already.

        `deadline` is a reading of `time.monotonic()`, looked at between steps. `on_step` is called
        with the number of steps done after each. Raises Diverged and TimeLimit. A list of rates is
        tried for its full part even where `to_step` is smaller.
        """
        to_step = min(to_step, self.steps)
        if self._run is None and to_step > 0:
            self._run = self._choose(deadline, on_step)
        while self._run is not None and self._run.step < to_step:
            every = self.train.eval_every
            stop = to_step
            if every:
                stop = min(to_step, (self._run.step // every + 1) * every)
            self._run.advance(stop, deadline, on_step)
            if every and stop % every == 0:
                self.evaluate()

    def _choose(self, deadline: float | None, on_step: OnStep | None) -> _Run:
        """Try every rate of the list and return the run of the best one."""
        part = math.ceil(self.train.grid * self.steps)
        best: _Run | None = None
        best_loss, failure = math.inf, None
        grid: list[dict[str, Any]] = []
        seconds = 0.0
        for peak in self.train.rates():
            run = self._start(peak)
            loss: float | None = None
            try:
                losses = run.advance(part, deadline, on_step)
                tail = losses[-math.ceil(part / 4) :]
                loss = sum(tail) / len(tail)
            except Diverged as error:
                failure = failure or error
            seconds += run.seconds
            grid.append({"lr": peak, "loss": loss, "steps": run.step, "chosen": False})
            if loss is not None and loss < best_loss:
                best, best_loss = run, loss
        if best is None:
            assert failure is not None
            raise failure
        self.grid = [{**row, "chosen": row["lr"] == best.peak} for row in grid]
        self._grid_seconds = seconds - best.seconds
        return best

    def evaluate(self) -> dict[str, float]:
        """The task's metrics on held-out data, also written into the curve.

        Raises Diverged where a metric is not finite.
        """
        run = self._chosen()
        with autocast(self.device, run.dtype):
            metrics = self.task.evaluate(run.model, self.batch, self.device)
        for value in metrics.values():
            if not math.isfinite(value):
                raise Diverged(run.step, value)
        if not (run.curve and "eval" in run.curve[-1] and run.curve[-1]["step"] == run.step):
            run.curve.append({**run.place(), "eval": metrics})
        return metrics

    def statistics(self) -> dict[str, Any]:
        """`lr`, `spent_steps`, `grid` where rates were tried, and what the model reports."""
        found: dict[str, Any] = {"lr": self.lr, "spent_steps": self.spent_steps}
        if self.grid:
            found["grid"] = self.grid
        return {**found, **self.model.statistics()}

    def identity(self) -> dict[str, Any]:
        """What decides the training, as JSON: genome, task, recipe, steps, batch, seed."""
        found: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "genome": asdict(self.genome),
                    "task": self.task.describe(),
                    "train": self.train.model_dump(),
                    "steps": self.steps,
                    "batch": self.batch,
                    "seed": self.seed,
                }
            )
        )
        return found

    def save(self, folder: Path | str) -> Path:
        """Write the checkpoint of that folder, replacing an older one whole, and return its path.

        Raises ProxyError where a list of rates has not been tried yet.
        """
        run = self._chosen()
        facts = {
            "identity": self.identity(),
            "lr": run.peak,
            "grid": self.grid,
            "grid_seconds": self._grid_seconds,
            "run": run.facts(),
        }
        return checkpoint.write(Path(folder), run.tensors(), facts)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        genome: Genome,
        task: Task,
        train: TrainConfig,
        steps: int,
        batch: int,
        seed: int,
        device: str = "cpu",
    ) -> Training:
        """The saved training, on any device; going on gives what it would have given unbroken.

        Raises ProxyError with one line where there is no checkpoint, where it is damaged, and where
        it is of another genome, task, recipe, length, batch or seed.
        """
        training = cls(genome, task, train, steps, batch, seed, device)
        tensors, facts = checkpoint.read(Path(folder))
        try:
            other = checkpoint.difference(facts["identity"], training.identity())
            if other is not None:
                raise ProxyError(f"{folder} holds a checkpoint of another training: {other}")
            run = training._run or training._start(facts["lr"])
            run.restore(tensors, facts["run"])
            training.grid, training._grid_seconds = facts["grid"], facts["grid_seconds"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ProxyError(
                f"{folder} holds a checkpoint that does not fit this model: {error}"
            ) from None
        training._run = run
        return training
