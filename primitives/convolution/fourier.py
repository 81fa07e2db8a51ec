"""FNet: mixing by a Fourier transform, without a parameter.

`causal=false` is the published layer: y = Re F_T F_D x, the discrete Fourier transforms over the
channels and over the T tokens (arXiv 2105.03824, equation 3).

The causal form changes three things: token t sums over s <= t only; the period of the transform
over tokens is a fixed N in the place of T, which no token knows before the end; and so the
frequency t/N of a token does not depend on the length. y_t = Re F_D z_t with

    z_t = sum_{s <= t} exp(-2 pi i t s / N) x_s.

As 2 t s = t^2 + s^2 - (t - s)^2, this is a causal convolution with a chirp between two products
with chirps. As the exponential has period N in s, decoding needs N sums of inputs and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.letters import BTD
from ...kernels.long_conv import long_conv
from ..base import (
    Axis,
    BidirectionalError,
    Cost,
    Gene,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    View,
    state_dtype,
)
from ..genes import choice, flag, whole
from ..position import ContextError
from ..recurrent_parts import at_least_float32, full_precision


@dataclass(frozen=True)
class FourierConfig:
    """Final numbers of one layer."""

    width: int
    causal: bool
    period: int
    """N, the tokens of the causal form's period; 0 where it is not causal."""
    scale: str

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """No parameter; FFTs are not counted, as torch counts none: cos and sin of the causal form
        meet every sum."""
        if not self.causal:
            return Cost()
        slots = min(context, self.period)
        average = (slots * (slots + 1) / 2 + (context - slots) * slots) / context
        kept = slots * self.width * state_dtype(dtype).itemsize
        return Cost(0, 0, 4.0 * self.width * average, kept)

    def build(self) -> Fourier:
        return Fourier(self)


