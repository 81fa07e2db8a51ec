"""What a study demands of a genome beside its form: sizes, costs, the share of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from ..primitives.base import DTYPES
from .cost import DEFAULT_CONTEXT, ModelCost, cost
from .genome import Genome
from .quantity import Bytes, Count, Share, Tokens
from .resolve import primitive_of


class _Bounds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = limits(self)
        if low is None and high is None:
            raise ValueError("needs min, max or both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min {low:g} is above max {high:g}")
        return self


class CountBounds(_Bounds):
    """Least and most of a count, both inclusive."""

    min: Count | None = None
    max: Count | None = None


class FlopsBounds(CountBounds):
    """Least and most FLOPs per token at a context of so many tokens."""

    context: Tokens = DEFAULT_CONTEXT


class CacheBounds(_Bounds):
    """Least and most bytes of one sequence's state at a context and in a dtype."""

    min: Bytes | None = None
    max: Bytes | None = None
    context: Tokens = DEFAULT_CONTEXT
    dtype: Literal["fp64", "fp32", "fp16", "bf16"] = "bf16"


class ShareBounds(_Bounds):
    """Least and most of a share, from 0 to 1."""

    min: Share | None = None
    max: Share | None = None


class Constraints(BaseModel):
    """The constraints of a study; absent ones hold always."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    params: CountBounds | None = None
    active_params: CountBounds | None = None
    flops_per_token: FlopsBounds | None = None
    cache_bytes: CacheBounds | None = None
    attention_share: ShareBounds | None = None

    def given(self) -> Iterator[tuple[str, _Bounds]]:
        """Name and bounds of every constraint that the study states."""
        for name in type(self).model_fields:
            bounds = getattr(self, name)
            if bounds is not None:
                yield name, bounds


def limits(bounds: Any) -> tuple[float | None, float | None]:
    """The least and the most value, None where there is no bound."""
    return bounds.min, bounds.max


def attention_share(genome: Genome) -> float:
    """The share of slots with a mixer that hold attention."""
    mixers = attention = 0
    for slot in genome.slots:
        rows = [row for row in map(primitive_of, slot.branches) if row.kind == "mixer"]
        mixers += bool(rows)
        attention += any(row.attends for row in rows)
    return attention / mixers if mixers else 0.0


def measured(genome: Genome, constraints: Constraints) -> dict[str, float]:
    """The value of every constrained quantity. Raises GeneError for an invalid genome."""
    known: dict[tuple[int, str], ModelCost] = {}

    def costs(context: int = DEFAULT_CONTEXT, dtype: str = "bf16") -> ModelCost:
        if (context, dtype) not in known:
            known[context, dtype] = cost(genome, context, DTYPES[dtype])
        return known[context, dtype]

    values: dict[str, float] = {}
    # Contexts and dtypes that some constraint names come first, so that the rest can reuse them.
    if constraints.cache_bytes is not None:
        bounds = constraints.cache_bytes
        values["cache_bytes"] = costs(bounds.context, bounds.dtype).total.state_bytes
    if constraints.flops_per_token is not None:
        total = costs(constraints.flops_per_token.context).total
        values["flops_per_token"] = total.flops_per_token
    if constraints.params is not None or constraints.active_params is not None:
        total = (next(iter(known.values())) if known else costs()).total
        if constraints.params is not None:
            values["params"] = total.params
        if constraints.active_params is not None:
            values["active_params"] = total.active_params
    if constraints.attention_share is not None:
        values["attention_share"] = attention_share(genome)
    return {name: float(values[name]) for name, _ in constraints.given()}


def exceeded(genome: Genome, constraints: Constraints) -> dict[str, float]:
    """By how much every bound is exceeded, feasible where <= 0; keys such as `params.max`.

    Raises GeneError for an invalid genome.
    """
    values = measured(genome, constraints)
    result: dict[str, float] = {}
    for name, bounds in constraints.given():
        low, high = limits(bounds)
        if low is not None:
            result[f"{name}.min"] = low - values[name]
        if high is not None:
            result[f"{name}.max"] = values[name] - high
    return result


def satisfied(genome: Genome, constraints: Constraints) -> bool:
    """Whether a valid genome keeps every constraint."""
    return all(excess <= 0 for excess in exceeded(genome, constraints).values())
