"""The diagonal gated recurrence: RG-LRU (Griffin), minGRU, minLSTM and between.

h_t = a_t h_{t-1} + b_t element by element, with a_t in (0, 1) computed from the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.diagonal_scan import diagonal_scan
from ...kernels.letters import BTD, BTF
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
from ..genes import choice, number, whole
from ..recurrent_parts import (
    ShortConv,
    at_least_float32,
    auto_heads,
    full_precision,
    inner_width,
    short_conv_params,
    taps_axis,
)

SHARPNESS = 8.0
"""c of RG-LRU: a_t = sigmoid(Lambda)^(c r_t)."""
BLOCK_TARGET = 256
GATES_PER_CHANNEL = {"rg-lru": 2, "mingru": 1, "minlstm": 2}


@dataclass(frozen=True)
class GatedScanConfig:
    """Final numbers of one layer. `blocks` is 0 where the gates come from the layer's input."""

    width: int
    inner: int
    gates: str
    blocks: int
    conv: int
    branch: str

    @property
    def gate_width(self) -> int:
        return GATES_PER_CHANNEL[self.gates] * self.inner

    @property
    def splits(self) -> list[int]:
        """Widths of output branch, recurrent branch and gates in the input projection."""
        return [
            self.inner if self.branch != "none" else 0,
            self.inner,
            0 if self.blocks else self.gate_width,
        ]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        block_gates = self.inner // self.blocks * self.gate_width if self.blocks else 0
        weights = self.width * (sum(self.splits) + self.inner) + block_gates
        biases = sum(self.splits) + self.width + (self.gate_width if self.blocks else 0)
        params = (
            weights
            + biases
            + short_conv_params(self.inner, self.conv, bias=True)
            + (self.inner if self.gates == "rg-lru" else 0)
        )
        flops = 2 * (weights + self.inner * self.conv)
        tail = self.inner * max(self.conv - 1, 0) * dtype.itemsize
        return Cost(params, params, float(flops), tail + self.inner * state_dtype(dtype).itemsize)

    def build(self) -> GatedScan:
        return GatedScan(self)


