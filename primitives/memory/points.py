"""The published memories that are layers of their own (see layer.py)."""

from __future__ import annotations

from ..base import Gene, Point, View

TTT: dict[str, Gene] = {
    "form": "residual-norm",
    "inner_activation": "gelu",
    "bias": True,
    "loss": "sum",
    "mini_batch": 16,
    "momentum": False,
    "forget": False,
    "conv": 4,
    "activation": "none",
    "qk_norm": "none",
    "v_norm": "none",
    "shared_qk": True,
    "norm": "layernorm",
    "gate": "gelu",
    "persistent": 0,
}
"""The block with the Mamba-like backbone. The authors' code also divides the rate by the head's
width and the token's place in its mini-batch, and turns q and k by their place in it (RoPE); the
paper has none of these, and neither has this."""

TITANS: dict[str, Gene] = {
    "depth": 2,
    "expand": 4.0,
    "form": "plain",
    "inner_activation": "silu",
    "bias": False,
    "loss": "sum",
    "rate": 0.0,
    "mini_batch": 16,
    "momentum": True,
    "forget": True,
    "conv": 4,
    "activation": "silu",
    "qk_norm": "l2",
    "v_norm": "l2",
    "shared_qk": False,
}
"""The paper leaves open: the memory's hidden width, activation and start, the size of the rates,
the number of heads and of persistent tokens. Values of length one are not in it: the gradient of a
plain MLP grows with the third power of what it is taught, and long values overflow it in a few
batches."""

POINTS = (
    Point(
        "ttt-linear",
        TTT | {"depth": 1, "rate": 1.0},
        "TTT (arXiv 2407.04620)",
        "f(x) = x + LN(x W + b), mini-batches of 16, in the block of the Mamba-like backbone",
        view=View(
            "W_t = W_(t-1) - theta_t grad l(W_b; k_t, v_t), W_b: W at the mini-batch's start",
            "a linear map per head from key to value views of the tokens",
            "by learning other values for the same keys; the norm slows large weights down",
            "|k + LN(k W + b) - v|^2, one step of gradient descent per token at rate theta_t",
        ),
    ),
    Point(
        "ttt-mlp",
        TTT | {"depth": 2, "expand": 4.0, "rate": 0.1},
        "TTT (arXiv 2407.04620)",
        "f(x) = x + LN(MLP(x)) with four times the head's channels inside",
        view=View(
            "W_t = W_(t-1) - theta_t grad l(W_b; k_t, v_t), W the two matrices of an MLP",
            "an MLP per head from key to value views of the tokens",
            "by learning other values for like keys; the norm slows large weights down",
            "|k + LN(MLP(k)) - v|^2, one step of gradient descent per token at rate theta_t",
        ),
    ),
    Point(
        "titans-lmm",
        TITANS | {"heads": 1, "norm": "rmsnorm", "gate": "silu", "persistent": 4},
        "Titans (arXiv 2501.00663)",
        "the memory without attention; `titans-lmm > swa` is the paper's memory as a layer",
        view=View(
            "S = eta_t S - theta_t grad l(M_b; k_t, v_t), M = (1-alpha_t) M + S",
            "an MLP from keys to values, and the momentum of its surprise",
            "by weight decay at a rate that the token chooses, and by learning other values",
            "|M(k) - v|^2, gradient descent with momentum and weight decay",
        ),
    ),
)
