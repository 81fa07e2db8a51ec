"""Titans' memory beside attention: as a gate (MAG) and as a context (MAC); arXiv 2501.00663.

MAG (section 4.2): attention in a sliding window over [p || x] and the memory over [p || x], two
branches; o = y * M(x). MAC (section 4.1), segment by segment: h = M_start(q(x)) is read with the
memory as it was before the segment; y = Attn([p || h || x]); the memory learns y; o = y * M(y).

What the paper leaves open, and what is done here. In MAC it lets the whole segment see all of h and
read the memory after the whole segment, which is not causal: here a token sees the h of tokens up
to itself, and reads the memory that has learned up to itself. A segment is also the batch whose
gradients are taken at one state. The queries for h pass no convolution; k, q and v of y do. The
gating y * M is norm(y) sigmoid(norm(M)), two norms with learned weights, as the paper describes
it, the nonlinearity being chosen. Persistent tokens have no position; h_t has that of x_t. In MAG
they are taught to the memory as a batch of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.inner_model import Learned
from ...kernels.letters import BTD
from ..base import Cost, Operator, State
from ..norm import make_norm, norm_params
from ..position import Rotary
from .core import Memory, MemoryConfig, pack, unpack
from .window import attend, attend_window, extend


@dataclass(frozen=True)
class BesideConfig:
    """Final numbers of a layer. `rope_theta` is 0 without RoPE; `window` is the gate's."""

    memory: MemoryConfig
    arrangement: str
    heads: int
    window: int
    persistent: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.memory.width // self.heads

    def kept(self, context: int) -> int:
        """Tokens whose keys and values a cache holds."""
        m = self.memory
        return min(context, self.window if self.arrangement == "gate" else m.batch_tokens)

    def seen(self, context: int) -> float:
        """Keys that a token sees besides the persistent ones, on average over a sequence."""
        near = self.kept(context)
        rising = near * (near + 1) / 2
        if self.arrangement == "gate":
            return (rising + (context - near) * near) / context
        whole, rest = divmod(context, near)
        return 2 * (whole * rising + rest * (rest + 1) / 2) / context

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        m, width = self.memory, self.memory.width
        products = 4 * width * width
        params = products + m.params + self.persistent * width + 2 * norm_params("rmsnorm", width)
        flops = 2.0 * products + m.project_flops() + m.gradient_flops() + m.read_flops()
        flops += 4 * width * (self.persistent + self.seen(context))
        before = 4 * self.persistent * width * width
        each = 2 * width * dtype.itemsize
        kept = self.kept(context)
        if self.arrangement == "gate":
            before += m.absorb_flops(self.persistent)
        else:
            # The queries for h, h, and its keys and values.
            flops += 2 * width * width + m.read_flops() + 4 * width * width
            kept *= 2
        state = m.state_bytes(dtype) + each * (kept + self.persistent)
        return Cost(params, params, flops + before / context, state)

    def build(self) -> MemoryGate | MemoryContext:
        return MemoryGate(self) if self.arrangement == "gate" else MemoryContext(self)


class _Beside(Operator):
    """What both have: persistent tokens, attention's projections, the memory, the join."""

    def __init__(self, config: BesideConfig) -> None:
        super().__init__()
        c, width = config, config.memory.width
        self.config = config
        self.memory = Memory(c.memory)
        self.persistent = nn.Parameter(torch.randn(c.persistent, width)) if c.persistent else None
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.attention_norm = make_norm("rmsnorm", width)
        self.memory_norm = make_norm("rmsnorm", width)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.rotary = Rotary(c.head_dim, c.rope_theta) if c.rope_theta else None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, H, K)."""
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_dim)

    def _queries(self, x: BTD, at: int) -> tuple[Tensor, Tensor]:
        """Turned and plain, (B, H, T, K); `at` is the position of the first."""
        plain = self._heads(self.q_proj(x))
        turned = plain if self.rotary is None else self.rotary(plain, at)
        return turned.transpose(1, 2), plain.transpose(1, 2)

    def _keys_values(self, x: BTD, at: int) -> tuple[Tensor, Tensor]:
        k, v = (self._heads(t) for t in self.kv_proj(x).chunk(2, -1))
        if self.rotary is not None:
            k = self.rotary(k, at)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _prefix(self, x: BTD) -> Tensor:
        """The persistent tokens' keys and values, (2, H, P, K)."""
        if self.persistent is None:
            return x.new_zeros(2, self.config.heads, 0, self.config.head_dim)
        # A copy: torch's FLOP counter fails on a view of a parameter without gradients.
        p = torch.stack((self.persistent.to(x.dtype),))
        k, v = (self._heads(t) for t in self.kv_proj(p).chunk(2, -1))
        return torch.cat((k, v)).transpose(1, 2)

    def _start(self, x: BTD) -> tuple[Learned, Tensor | None]:
        """The memory before the tokens of a sequence."""
        return self.memory.start(x.shape[0], x.dtype, x.device)

    def _join(self, y: BTD, read: Tensor) -> BTD:
        # The weights' dtype, which under autocast is not y's.
        dtype = self.out_proj.weight.dtype
        m = self.memory_norm(read.flatten(2).to(dtype))
        out: Tensor = self.out_proj(self.attention_norm(y.to(dtype)) * torch.sigmoid(m))
        return out

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """Empty caches, and the weights that a sequence starts with.

        The first call fills in what the persistent tokens say.
        """
        c = self.config
        tensors = pack(*self.memory.start(batch, dtype, device))
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        size = c.kept(context) * (1 if c.arrangement == "gate" else 2)
        shapes = {"keys": (c.heads, size, c.head_dim), "values": (c.heads, size, c.head_dim)}
        if c.persistent:
            shapes["prefix"] = (2 * c.heads, c.persistent, c.head_dim)
        for name, shape in shapes.items():
            tensors[name] = torch.zeros(batch, *shape, dtype=dtype, device=device)
        return State(0, tensors)

    def _begin(
        self, x: BTD, state: State | None
    ) -> tuple[Learned, Tensor | None, Tensor, dict[str, Tensor]]:
        """The memory, its convolution's tail, the prefix and the tensors that a state keeps."""
        c = self.config
        kept: dict[str, Tensor] = {}
        if state is not None:
            kept = {name: state.tensors[name] for name in ("keys", "values")}
        if state is None or not state.length:
            prefix = self._prefix(x)
            if state is not None and c.persistent:
                each = prefix.flatten(0, 1).expand(x.shape[0], -1, -1, -1)
                kept["prefix"] = each.to(state.tensors["prefix"].dtype).contiguous()
            return *self._start(x), prefix, kept
        if c.persistent:
            kept["prefix"] = state.tensors["prefix"]
            # All sequences have the same.
            prefix = kept["prefix"][0].reshape(2, c.heads, c.persistent, c.head_dim)
        else:
            prefix = self._prefix(x)
        return *unpack(state.tensors, c.memory.depth), prefix, kept


