"""From scores to the heads' output: the forms of attention's normalisation, and heads by router.

Of a plain softmax nothing here has a parameter or costs anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Carry
from ..norm import make_norm, norm_params
from .moh import HeadRouter, router_rows
from .weigh import Score, Tape

LAMBDA_STD = 0.1
"""Of differential attention's vectors (arXiv 2410.05258, appendix)."""


@dataclass(frozen=True)
class ScoreForm:
    """Final numbers of what stands between the scores and the output projection."""

    kind: str = "softmax"
    """softmax, sigmoid or differential."""
    cap: float = 0.0
    sinks: bool = False
    talking: bool = False
    residual: bool = False
    lambda_init: float = 0.0
    """Of differential attention: its lambda before training, which its norm makes up for."""
    active: int = 0
    """Routed heads per token; 0 where no head is routed."""
    shared: int = 0
    """The first heads, which are always on beside routed ones."""

    def params(self, heads: int, head_dim: int, width: int) -> int:
        total = sum(router_rows(heads, self.active, self.shared)) * width
        total += heads if self.sinks else 0
        total += 2 * heads * heads if self.talking else 0
        if self.kind == "differential":
            total += 4 * head_dim + norm_params("rmsnorm", 2 * head_dim)
        return total

    def flops(self, heads: int, width: int, seen: float) -> float:
        """Per decoded token that sees so many keys, beside the two products of all attention."""
        mixing = 4.0 * heads * heads * seen if self.talking else 0.0
        return mixing + 2.0 * sum(router_rows(heads, self.active, self.shared)) * width


def lambda_init(depth: int) -> float:
    """0.8 - 0.6 exp(-0.3 depth), `depth` counting layers from 0 (arXiv 2410.05258, 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


class Scoring(nn.Module):
    """The parameters of a form, what it makes of scores, and of the heads' outputs.

    Differential attention (Ye et al., arXiv 2410.05258, equations 1 to 3): heads i and i + H/2 are
    the two maps of one pair, which reads the values of both side by side; lambda = exp(q1 . k1) -
    exp(q2 . k2) + lambda_init; RMSNorm per pair, times 1 - lambda_init.

    Talking heads (Shazeer et al., 2003.02436): the heads' scores are mixed before the softmax, and
    the weights after it; the mixing begins as the identity, so as plain attention.

    Sigmoid attention (Ramapuram et al., 2409.04431): sigmoid(score - log n). The paper's n is the
    length of the sequence, which a token cannot know before the end: here it is the number of keys
    that the query sees, which is the paper's for the last token, and one function for training and
    decoding.

    Sinks (gpt-oss, 2508.10925): a learned score per head in the softmax's denominator. Residual
    scores: RealFormer (He et al., 2012.11747, equation 5).

    Mixture of heads: see moh.py.
    """

    def __init__(self, form: ScoreForm, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.form = form
        self.sinks = nn.Parameter(torch.zeros(heads)) if form.sinks else None
        self.before = nn.Parameter(torch.eye(heads)) if form.talking else None
        self.after = nn.Parameter(torch.eye(heads)) if form.talking else None
        self.vectors: nn.Parameter | None = None
        self.norm: nn.Module | None = None
        if form.kind == "differential":
            # q1, k1, q2, k2
            self.vectors = nn.Parameter(torch.randn(4, head_dim) * LAMBDA_STD)
            self.norm = make_norm("rmsnorm", 2 * head_dim)
        self.heads: HeadRouter | None = None
        if form.active:
            self.heads = HeadRouter(heads, form.active, form.shared, width)

    def begin(self, carry: Carry | None) -> Score:
        """What turns this call's scores into weights."""
        form = self.form
        if form == ScoreForm():
            return Score()
        tape = None
        if form.residual and carry is not None:
            tape = Tape(carry.earlier)
            carry.later = tape.scores
        return Score(
            form="sigmoid" if form.kind == "sigmoid" else "softmax",
            cap=form.cap,
            sinks=self.sinks,
            before=self.before,
            after=self.after,
            difference=self._lambda(),
            tape=tape,
        )

    def _lambda(self) -> Tensor | None:
        if self.vectors is None:
            return None
        q1, k1, q2, k2 = self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32))
        found: Tensor = (q1 @ k1).exp() - (q2 @ k2).exp() + self.form.lambda_init
        return found

    def finish(self, out: Tensor, x: BTD) -> Tensor:
        """The heads' outputs (B, T, H, V) of tokens x, ready for gate and projection."""
        if self.norm is not None:
            batch, tokens, heads, width = out.shape
            pairs = self.norm(out.reshape(batch, tokens, heads // 2, 2 * width))
            out = (pairs * (1.0 - self.form.lambda_init)).view_as(out)
        if self.heads is not None:
            out = out * self.heads.route(x).unsqueeze(-1).to(out.dtype)
        return out
