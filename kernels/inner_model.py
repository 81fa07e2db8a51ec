"""The small model that a sequence trains as it goes: its output and its gradient, by hand.

f is an MLP of matrices W_1..W_L (L = 1: linear), bare or around its input, and the loss of a token
is scale |f(k) - v|^2. TTT (arXiv 2407.04620) has f(x) = x + LN(MLP(x)), Titans (arXiv 2501.00663)
leaves the form of its MLP open. Tensors are (B, H, C, width) for C tokens, matrices (B, H, in,
out); a bias is the last row of its matrix, whose input is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Literal["plain", "residual", "residual-norm"]
Activation = Literal["gelu", "silu"]

NORM_EPS = 1e-5
"""Beside the variance in the norm, as LayerNorm's."""

Norm = tuple[Tensor, Tensor] | None
"""Scale and shift of the inner model's norm, (H, V) each."""


@dataclass(frozen=True)
class Inner:
    """What is fixed about an inner model.

    `form`: plain MLP(x); residual x + MLP(x); residual-norm x + LN(MLP(x)). `activation` stands
    between the matrices. `scale` is that of the loss: 1 for the sum of squares over the channels,
    1/V for their mean.
    """

    form: Form
    activation: Activation
    bias: bool
    scale: float = 1.0

    def widen(self, x: Tensor) -> Tensor:
        """x with the bias' one beside it, where there are biases."""
        return F.pad(x, (0, 1), value=1.0) if self.bias else x

    def act(self, z: Tensor) -> Tensor:
        return F.gelu(z) if self.activation == "gelu" else F.silu(z)

    def slope(self, z: Tensor) -> Tensor:
        """The derivative of `act`."""
        if self.activation == "gelu":
            below = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
            return below + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))

    def finish(self, x: Tensor, z: Tensor, norm: Norm) -> Tensor:
        """f from its input and the output of its last matrix; `norm`, scale and shift, (H, V)."""
        if self.form == "plain":
            return z
        if self.form == "residual":
            return x + z
        assert norm is not None
        z = F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)
        return x + torch.addcmul(norm[1].unsqueeze(1), z, norm[0].unsqueeze(1))

    def error(self, x: Tensor, z: Tensor, target: Tensor, norm: Norm) -> Tensor:
        """The gradient of the loss by z, the output of the last matrix."""
        if self.form != "residual-norm":
            return 2 * self.scale * (self.finish(x, z, norm) - target)
        assert norm is not None
        weight, bias = (t.unsqueeze(1) for t in norm)
        centred = z - z.mean(-1, keepdim=True)
        over = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
        unit = centred * over
        g = 2 * self.scale * weight * (x + torch.addcmul(bias, unit, weight) - target)
        g = g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)
        return g * over


@dataclass
class Learned:
    """What a sequence has learned: one (B, H, in, out) per matrix of the inner model, each.

    `start`: the weights at the start of the batch of tokens that is under way, where gradients are
    taken. `now`: the weights as they are. `momentum`: None where there is none.
    """

    start: list[Tensor]
    now: list[Tensor]
    momentum: list[Tensor] | None

    @classmethod
    def fresh(cls, weights: list[Tensor], momentum: bool) -> Learned:
        return cls(weights, weights, [torch.zeros_like(w) for w in weights] if momentum else None)

    def next_batch(self) -> Learned:
        """The same where a new batch of tokens begins."""
        return Learned(self.now, self.now, self.momentum)


def forward(inner: Inner, weights: list[Tensor], x: Tensor, norm: Norm) -> Tensor:
    """f(x)."""
    return _pass(inner, weights, x, norm)[0]


def gradient(
    inner: Inner,
    weights: list[Tensor],
    x: Tensor,
    target: Tensor,
    norm: Norm,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """f(x), and each token's gradient by every matrix as its two factors, u_l^T g_l.

    u_l, (B, H, C, in), is the matrix' input; g_l, (B, H, C, out), the gradient by its output.
    """
    out, inputs, outputs = _pass(inner, weights, x, norm)
    g = inner.error(x, outputs[-1], target, norm)
    grads = [g]
    for i in range(len(weights) - 1, 0, -1):
        back = weights[i][..., :-1, :] if inner.bias else weights[i]
        g = (g @ back.mT) * inner.slope(outputs[i - 1])
        grads.append(g)
    return out, inputs, grads[::-1]


def _pass(
    inner: Inner, weights: list[Tensor], x: Tensor, norm: Norm
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """f(x), and the inputs and outputs of the matrices."""
    inputs, outputs = [], []
    h = x
    for i, weight in enumerate(weights):
        inputs.append(inner.widen(inner.act(h) if i else h))
        h = inputs[-1] @ weight
        outputs.append(h)
    return inner.finish(x, h, norm), inputs, outputs
