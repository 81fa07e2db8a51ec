"""S4 and S4D: a time-invariant state space per channel, then GELU and a projection.

x' = A x + B u, y = Re(C x) + D u per channel, made discrete with a step size of the channel. S4D:
A diagonal and complex (arXiv 2206.11893). S4: A diagonal less a matrix of rank one (2111.00396), as
A = Lambda - P P^*, which keeps it stable (2202.09729, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTD
from ...kernels.low_rank_state_space import low_rank_state_space
from ...kernels.time_invariant import time_invariant
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
from ..genes import choice, whole
from ..recurrent_parts import at_least_float32, full_precision
from .hippo import legs

SPECTRA = ("lin", "inv", "real", "legs")
FASTEST = 10.0
"""Step sizes and decay rates stay below the exponential of this."""


@dataclass(frozen=True)
class S4Config:
    """Final numbers of one layer; `pairs` are the conjugate pairs of states of a channel."""

    width: int
    pairs: int
    low_rank: bool
    spectrum: str
    discretisation: str
    gated: bool

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width**2 * (1 + self.gated)
        params = products + self.width * (1 + self.gated) + self.width * (4 * self.pairs + 2)
        params += self.width * 4 * self.pairs * self.low_rank
        # The state's decay, writing and reading are elementwise.
        state = 2 * self.width * self.pairs * state_dtype(dtype).itemsize
        return Cost(params, params, float(2 * products), state)

    def build(self) -> S4:
        return S4(self)


class S4(Operator):
    """See the module. Where A is diagonal, B is 1, what it could be being part of C.

    Initial A: `lin`, -1/2 + i pi n; `inv`, -1/2 + i N/pi (N/(2n+1) - 1); `real`, -(n+1); `legs`,
    that of HiPPO-LegS, with the low rank or without it.
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        c = self.config = config
        shape = (c.width, c.pairs)
        n = torch.arange(c.pairs, dtype=torch.float32)
        rows, start = 2 * c.pairs, legs(c.pairs)
        imag = {
            "lin": math.pi * n,
            "inv": rows / math.pi * (rows / (2 * n + 1) - 1),
            "real": torch.zeros(c.pairs),
            "legs": start.frequencies.float(),
        }[c.spectrum]
        real = (n + 1) if c.spectrum == "real" else torch.full_like(n, 0.5)
        self.log_dt = nn.Parameter(torch.empty(c.width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.A_log = nn.Parameter(real.log().expand(shape).clone())
        self.A_imag = nn.Parameter(imag.expand(shape).clone())
        if c.low_rank:
            low_rank = torch.view_as_real(torch.complex(start.low_rank, 0 * start.low_rank))
            self.P = nn.Parameter(low_rank.float().expand(*shape, 2).clone())
            self.B = nn.Parameter(self.P.detach() * 2**0.5)
        self.C = nn.Parameter(torch.randn(*shape, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(c.width))
        self.out_proj = nn.Linear(c.width, c.width * (1 + c.gated))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (D, 1), Lambda and C (D, N), in float64."""
        dt = self.log_dt.double().clamp_max(FASTEST).exp()[:, None]
        a = torch.complex(-self.A_log.double().clamp_max(FASTEST).exp(), self.A_imag.double())
        return dt, a, torch.view_as_complex(self.C.double())

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log A and C B of the discrete system with a diagonal A, complex128 (D, N)."""
        dt, a, c = self.continuous()
        if self.config.discretisation == "zoh":
            return dt * a, c * torch.expm1(dt * a) / a
        # bilinear: A = (1 + dt a/2) / (1 - dt a/2), B = dt / (1 - dt a/2)
        below = 1 - dt * a / 2
        return torch.log((1 + dt * a / 2) / below), c * dt / below

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lambda, P and B of the bilinear form with the half step in them, and C, (D, N)."""
        dt, a, c = self.continuous()
        p, b = (torch.view_as_complex(t.double()) for t in (self.P, self.B))
        return dt * a / 2, torch.sqrt(dt / 2) * p, dt * b, c

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        held = None if state is None else state.tensors["x"]
        with full_precision(x):
            wide = at_least_float32(x)
            if self.config.low_rank:
                y, last = low_rank_state_space(wide, *self.low_rank(), held)
            else:
                y, last = time_invariant(wide, *self.discrete(), held)
            y = F.gelu(torch.addcmul(y, self.skip.to(y.dtype), wide)).to(x.dtype)
        out = self.out_proj(y)
        if self.config.gated:
            out = F.glu(out, dim=-1)
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], {"x": last})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.width, c.pairs, 2)
        return State(0, {"x": torch.zeros(shape, dtype=state_dtype(dtype), device=device)})


def configure(site: Site, genes: Mapping[str, Gene]) -> S4Config:
    rows = whole(genes, "state")
    if rows % 2:
        raise GeneError(f"state-space: state={rows} is odd, and its states come in pairs")
    low_rank = choice(genes, "structure") == "dplr"
    for name, needed in (("spectrum", "legs"), ("discretisation", "bilinear")):
        if low_rank and genes[name] != needed:
            raise GeneError(
                f"state-space: structure=dplr goes with {name}={needed}, not {genes[name]}"
            )
    return S4Config(
        width=site.width,
        pairs=rows // 2,
        low_rank=low_rank,
        spectrum=choice(genes, "spectrum"),
        discretisation=choice(genes, "discretisation"),
        gated=choice(genes, "out") == "glu",
    )


STATE_SPACE = Primitive(
    name="state-space",
    kind="mixer",
    summary="time-invariant state space per channel, diagonal or with low rank (S4D, S4)",
    source="S4 (arXiv 2111.00396), S4D (2206.11893)",
    liv=Liv("none", "toeplitz", "none", "none", "diagonal"),
    axes=(
        Axis(
            "state",
            64,
            "real numbers of state per channel, in pairs",
            low=2.0,
            high=256.0,
            search=(16, 64),
        ),
        Axis(
            "structure",
            "diagonal",
            "the state's matrix: diagonal (S4D), or diagonal plus low rank (S4; with spectrum=legs"
            " and discretisation=bilinear)",
            options=("diagonal", "dplr"),
            search=("diagonal", "dplr"),
        ),
        Axis(
            "spectrum",
            "lin",
            "where the states start: lin, frequencies pi n; inv, their inverse law; real, decays"
            " -n without oscillation; legs, those of HiPPO-LegS",
            options=SPECTRA,
            search=SPECTRA,
        ),
        Axis(
            "discretisation",
            "zoh",
            "from continuous to discrete time: zero-order hold or bilinear",
            options=("zoh", "bilinear"),
            search=("zoh", "bilinear"),
        ),
        Axis(
            "out",
            "glu",
            "projection after the GELU: linear, or twice as wide and gated by its second half",
            options=("linear", "glu"),
            search=("linear", "glu"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "s4",
            {
                "state": 64,
                "structure": "dplr",
                "spectrum": "legs",
                "discretisation": "bilinear",
                "out": "linear",
            },
            "S4 (arXiv 2111.00396), with A = Lambda - P P^* (2202.09729)",
            view=View(
                "x = (1 - dt A/2)^-1 ((1 + dt A/2) x + dt B u); y = C x + D u, A = Lambda - P P^*",
                "the channel's past, weighted by age, as N coefficients of Legendre polynomials",
                "exponentially, at the rates of N modes that A mixes, learned per channel",
                "-B u x - x A x / 2 for A's symmetric part, half implicit; the rest of A rotates",
            ),
        ),
        Point(
            "s4d",
            {"state": 64, "spectrum": "lin", "discretisation": "zoh", "out": "glu"},
            "S4D-Lin (arXiv 2206.11893)",
            view=View(
                "x = exp(dt A) x + B u; y = 2 Re(C x) + D u, per channel, A complex",
                "the channel's recent past as N/2 fading oscillations",
                "exponentially, at N/2 learned rates and frequencies per channel",
                "-Re(B u conj(x)) - Re(A) |x|^2 / 2: descent with weight decay; Im(A) rotates",
            ),
        ),
    ),
)
