"""Recurrences through a nonlinearity: LSTM, GRU and sLSTM, token by token.

Their gates see the last output, so no token can be computed before the one ahead of it is done;
this loop is the definition and the only form. Inputs are what the layer's input adds to the gates,
(B, T, G, H, K) for G gates of H heads of K channels; `mix`, (H, K, G K), is what the last output of
a head adds to its own gates.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import without_autocast
from .definitions import accumulator

Cell = Literal["lstm", "gru", "slstm"]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "slstm": 4}
PARTS: dict[Cell, tuple[str, ...]] = {
    "lstm": ("h", "c"),
    "gru": ("h",),
    "slstm": ("h", "c", "n", "m"),
}
"""What a state holds, each part (H, B, K)."""


@without_autocast
def nonlinear(
    cell: Cell, inputs: Tensor, mix: Tensor, inner_bias: Tensor | None, state: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """The outputs, (B, T, H, K), and the state, the parts of `PARTS` in order, float32 at least.

    `inner_bias`, (H, K), is the GRU's beside its last output, inside the reset gate. `state`
    continues a sequence; None starts one.
    """
    dtype = accumulator(inputs, mix)
    batch, _, gates, heads, width = inputs.shape
    mix = mix.to(dtype)
    parts = state
    if parts is None:
        zero = inputs.new_zeros(heads, batch, width, dtype=dtype)
        parts = [zero] * len(PARTS[cell])
    first, outputs = state is None, []
    for at in inputs.to(dtype).permute(1, 3, 0, 2, 4).unbind(0):
        added = torch.bmm(parts[0], mix).view(heads, batch, gates, width)
        if cell == "lstm":
            parts = lstm(at + added, parts[1])
        elif cell == "gru":
            bias = mix.new_zeros(()) if inner_bias is None else inner_bias.to(dtype)[:, None]
            parts = gru(at, added, bias, parts[0])
        else:
            parts = slstm(at + added, parts, first)
        first = False
        outputs.append(parts[0])
    return torch.stack(outputs, 1).permute(2, 1, 0, 3).to(inputs.dtype), parts


def lstm(gates: Tensor, c: Tensor) -> list[Tensor]:
    """c = f c + i tanh(g), h = o tanh(c); gates i, f, g, o (Hochreiter and Schmidhuber 1997)."""
    i, f, g, o = gates.unbind(-2)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def gru(inputs: Tensor, added: Tensor, bias: Tensor, h: Tensor) -> list[Tensor]:
    """h = (1 - z) tanh(x_n + r (U_n h + b)) + z h; gates r, z, n (arXiv 1406.1078, 1412.3555).

    The reset gate stands after the matrix product, as in torch and cuDNN.
    """
    r, z = torch.sigmoid(inputs[..., :2, :] + added[..., :2, :]).unbind(-2)
    n = torch.tanh(inputs[..., 2, :] + r * (added[..., 2, :] + bias))
    return [(1 - z) * n + z * h]


def slstm(gates: Tensor, parts: list[Tensor], first: bool) -> list[Tensor]:
    """c = f c + i tanh(z), n = f n + i, h = o c / n, i = exp, f = sigmoid; gates i, f, z, o.

    c and n are kept over exp(m), m = max(log f + m, ig) (arXiv 2405.04517, section 2.2). The first
    token has m = ig, so that n is never below 1. No gradient goes through m: h does not depend on
    it.
    """
    ig, f, z, o = gates.unbind(-2)
    _, c, n, m = parts
    log_f = F.logsigmoid(f)
    after = ig.detach() if first else torch.maximum(log_f + m, ig).detach()
    keep = torch.zeros_like(ig) if first else torch.exp(log_f + m - after)
    write = torch.exp(ig - after)
    c = keep * c + write * torch.tanh(z)
    n = keep * n + write
    return [torch.sigmoid(o) * c / n, c, n, after]