class Fourier(Operator):
    """See the module. The state is the sums of inputs whose positions agree modulo the period."""

    def __init__(self, config: FourierConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        """Raises ContextError where the tokens do not fit in a state shorter than the period."""
        c = self.config
        if state is not None and not c.causal:
            raise BidirectionalError
        wide = at_least_float32(x)
        start = 0 if state is None else state.length
        count = torch.full((1,), x.shape[1], device=x.device)
        with full_precision(x):
            if c.causal:
                count = torch.arange(start, start + x.shape[1], device=x.device) + 1
                z = self._causal(wide, state, start)
            else:
                z = torch.fft.fft(wide, dim=1)
            y = torch.fft.fft(z, dim=2).real
            if c.scale == "orthonormal":
                y = y * (count * c.width).to(y.dtype).rsqrt()[:, None]
        if state is None:
            return y.to(x.dtype), None
        return y.to(x.dtype), State(start + x.shape[1], state.tensors)

    def _causal(self, x: BTD, state: State | None, start: int) -> Tensor:
        """z at the tokens of x, the first of which is the token `start`; complex (B, T, D)."""
        period, tokens = self.config.period, x.shape[1]
        if state is None:
            return _within(x, 0, period)
        sums = state.tensors["sums"]
        size = sums.shape[1]
        if start + tokens > size < period:
            raise ContextError(
                f"the state of the Fourier transform holds {size} tokens; this call needs "
                f"{start + tokens}"
            )
        z: Tensor | None = None
        if tokens > 1:
            z = _within(x, start, period)
            if start:
                z = z + _across(sums[:, : min(start, size)], start, tokens, period)
        slots = torch.arange(start, start + tokens, device=x.device) % period
        # Not in place where a gradient may need the sums before.
        sums = sums.index_add(1, slots, x.to(sums.dtype))
        state.tensors["sums"] = sums
        if z is None:
            z = _across(sums[:, : min(start + 1, size)], start, 1, period)
        return z.to(torch.promote_types(x.dtype, torch.complex64))

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        if not c.causal:
            raise BidirectionalError
        shape = (batch, min(context, c.period), c.width)
        return State(0, {"sums": torch.zeros(shape, dtype=state_dtype(dtype), device=device)})


def _chirp(positions: Tensor, period: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of pi t^2 / N; t^2 modulo 2N in whole numbers keeps late positions exact."""
    angle = (positions.square() % (2 * period)).double() * (math.pi / period)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _within(x: BTD, start: int, period: int) -> Tensor:
    """The part of z that comes from the tokens of x themselves."""
    batch, tokens, width = x.shape
    lags = torch.arange(tokens, device=x.device)
    cos, sin = (part[:, None] for part in _chirp(lags + start, period, x.dtype))
    # x exp(-i t^2 pi/N), its real and imaginary parts as sequences of their own.
    turned = torch.stack((x * cos, -x * sin)).movedim(2, -1).reshape(-1, tokens, 1)
    taps = torch.stack(_chirp(lags, period, x.dtype))
    mixed = long_conv(turned.expand(-1, -1, 2).contiguous(), taps)
    (rr, ri), (ir, ii) = (
        part.movedim(2, 1).unbind(-1) for part in mixed.view(2, batch, width, tokens, 2)
    )
    # Times exp(+i lag^2 pi/N), then times exp(-i t^2 pi/N).
    real, imag = rr - ii, ri + ir
    return torch.complex(real * cos + imag * sin, imag * cos - real * sin)


def _across(sums: Tensor, start: int, tokens: int, period: int) -> Tensor:
    """The part of z at `tokens` tokens that comes from the sums, (B, slots, D)."""
    slots = torch.arange(sums.shape[1], device=sums.device)
    positions = torch.arange(start, start + tokens, device=sums.device)
    angle = (torch.outer(positions, slots) % period).double() * (2 * math.pi / period)
    waves = torch.cat((angle.cos(), -angle.sin())).to(sums.dtype)
    real, imag = torch.matmul(waves, sums).chunk(2, dim=1)
    return torch.complex(real, imag)


def configure(site: Site, genes: Mapping[str, Gene]) -> FourierConfig:
    causal = flag(genes, "causal")
    return FourierConfig(
        width=site.width,
        causal=causal,
        period=whole(genes, "period") if causal else 0,
        scale=choice(genes, "scale"),
    )


FOURIER = Primitive(
    name="fourier",
    kind="mixer",
    summary="fixed mixing by a Fourier transform over tokens and channels (FNet)",
    source="FNet (arXiv 2105.03824)",
    liv=Liv("none", "toeplitz", "none", "none", "dense"),
    axes=(
        Axis(
            "causal",
            True,
            "sum over earlier tokens only, with a fixed period; false is the published transform"
            " of the whole sequence",
            options=(True, False),
        ),
        Axis(
            "period",
            512,
            "tokens of the causal form's period: token t has the frequency t/period",
            low=1.0,
            search=(64, 512),
        ),
        Axis(
            "scale",
            "orthonormal",
            "none, as published, where a norm follows; orthonormal divides by the root of the"
            " numbers that an output sums",
            options=("none", "orthonormal"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "fnet",
            {"causal": False, "scale": "none"},
            "FNet (arXiv 2105.03824)",
            view=View(
                "y_t = Re F_D(sum_j exp(-2 pi i j t / T) x_j), all tokens at once",
                "the whole sequence as it is; no state goes from token to token",
                "never",
                "none: there is no state to fit",
            ),
        ),
        Point(
            "causal-fnet",
            {"causal": True, "scale": "orthonormal"},
            "after FNet (arXiv 2105.03824)",
            "sums over earlier tokens, with a fixed period in the place of the length, scaled",
            view=View(
                "S_{t mod N} += x_t; y_t = Re F_D(sum_j exp(-2 pi i j t / N) S_j)",
                "at most N sums of the tokens whose positions agree modulo N",
                "never: a sum keeps all of its terms",
                "-S_{t mod N} . x_t, linear: linear attention whose keys are fixed by position",
            ),
        ),
    ),
)
