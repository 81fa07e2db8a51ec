"""The router of a mixture: scores of experts, and who computes what.

Token choice (Shazeer et al., arXiv 1701.06538): s = score(W_r x); a token takes the k experts with
the largest s_e + b_e; their weights are scale * s_e, over their sum where `renormalise`. Variants:

- groups (DeepSeek-V2, 2405.04434; V3, 2412.19437): experts stand in groups, and a token chooses
  within the groups whose best expert (`max`) or two best together (`top2`) score highest.
- noise, in training only. noisy-top-k (1701.06538): W_r x + N(0, 1) softplus(W_n x). jitter
  (Switch, 2101.03961): the router's input times U(0.99, 1.01). random-second (GShard, 2006.16668):
  a choice after the first goes out with probability k g_e only, g being the weights before `scale`.
- capacity, in training only (GShard, Switch): of a sequence of T tokens an expert takes
  ceil(capacity * k * T / E), the first choices of all tokens before all second ones, each in the
  order of tokens. Whether a second choice is dropped so depends on later tokens, as in the papers.
- residual (MoE++, 2410.07348): W_g times the logits of the layer before is added to the logits. In
  the first such layer its own stand for them.

Expert choice (Zhou et al., 2202.09368): every expert takes the ceil(capacity * T / E) tokens of a
sequence that score highest for it; the whole sequence is read. Hash (Hash Layers, 2106.04426): the
experts are a fixed random function of the token's id, each with weight 1/k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from .drawn import normal, scrambled, uniform

BALANCE_RATE = 0.001
"""How far a step moves a bias, the value of DeepSeek-V3 (arXiv 2412.19437, 4.2)."""
FINE = 2.0**-40
"""The unit of biases that move in proportion."""
JITTER = 0.01
"""The width of the jitter, the value of Switch (arXiv 2101.03961)."""


@dataclass(frozen=True)
class RouterConfig:
    """Final numbers of a router."""

    width: int
    experts: int
    special: int
    """Experts behind the others that compute nothing, or next to nothing."""
    choice: str
    top_k: int
    score: str
    renormalise: bool
    scale: float
    bias: bool
    balance: str
    """How a bias on the selection moves against the load after each step, see `adjust`."""
    bias_rate: float
    computed: float
    """Experts of a token that compute, on average, where `proportional`."""
    noise: str
    groups: int
    top_groups: int
    group_score: str
    capacity: float
    """Of a training sequence; 0 for any number of tokens per expert."""
    special_load: float
    """MoE++'s tau: how much more a special expert should get than another, inverted."""
    residual: bool

    @property
    def outputs(self) -> int:
        return self.experts + self.special

    @property
    def unit(self) -> float:
        """Biases are counted in it: whole numbers survive `module.to(bf16)`."""
        return self.bias_rate if self.balance == "bias" else FINE

    @property
    def products(self) -> int:
        """Multiply-adds per token, outside training."""
        if self.choice == "hash":
            return 0
        return self.outputs * (self.width + (self.outputs if self.residual else 0))

    @property
    def active_params(self) -> int:
        """Parameters that work outside training: all but the noise's."""
        return self.products + (self.outputs if self.bias else 0)

    @property
    def params(self) -> int:
        noise = self.width * self.outputs if self.noise == "noisy-top-k" else 0
        return self.active_params + noise

    def room(self, tokens: int) -> tuple[int, int]:
        """The most tokens of a sequence for an expert, and for a special one, with `capacity`."""
        share = self.special_load * self.experts + self.special
        pairs = self.capacity * self.top_k * tokens / share
        return math.ceil(self.special_load * pairs), math.ceil(pairs)

    def taken(self, tokens: int) -> int:
        """Tokens of a sequence that an expert takes where experts choose."""
        return min(tokens, math.ceil(self.capacity * tokens / self.experts))


class Routing(NamedTuple):
    """Where the tokens go, (N, k) per token and choice, and what the losses read."""

    experts: Tensor
    """Numbers from `RouterConfig.experts` on are special experts."""
    weights: Tensor
    kept: Tensor | None = None
    """False where a pair is dropped; None where none is."""
    logits: Tensor | None = None
    """With noise, (N, L); None for hashes."""
    scores: Tensor | None = None
    """(N, L)."""
    clean: Tensor | None = None
    """The logits without noise, and the noise's standard deviation: (2, N, L), noisy-top-k only."""


