"""Zamba's block: attention and an MLP in a row, made to be shared over the depth.

y = W_out mlp(norm(attention(norm([x; e])))), with x the stream and e what the embedding made of the
same token (Zamba, Glorioso et al., arXiv 2405.16712, section 2). Nothing is added in between; in
Zamba y goes into the input of a Mamba and not into the stream (`join=chain`). One set of weights
stands in several slots (`weights=@a`), of which every place has its own W_out. In Zamba2 (arXiv
2411.15242, section 2) it also has adapters of low rank of its own (LoRA, 2106.09685), which add
W_up W_down u to the first products of the MLP, of input u, and in the smallest model to queries,
keys and values.

Zamba's scores are divided by sqrt(K / 2) for heads of K channels, here by sqrt(K): its query
weights, adapters included, are ours after a division by sqrt(2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import EMBEDDING, Carry, Cost, Operator, State
from ..channel.mlp import Mlp, MlpConfig
from ..norm import make_norm, norm_params
from .layer import Attention, AttentionConfig

ADAPTERS = ("none", "mlp", "all")


@dataclass(frozen=True)
class SharedBlockConfig:
    """Final numbers of one block."""

    width: int
    attention: AttentionConfig
    """Of what it reads: its width is 2 D where that is stream and embedding."""
    mlp: MlpConfig
    adapters: str
    """none, mlp, or all: on the MLP's first product, or on attention's too."""
    rank: int
    """Of the adapters; 0 where there are none."""

    @property
    def reads_stream(self) -> bool:
        return True

    @property
    def carries(self) -> str | None:
        return EMBEDDING if self.attention.width > self.width else None

    @property
    def adapted(self) -> list[tuple[int, list[int]]]:
        """The adapters that a place has: input channels, and the channels of each output."""
        found = []
        if self.adapters == "all":
            kv = self.attention.kv_heads * self.attention.head_dim
            found.append((self.attention.width, [self.attention.query_width, kv, kv]))
        if self.adapters != "none":
            found.append((self.width, [self.mlp.entry]))
        return found

    @property
    def own_params(self) -> int:
        adapters = sum(self.rank * (len(outs) * d + sum(outs)) for d, outs in self.adapted)
        return self.width * self.width + adapters

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        attention = self.attention.cost(context, dtype)
        # Its last product is as wide as the stream, not as what it reads.
        spared = self.attention.query_width * (self.attention.width - self.width)
        norms = norm_params("rmsnorm", self.attention.width) + norm_params("rmsnorm", self.width)
        params = self.own_params + norms - spared
        flops = 2.0 * (self.own_params - spared)
        return attention + self.mlp.cost(context, dtype) + Cost(params, params, flops)

    def build(self, places: int = 1) -> SharedBlock:
        return SharedBlock(self, places)


class Adapter(nn.Module):
    """Maps of low rank from one input, W_up W_down u for each output, side by side."""

    def __init__(self, width: int, outs: Sequence[int], rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank * len(outs), bias=False)
        self.up = nn.ModuleList(nn.Linear(rank, out, bias=False) for out in outs)

    def forward(self, u: Tensor) -> Tensor:
        inner = self.down(u).chunk(len(self.up), dim=-1)
        return torch.cat([up(part) for up, part in zip(self.up, inner, strict=True)], -1)


class Place(nn.Module):
    """What a block has of its own in one slot."""

    def __init__(self, config: SharedBlockConfig) -> None:
        super().__init__()
        made = [Adapter(d, outs, config.rank) for d, outs in config.adapted]
        self.attention = made[0] if config.adapters == "all" else None
        self.mlp = made[-1] if made else None
        self.exit = nn.Linear(config.width, config.width, bias=False)


class SharedBlock(Operator):
    """See the module. Its state is attention's; every place has one.

    Without what the model hands on, the stream stands for the embedding, as it does in the first
    slot.
    """

    def __init__(self, config: SharedBlockConfig, places: int = 1) -> None:
        super().__init__()
        self.config = config
        attention = self.attention = Attention(config.attention)
        attention.exit = nn.Linear(config.attention.query_width, config.width, bias=False)
        self.mlp = Mlp(config.mlp)
        self.norm = make_norm("rmsnorm", config.attention.width)
        self.inner_norm = make_norm("rmsnorm", config.width)
        self.places = nn.ModuleList(Place(config) for _ in range(places))

    def forward(
        self, x: BTD, state: State | None = None, carry: Carry | None = None, place: int = 0
    ) -> tuple[BTD, State | None]:
        own = self.places[place]
        assert isinstance(own, Place)
        u = x
        if self.config.carries is not None:
            held = None if carry is None else carry.earlier
            u = torch.cat((x, x if held is None else held[0]), -1)
        u = self.norm(u)
        added = None if own.attention is None else own.attention(u)
        heads, state, _ = self.attention.forward_heads(u, state, None, added)
        y = self.inner_norm(self.attention.exit(heads))
        y, _ = self.mlp(y, None, None if own.mlp is None else own.mlp(y))
        return own.exit(y), state

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        return self.attention.init_state(batch, context, dtype, device)
