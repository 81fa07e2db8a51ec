"""Memory learned at test time: the weights of a small model are the state, trained by each token.

Per matrix W of the inner model (`inner_model.py`), with momentum S, in batches of C tokens:

    S_t = eta_t S_{t-1} - theta_t grad l(W_start; k_t, v_t)        W_start: at the batch's start
    W_t = (1 - alpha_t) W_{t-1} + S_t                              o_t = f(q_t; W_t)

TTT (arXiv 2407.04620, eq. 3-7) without momentum (S_t is the one step) and forgetting, Titans
(arXiv 2501.00663, eq. 9-17) with both.

All gradients of a batch are taken at one state, so a batch is a few matrix products, the dual form:
the gradient of token s by W is u_s^T g_s, and W_t = a_t W_0 + b_t S_0 - sum_{s<=t} c_ts u_s^T g_s.
What token t reads through W_t is then a_t h W_0 + b_t h S_0 - sum_s c_ts (h . u_s) g_s, with h its
input to that matrix, and no W_t is made but the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import definitions
from .backend import choose, without_autocast
from .chunks import causal_exp
from .inner_model import Inner, Learned, Norm, forward, gradient
from .letters import BTH, BTHK, BTHV


@without_autocast
def learned_memory(
    q: BTHK | None,
    k: BTHK,
    v: BTHV,
    rate: BTH,
    log_momentum: BTH | None,
    log_keep: BTH | None,
    inner: Inner,
    norm: Norm,
    learned: Learned,
    batch_tokens: int,
    phase: int = 0,
) -> tuple[BTHV | None, Learned]:
    """The outputs f(q_t; W_t) (None without queries) and what the sequence has learned at the end.

    `rate` is theta, `log_momentum` log eta (None: no momentum), `log_keep` log(1 - alpha) (None:
    nothing is forgotten). `phase` is the number of tokens, below `batch_tokens`, that the batch
    under way has already seen. Computes in the dtype of the weights in `learned`, which the outputs
    have too. `learned` is not written to.
    """
    if choose("delta_rule", k.device, "test-time") == "definition":
        return definitions.learned_memory(
            q, k, v, rate, log_momentum, log_keep, inner, norm, learned, batch_tokens, phase
        )
    tokens, dtype = k.shape[1], learned.now[0].dtype
    given = [
        None if t is None else t.to(dtype).movedim(2, 1)
        for t in (q, k, v, rate, log_momentum, log_keep)
    ]
    outputs: list[Tensor] = []
    at = 0
    while at < tokens:
        # As much of the batch under way as there is, then whole batches, then what is left.
        size = min(batch_tokens - phase, tokens - at)
        count = 1 if phase else max(1, (tokens - at) // batch_tokens)
        end = at + size * count
        pieces = [None if t is None else t[:, :, at:end] for t in given]
        if tokens == 1:
            o, learned = _step(pieces, inner, norm, learned)
            outputs += [] if o is None else [o]
        else:
            cut = [None if t is None else _cut(t, count, size) for t in pieces]
            read, learned = _batches(cut, inner, norm, learned)
            outputs += read
        at, phase = end, (phase + size) % batch_tokens
        if phase == 0:
            learned = learned.next_batch()
    if q is None:
        return None, learned
    return torch.cat(outputs, 2).movedim(1, 2), learned


def _cut(t: Tensor, count: int, size: int) -> Tensor:
    """(B, H, count * size, ...) to (B, H, count, size, ...)."""
    return t.reshape(*t.shape[:2], count, size, *t.shape[3:])


@dataclass(frozen=True)
class Coefficients:
    """W_t and S_t from W_0, S_0 and the gradients; None where a factor is one or a term missing.

    `keep` a_t and `lasting` b_t, (..., C, 1); `writes` c_ts, (..., C, C); for the last S_t
    `fading`, (..., 1, 1), of S_0, and `pushes`, (..., C, 1), of the gradients.
    """

    keep: Tensor | None
    writes: Tensor
    lasting: Tensor | None
    fading: Tensor | None
    pushes: Tensor | None

    def at(self, n: int) -> Coefficients:
        """Those of batch n, the axis before the last two."""
        fields = (self.keep, self.writes, self.lasting, self.fading, self.pushes)
        keep, writes, *rest = (None if t is None else t[:, :, n] for t in fields)
        assert writes is not None
        return Coefficients(keep, writes, *rest)


def coefficients(
    rate: Tensor | None, log_momentum: Tensor | None, log_keep: Tensor | None
) -> Coefficients:
    """All of (..., C), for batches of C tokens."""
    assert rate is not None
    theta = rate.unsqueeze(-2)
    kept, keep = None, None
    if log_keep is not None:
        kept, keep = _products(log_keep)
    if log_momentum is None:
        writes = (
            theta.expand(*rate.shape, rate.shape[-1]) if kept is None else kept * theta
        ).tril()
        return Coefficients(keep, writes, None, None, None)
    within, since = _products(log_momentum)
    both = torch.cat((within, since), -1)
    # S_t adds to every later W: a scan over a scan.
    both = both.cumsum(-2) if kept is None else kept @ both
    return Coefficients(
        keep,
        both[..., :-1] * theta,
        both[..., -1:],
        since[..., -1:, :],
        (within[..., -1:, :] * theta).mT,
    )


def _products(logs: Tensor) -> tuple[Tensor, Tensor]:
    """exp of sums: over s < r <= t, (..., C, C), 0 where s > t; over r <= t, (..., C, 1)."""
    total = logs.double().cumsum(-1).unsqueeze(-1)
    return causal_exp(total, logs.dtype), total.to(logs.dtype).exp()


def _batches(
    given: list[Tensor | None], inner: Inner, norm: Norm, learned: Learned
) -> tuple[list[Tensor], Learned]:
    """q, k, v, theta, log eta, log(1 - alpha), each (B, H, N, C, ...): N batches, one by one."""
    weigh = coefficients(given[3], given[4], given[5])
    outputs: list[Tensor] = []
    assert given[1] is not None
    for n in range(given[1].shape[2]):
        if n:
            learned = learned.next_batch()
        q, k, v = (None if t is None else t[:, :, n] for t in given[:3])
        assert k is not None
        assert v is not None
        _, inputs, grads = gradient(inner, learned.start, k, v, norm)
        if q is not None:
            outputs.append(_read(q, inputs, grads, weigh.at(n), inner, norm, learned))
        learned = _write(inputs, grads, weigh.at(n), learned)
    return outputs, learned


def _read(
    q: Tensor,
    inputs: list[Tensor],
    grads: list[Tensor],
    weigh: Coefficients,
    inner: Inner,
    norm: Norm,
    learned: Learned,
) -> Tensor:
    """f(q_t; W_t) of every token of a batch: the dual form, matrix by matrix."""
    h = q
    for i, (u, g, weight) in enumerate(zip(inputs, grads, learned.now, strict=True)):
        h = inner.widen(inner.act(h) if i else h)
        z = h @ weight
        if weigh.keep is not None:
            z = z * weigh.keep
        if learned.momentum is not None:
            assert weigh.lasting is not None
            z = z + (h @ learned.momentum[i]) * weigh.lasting
        h = z - (h @ u.mT * weigh.writes) @ g
    return inner.finish(q, h, norm)


def _write(
    inputs: list[Tensor], grads: list[Tensor], weigh: Coefficients, learned: Learned
) -> Learned:
    """The weights and the momentum after the batch's last token."""
    now, momentum = [], []
    last = weigh.writes[..., -1:, :].mT
    for i, (u, g, weight) in enumerate(zip(inputs, grads, learned.now, strict=True)):
        if weigh.keep is not None:
            weight = weight * weigh.keep[..., -1:, :]
        if learned.momentum is not None:
            assert weigh.lasting is not None
            assert weigh.fading is not None
            assert weigh.pushes is not None
            old = learned.momentum[i]
            weight = weight + old * weigh.lasting[..., -1:, :]
            momentum.append(old * weigh.fading - u.mT @ (g * weigh.pushes))
        now.append(weight - u.mT @ (g * last))
    return Learned(learned.start, now, momentum if learned.momentum is not None else None)


def _step(
    given: list[Tensor | None], inner: Inner, norm: Norm, learned: Learned
) -> tuple[Tensor | None, Learned]:
    """One token, (B, H, 1, ...): the equations as they stand, without the dual form's scores."""
    q, k, v, rate, log_momentum, log_keep = given
    assert k is not None
    assert v is not None
    assert rate is not None
    _, inputs, grads = gradient(inner, learned.start, k, v, norm)
    now, momentum = [], []
    for i, (u, g, weight) in enumerate(zip(inputs, grads, learned.now, strict=True)):
        step = u.mT * (g * -rate.unsqueeze(-1))
        if learned.momentum is not None and log_momentum is not None:
            step = torch.addcmul(step, learned.momentum[i], log_momentum.unsqueeze(-1).exp())
            momentum.append(step)
        if log_keep is None:
            now.append(weight + step)
        else:
            now.append(torch.addcmul(step, weight, log_keep.unsqueeze(-1).exp()))
    learned = Learned(learned.start, now, momentum if learned.momentum is not None else None)
    return None if q is None else forward(inner, now, q, norm), learned