class MemoryGate(_Beside):
    """MAG; see the module."""

    def _start(self, x: BTD) -> tuple[Learned, Tensor | None]:
        if self.persistent is None:
            return super()._start(x)
        return self.memory.absorb(self.persistent.to(x.dtype), x.shape[0])

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        length = 0 if state is None else state.length
        learned, tail, prefix, kept = self._begin(x, state)
        q, plain = self._queries(x, length)
        keys, values = self._keys_values(x, length)
        if state is not None:
            ring = kept["keys"], kept["values"]
            keys, values = extend(*ring, (keys, values), length, c.window)
        y = attend_window(q, plain, keys, values, prefix, c.window).transpose(1, 2).flatten(2)
        seen, tail = self.memory.views(x, tail)
        read, learned = self.memory.learn(seen, learned, length % c.memory.batch_tokens)
        out = self._join(y, read)
        if state is None:
            return out, None
        return out, State(length + x.shape[1], pack(learned, tail) | kept)


class MemoryContext(_Beside):
    """MAC; see the module. Its cache holds the segment under way: keys and values of h_1, x_1, h_2,
    x_2 and so on."""

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        segment = self.config.memory.batch_tokens
        length = 0 if state is None else state.length
        learned, tail, prefix, kept = self._begin(x, state)
        phase = length % segment
        outputs, at = [], 0
        while at < x.shape[1]:
            piece = x[:, at : at + segment - phase]
            size = piece.shape[1]
            y, pair = self._attend(piece, learned, prefix, kept, phase)
            for name, new in zip(("keys", "values"), pair, strict=True):
                if name in kept:
                    kept[name][:, :, 2 * phase : 2 * (phase + size)] = new
            seen, tail = self.memory.views(y, tail)
            read, learned = self.memory.learn(seen, learned, phase)
            outputs.append(self._join(y, read))
            at, phase = at + size, (phase + size) % segment
        out = torch.cat(outputs, 1)
        if state is None:
            return out, None
        return out, State(length + x.shape[1], pack(learned, tail) | kept)

    def _attend(
        self, x: BTD, learned: Learned, prefix: Tensor, kept: dict[str, Tensor], phase: int
    ) -> tuple[BTD, tuple[Tensor, Tensor]]:
        """y of tokens of one segment, and the keys and values of their h and x."""
        h = self.memory.recall(self.memory.queries(x), learned.start)
        h = h.flatten(2).to(x.dtype)
        both = zip(self._keys_values(h, phase), self._keys_values(x, phase), strict=True)
        new = [torch.stack(pair, 3).flatten(2, 3) for pair in both]
        pair = new[0], new[1]
        keys, values = pair
        if phase:
            keys, values = (
                torch.cat((kept[name][:, :, : 2 * phase].to(t.dtype), t), 2)
                for name, t in (("keys", keys), ("values", values))
            )
        q, plain = self._queries(x, phase)
        at = torch.arange(keys.shape[2], device=x.device) // 2
        hidden = at[2 * phase :: 2, None] < at if x.shape[1] > 1 else None
        o = attend(q, plain, keys, values, prefix, hidden)
        return o.transpose(1, 2).flatten(2), pair
