"""From scores to the heads' output: the forms of attention's normalisation, and heads by router.

Of a plain softmax nothing here has a parameter or costs anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Carry
from ..norm import make_norm, norm_params
from .weigh import Score, Tape

LAMBDA_STD = 0.1
"""Of differential attention's vectors (arXiv 2410.05258, appendix)."""

BALANCE_WEIGHT = 0.01
"""Of MoH's balancing loss (arXiv 2410.11842, 3.3)."""


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

    def routed(self, heads: int) -> int:
        return heads - self.shared if self.active else 0

    def router_rows(self, heads: int) -> tuple[int, int, int]:
        """Outputs of MoH's router: the routed heads, the shared ones, both kinds' balance.

        A single shared head has weight 1 among the shared whatever a router says: no row for it.
        """
        if not self.active:
            return 0, 0, 0
        return heads - self.shared, self.shared if self.shared > 1 else 0, 2 if self.shared else 0

    def params(self, heads: int, head_dim: int, width: int) -> int:
        total = sum(self.router_rows(heads)) * width
        total += heads if self.sinks else 0
        total += 2 * heads * heads if self.talking else 0
        if self.kind == "differential":
            total += 4 * head_dim + norm_params("rmsnorm", 2 * head_dim)
        return total

    def flops(self, heads: int, width: int, seen: float) -> float:
        """Per decoded token that sees so many keys, beside the two products of all attention."""
        mixing = 4.0 * heads * heads * seen if self.talking else 0.0
        return mixing + 2.0 * sum(self.router_rows(heads)) * width


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

    Mixture of heads (MoH; Jin et al., 2410.11842, equations 5 to 9): the shared heads' outputs are
    weighted by a_1 softmax(W_s x), those of the `active` best of the routed heads by a_2 softmax(
    W_r x), the others are 0; (a_1, a_2) = softmax(W_h x). All heads are computed.
    """

    def __init__(self, form: ScoreForm, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.sinks = nn.Parameter(torch.zeros(heads)) if form.sinks else None
        self.before = nn.Parameter(torch.eye(heads)) if form.talking else None
        self.after = nn.Parameter(torch.eye(heads)) if form.talking else None
        self.vectors: nn.Parameter | None = None
        self.norm: nn.Module | None = None
        if form.kind == "differential":
            # q1, k1, q2, k2
            self.vectors = nn.Parameter(torch.randn(4, head_dim) * LAMBDA_STD)
            self.norm = make_norm("rmsnorm", 2 * head_dim)
        rows = sum(form.router_rows(heads))
        self.router = nn.Linear(width, rows, bias=False) if rows else None
        self._loss: Tensor | None = None
        self._load: Tensor | None = None

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
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.form.lambda_init

    def finish(self, out: Tensor, x: BTD) -> Tensor:
        """The heads' outputs (B, T, H, V) of tokens x, ready for gate and projection."""
        if self.norm is not None:
            pairs = self.norm(out.unflatten(2, (-1, 2)).flatten(3))
            out = (pairs * (1.0 - self.form.lambda_init)).view_as(out)
        if self.router is not None:
            out = out * self.route(x).unsqueeze(-1).to(out.dtype)
        return out

    def route(self, x: BTD) -> Tensor:
        """The weight of every head (B, T, H), in float32 at least; 0 for one that is not chosen."""
        assert self.router is not None
        form = self.form
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
        routed, shared, kinds = logits.split(form.router_rows(self.heads), -1)
        scores = routed.softmax(-1)
        # A stable sort: ties go to the lowest index in every batch size.
        order = torch.sort(routed.detach(), dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(scores).scatter(-1, order[..., : form.active], 1.0)
        if self.training and torch.is_grad_enabled():
            load = chosen.flatten(0, -2).mean(0)
            self._load = load
            self._loss = BALANCE_WEIGHT * (load * scores.flatten(0, -2).mean(0)).sum()
        weights = scores * chosen
        if not form.shared:
            return weights
        share = kinds.softmax(-1)
        always = shared.softmax(-1) if form.shared > 1 else torch.ones_like(weights[..., :1])
        return torch.cat((share[..., :1] * always, share[..., 1:] * weights), -1)

    def auxiliary_loss(self) -> Tensor | None:
        """MoH's weighted balancing loss of the last training call, once; None where nothing is
        routed. Sum over routed heads of (share of tokens that chose it) * (its mean score)."""
        loss, self._loss = self._loss, None
        return loss

    def load(self) -> list[float]:
        """The share of tokens that chose each routed head in the last training call."""
        if self._load is None:
            return [0.0] * self.form.routed(self.heads)
        return [float(share) for share in self._load.tolist()]
