"""A mixture of experts on every token: token choice, top k, with shared experts and a balance.

The equations (Shazeer et al., arXiv 1701.06538; DeepSeekMoE, 2401.06066): s = score(W_r x);
K = the k experts with the largest s_e + b_e; g_e = scale * s_e over K, divided by their sum where
`renormalise` (and k > 1); y = sum_{e in K} g_e expert_e(x) + shared(x). An expert is an MLP as in
`mlp.py`. The bias b only selects (DeepSeek-V3, 2408.15664, 2412.19437): after each step b_e moves
by a fixed rate towards an even load, and no loss is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, GeneError, Liv, Operator, Point, Primitive, Site, State
from ..genes import choice, flag, number, whole
from .mlp import ACTIVATION, EXPANSION, GATED, MlpConfig, activate, inner_width, passed

BALANCE_RATE = 0.001
"""How far `balance` moves a bias per step, the value of DeepSeek-V3 (arXiv 2412.19437, 4.2)."""


@dataclass(frozen=True)
class MoeConfig:
    """Final numbers of a mixture of experts."""

    width: int
    experts: int
    top_k: int
    inner: int
    """Inner width of one expert."""
    shared: int
    score: str
    renormalise: bool
    scale: float
    balance: str
    activation: str
    gated: bool

    @property
    def entry(self) -> int:
        """The outputs of an expert's first product: gate and up, or up alone."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def always_on(self) -> MlpConfig | None:
        """The shared experts: side by side they are one MLP of their summed inner width."""
        if self.shared == 0:
            return None
        return MlpConfig(self.width, self.shared * self.inner, self.activation, self.gated, False)

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        router = self.width * self.experts
        expert = self.width * (self.entry + self.inner)
        always_on = self.always_on.cost(context, dtype).params if self.always_on else 0
        active = router + always_on + self.top_k * expert
        return Cost(router + always_on + self.experts * expert, active, 2.0 * active)

    def build(self) -> Moe:
        return Moe(self)


class Routing(NamedTuple):
    """Where the tokens go: per token and choice an expert (N, k) and its weight (N, k)."""

    experts: Tensor
    weights: Tensor


