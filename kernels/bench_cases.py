"""What the bench runs: operators at a shape, with their inputs, and the check before any time.

The check compares with the definition, in float32 and from the same rounded inputs: outputs, final
state and, but for decoding, the gradient of every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import Backend, use_backend
from .complex_scan import complex_scan
from .delta_rule import delta_rule
from .diagonal_low_rank import diagonal_low_rank
from .diagonal_scan import diagonal_scan
from .linear_cross_entropy import linear_cross_entropy
from .matrix_state import matrix_state
from .moe_permute import dispatch, permute, unpermute
from .preread import matrix_state_preread
from .rms_norm import rms_norm
from .selective_scan import selective_scan
from .short_conv import short_conv

Inputs = dict[str, Tensor | None]
Call = Callable[..., tuple[Tensor, ...]]


def mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (linear_cross_entropy(hidden, weight, targets),)


def to_experts_and_back(x: Tensor, weights: Tensor, choices: Tensor) -> tuple[Tensor, ...]:
    """Each token to its experts' rows and the weighted sum of these; the experts do nothing."""
    where = dispatch(choices, EXPERTS)
    return (unpermute(permute(x, where), weights, where),)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Causal softmax attention as the formula says it: what the peers are checked against."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (torch.einsum("bhts,bshk->bthk", weights, v),)


FUNCTIONS: dict[str, Call] = {
    "matrix_state": matrix_state,
    "delta_rule": delta_rule,
    "diagonal_scan": diagonal_scan,
    "complex_scan": complex_scan,
    "selective_scan": selective_scan,
    "short_conv": short_conv,
    "rms_norm": rms_norm,
    "linear_cross_entropy": mean_loss,
    "moe_permute": to_experts_and_back,
    "attention": attention,
    "preread": matrix_state_preread,
    "diagonal-low-rank": diagonal_low_rank,
}
"""By operator, or by the form that has a function of its own."""
FORMS: tuple[tuple[str, str | None], ...] = (
    *(("matrix_state", form) for form in ("none", "fixed", "scalar", "vector", "preread")),
    *(("delta_rule", form) for form in (None, "vector", "diagonal-low-rank")),
    ("diagonal_scan", None),
    ("complex_scan", None),
    ("selective_scan", None),
    ("short_conv", None),
    ("rms_norm", None),
    ("linear_cross_entropy", None),
    ("moe_permute", None),
)
STATELESS = ("rms_norm", "linear_cross_entropy", "moe_permute", "attention")
TAPS = 4
EXPERTS = 64
CHUNK = 64

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the check, relative: float32 sums in another order (and as three TF32 products on a GPU);
half-precision operands, 2**-11 and 2**-9 each, in products of products."""
CHECKED_LENGTH = 193
CHECKED_SIZE = 1000


@dataclass(frozen=True)
class Case:
    """One operator at one shape: B sequences of T tokens, H heads of K keys and K values.

    Scans, convolutions, norms, losses and experts have D = H K channels. `size` is the alphabet of
    `linear_cross_entropy`, the state of `selective_scan`, the experts per token of `moe_permute`.
    T = 1 is decoding: the operator starts with a state.
    """

    op: str
    form: str | None
    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    size: int = 0

    @property
    def channels(self) -> int:
        return self.heads * self.width

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "dtype": str(self.dtype)[6:]}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Case:
        return cls(**{**facts, "dtype": getattr(torch, facts["dtype"])})

    def small(self) -> Case:
        """The case of the check: two heads of the same width, several chunks and an odd length."""
        tokens = 1 if self.tokens == 1 else CHECKED_LENGTH
        size = min(self.size, CHECKED_SIZE)
        return replace(self, batch=1, heads=2, tokens=tokens, size=size)

    def inputs(self, device: str) -> Inputs:
        draw = _Draw(self, device)
        B, T, D = self.batch, self.tokens, self.channels
        if self.op == "diagonal_scan":
            state = draw.normal(B, D).float() if T == 1 else None
            return {"log_a": draw.decay(B, T, D), "b": draw.normal(B, T, D), "state": state}
        if self.op == "complex_scan":
            state = draw.normal(B, 2 * D).float() if T == 1 else None
            angle = 0.1 * draw.normal(D).float()
            b = draw.normal(B, T, 2 * D)
            return {"log_a": draw.decay(B, T, D), "angle": angle, "b": b, "state": state}
        if self.op == "selective_scan":
            n = self.size
            rates = torch.arange(1, n + 1, device=device).expand(D, n)
            return {
                "x": draw.normal(B, T, D),
                "dt": draw.uniform(B, T, D) / 10 + 1e-3,
                "a": -rates.float().contiguous(),
                "b": draw.normal(B, T, n),
                "c": draw.normal(B, T, n),
                "state": draw.normal(B, D, n).float() if T == 1 else None,
            }
        if self.op == "short_conv":
            past = draw.normal(B, D, TAPS - 1) if T == 1 else None
            return {"x": draw.normal(B, T, D), "weight": draw.normal(D, TAPS), "state": past}
        if self.op == "rms_norm":
            x, residual = draw.normal(B, T, D), draw.normal(B, T, D)
            return {"x": x, "weight": draw.normal(D), "residual": residual}
        if self.op == "linear_cross_entropy":
            hidden, table = draw.normal(B, T, D), draw.normal(self.size, D) * D**-0.5
            return {"hidden": hidden, "weight": table, "targets": draw.whole(self.size, B, T)}
        if self.op == "moe_permute":
            weights = draw.uniform(B * T, self.size)
            choices = draw.uniform(B * T, EXPERTS).topk(self.size, dim=-1).indices
            return {"x": draw.normal(B * T, D), "weights": weights, "choices": choices}
        return self._head_inputs(draw)

    def _head_inputs(self, draw: _Draw) -> Inputs:
        B, T, H, K = self.batch, self.tokens, self.heads, self.width
        given: Inputs = {
            "q": draw.normal(B, T, H, K),
            "k": draw.unit(B, T, H, K).to(self.dtype),
            "v": draw.normal(B, T, H, K),
        }
        if self.op == "attention":
            return {**given, "k": draw.normal(B, T, H, K)}
        shapes = {"fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
        form = {"preread": "vector", "diagonal-low-rank": "vector", None: "scalar"}.get(
            self.form, self.form
        )
        given["log_decay"] = draw.decay(*shapes[form]) if form in shapes else None
        given["state"] = draw.normal(B, H, K, K).float() if T == 1 else None
        if self.form == "preread":
            given["bonus"] = draw.normal(H, K)
        if self.form == "diagonal-low-rank":
            unit = draw.unit(B, T, H, K)
            given["a"] = -unit.to(self.dtype)
            given["b"] = (unit * draw.uniform(B, T, H, 1)).to(self.dtype)
        elif self.op == "delta_rule":
            given["beta"] = draw.uniform(B, T, H)
        return given


class _Draw:
    """Random tensors of a case, drawn on its device: the large ones take seconds on a CPU."""

    def __init__(self, case: Case, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, case.dtype

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape).float(), dim=-1)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def decay(self, *shape: int) -> Tensor:
        return -self.uniform(*shape) / 8

    def whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self.generator, device=self.device)


def function_of(case: Case) -> Call:
    return FUNCTIONS[case.form if case.form in FUNCTIONS else case.op]


def pinned(function: Call, backend: Backend) -> Call:
    def call(**given: Any) -> tuple[Tensor, ...]:
        with use_backend(backend):
            return function(**given)

    return call


def differentiable(inputs: Inputs) -> Inputs:
    """Leaves of their own that want gradients, but for whole numbers."""
    return {
        name: t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
        for name, t in inputs.items()
    }


def results(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs by name: the second is a final state."""
    names = ("out", "final", *(f"out{i}" for i in range(2, len(outputs))))
    return {name: out.detach() for name, out in zip(names, outputs, strict=False)}


