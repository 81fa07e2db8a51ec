"""Weights of transformers' models as ours, and comparing logits: for tests of whole models.

Tolerance: 1e-5 of the logits' scale in float32, as for the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mendel.genome.build import build
from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse

VOCAB = 40
Weights = dict[str, Tensor]


def tokens(length: int = 37) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def scatter(theirs: nn.Module) -> Weights:
    """Their weights, each away from its start, by name."""
    generator = torch.Generator().manual_seed(0)
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter.shape[-1] if parameter.dim() > 1 else 25
            parameter.add_(noise / fan**0.5)
    return {name: t.detach().clone() for name, t in theirs.state_dict().items()}


def of(weights: Weights, prefix: str) -> Weights:
    """The weights below a name, by the rest of their names."""
    start = len(prefix) + 1
    return {name[start:]: t for name, t in weights.items() if name.startswith(prefix + ".")}


def load(
    genome: str | Genome, operators: list[Weights], norms: list[Tensor], ends: Weights
) -> LanguageModel:
    """Our model with given weights of every operator, of every slot's norm, and of the rest."""
    genome = parse(genome) if isinstance(genome, str) else genome
    model = build(genome)
    state = dict(ends)
    state |= {f"blocks.{i}.before.weight": norm for i, norm in enumerate(norms)}
    for i, operator in enumerate(operators):
        state |= {f"operators.{i}.{name}": t for name, t in operator.items()}
    given = {name: t for name, t in model.state_dict().items() if name not in state}
    assert not any(t.is_floating_point() for t in given.values()), given.keys()
    model.load_state_dict(state | given)
    assert sum(p.numel() for p in model.parameters()) == cost(genome).total.params
    return model.eval()


def joined(weights: Weights, ours: str, *theirs: str) -> Weights:
    """Weight and bias, where there is one, of maps that we have as one."""
    kinds = [kind for kind in ("weight", "bias") if f"{theirs[0]}.{kind}" in weights]
    return {
        f"{ours}.{kind}": torch.cat([weights[f"{name}.{kind}"] for name in theirs])
        for kind in kinds
    }


def attention(weights: Weights) -> Weights:
    entry = joined(weights, "entry", "q_proj", "k_proj", "v_proj")
    return entry | joined(weights, "exit", "o_proj")


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def check(ours: LanguageModel, expected: Tensor, cap: float = 0.0) -> None:
    """One call and decoding token by token, `cap` being that of the published logits."""
    x = tokens(expected.shape[1])
    with torch.no_grad():
        whole = ours(x)[0]
        state = ours.init_state(2, x.shape[1])
        steps = torch.cat([ours(token, state)[0] for token in x.split(1, 1)], 1)
    for logits in (whole, steps):
        capped = cap * torch.tanh(logits / cap) if cap else logits
        assert error(capped, expected) < 1e-5
