"""The published points of the delta rule (see delta.py)."""

from __future__ import annotations

from ..base import Gene, Point, View

COMMON: dict[str, Gene] = {
    "expand": 1.0,
    "conv": 4,
    "activation": "silu",
    "decay": "none",
    "steps": 1,
    "negative_eigenvalues": False,
    "gate": "none",
}

POINTS = (
    Point(
        "deltanet",
        COMMON,
        "DeltaNet (arXiv 2406.06484)",
        view=View(
            "S = (I - b k k^T) S + b k v^T",
            "the last value written under each key direction",
            "by writing over it: what a key held goes as the key comes again",
            "|S^T k - v|^2 / 2, one step of gradient descent at rate b",
        ),
    ),
    Point(
        "gated-deltanet",
        COMMON | {"expand": 2.0, "decay": "scalar", "gate": "silu"},
        "Gated DeltaNet (arXiv 2412.06464)",
        view=View(
            "S = (I - b k k^T) a S + b k v^T",
            "the last value written under each key direction, older ones fainter",
            "by writing over it, and exponentially, at a rate per head that the token chooses",
            "|S^T k - v|^2 / 2 at rate b, after a weight decay by a",
        ),
    ),
    Point(
        "kda",
        COMMON | {"decay": "vector", "gate": "sigmoid", "gate_map": "low-rank"},
        "Kimi Delta Attention (arXiv 2510.26692)",
        view=View(
            "S = (I - b k k^T) Diag(a) S + b k v^T",
            "the last value written under each key direction, key channels fading on their own",
            "by writing over it, and exponentially, at a rate per key channel",
            "|S^T k - v|^2 / 2 at rate b, after a weight decay by Diag(a)",
        ),
    ),
    Point(
        "deltaproduct",
        COMMON | {"steps": 2, "negative_eigenvalues": True},
        "DeltaProduct (arXiv 2502.10297)",
        "two steps per token",
        view=View(
            "S = (I - b_j k_j k_j^T) S + b_j k_j v_j^T for j = 1..n",
            "the last value written under each key direction; a token can rotate what is held",
            "by writing over it, n directions per token",
            "|S^T k_j - v_j|^2 / 2, n steps of gradient descent at rates b_j up to 2",
        ),
    ),
)