def forward_and_backward(call: Call, inputs: Inputs, douts: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradient of every input for the outputs' gradients `douts`."""
    leaves = differentiable(inputs)
    outputs = call(**leaves)
    torch.autograd.backward(outputs, [d.to(o.dtype) for d, o in zip(douts, outputs, strict=True)])
    found = results(outputs)
    for name, t in leaves.items():
        if t is not None and t.grad is not None:
            found["d" + name] = t.grad
    return found


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs: random for the first, ones for a state."""
    first = outputs[0].float()
    generator = torch.Generator(first.device).manual_seed(1)
    random = torch.randn(first.shape, generator=generator, device=first.device)
    return [random, *(torch.ones_like(t, dtype=torch.float32) for t in outputs[1:])]


def check(case: Case, backend: Backend | Call, device: str) -> dict[str, float]:
    """Relative errors of a backend, or of another call, against the definition.

    Decoding asks for no gradients, as where it is timed: with them other kernels would be checked.
    """
    small = case.small()
    inputs = small.inputs(device)
    exact = {
        name: t.float() if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    definition = pinned(function_of(case), "definition")
    call = pinned(function_of(case), backend) if isinstance(backend, str) else backend
    with torch.no_grad():
        outputs = definition(**exact)
        if small.tokens == 1:
            return compared(results(call(**inputs)), results(outputs))
        douts = upstream(outputs)
    right = forward_and_backward(definition, exact, douts)
    have = forward_and_backward(call, inputs, douts)
    return compared(have, right)


def compared(have: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of what both have; another library may have no final state."""
    return {part: relative_error(have[part], want[part]) for part in want if part in have}


def relative_error(have: Tensor, want: Tensor) -> float:
    norm = want.float().norm()
    return float((have.float() - want.float()).norm() / norm)
