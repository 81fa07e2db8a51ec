"""Hyena: gates and long convolutions in turn, the filters made by a small network of the position.

z^1 = v, z^{n+1}_t = x^n_t (h^n * z^n)_t for n = 1..N, y = W_out z^{N+1}, with v and the gates x^n
from a projection and a short convolution (arXiv 2302.10866, definition 3.1). The filters (section
3.3): h_t = exp(-alpha t / L) FFN(e_t), where the FFN has sines of a frequency between its layers,
e_t = (t/L, cos and sin of 2 pi f t / L, f = 1..K), and alpha goes evenly over the channels from
`slow` to `fast`. They are functions of the position and go on beyond L.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTD
from ...kernels.long_conv import long_conv
from ..base import (
    Axis,
    Cost,
    Gene,
    GeneError,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    View,
    state_dtype,
)
from ..genes import number, whole
from ..position import ContextError
from ..recurrent_parts import ShortConv, at_least_float32, full_precision, short_conv_params


@dataclass(frozen=True)
class HyenaConfig:
    """Final numbers of one layer."""

    width: int
    order: int
    """N, the long convolutions."""
    taps: int
    length: int
    """L, the tokens in which positions and decays are counted."""
    bands: int
    """K, the frequencies of a position's features."""
    filter_width: int
    filter_layers: int
    frequency: float
    slow: float
    fast: float

    @property
    def streams(self) -> int:
        """Channels of v and the gates."""
        return (self.order + 1) * self.width

    @property
    def filter_sizes(self) -> list[int]:
        """Widths of the filters' network, from the features of a position to all filters."""
        hidden = [self.filter_width] * self.filter_layers
        return [1 + 2 * self.bands, *hidden, self.order * self.width]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """Decoding makes every tap of the filters once, and meets all earlier inputs per token."""
        products = self.width * (self.streams + self.width)
        network = sum(a * b for a, b in pairwise(self.filter_sizes))
        params = products + short_conv_params(self.streams, self.taps, bias=False)
        params += network + sum(self.filter_sizes[1:-1])
        inputs = self.order * self.width
        flops = 2 * (products + network + self.streams * self.taps) + inputs * (context + 1)
        kept = inputs * context + self.streams * (self.taps - 1)
        return Cost(params, params, float(flops), kept * dtype.itemsize)

    def build(self) -> Hyena:
        return Hyena(self)


@dataclass
class HyenaState(State):
    """`inputs` of the long convolutions, (B, N, D, S), and the short convolution's last, `conv`."""

    filters: Tensor = field(default_factory=lambda: torch.empty(0))
    """(N, D, S), the last tap first, as far as the sequence has come: the weights in another form
    and the same for all sequences, so no part of a sequence's bytes."""

    def clone(self) -> HyenaState:
        kept = {k: t.clone() for k, t in self.tensors.items()}
        return HyenaState(self.length, kept, self.filters.clone())

    def keep(self, n: int, v: BTD, taps: Tensor) -> None:
        """Write the inputs of the n-th convolution at the last T tokens, and its taps there."""
        start, tokens = self.length - v.shape[1], v.shape[1]
        self.tensors["inputs"][:, n, :, start : self.length] = v.mT
        at = self.filters.shape[-1] - self.length
        self.filters[n, :, at : at + tokens] = taps.flip(-1)

    def convolved(self, n: int, tokens: int) -> Tensor:
        """The n-th convolution at the last so many tokens, (B, tokens, D)."""
        seen = self.tensors["inputs"][:, n, :, : self.length]
        taps = self.filters[n, :, self.filters.shape[-1] - self.length :]
        if tokens > 1:
            return long_conv(seen.mT, taps.flip(-1))[:, -tokens:]
        with full_precision(seen):
            # Per channel (B, t) by (t, 1).
            y = torch.bmm(seen.transpose(0, 1).to(taps.dtype), taps[..., None])
        return y.permute(1, 2, 0)