class Moe(Operator):
    """A mixture of experts over the width of every token by itself; it carries no state.

    A token's experts depend on that token alone (no capacity, ties go to the lowest index), so
    decoding does what training did, whatever else is in the batch.
    """

    steps: Tensor
    counts: Tensor
    load: Tensor

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(_uniform(config.experts, config.width))
        self.entry = nn.Parameter(_uniform(config.experts, config.entry, config.width))
        self.exit = nn.Parameter(_uniform(config.experts, config.width, config.inner))
        self.shared = config.always_on.build() if config.always_on else None
        # The bias as a count of steps of BALANCE_RATE: whole numbers survive `module.to(bf16)`.
        self.register_buffer("steps", torch.zeros(config.experts, dtype=torch.int64))
        # Tokens per expert: since the last `balance`, and in the step that it closed.
        self.register_buffer("counts", torch.zeros(config.experts, dtype=torch.int64))
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64))

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        rows = x.flatten(0, 1)
        routing = self.route(rows)
        y = self._experts(rows, routing).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y.to(x.dtype), passed(state, x)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        return State()

    def stream_weights(self) -> dict[str, int]:
        """The axis of each weight that lies along the residual stream (see `sphere.py`)."""
        return {"router": 1, "entry": 2, "exit": 1}

    def route(self, rows: Tensor) -> Routing:
        """The experts of every row of (N, D), in float32 at least.

        A router in half precision flips between experts whose scores are near.
        """
        config = self.config
        dtype = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(dtype), self.router.to(dtype))
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
        ranked = scores.detach()
        if config.balance == "bias":
            ranked = ranked + self.steps * BALANCE_RATE
        # topk breaks ties as its algorithm for that batch size happens to; a stable sort does not.
        experts = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
        experts = experts[:, : config.top_k]
        weights = scores.gather(1, experts)
        if config.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * config.scale)

    def _experts(self, rows: Tensor, routing: Routing) -> Tensor:
        """sum_k weights * expert(row) for rows (N, D)."""
        device = rows.device.type
        # Autocast does not know the grouped product.
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        )
        rows, entry, exit_ = rows.to(dtype), self.entry.to(dtype), self.exit.to(dtype)
        chosen = routing.experts.flatten()
        form = product_form(chosen.numel(), entry)
        if self.training:
            self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        top_k = self.config.top_k
        if form == "gathered":
            out = rows.repeat_interleave(top_k, 0).unsqueeze(-1)
            out = exit_[chosen] @ self._activate(entry[chosen] @ out, 1)
            out = out.squeeze(-1)
        else:
            sorted_experts, order = torch.sort(chosen, stable=True)
            ids = torch.arange(self.config.experts, device=rows.device)
            ends = torch.searchsorted(sorted_experts, ids, right=True).to(torch.int32)
            out = _product(rows[order // top_k], entry, ends, form)
            out = _product(self._activate(out, 1), exit_, ends, form)
            back = torch.empty_like(order)
            back[order] = torch.arange(order.numel(), device=rows.device)
            out = out[back]
        out = out.reshape(*routing.weights.shape, -1)
        return (out * routing.weights.unsqueeze(-1).to(out.dtype)).sum(1)

    def _activate(self, hidden: Tensor, dim: int) -> Tensor:
        if not self.config.gated:
            return activate(self.config.activation, hidden)
        gate, up = hidden.chunk(2, dim)
        return activate(self.config.activation, gate) * up

    def balance(self) -> None:
        """Close a training step: with `balance=bias` move each bias against its expert's load."""
        if self.config.balance == "bias":
            # Whole numbers: sign of the mean load minus the expert's.
            self.steps += (self.counts.sum() - self.config.experts * self.counts).sign()
        self.load.copy_(self.counts)
        self.counts.zero_()

    def statistics(self) -> dict[str, list[float] | int]:
        """`load`: the share of choices per expert in the last training step; `dropped` tokens."""
        counts = self.counts if bool(self.counts.any()) else self.load
        shares = counts.double() / counts.sum().clamp_min(1)
        return {"load": shares.tolist(), "dropped": 0}


ProductForm = Literal["gathered", "grouped", "segments"]


def product_form(choices: int, weight: Tensor) -> ProductForm:
    """How the experts' products are computed for so many (token, expert) pairs.

    `gathered`: every pair brings its expert's weights, for the few pairs of decoding. `grouped`:
    one grouped product over the pairs sorted by expert. `segments`: one product per expert, where
    torch's grouped product does not serve: float64, and rows that are no multiple of 16 bytes.
    weight is (E, F, D).
    """
    experts, _, width = weight.shape
    if choices <= experts:
        return "gathered"
    aligned = width * weight.element_size() % 16 == 0
    if aligned and weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return "grouped"
    return "segments"


def _product(rows: Tensor, weight: Tensor, ends: Tensor, form: ProductForm) -> Tensor:
    """Rows (M, D) sorted by expert times their expert's weight (E, F, D); `ends` (E,) of int32."""
    if form == "grouped":
        # Under torch.compile torch 2.13 knows the grouped product's shape in bf16 only.
        grouped = F.grouped_mm if weight.dtype == torch.bfloat16 else _grouped_uncompiled
        return grouped(rows, weight.mT, offs=ends)
    parts = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grouped_uncompiled(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=offs)


def _uniform(*shape: int) -> Tensor:
    """Weights (..., out, in) as nn.Linear draws them."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def configure(site: Site, genes: Mapping[str, Gene]) -> MoeConfig:
    experts, top_k = whole(genes, "experts"), whole(genes, "top_k")
    if top_k > experts:
        raise GeneError(f"top_k={top_k} is more than experts={experts}")
    return MoeConfig(
        width=site.width,
        experts=experts,
        top_k=top_k,
        inner=inner_width(site.width, number(genes, "expansion")),
        shared=whole(genes, "shared"),
        score=choice(genes, "score"),
        # With one expert the quotient is 1 whatever the router says: it would never learn.
        renormalise=flag(genes, "renormalise") and top_k > 1,
        scale=number(genes, "scale"),
        balance=choice(genes, "balance"),
        activation=choice(genes, "activation"),
        gated=flag(genes, "gated"),
    )


MOE = Primitive(
    name="moe",
    kind="channel",
    summary="a mixture of experts: every token picks its top k",
    source="Shazeer et al., arXiv 1701.06538; DeepSeekMoE, arXiv 2401.06066",
    liv=Liv("dense, routed", "diagonal", "none", "swish", "dense"),
    axes=(
        Axis("experts", 8, "routed experts", low=1.0, high=4096.0, search=(4, 8, 16)),
        Axis("top_k", 2, "experts per token", low=1.0, high=256.0, search=(1, 2, 4)),
        Axis(
            "expansion",
            1.0,
            "inner width of one expert as a multiple of the width, rounded to a multiple of 8",
            low=EXPANSION.low,
            high=EXPANSION.high,
            search=(0.5, 1.0, 2.0),
        ),
        Axis("shared", 0, "experts that are always on", low=0.0, high=64.0, search=(0, 1)),
        Axis(
            "score",
            "softmax",
            "from the router's logits to scores",
            options=("softmax", "sigmoid"),
            search=("softmax", "sigmoid"),
        ),
        Axis(
            "renormalise",
            True,
            "divide the chosen experts' scores by their sum, where top_k is more than 1",
            options=(False, True),
        ),
        Axis("scale", 1.0, "factor on the routed experts' output", low=0.0, high=100.0),
        Axis(
            "balance",
            "bias",
            "bias: a bias on the selection moves against the load after each step (arXiv "
            "2408.15664)",
            options=("none", "bias"),
        ),
        ACTIVATION,
        GATED,
    ),
    configure=configure,
    points=(
        Point(
            "mixtral",
            {"experts": 8, "top_k": 2, "expansion": 3.5, "balance": "none"},
            "Jiang et al., Mixtral of Experts, arXiv 2401.04088",
            "without the paper's balancing loss",
        ),
        Point(
            "deepseek-moe",
            {
                "experts": 64,
                "top_k": 6,
                "expansion": 0.6875,
                "shared": 2,
                "renormalise": False,
                "balance": "none",
            },
            "Dai et al., DeepSeekMoE 16B, arXiv 2401.06066",
            "without the paper's balancing losses",
        ),
    ),
)
