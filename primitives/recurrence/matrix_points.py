"""The published points of the matrix-state recurrence (see recurrence_axes.py)."""

from __future__ import annotations

from ..base import Gene, Point, View

PLAIN: dict[str, Gene] = {
    "key_dim": 0,
    "groups": 0,
    "expand": 1.0,
    "key_expand": 1.0,
    "decay": "none",
    "rotary": False,
    "shift": "none",
    "conv": 0,
    "activation": "none",
    "feature": "none",
    "normaliser": False,
    "bonus": False,
    "skip": False,
    "gate": "none",
    "norm": "none",
}
"""Linear attention without feature map: what each point below states its differences from."""

POINTS = (
    Point(
        "linear-attention",
        PLAIN | {"feature": "elu+1", "normaliser": True},
        "linear attention (arXiv 2006.16236)",
        view=View(
            "S = S + phi(k) v^T, z = z + phi(k); y = S^T phi(q) / z^T phi(q)",
            "the sum of all values under their keys, and the sum of the keys",
            "never",
            "-<S^T phi(k), v>, one step of gradient descent at rate 1",
        ),
    ),
    Point(
        "performer",
        PLAIN | {"feature": "favor", "normaliser": True},
        "Performer (arXiv 2009.14794)",
        "four random features per key channel, drawn once",
        view=View(
            "S = S + phi(k) v^T, z = z + phi(k), E[phi(q)^T phi(k)] = exp(q^T k / sqrt(K))",
            "an estimate of softmax attention's numerator and denominator",
            "never",
            "-<S^T phi(k), v>, one step of gradient descent at rate 1",
        ),
    ),
    Point(
        "based",
        PLAIN | {"key_dim": 16, "feature": "taylor", "normaliser": True},
        "Based (arXiv 2402.18668)",
        "the linear attention of Based; the paper alternates it with sliding-window attention",
        view=View(
            "S = S + phi(k) v^T, z = z + phi(k), phi(q)^T phi(k) = 1 + s + s^2/2,"
            " s = q^T k / sqrt(K)",
            "values under the 0th, 1st and 2nd powers of their keys",
            "never",
            "-<S^T phi(k), v>, one step of gradient descent at rate 1",
        ),
    ),
    Point(
        "hedgehog",
        PLAIN | {"feature": "hedgehog", "normaliser": True},
        "Hedgehog (arXiv 2402.04347)",
        view=View(
            "S = S + phi(k) v^T, z = z + phi(k), phi(x) = [softmax(Wx), softmax(-Wx)]",
            "the sum of all values under spiky features of their keys",
            "never",
            "-<S^T phi(k), v>, one step of gradient descent at rate 1",
        ),
    ),
    Point(
        "retnet",
        PLAIN
        | {"expand": 2.0, "decay": "fixed", "rotary": True, "gate": "silu", "norm": "groupnorm"},
        "RetNet (arXiv 2307.08621)",
        "multi-scale retention with decays 1 - 2^(-5-h); the paper's heads are width/256",
        view=View(
            "S = g S + k v^T, g = 1 - 2^(-5-h) of head h",
            "values under their keys, older ones fainter",
            "exponentially, at a fixed rate per head",
            "-<S^T k, v> + (1-g)/2 |S|^2: gradient descent with weight decay",
        ),
    ),
    Point(
        "lightning-attention",
        PLAIN | {"decay": "slopes", "activation": "silu", "gate": "sigmoid", "norm": "rmsnorm-all"},
        "Lightning Attention (arXiv 2401.04658), as in MiniMax-01 (arXiv 2501.08313)",
        "the slots of the backbone count as the paper's layers",
        view=View(
            "S = g S + k v^T, g = exp(-2^(-8(h+1)/H) (1 - l/(L-1)))",
            "values under their keys, older ones fainter",
            "exponentially, at a fixed rate per head, slower in later layers",
            "-<S^T k, v> + (1-g)/2 |S|^2: gradient descent with weight decay",
        ),
    ),
    Point(
        "mamba2",
        PLAIN
        | {
            "expand": 2.0,
            "key_dim": 128,
            "groups": 1,
            "decay": "scalar",
            "decay_form": "dt",
            "conv": 4,
            "activation": "silu",
            "skip": True,
            "gate": "silu",
            "norm": "gated-rmsnorm",
        },
        "Mamba-2 (arXiv 2405.21060)",
        "state width 128 and heads of 64 channels (fewer channels at widths below 128)",
        view=View(
            "S = exp(-dt A) S + dt B x^T; y = S^T C + D x",
            "values under their keys, each written and faded by its own step dt",
            "exponentially, at a rate per head that the token chooses",
            "-<S^T B, x> + A/2 |S|^2: gradient descent with weight decay, at rate dt",
        ),
    ),
    Point(
        "gla",
        PLAIN
        | {
            "key_expand": 0.5,
            "decay": "vector",
            "decay_form": "sigmoid",
            "decay_rank": 16,
            "gate": "silu",
            "norm": "rmsnorm",
        },
        "Gated Linear Attention (arXiv 2312.06635)",
        "the paper has four heads",
        view=View(
            "S = Diag(a) S + k v^T, a = sigmoid(x W1 W2 + b)^(1/16)",
            "values under their keys, each key channel with its own memory length",
            "exponentially, at a rate per key channel that the token chooses",
            "-<S^T k, v> + tr(S^T Diag(1-a) S)/2: gradient descent with weight decay",
        ),
    ),
    Point(
        "hgrn2",
        PLAIN
        | {
            "decay": "vector",
            "decay_form": "complement",
            "decay_rank": 0,
            "activation": "silu-q",
            "norm": "rmsnorm-all",
        },
        "HGRN2 (arXiv 2404.07904)",
        "each layer learns its own lower bound, starting at its share of the layers below",
        view=View(
            "S = Diag(f) S + (1-f) v^T, f = l + (1-l) sigmoid(x W)",
            "an average of the values per key channel, its weights summing to one",
            "exponentially, at a rate per key channel that the token chooses, slower than l",
            "tr((S - 1 v^T)^T Diag(1-f) (S - 1 v^T))/2: one step of gradient descent",
        ),
    ),
    Point(
        "rwkv5",
        PLAIN
        | {
            "decay": "learned",
            "shift": "static",
            "bonus": True,
            "gate": "silu",
            "norm": "groupnorm",
        },
        "RWKV-5, Eagle (arXiv 2404.05892)",
        view=View(
            "y = (S + Diag(u) k v^T)^T r, then S = Diag(w) S + k v^T",
            "values under their keys, each key channel with its own memory length",
            "exponentially, at a learned rate per key channel",
            "-<S^T k, v> + tr(S^T Diag(1-w) S)/2: gradient descent with weight decay",
        ),
    ),
    Point(
        "rwkv6",
        PLAIN
        | {
            "decay": "vector",
            "decay_form": "exp",
            "decay_rank": 64,
            "shift": "dynamic",
            "bonus": True,
            "gate": "silu",
            "norm": "groupnorm",
        },
        "RWKV-6, Finch (arXiv 2404.05892)",
        view=View(
            "y = (S + Diag(u) k v^T)^T r, then S = Diag(w) S + k v^T, w = exp(-exp(d(x)))",
            "values under their keys, each key channel with its own memory length",
            "exponentially, at a rate per key channel that the token chooses",
            "-<S^T k, v> + tr(S^T Diag(1-w) S)/2: gradient descent with weight decay",
        ),
    ),
)