class Filters(nn.Module):
    """The implicit filters of all orders and channels."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        c = self.config = config
        layers = [nn.Linear(a, b) for a, b in pairwise(c.filter_sizes[:-1])]
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(c.filter_width, c.order * c.width, bias=False)
        # Filters of energy near 1 at the start: a sine's mean square is 1/2, that of the weights
        # is 1/(3 filter_width), and the window's energy is L / (2 alpha) tokens.
        energy = c.length / (2 * self.rates(torch.float32, torch.device("cpu"))).clamp_min(1e-3)
        with torch.no_grad():
            self.last.weight.mul_((6 / energy).sqrt().repeat(c.order)[:, None])

    def rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """alpha of every channel, (D,)."""
        c = self.config
        return torch.linspace(c.slow, c.fast, c.width, dtype=dtype, device=device)

    def forward(self, tokens: int, start: int = 0) -> Tensor:
        """The taps of so many positions from `start` on, (N, D, tokens), in float32 at least."""
        c = self.config
        weight = at_least_float32(self.last.weight)
        with full_precision(weight):
            # float64: a late angle loses its digits in float32, and every layer's sine multiplies
            # the roundings before it by the frequency.
            place = torch.arange(start, start + tokens, dtype=torch.float64, device=weight.device)
            place = place / c.length
            bands = torch.arange(1, c.bands + 1, dtype=torch.float64, device=weight.device)
            angle = 2 * math.pi * place[:, None] * bands
            h = torch.cat((place[:, None], angle.cos(), angle.sin()), 1)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                h = F.linear(h, layer.weight.double(), layer.bias.double())
                h = torch.sin(c.frequency * h)
            h = h.to(weight.dtype)
            h = F.linear(h, weight).T.view(c.order, c.width, tokens)
            rates = self.rates(torch.float64, weight.device)
            return h * torch.exp(-rates[:, None] * place).to(h.dtype)


class Hyena(Operator):
    """See the module. `in_proj` makes v, x^1, ..., x^N, in this order.

    Its state is the cache of the long convolutions' inputs. Decoding writes into it in place, so
    run it without gradients, or without a backward pass through more than one call.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, c.streams, bias=False)
        self.conv = ShortConv(c.streams, c.taps, False, "none")
        self.filters = Filters(c)
        self.out_proj = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        """Raises ContextError where the tokens do not fit in the state's cache."""
        c = self.config
        tokens = x.shape[1]
        held = None if state is None else state.tensors["conv"]
        new: HyenaState | None = None
        if state is not None:
            assert isinstance(state, HyenaState)
            inputs, end = state.tensors["inputs"], state.length + tokens
            if end > inputs.shape[-1]:
                size = inputs.shape[-1]
                raise ContextError(f"the cache of Hyena holds {size} tokens; this call needs {end}")
            new = HyenaState(end, {"inputs": inputs}, state.filters)
        mixed, tail = self.conv(self.in_proj(x), held)
        v, *gates = mixed.split(c.width, dim=-1)
        filters = self.filters(tokens, 0 if state is None else state.length)
        for n, gate in enumerate(gates):
            if new is not None:
                new.keep(n, v, filters[n])
            if new is None or new.length == tokens > 1:
                v = gate * long_conv(v, filters[n])
            else:
                v = gate * new.convolved(n, tokens).to(v.dtype)
        out = self.out_proj(v)
        if new is not None:
            new.tensors["conv"] = tail
        return out, new

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """A cache for `context` tokens, and room for the filters' taps at so many positions."""
        c = self.config
        shapes = {
            "inputs": (batch, c.order, c.width, context),
            "conv": (batch, c.streams, c.taps - 1),
        }
        tensors = {k: torch.zeros(s, dtype=dtype, device=device) for k, s in shapes.items()}
        wide = state_dtype(self.filters.last.weight.dtype)
        taps = torch.zeros(c.order, c.width, context, dtype=wide, device=device)
        return HyenaState(0, tensors, taps)


def configure(site: Site, genes: Mapping[str, Gene]) -> HyenaConfig:
    slow, fast = number(genes, "slow"), number(genes, "fast")
    if slow > fast:
        raise GeneError(f"hyena: slow={slow:g} is more than fast={fast:g}")
    return HyenaConfig(
        width=site.width,
        order=whole(genes, "order"),
        taps=whole(genes, "taps"),
        length=whole(genes, "length"),
        bands=whole(genes, "bands"),
        filter_width=whole(genes, "filter_width"),
        filter_layers=whole(genes, "filter_layers"),
        frequency=number(genes, "frequency"),
        slow=slow,
        fast=fast,
    )


HYENA = Primitive(
    name="long-conv",
    kind="mixer",
    summary="gates and long convolutions with implicit filters in turn (Hyena)",
    source="Hyena (arXiv 2302.10866)",
    liv=Liv("gates and a branch", "toeplitz", "none", "none", "diagonal"),
    axes=(
        Axis("order", 2, "long convolutions, each with a gate", low=1.0, high=8.0, search=(1, 2)),
        Axis("taps", 3, "taps of the short convolution before", low=2.0, high=64.0, search=(3, 4)),
        Axis(
            "length",
            1024,
            "tokens over which a filter's window decays; filters go on beyond",
            low=1.0,
            search=(256, 1024),
        ),
        Axis("bands", 16, "frequencies of a position's features", low=1.0, high=256.0),
        Axis("filter_width", 64, "width of the filters' network", low=1.0, high=1024.0),
        Axis("filter_layers", 3, "its layers with sines", low=1.0, high=16.0),
        Axis("frequency", 14.0, "frequency of its sines", low=0.001, high=1000.0),
        Axis("slow", 3.0, "the slowest channel's decay over the length", low=0.0, high=1000.0),
        Axis("fast", 15.0, "the fastest channel's decay over the length", low=0.0, high=1000.0),
    ),
    configure=configure,
    points=(
        Point(
            "hyena",
            {"order": 2, "taps": 3},
            "Hyena (arXiv 2302.10866)",
            view=View(
                "z <- x_n * (h_n conv z), n = 1..N: each order keeps what it convolved",
                "every gated value of every order so far, as a cache keeps keys",
                "as far as the filters' learned windows decay; nothing is overwritten",
                "none: values are put on record and not fitted",
            ),
        ),
    ),
)