class Router(nn.Module):
    """See the module. Scores are float32 at least: in half precision experts whose scores are near
    flip. Ties go to the lowest expert, whatever the batch."""

    steps: Tensor
    seed: Tensor
    step: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        outputs, width = config.outputs, config.width
        self.weight: nn.Parameter | None = None
        if config.choice != "hash":
            bound = width**-0.5
            self.weight = nn.Parameter(torch.empty(outputs, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs)) if config.bias else None
        self.spread: nn.Parameter | None = None
        if config.noise == "noisy-top-k":
            self.spread = nn.Parameter(torch.zeros(outputs, width))
        self.chain = nn.Parameter(torch.zeros(outputs, outputs)) if config.residual else None
        # The bias in `unit`s.
        self.register_buffer("steps", torch.zeros(outputs, dtype=torch.int64))
        if config.choice == "hash" or config.noise != "none":
            self.register_buffer("seed", torch.randint(2**62, ()))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def stream_weights(self) -> dict[str, int]:
        """The axis of each weight that lies along the residual stream (see `sphere.py`)."""
        return {} if self.weight is None else {"weight": 1}

    def logits(
        self, x: BTD, live: bool = False, earlier: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits (B, T, L), and `Routing.clean`; noise only where `live`."""
        config = self.config
        assert self.weight is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            read = x
            if live and config.noise == "jitter":
                drawn = uniform(tuple(x.shape), self.seed, self.step).to(dtype)
                read = x * (1 + JITTER * (2 * drawn - 1))
            bias = None if self.bias is None else self.bias.to(dtype)
            found = F.linear(read, self.weight.to(dtype), bias)
            if self.chain is not None:
                before = found if earlier is None else earlier.to(dtype)
                found = found + F.linear(before, self.chain.to(dtype))
            if self.spread is None or not live:
                return found, None
            deviation = F.softplus(F.linear(x, self.spread.to(dtype)))
        drawn = normal(tuple(found.shape), self.seed, self.step).to(dtype)
        clean = torch.stack((found, deviation)).flatten(1, 2)
        return found + drawn * deviation, clean

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.score == "sigmoid" else logits.softmax(-1)

    def route(self, x: BTD, live: bool = False, earlier: Tensor | None = None) -> Routing:
        """The experts of every token. `live`: with what belongs to training alone."""
        config = self.config
        logits, clean = self.logits(x, live, earlier)
        logits = logits.flatten(0, 1)
        scores = self.scores(logits)
        ranked = scores.detach()
        if config.balance != "none":
            ranked = ranked + self.steps * config.unit
        if config.top_groups < config.groups:
            ranked = self._within_groups(ranked)
        experts = _best(ranked, config.top_k)
        weights = scores.gather(1, experts)
        if config.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        kept = self._kept(experts, weights, x.shape[0], x.shape[1]) if live else None
        return Routing(experts, weights * config.scale, kept, logits, scores, clean)

    def hashed(self, ids: Tensor, dtype: torch.dtype) -> Routing:
        """The experts of token ids (B, T): of a random order of all, drawn per id, the first k.

        `dtype` is that of the weights.
        """
        config = self.config
        each = torch.arange(config.experts, device=ids.device)
        order = scrambled(scrambled(ids.flatten() + self.seed)[:, None] + each)
        experts = _best(order, config.top_k)
        weights = torch.full_like(experts, config.scale / config.top_k, dtype=dtype)
        return Routing(experts, weights)

    def chosen(self, x: BTD) -> tuple[Tensor, Tensor, Routing]:
        """Expert choice: tokens (B, E, C) of each sequence and their weights, best first.

        Beside them what the ledger reads, in which the choices of a token do not stand.
        """
        logits, _ = self.logits(x)
        scores = self.scores(logits)
        tokens = _best(scores.detach().mT, self.config.taken(x.shape[1]))
        weights = scores.mT.gather(-1, tokens) * self.config.scale
        flat = scores.flatten(0, 1)
        return tokens, weights, Routing(tokens, weights, None, logits.flatten(0, 1), flat)

    def _within_groups(self, ranked: Tensor) -> Tensor:
        config = self.config
        grouped = ranked.view(ranked.shape[0], config.groups, -1)
        best = grouped.topk(2 if config.group_score == "top2" else 1, -1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(-1, _best(best, config.top_groups), True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view(ranked.shape)

    def _kept(self, experts: Tensor, weights: Tensor, batch: int, tokens: int) -> Tensor | None:
        config = self.config
        kept: Tensor | None = None
        if config.noise == "random-second":
            drawn = uniform(tuple(weights.shape), self.seed, self.step)
            kept = config.top_k * weights.detach() > drawn
            kept[:, 0] = True
        if config.capacity:
            most = torch.tensor(config.room(tokens), device=experts.device)
            counts = torch.tensor((config.experts, config.special), device=experts.device)
            room = most.repeat_interleave(counts, output_size=config.outputs)
            kept = within(experts.view(batch, tokens, -1), room, kept).flatten(0, 1)
        return kept

    @torch.no_grad()
    def adjust(self, counts: Tensor) -> None:
        """Close a training step with these choices of each expert, and draw anew.

        bias (arXiv 2408.15664): b_e moves by `bias_rate` with the sign of the mean load minus e's.
        proportional (LongCat-Flash, 2509.01322): by `bias_rate` times the share of choices
        that it should have, K_e / (K N) for each of N experts, minus the one that it had. Special
        experts keep theirs: what the others leave is their share.
        """
        config, total = self.config, counts.sum()
        if config.balance == "bias":
            self.steps += (total - config.outputs * counts).sign()
        if config.balance == "proportional":
            wanted = config.computed / (config.top_k * config.experts)
            missing = wanted - counts.double() / total.clamp_min(1)
            missing[config.experts :] = 0.0
            moved = (config.bias_rate * missing / FINE).round().to(torch.int64)
            self.steps += moved * total.clamp_max(1)
        if self.config.noise != "none":
            self.step += 1


def within(experts: Tensor, room: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Which of the pairs (B, T, k) find room: all tokens' first choices first, in their order.

    `room` (L,) is that of each expert within a sequence; a pair that is not `wanted` takes none.
    """
    batch, tokens, top_k = experts.shape
    outputs = room.shape[0]
    flat = experts if wanted is None else experts.masked_fill(~wanted.view(experts.shape), outputs)
    ordered, order = torch.sort(flat.mT.flatten(1), dim=1, stable=True)
    ids = torch.arange(outputs + 1, device=experts.device).expand(batch, -1).contiguous()
    starts = torch.searchsorted(ordered, ids)
    place = torch.arange(tokens * top_k, device=experts.device) - starts.gather(1, ordered)
    found = place < F.pad(room, (0, 1))[ordered]
    kept = torch.zeros_like(found).scatter(1, order, found)
    return kept.view(batch, top_k, tokens).mT


def _best(ranked: Tensor, count: int) -> Tensor:
    """The indices of the largest along the last axis, best first.

    topk breaks ties as its algorithm for that batch size happens to; a stable sort does not.
    """
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]
