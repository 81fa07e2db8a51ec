"""S5: one time-invariant complex diagonal state that all channels write into and read from.

x' = Lambda x + B u, y = 2 Re(C x) + D u with B and C dense, made discrete by a zero-order hold with
a step size per state and run as a scan; then GELU and a gate (arXiv 2208.04933).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.complex_scan import complex_scan
from ...kernels.letters import BTD
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

OUTPUTS = ("gate", "glu", "linear")
FASTEST = 10.0
"""Step sizes and decay rates stay below the exponential of this."""


@dataclass(frozen=True)
class S5Config:
    """Final numbers of one layer; `pairs` are the conjugate pairs of states, in `blocks` that start
    alike."""

    width: int
    pairs: int
    blocks: int
    out: str

    @property
    def rows(self) -> int:
        """Real numbers of state."""
        return 2 * self.pairs

    @property
    def out_width(self) -> int:
        return self.width * (1 + (self.out == "glu"))

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (2 * self.rows + self.out_width)
        params = products + self.out_width + 3 * self.pairs + self.width
        state = self.rows * state_dtype(dtype).itemsize
        return Cost(params, params, float(2 * products), state)

    def build(self) -> S5:
        return S5(self)


class S5(Operator):
    """See the module. States come in conjugate pairs, of which one each is computed.

    `B` makes the real parts of all states' inputs, then the imaginary ones; the columns of `C` lie
    likewise. Lambda, and the bases of B and C, start as those of the normal part of HiPPO-LegS.
    """

    def __init__(self, config: S5Config) -> None:
        super().__init__()
        c = self.config = config
        block = legs(c.pairs // c.blocks)
        self.A_log = nn.Parameter(torch.full((c.pairs,), math.log(0.5)))
        self.A_imag = nn.Parameter(block.frequencies.float().repeat(c.blocks))
        self.log_dt = nn.Parameter(torch.empty(c.pairs).uniform_(math.log(1e-3), math.log(1e-1)))
        self.B = nn.Linear(c.width, c.rows, bias=False)
        self.C = nn.Linear(c.rows, c.width, bias=False)
        self.skip = nn.Parameter(torch.randn(c.width))
        self.out_proj = nn.Linear(c.width, c.out_width)
        # B = V^* B' and C = C' V for real B' and C' of variance 1 / inputs, V of diagonal blocks.
        split = (c.blocks, c.rows // c.blocks)
        write = torch.randn(*split, c.width, dtype=torch.float64) * c.width**-0.5
        read = torch.randn(c.width, *split, dtype=torch.float64) * c.rows**-0.5
        turned = (block.vectors.mH @ write.to(block.vectors.dtype)).flatten(0, 1)
        columns = (read.to(block.vectors.dtype) @ block.vectors).flatten(1)
        with torch.no_grad():
            self.B.weight.copy_(torch.cat((turned.real, turned.imag), 0))
            self.C.weight.copy_(torch.cat((columns.real, columns.imag), 1))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the diagonal and the factors on B's rows, complex128 (N,)."""
        dt = self.log_dt.double().clamp_max(FASTEST).exp()
        a = torch.complex(-self.A_log.double().clamp_max(FASTEST).exp(), self.A_imag.double())
        return dt * a, torch.expm1(dt * a) / a

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        log_a, factor = self.discrete()
        added = at_least_float32(self.B(x))
        held = None if state is None else state.tensors["x"]
        with full_precision(x):
            h, last = complex_scan(log_a.real, log_a.imag, added, held, factor)
            real, imag = h.chunk(2, dim=-1)
            pairs = torch.cat((2 * real, -2 * imag), -1)
        read = self.C(pairs.to(x.dtype))
        wide = at_least_float32(read)
        y = F.gelu(torch.addcmul(wide, self.skip.to(wide.dtype), at_least_float32(x))).to(x.dtype)
        out = self.out_proj(y)
        if self.config.out == "gate":
            out = y * torch.sigmoid(out)
        elif self.config.out == "glu":
            out = F.glu(out, dim=-1)
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], {"x": last})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        shape = (batch, self.config.rows)
        return State(0, {"x": torch.zeros(shape, dtype=state_dtype(dtype), device=device)})


def configure(site: Site, genes: Mapping[str, Gene]) -> S5Config:
    rows, blocks = whole(genes, "state"), whole(genes, "blocks")
    if rows % (2 * blocks):
        raise GeneError(
            f"shared-state-space: state={rows} is no whole number of pairs in each of"
            f" blocks={blocks}"
        )
    return S5Config(width=site.width, pairs=rows // 2, blocks=blocks, out=choice(genes, "out"))


SHARED_STATE_SPACE = Primitive(
    name="shared-state-space",
    kind="mixer",
    summary="time-invariant complex diagonal state that all channels share (S5)",
    source="S5 (arXiv 2208.04933)",
    liv=Liv("none", "toeplitz", "none", "none", "dense"),
    axes=(
        Axis(
            "state",
            64,
            "real numbers of state of the whole layer, in pairs",
            low=2.0,
            high=4096.0,
            search=(32, 64, 128),
            grows="width",
        ),
        Axis(
            "blocks",
            1,
            "copies of a smaller HiPPO matrix that the states start as, a divisor of state / 2",
            low=1.0,
            high=64.0,
            search=(1, 4),
        ),
        Axis(
            "out",
            "gate",
            "after the GELU: gate, times the sigmoid of a projection of itself; glu, a projection"
            " twice as wide gated by its second half; linear, a projection",
            options=OUTPUTS,
            search=OUTPUTS,
        ),
    ),
    configure=configure,
    points=(
        Point(
            "s5",
            {"state": 64, "blocks": 1, "out": "gate"},
            "S5 (arXiv 2208.04933)",
            "Lambda's real parts are kept negative",
            view=View(
                "x = exp(dt L) x + (exp(dt L) - 1)/L B u; y = 2 Re(C x) + D u, L diagonal, complex",
                "the recent past of all channels mixed, as N/2 fading oscillations",
                "exponentially, at N/2 learned rates and frequencies",
                "-Re(conj(x) B u) - Re(L) |x|^2 / 2: descent with weight decay; Im(L) rotates",
            ),
        ),
    ),
)
