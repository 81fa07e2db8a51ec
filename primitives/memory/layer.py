"""A memory as a layer: TTT's layers and Titans' long-term memory module.

y_t = W_o (norm(f(q_t; W_t)) * gate(x_t)), the weights W_t learned from the tokens up to t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTD
from ..base import Cost, Operator, State
from ..norm import make_norm, norm_params
from .core import Memory, MemoryConfig, pack, unpack

GATES = ("none", "silu", "sigmoid", "gelu")


@dataclass(frozen=True)
class MemoryLayerConfig:
    """Final numbers of one layer. `persistent`: learned tokens before every sequence."""

    memory: MemoryConfig
    norm: str
    gate: str
    persistent: int

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        m = self.memory
        products = m.width * m.channels * (1 + (self.gate != "none"))
        params = products + m.params + self.persistent * m.width
        if self.norm != "none":
            params += norm_params(self.norm, m.channels)
        flops = 2 * products + m.project_flops() + m.gradient_flops() + m.read_flops()
        before = m.absorb_flops(self.persistent) / context
        return Cost(params, params, flops + before, m.state_bytes(dtype))

    def build(self) -> MemoryLayer:
        return MemoryLayer(self)


class MemoryLayer(Operator):
    """See the module. The persistent tokens are learned by the memory as one batch of their own,
    ahead of the sequence (Titans: x' = [p_1 .. p_P || x], section 4.3)."""

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        c, m = config, config.memory
        self.config = config
        self.memory = Memory(m)
        self.persistent = nn.Parameter(torch.randn(c.persistent, m.width)) if c.persistent else None
        self.norm = make_norm(c.norm, m.channels) if c.norm != "none" else None
        self.gate_proj = nn.Linear(m.width, m.channels, bias=False) if c.gate != "none" else None
        self.out_proj = nn.Linear(m.channels, m.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        m = self.config.memory
        length = 0 if state is None else state.length
        if state is not None and length:
            learned, tail = unpack(state.tensors, m.depth)
        elif self.persistent is None:
            learned, tail = self.memory.start(x.shape[0], x.dtype, x.device)
        else:
            learned, tail = self.memory.absorb(self.persistent.to(x.dtype), x.shape[0])
        seen, tail = self.memory.views(x, tail)
        o, learned = self.memory.learn(seen, learned, length % m.batch_tokens)
        # The weights' dtype, which under autocast is not x's.
        y = o.flatten(2).to(self.out_proj.weight.dtype)
        if self.norm is not None:
            y = self.norm(y)
        if self.gate_proj is not None:
            y = y * gated(self.config.gate, self.gate_proj(x))
        y = self.out_proj(y)
        return y, None if state is None else State(length + x.shape[1], pack(learned, tail))

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """The weights that a sequence starts with; its first call teaches the persistent tokens."""
        tensors = pack(*self.memory.start(batch, dtype, device))
        # Each sequence gets room of its own.
        return State(0, {name: t.contiguous() for name, t in tensors.items()})


def gated(kind: str, z: Tensor) -> Tensor:
    """The gate's values; `kind` is one of `GATES` but none."""
    if kind == "sigmoid":
        return torch.sigmoid(z)
    return F.silu(z) if kind == "silu" else F.gelu(z)