class GatedScan(Operator):
    """Griffin's recurrent block: projections, short convolution, recurrence, gated output.

    `in_proj` makes the output branch, the recurrent branch and, where they come from the input, the
    gates, in this order.
    """

    def __init__(self, config: GatedScanConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits))
        nn.init.zeros_(self.in_proj.bias)
        self.conv = ShortConv(c.inner, c.conv, True, "none") if c.conv else None
        self.block_gates = (
            BlockDiagonal(c.blocks, c.inner // c.blocks, c.gate_width // c.blocks)
            if c.blocks
            else None
        )
        self.rg_lru = RgLru(c.inner) if c.gates == "rg-lru" else None
        self.out_proj = nn.Linear(c.inner, c.width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        start = 0 if state is None else state.length
        y, u, gates = self.in_proj(x).split(c.splits, dim=-1)
        tail = None
        if self.conv is not None:
            u, tail = self.conv(u, tensors.get("conv"))
        if self.block_gates is not None:
            gates = self.block_gates(u)

        u, gates = at_least_float32(u), at_least_float32(gates)
        if self.rg_lru is not None:
            log_a, b = self.rg_lru(u, gates, start)
        else:
            log_a, b = mingru(u, gates) if c.gates == "mingru" else minlstm(u, gates)
        with full_precision(x):
            h, last = diagonal_scan(log_a, b, tensors.get("h"))
        if c.branch == "gelu":
            h = h * F.gelu(at_least_float32(y), approximate="tanh")
        out = self.out_proj(h.to(x.dtype))
        if state is None:
            return out, None
        kept = {"h": last}
        if tail is not None:
            kept["conv"] = tail
        return out, State(start + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        tensors = {"h": torch.zeros(batch, c.inner, dtype=state_dtype(dtype), device=device)}
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.inner, c.conv - 1, dtype=dtype, device=device)
        return State(0, tensors)


class BlockDiagonal(nn.Module):
    """A linear map whose matrix has `blocks` blocks of (width, out) on its diagonal."""

    def __init__(self, blocks: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width, out).normal_(std=width**-0.5))
        self.bias = nn.Parameter(torch.zeros(blocks, out))

    def forward(self, u: BTF) -> Tensor:
        """(B, T, blocks * out); where out is several gates of a block, see `split_gates`."""
        blocks, width, _ = self.weight.shape
        batch, tokens, _ = u.shape
        rows = u.reshape(batch * tokens, blocks, width).transpose(0, 1)
        y = torch.baddbmm(self.bias[:, None], rows, self.weight)
        # Per block its gates lie side by side; the recurrence wants each gate whole.
        y = y.view(blocks, batch * tokens, -1, width).permute(1, 2, 0, 3)
        return y.reshape(batch, tokens, -1)


class RgLru(nn.Module):
    """RG-LRU's decay and input from its gates (arXiv 2402.19427, eq. 1-4).

    a_t = sigmoid(Lambda)^(c r_t) and b_t = sqrt(1 - a_t^2) (i_t u_t), with r and i the sigmoids of
    the gates. As in the released model the first token of a sequence is not scaled by the root: no
    state stands beside it. At the start a^c, the decay of an open gate, is uniform in 0.9..0.999.
    """

    def __init__(self, inner: int) -> None:
        super().__init__()
        a = torch.empty(inner).uniform_(0.9, 0.999)
        # softplus(w) = -log(a) / c; `decay` is the paper's -Lambda.
        self.decay = nn.Parameter(torch.log(torch.expm1(-a.log() / SHARPNESS)))

    def forward(self, u: BTF, gates: Tensor, start: int) -> tuple[BTF, BTF]:
        """log a and b, from the gates (i, r), each of width F."""
        i, r = torch.sigmoid(gates).chunk(2, dim=-1)
        log_a = -SHARPNESS * r * F.softplus(self.decay.to(u.dtype))
        # The root's slope is infinite where a = 1; 1e-12 bounds it and moves b by 1e-6 at most.
        root = torch.sqrt((-torch.expm1(2 * log_a)).clamp_min(1e-12))
        if start == 0:
            root = torch.cat((torch.ones_like(root[:, :1]), root[:, 1:]), 1)
        return log_a, root * i * u


def mingru(u: BTF, gates: BTF) -> tuple[BTF, BTF]:
    """log a and b of minGRU: h = (1 - z) h + z g(u) with z = sigmoid(gates) (arXiv 2410.01201).

    log(1 - z) is taken as log sigmoid(-gates), which stays finite.
    """
    return F.logsigmoid(-gates), torch.sigmoid(gates) * candidate(u)


def minlstm(u: BTF, gates: Tensor) -> tuple[BTF, BTF]:
    """log a and b of minLSTM: h = f' h + i' g(u), f' = f / (f + i) and i' = i / (f + i), with f and
    i the sigmoids of the gates (f, i), each of width F (arXiv 2410.01201, section 3.2).

    f' = sigmoid(d) and i' = sigmoid(-d) with d = log f - log i, which stays finite.
    """
    f, i = gates.chunk(2, dim=-1)
    d = F.logsigmoid(f) - F.logsigmoid(i)
    return F.logsigmoid(d), torch.sigmoid(-d) * candidate(u)


def candidate(u: BTF) -> BTF:
    """u + 1/2 for positive u and sigmoid(u) below, the form that the paper trains (appendix B)."""
    return torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def configure(site: Site, genes: Mapping[str, Gene]) -> GatedScanConfig:
    name = "gated-scan"
    inner = inner_width(name, site.width, number(genes, "expand"))
    blocks = 0
    if choice(genes, "gate_input") == "branch":
        blocks = whole(genes, "blocks") or auto_heads(inner, BLOCK_TARGET)
        if inner % blocks:
            raise GeneError(f"{name}: blocks={blocks} does not divide the inner width {inner}")
    return GatedScanConfig(
        width=site.width,
        inner=inner,
        gates=choice(genes, "gates"),
        blocks=blocks,
        conv=whole(genes, "conv"),
        branch=choice(genes, "branch"),
    )


GATED_SCAN = Primitive(
    name="gated-scan",
    kind="mixer",
    summary="diagonal gated recurrence in a gated block (RG-LRU, minGRU, minLSTM)",
    source="Griffin (arXiv 2402.19427), minGRU and minLSTM (arXiv 2410.01201)",
    liv=Liv("branch, gates and output gate", "diagonal", "none", "none", "diagonal"),
    axes=(
        Axis(
            "gates",
            "rg-lru",
            "rg-lru: decay and input gates, input scaled by sqrt(1 - a^2); mingru: one gate that"
            " mixes state and candidate; minlstm: two gates, normalised to sum to one",
            options=("rg-lru", "mingru", "minlstm"),
            search=("rg-lru", "mingru", "minlstm"),
        ),
        Axis(
            "gate_input",
            "branch",
            "branch: the gates are block-diagonal maps of the recurrent branch, after its"
            " convolution; input: dense maps of the layer's input",
            options=("branch", "input"),
            search=("branch", "input"),
        ),
        Axis(
            "blocks",
            0,
            "blocks of the gates' block-diagonal maps; 0 takes blocks of 256 channels, or four"
            " where the width has no room",
            low=0.0,
            search=(0, 1, 4, 8),
            grows="heads",
        ),
        Axis(
            "expand",
            1.0,
            "width of the recurrence over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 1.5, 2.0),
        ),
        taps_axis(4),
        Axis(
            "branch",
            "gelu",
            "activation of the branch that multiplies the output; none has no such branch",
            options=("none", "gelu"),
            search=("none", "gelu"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "rg-lru",
            {
                "gates": "rg-lru",
                "gate_input": "branch",
                "expand": 1.0,
                "conv": 4,
                "branch": "gelu",
            },
            "Griffin's recurrent block (arXiv 2402.19427)",
            "as wide as the released models; the paper's own is 4/3 of the width",
            view=View(
                "h = a h + sqrt(1 - a^2) (i u), a = sigmoid(L)^(8 r), per channel",
                "one moving average per channel, of constant variance",
                "exponentially, at a rate per channel that the token chooses",
                "-sqrt(1-a^2) i u h + (1-a) h^2 / 2: gradient descent with weight decay",
            ),
        ),
        Point(
            "mingru",
            {
                "gates": "mingru",
                "gate_input": "input",
                "expand": 2.0,
                "conv": 0,
                "branch": "none",
            },
            "minGRU (arXiv 2410.01201)",
            "with the projection back to the model's width that an expanded state needs",
            view=View(
                "h = (1-z) h + z g(u), per channel",
                "one weighted average per channel, its weights summing to one",
                "exponentially, at a rate per channel that the token chooses",
                "z (h - g(u))^2 / 2, one step of gradient descent",
            ),
        ),
        Point(
            "minlstm",
            {
                "gates": "minlstm",
                "gate_input": "input",
                "expand": 2.0,
                "conv": 0,
                "branch": "none",
            },
            "minLSTM (arXiv 2410.01201)",
            "with the projection back to the model's width that an expanded state needs",
            view=View(
                "h = f/(f+i) h + i/(f+i) g(u), per channel",
                "one weighted average per channel, its weights summing to one",
                "exponentially, at a rate per channel that the token chooses",
                "i/(f+i) (h - g(u))^2 / 2, one step of gradient descent",
            ),
        ),
    ),
)
