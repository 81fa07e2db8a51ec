"""What keeps a mixture's experts evenly loaded, and the count of their load.

For a batch of N tokens with k choices among L experts, f_e the share of choices that e got times L,
and P_e the mean of e's score over the sum of all scores:

- batch: sum_e f_e P_e (Switch, arXiv 2101.03961; with k choices as in DeepSeekMoE, 2401.06066);
- sequence: the same within each sequence, averaged (DeepSeekMoE; DeepSeek-V3, 2412.19437);
- first: as `sequence`, f of the first choices alone (GShard, 2006.16668, up to its factor 1/L^2);
- importance: CV^2 of the experts' summed weights, and with noisy-top-k CV^2 of the expected number
  of tokens (Shazeer et al., 1701.06538); CV^2 is the variance over the squared mean.

Of DeepSeek-V2 (2405.04434, 2.2.3) are two between the groups that experts stand in, which are
devices there, with its sequences of T tokens, D groups, and M groups that a token may go to:

- device: sum_g f'_g P'_g, f'_g the mean of its experts' f_e, P'_g the sum of their P_e;
- sent: sum_g f''_g P'_g, f''_g = D/(M T) times the tokens that have an expert in g.

All but importance are 1 for an even load (sent: where every token goes to M groups). MoE++
(2410.07348) multiplies the terms of special experts by tau. The z-loss (ST-MoE, 2202.08906) is the
mean of logsumexp(logits)^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .router import Router, Routing

MICRO = 1e6
"""Entropies are summed in millionths: whole numbers survive `module.to(bf16)`."""


@dataclass(frozen=True)
class BalanceConfig:
    """Which losses a mixture adds in training, and their weights."""

    aux: str
    aux_weight: float
    z_weight: float
    device_weight: float
    sent_weight: float
    groups: int
    """Of experts, for the two before; 1 without them."""
    top_groups: int


def losses(config: BalanceConfig, router: Router, routing: Routing, batch: int) -> Tensor | None:
    """The weighted sum of the losses of one call of `batch` sequences; None where there is none."""
    if routing.logits is None:
        return None
    parts: list[Tensor] = []
    if config.aux != "none":
        parts.append(config.aux_weight * balance_loss(config.aux, router, routing, batch))
    if config.z_weight:
        parts.append(config.z_weight * routing.logits.logsumexp(-1).square().mean())
    if config.groups > 1:
        device, sent = group_losses(routing, batch, config.groups, config.top_groups)
        parts += [config.device_weight * device, config.sent_weight * sent]
    return sum(parts[1:], parts[0]) if parts else None


def balance_loss(form: str, router: Router, routing: Routing, batch: int) -> Tensor:
    """One of the forms of the module, without its weight."""
    config = router.config
    if form == "importance":
        return _importance(router, routing)
    counted = routing.experts[:, :1] if form == "first" else routing.experts
    share, mean = _shares(routing, counted, 1 if form == "batch" else batch)
    terms: Tensor = config.outputs * (share * mean).mean(0)
    if config.special and config.special_load != 1.0:
        factor = torch.ones_like(terms)
        factor[config.experts :] = config.special_load
        terms = terms * factor
    return terms.sum()


def group_losses(
    routing: Routing, batch: int, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """`device` and `sent` of the module, without their weights."""
    share, mean = _shares(routing, routing.experts, batch)
    load = share.shape[1] * share.view(batch, groups, -1).mean(-1)
    score = mean.view(batch, groups, -1).sum(-1)
    there = torch.zeros_like(share[:1, :groups]).expand(routing.experts.shape[0], -1)
    there = there.scatter(1, routing.experts // (share.shape[1] // groups), 1.0)
    sent = groups / top_groups * there.view(batch, -1, groups).mean(1)
    return (load * score).sum(-1).mean(), (sent * score).sum(-1).mean()


def _shares(routing: Routing, counted: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The share of the counted choices (N, k) and the mean score of each expert, (parts, L), of
    equally many sequences each."""
    scores = routing.scores
    assert scores is not None
    chosen = torch.zeros_like(scores).scatter(1, counted, 1.0)
    normal = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    share = (chosen / counted.shape[1]).view(parts, -1, scores.shape[1]).mean(1)
    return share, normal.view(parts, -1, scores.shape[1]).mean(1)


def _importance(router: Router, routing: Routing) -> Tensor:
    scores, top_k = routing.scores, router.config.top_k
    assert scores is not None
    assert routing.logits is not None
    weights = torch.zeros_like(scores).scatter(1, routing.experts, routing.weights)
    loss = squared_variation(weights.sum(0))
    if routing.clean is None or top_k >= scores.shape[1]:
        return loss
    clean, deviation = routing.clean
    # The noisy logit that an expert has to beat: the k-th best of the others.
    best = routing.logits.topk(top_k + 1, -1).values
    inside = torch.zeros_like(scores, dtype=torch.bool).scatter(1, routing.experts, True)
    rival = torch.where(inside, best[:, top_k:], best[:, top_k - 1 : top_k])
    expected = torch.special.ndtr((clean - rival) / deviation).sum(0)
    return loss + squared_variation(expected)


def squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation of a vector."""
    return x.var(unbiased=False) / (x.mean().square() + 1e-10)


class Ledger(nn.Module):
    """Counts of a training step: of this one so far, and of the one that `close` closed last."""

    counts: Tensor
    load: Tensor
    tally: Tensor
    last: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        for name, size in (("counts", outputs), ("load", outputs), ("tally", 4), ("last", 4)):
            # tally: dropped, of how many, entropy in millionths, of how many tokens.
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def record(self, routing: Routing) -> None:
        """Count a call in which tokens chose."""
        chosen = routing.experts.flatten()
        self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        self.tally[1] += chosen.numel()
        if routing.kept is not None:
            self.tally[0] += (~routing.kept).sum()
        self._entropy(routing.scores)

    @torch.no_grad()
    def record_choice(self, tokens: Tensor, routing: Routing, length: int) -> None:
        """Count a call in which experts chose `tokens` (B, E, C) of sequences of `length`."""
        batch, _, taken = tokens.shape
        self.counts += batch * taken
        taken_once = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
        taken_once.scatter_(1, tokens.flatten(1), True)
        self.tally[0] += (~taken_once).sum()
        self.tally[1] += taken_once.numel()
        self._entropy(routing.scores)

    def _entropy(self, scores: Tensor | None) -> None:
        if scores is None:
            return
        normal = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        self.tally[2] += (torch.special.entr(normal).sum() * MICRO).round().to(torch.int64)
        self.tally[3] += scores.shape[0]

    @torch.no_grad()
    def close(self) -> None:
        """The step is over."""
        for old, new in ((self.load, self.counts), (self.last, self.tally)):
            old.copy_(new)
            new.zero_()

    def statistics(self) -> dict[str, Any]:
        """Of the last training step: `load`, the share of choices per expert, before any is
        dropped; `dropped`, the share of choices that were (of tokens without an expert, where
        experts choose); `entropy` of the scores in nats, where there are any."""
        running = bool(self.tally.any())
        counts, tally = (self.counts, self.tally) if running else (self.load, self.last)
        dropped, pairs, entropy, tokens = tally.tolist()
        shares = counts.double() / counts.sum().clamp_min(1)
        found: dict[str, Any] = {"load": shares.tolist(), "dropped": dropped / max(pairs, 1)}
        if tokens:
            found["entropy"] = entropy / MICRO / tokens
        return found
