"""What every primitive agrees on: axes, config, cost, state, the row of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Gene = bool | int | float | str | None
"""The value of one axis in a genome."""

Growth = Literal["", "heads", "shares", "head", "width"]
"""How the value of an axis goes with the model's width: not at all, as a number of heads (blocks)
that divide it, as a number of groups of such heads, as channels of one head, as channels that are
some share of the width."""

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""The names of dtypes in studies, commands and reports."""


class GeneError(ValueError):
    """A gene, or a combination of genes, that a primitive refuses. The message is a sentence."""


class BidirectionalError(ValueError):
    """A state is asked of an operator that reads the whole sequence. The message is a sentence."""

    def __init__(
        self, sentence: str = "a bidirectional operator reads the whole sequence: it has no state"
    ) -> None:
        super().__init__(sentence)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state: never less than float32, because its sum runs for ever."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class Axis:
    """One choice that a genome makes about a primitive.

    Either `options` lists every allowed value, or `low` and `high` bound a number (both inclusive;
    `high=None` is unbounded). `search` is what a study draws from when it does not say; a value
    outside `search` but inside the bounds is still valid. `grows` is what a design does with the
    value when it is scaled to another width (`genome/widen.py`).
    """

    name: str
    default: Gene
    doc: str
    options: tuple[Gene, ...] = ()
    low: float | None = None
    high: float | None = None
    search: tuple[Gene, ...] = ()
    grows: Growth = ""

    @property
    def type(self) -> type:
        return type(self.default)

    def allowed(self) -> str:
        """What the axis takes, as words for an error message."""
        if self.options:
            return "one of " + ", ".join(show_gene(o) for o in self.options)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:.15g} to {self.high:.15g}"
        if self.low is not None:
            return f"{kind} of at least {self.low:.15g}"
        return kind

    def check(self, value: Gene) -> Gene:
        """Return the value in the axis' own type, or raise GeneError with a sentence."""
        if self.options:
            for option in self.options:
                if option == value and isinstance(option, bool) == isinstance(value, bool):
                    return option
            raise GeneError(f"{self.name} is {self.allowed()}, not {show_gene(value)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(self.default, int):
            is_number = isinstance(value, int) and not isinstance(value, bool)
        if not is_number:
            raise GeneError(f"{self.name} is {self.allowed()}, not {show_gene(value)}")
        assert isinstance(value, int | float)
        # Written so that nan fails too.
        if not (
            (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        ):
            raise GeneError(f"{self.name} is {self.allowed()}, not {show_gene(value)}")
        return value if isinstance(self.default, int) else float(value)


def show_gene(value: Gene) -> str:
    """A gene as the notation writes it: `true`, `none`, `2`, `0.5`, `full`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    return str(value)


@dataclass(frozen=True)
class Site:
    """Where in a backbone an operator stands: what its config depends on besides its genes."""

    width: int
    """D, the width of the residual stream."""
    position: str = "none"
    """The backbone's position encoding (`POSITIONS`), which an operator may inherit."""
    layer: int = 0
    """The index of the slot, from 0."""
    depth: int = 1
    """The number of slots."""
    borrows: bool = False
    """The operator takes the key-value features of an earlier slot and makes none of its own."""
    normalised: bool = False
    """The backbone is nGPT's (arXiv 2410.01131): an operator that the paper has takes its scalings
    of queries and keys, or of the hidden channels."""


@dataclass(frozen=True)
class Cost:
    """What an operator or a model costs, counted without making a tensor.

    `flops_per_token` counts the multiply-adds of matrix products and convolutions in the forward
    pass, two each, as torch's FlopCounterMode does, on average over the positions 1..context of one
    sequence that is decoded token by token (so causal attention counts the half that it needs).
    Elementwise work is not counted. `state_bytes` is what one sequence carries at that context.
    """

    params: int = 0
    active_params: int = 0
    flops_per_token: float = 0.0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.flops_per_token + other.flops_per_token,
            self.state_bytes + other.state_bytes,
        )


@runtime_checkable
class Config(Protocol):
    """A frozen dataclass of final numbers: everything that decides the module, nothing else."""

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """The cost at a context length (tokens) with weights and activations in `dtype`.

        A bidirectional operator counts one pass over `context` tokens, divided by their number.
        """
        ...

    def build(self) -> nn.Module:
        """The module, with fresh weights from torch's global generator."""
        ...


def is_causal(config: Config) -> bool:
    """No output of the operator depends on a later token. Configs of operators that can also read
    the whole sequence have a field `causal`; the others have none and are causal."""
    return bool(getattr(config, "causal", True))


def training_flops(config: Config, context: int) -> float:
    """FLOPs per token of one forward pass over a whole sequence of `context` tokens.

    They are decoding's, but for configs that decode in another form than they train in: those have
    a method `training_flops`.
    """
    own = getattr(config, "training_flops", None)
    if own is None:
        return config.cost(context, torch.bfloat16).flops_per_token
    return float(own(context))


@dataclass
class State:
    """What an operator carries from one call to the next, for a batch of sequences of equal length.

    A call consumes the state that it is given (it may write into its tensors) and returns the one
    to use next; `clone` first to keep the old one.
    """

    length: int = 0
    """Tokens seen so far."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def clone(self) -> State:
        return State(self.length, {k: t.clone() for k, t in self.tensors.items()})


TOKENS = "tokens"
"""What the model itself hands on to the first slot and all later ones: the token ids (B, T)."""

EMBEDDING = "embedding"
"""Likewise: the stream as it enters the first slot, (B, T, D)."""


@dataclass
class Carry:
    """What operators of different slots hand on within one call, between operators whose configs
    name the same `carries` (see `carries`).

    It is no state: a call of one token hands on the same as the call of the whole sequence does.
    """

    earlier: list[Tensor] | None = None
    """What the nearest earlier slot with such an operator handed on; None for the first."""
    later: list[Tensor] = field(default_factory=list)
    """What this operator hands on."""


def carries(config: Config) -> str | None:
    """The name of what an operator hands on to the next operator that has the same name for it.

    None for nothing. Modules of the others take `carry` as a keyword in all their forward methods.
    """
    name: str | None = getattr(config, "carries", None)
    return name


def reads_stream(config: Config) -> bool:
    """The operator norms its input itself: it gets the stream and not the slot's norm of it."""
    return bool(getattr(config, "reads_stream", False))


def own_params(config: Config) -> int:
    """The parameters that every place of an operator with shared weights has of its own.

    Where there are any, the config has `build(places)`, for a module with so many of those parts,
    and the module takes the number of its place, from 0, as the keyword `place`.
    """
    return int(getattr(config, "own_params", 0))


class Operator(nn.Module):
    """The shape of every primitive's module. Subclasses are plain modules: nothing happens here.

    `forward(x, state)`: x is (B, T, D). With `state=None` it is the training form: a whole sequence
    from its start, and the returned state is None. With a state the call continues the sequence,
    T = 1 is decoding, and the returned state is the next one.
    """

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        raise NotImplementedError

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """An empty state with room for `context` tokens; its bytes at batch 1 are the cost's.

        Raises BidirectionalError where the operator is not causal; so does a call with a state.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Liv:
    """STAR's description of an operator as a linear input-varying system (arXiv 2411.17800).

    `token_mixing`: diagonal, low-rank, scaled Toeplitz, semi-separable, none.
    `sparsity`: none, banded. `nonlinearity`: none, softmax, relu, swish.
    `channel_mixing`: diagonal, dense, grouped.
    """

    featurizer: str
    token_mixing: Literal["diagonal", "low-rank", "toeplitz", "semi-separable", "none"]
    sparsity: Literal["none", "banded"]
    nonlinearity: str
    channel_mixing: Literal["diagonal", "dense", "grouped"]


@dataclass(frozen=True)
class View:
    """A recurrent layer's place in the unified view, one line each.

    `update`: the state's update in symbols. `stores`: what the state holds. `forgets`: how it lets
    go. `loss`: the loss that the update descends, the state being the weights.
    """

    update: str
    stores: str
    forgets: str
    loss: str


@dataclass(frozen=True)
class Point:
    """A published layer as a setting of a primitive's axes; other axes keep their defaults."""

    name: str
    genes: Mapping[str, Gene]
    source: str
    """Paper and arXiv number."""
    doc: str = ""
    view: View | None = None
    """Its place among the recurrences; None where there is no recurrent state."""


@dataclass(frozen=True)
class Primitive:
    """A row of the catalogue."""

    name: str
    kind: Literal["mixer", "channel"]
    summary: str
    source: str
    liv: Liv
    axes: tuple[Axis, ...]
    configure: Callable[[Site, Mapping[str, Gene]], Config]
    """From a site and the values of all axes to a config; raises GeneError with a sentence where
    the values do not go together. Calls `Axis.check` on nothing: the values are checked before."""
    points: tuple[Point, ...] = ()
    lends: bool = False
    """Its key-value features can be shared with later slots: the module has `forward_lending` and
    `forward_borrowing` (see attention/layer.py)."""
    lending_problem: Callable[[Config, Config], str | None] | None = None
    """For a primitive that lends: why the second config cannot use the features of the first, as a
    sentence; None where it can. Either config may be another primitive's."""

    @property
    def attends(self) -> bool:
        """It is, or holds, attention: low-rank token mixing with a softmax (arXiv 2411.17800)."""
        return self.liv.token_mixing == "low-rank" and self.liv.nonlinearity == "softmax"

    def defaults(self) -> dict[str, Gene]:
        return {axis.name: axis.default for axis in self.axes}

    def axis(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise GeneError(
            f"{self.name} has no axis {name!r}; it has " + ", ".join(a.name for a in self.axes)
        )

    def complete(self, genes: Mapping[str, Gene]) -> dict[str, Gene]:
        """All axes with checked values: the given ones, and the defaults for the rest."""
        full = self.defaults()
        for name, value in genes.items():
            full[name] = self.axis(name).check(value)
        return full

    def names(self) -> Iterator[str]:
        """The names under which a genome can ask for it: its own and its points'."""
        yield self.name
        for point in self.points:
            yield point.name
