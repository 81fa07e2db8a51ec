"""Whose weights go with an export: those that a trial's proxies left, or a training's seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...genome.build import build
from ...genome.genome import Genome
from ...genome.model import LanguageModel
from ...proxies import checkpoint
from ...proxies.text import NAME as BYTE_TEXT
from ..store import CHECKPOINTS
from ..terminal import Mistake
from .order import Order
from .proof import sha256


@dataclass(frozen=True)
class Weights:
    """A trained state of the model. `name` is the proxy, or the seed of a training; `identity` is
    what decided the training (task, recipe, steps, batch, seed)."""

    name: str
    tensors: Mapping[str, Tensor]
    """By the names of the model's state."""
    identity: dict[str, Any]
    step: int
    lr: float
    checkpoint: str
    """The sha256 of the checkpoint."""

    @property
    def vocab(self) -> int:
        return self.tensors["embedding.weight"].shape[0]

    @property
    def task(self) -> str:
        return str(self.identity["task"]["task"])

    @property
    def length(self) -> int:
        """Tokens that the model read per sequence."""
        return int(self.identity["task"]["length"])

    @property
    def byte_text(self) -> bool:
        """The alphabet is the bytes of text."""
        return self.task == BYTE_TEXT

    def facts(self) -> dict[str, Any]:
        """As JSON: what was trained on what, how long and from which seed."""
        recipe = {k: v for k, v in self.identity.items() if k not in ("genome", "task")}
        tokens = self.step * int(self.identity["batch"]) * self.length
        return {
            "of": self.name,
            "data": self.identity["task"],
            **recipe,
            "step": self.step,
            "lr": self.lr,
            "tokens": tokens,
            "vocab": self.vocab,
            "checkpoint_sha256": self.checkpoint,
        }

    def model(self, genome: Genome) -> LanguageModel:
        """The trained model, in evaluation mode. Raises Mistake where the weights do not fit."""
        with torch.random.fork_rng(devices=[]):
            model = build(genome, self.vocab)
        try:
            model.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise Mistake(f"the weights of {self.name} do not fit: {lines[-1]}") from None
        return model.eval()


def find(order: Order) -> Weights | None:
    """The weights that were asked for, or by default those of the first proxy that is text, else
    of the first proxy, or of the first seed; None where nothing is trained or kept.

    Raises Mistake, or ProxyError where a checkpoint cannot be read.
    """
    source = order.source
    if order.seed is not None and source.training is None:
        raise Mistake(f"--seed chooses among the seeds of mendel train; {source.text} is none")
    if order.proxy is not None and source.trial is None:
        raise Mistake(f"--proxy chooses among the proxies of a trial; {source.text} is none")
    there = _places(order)
    name = order.proxy if order.seed is None else f"seed-{order.seed}"
    if name is not None and name not in there:
        kept = f"there are those of {', '.join(there)}" if there else "there are none"
        raise Mistake(f"{source.text} keeps no weights of {name}; {kept}")
    if name is None:
        name = _first(order, list(there))
    return None if name is None else read(there[name], name, source.genome)


def _places(order: Order) -> dict[str, Path]:
    """The folders that hold a checkpoint, by proxy or seed."""
    source = order.source
    if source.trial is not None and source.run is not None:
        folder = source.run.trial_folder(source.trial.number) / CHECKPOINTS
        named = {proxy: folder / proxy for proxy in source.run.study.proxies}
    elif source.training is not None:
        seeds = sorted(source.training.glob("seed-*"), key=lambda p: (len(p.name), p.name))
        named = {p.name: p for p in seeds}
    else:
        named = {}
    return {name: p for name, p in named.items() if (p / checkpoint.FILE).is_file()}


def _first(order: Order, names: list[str]) -> str | None:
    run = order.source.run
    if run is not None:
        names.sort(key=lambda name: run.study.proxies[name].task != BYTE_TEXT)
    return names[0] if names else None


def read(folder: Path, name: str, genome: Genome) -> Weights:
    """The weights of a checkpoint. Raises Mistake where they are of another design."""
    tensors, facts = checkpoint.read(folder)
    try:
        identity, step, lr = facts["identity"], int(facts["run"]["step"]), float(facts["lr"])
        own = _is_of(identity["genome"], genome)
    except (KeyError, TypeError, ValueError):
        raise Mistake(f"{folder} holds a checkpoint without the facts of its training") from None
    if not own:
        raise Mistake(f"{folder} holds the weights of another design; they do not fit this one")
    state = build(genome, tensors["weight.embedding.weight"].shape[0]).state_dict()
    parts = [key.partition(".") for key in tensors]
    kept = {rest: f"{kind}.{rest}" for kind, _, rest in parts if kind in ("weight", "buffer")}
    return Weights(
        name,
        {key: tensors[place].contiguous() for key, place in kept.items() if key in state},
        identity,
        step,
        lr,
        sha256(folder / checkpoint.FILE),
    )


def _is_of(saved: Mapping[str, Any], genome: Genome) -> bool:
    """Whether a checkpoint's genome is this one; a header that has grown since has its defaults."""
    defaults = {f.name: f.default for f in fields(Genome)}
    held = {name: saved.get(name, defaults[name]) for name in defaults}
    return saved.keys() <= defaults.keys() and held == json.loads(json.dumps(asdict(genome)))
