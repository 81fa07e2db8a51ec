"""The definition of every operator: a loop over time that reads like the formula.

Slow, and right by inspection: every other form is compared with these. They compute in float32 or,
where the inputs are float64, in float64, and are differentiable by autograd.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .inner_model import NORM_EPS, Inner, Learned, Norm
from .letters import BD, BDN, BF, BH, BHKV, BTD, BTF, BTH, BTHK, BTHV, BTN, DN, DW, HK, D, H

LARGEST = 80.0
"""The mLSTM divides by exp of this at most: what is that far below 1 is 0 beside anything else."""


NOTHING = -1e30
"""The logarithm of an empty sum, finite so that differences of it are."""


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums and states: the widest of the inputs', and float32 at least."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def matrix_state(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: H | BTH | BTHK | None,
    state: BHKV | None,
    scale: float,
) -> tuple[BTHV, BHKV]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t."""
    batch, tokens, heads, key_width = q.shape
    dtype = accumulator(q, k, v, log_decay, state)
    q_, k_, v_ = (t.to(dtype) for t in (q, k, v))
    S = _initial(state, (batch, heads, key_width, v.shape[-1]), dtype, q)
    if log_decay is None:
        g = torch.zeros((), dtype=dtype, device=q.device).expand(q.shape)
    else:
        g = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        g = g.to(dtype).expand(q.shape)
    o = []
    for t in range(tokens):
        S = g[:, t, :, :, None].exp() * S + k_[:, t, :, :, None] * v_[:, t, :, None, :]
        o.append(scale * torch.einsum("bhkv,bhk->bhv", S, q_[:, t]))
    return torch.stack(o, dim=1).to(v.dtype), S


def matrix_state_preread(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    bonus: HK,
    log_decay: H | BTH | BTHK | None,
    state: BHKV | None,
    scale: float,
) -> tuple[BTHV, BHKV]:
    """o_t = scale (S_{t-1} + Diag(u) k_t v_t^T)^T q_t;  S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T."""
    dtype = accumulator(q, k, v, log_decay, state)
    S = _initial(state, (q.shape[0], *q.shape[2:], v.shape[-1]), dtype, q)
    g = torch.zeros((), dtype=dtype, device=q.device) if log_decay is None else log_decay
    g = (g[..., None] if g.ndim in (1, 3) else g).to(dtype).expand(q.shape)
    o = []
    for t in range(q.shape[1]):
        kv = k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
        seen = S + bonus.to(dtype)[..., None] * kv
        o.append(scale * torch.einsum("bhkv,bhk->bhv", seen, q[:, t].to(dtype)))
        S = g[:, t, :, :, None].exp() * S + kv
    return torch.stack(o, dim=1).to(v.dtype), S


def delta_rule(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    beta: BTH,
    log_decay: BTH | BTHK | None,
    state: BHKV | None,
    scale: float,
) -> tuple[BTHV, BHKV]:
    """S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    A decay per token and head is the same for all key channels.
    """
    batch, tokens, heads, key_width = q.shape
    dtype = accumulator(q, k, v, beta, log_decay, state)
    q_, k_, v_, b_ = (t.to(dtype) for t in (q, k, v, beta))
    S = _initial(state, (batch, heads, key_width, v.shape[-1]), dtype, q)
    g = torch.zeros_like(b_) if log_decay is None else log_decay.to(dtype)
    g = g if g.ndim == 4 else g[..., None]
    o = []
    for t in range(tokens):
        S = g[:, t, :, :, None].exp() * S
        read = torch.einsum("bhkv,bhk->bhv", S, k_[:, t])
        write = b_[:, t, :, None] * (v_[:, t] - read)
        S = S + k_[:, t, :, :, None] * write[:, :, None, :]
        o.append(scale * torch.einsum("bhkv,bhk->bhv", S, q_[:, t]))
    return torch.stack(o, dim=1).to(v.dtype), S


def diagonal_low_rank(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    a: BTHK,
    b: BTHK,
    log_decay: BTHK,
    state: BHKV | None,
    scale: float,
) -> tuple[BTHV, BHKV]:
    """S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T;  o_t = scale S_t^T q_t."""
    dtype = accumulator(q, k, v, a, b, log_decay, state)
    S = _initial(state, (q.shape[0], *q.shape[2:], v.shape[-1]), dtype, q)
    o = []
    for t in range(q.shape[1]):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t].to(dtype))
        S = log_decay[:, t, :, :, None].to(dtype).exp() * S
        S = S + b[:, t, :, :, None].to(dtype) * read[:, :, None]
        S = S + k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
        o.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t].to(dtype)))
    return torch.stack(o, dim=1).to(v.dtype), S


def mlstm(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    input_gate: BTH,
    log_forget: BTH,
    state: tuple[Tensor, BH] | None,
    scale: float,
) -> tuple[BTHV, tuple[Tensor, BH]]:
    """C_t = f C_{t-1} + i k v^T, n_t = f n_{t-1} + i k, h = scale C^T q / max(|scale n^T q|, e^-m),
    all over exp(m_t), m_t = max(log f_t + m_{t-1}, ig_t); C and n side by side in the state."""
    batch, tokens, heads, width = q.shape
    dtype = accumulator(q, k, v, input_gate, log_forget, None if state is None else state[0])
    matrix, m = (None, q.new_zeros(batch, heads)) if state is None else state
    held, m = _initial(matrix, (batch, heads, width, v.shape[-1] + 1), dtype, q), m.to(dtype)
    C, n = held[..., :-1], held[..., -1]
    out = []
    for t in range(tokens):
        log_f, ig = log_forget[:, t].to(dtype), input_gate[:, t].to(dtype)
        after = torch.maximum(log_f + m, ig)
        f, i, m = torch.exp(log_f + m - after), torch.exp(ig - after), after
        key, query = i[..., None] * k[:, t].to(dtype), scale * q[:, t].to(dtype)
        C = f[..., None, None] * C + key[..., None] * v[:, t, :, None].to(dtype)
        n = f[..., None] * n + key
        weight = torch.einsum("bhk,bhk->bh", n, query).abs()
        read = torch.einsum("bhkv,bhk->bhv", C, query)
        out.append(read / torch.maximum(weight, torch.exp((-m).clamp_max(LARGEST)))[..., None])
    return torch.stack(out, dim=1).to(v.dtype), (torch.cat((C, n[..., None]), -1), m)


def diagonal_scan(log_a: D | BTD, b: BTD, state: BD | None) -> tuple[BTD, BD]:
    """h_t = exp(log_a_t) h_{t-1} + b_t."""
    dtype = accumulator(log_a, b, state)
    h = _initial(state, (b.shape[0], b.shape[2]), dtype, b)
    g = log_a.to(dtype).expand(b.shape)
    out = []
    for t in range(b.shape[1]):
        h = g[:, t].exp() * h + b[:, t].to(dtype)
        out.append(h)
    return torch.stack(out, dim=1).to(b.dtype), h


def complex_scan(
    log_a: D | BTD, angle: D | BTD, b: BTF, state: BF | None, factor: Tensor | None
) -> tuple[BTF, BF]:
    """h_t = exp(log_a_t + i angle_t) h_{t-1} + factor b_t, real parts and then imaginary ones."""
    dtype = accumulator(b, state)
    wide = dtype.to_complex()
    shape = (*b.shape[:2], b.shape[2] // 2)
    decay = torch.exp(torch.complex(log_a.double().expand(shape), angle.double().expand(shape)))
    decay = decay.to(wide)
    w = torch.complex(*b.to(dtype).chunk(2, dim=-1))
    w = w if factor is None else factor.to(wide) * w
    h = torch.zeros_like(w[:, 0]) if state is None else torch.complex(*state.to(dtype).chunk(2, -1))
    out = []
    for t in range(b.shape[1]):
        h = decay[:, t] * h + w[:, t]
        out.append(torch.cat((h.real, h.imag), -1))
    return torch.stack(out, dim=1).to(b.dtype), out[-1]


def selective_scan(x: BTD, dt: BTD, a: DN, b: BTN, c: BTN, state: BDN | None) -> tuple[BTD, BDN]:
    """h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d];  y_t = h_t C_t."""
    dtype = accumulator(x, dt, a, b, c, state)
    h = _initial(state, (x.shape[0], *a.shape), dtype, x)
    out = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None].to(dtype)
        written = step * b[:, t, None, :].to(dtype) * x[:, t, :, None].to(dtype)
        h = torch.exp(step * a.to(dtype)) * h + written
        out.append(torch.einsum("bdn,bn->bd", h, c[:, t].to(dtype)))
    return torch.stack(out, dim=1).to(x.dtype), h


def wkv(
    k: BTD, v: BTD, log_decay: D, bonus: D, state: tuple[BD, BD, BD] | None
) -> tuple[BTD, tuple[BD, BD, BD]]:
    """y_t = (num + e^{u+k} v) / (den + e^{u+k}), then num = e^g num + e^k v, den = e^g den + e^k;
    num and den over exp(m_t), m_t = max(g + m_{t-1}, k_t)."""
    dtype = accumulator(k, v, log_decay, bonus, None if state is None else state[0])
    if state is None:
        zero = torch.zeros_like(v[:, 0], dtype=dtype)
        state = zero, zero, torch.full_like(zero, NOTHING)
    num, den, m = (t.to(dtype) for t in state)
    g, u = log_decay.to(dtype), bonus.to(dtype)
    out = []
    for t in range(k.shape[1]):
        key, value = k[:, t].to(dtype), v[:, t].to(dtype)
        most = torch.maximum(m, u + key)
        old, new = torch.exp(m - most), torch.exp(u + key - most)
        out.append((old * num + new * value) / (old * den + new))
        most = torch.maximum(g + m, key)
        old, new = torch.exp(g + m - most), torch.exp(key - most)
        num, den, m = old * num + new * value, old * den + new, most
    return torch.stack(out, dim=1).to(v.dtype), (num, den, m)


def time_invariant(u: BTD, a: Tensor, c: Tensor, state: Tensor | None) -> tuple[BTD, Tensor]:
    """x_t = exp(a) x_{t-1} + u_t;  y_t = sum_n c x_t, for complex a and c twice its real part; a, c
    (D, N), the state (B, D, N), complex (B, D, N, 2)."""
    dtype = accumulator(u, state)
    paired = a.is_complex()
    wide = dtype.to_complex() if paired else dtype
    x = torch.zeros(u.shape[0], *a.shape, dtype=wide, device=u.device)
    if state is not None:
        x = torch.view_as_complex(state.to(dtype).contiguous()) if paired else state.to(dtype)
    out = []
    for t in range(u.shape[1]):
        x = torch.exp(a).to(wide) * x + u[:, t, :, None].to(dtype)
        y = (c.to(wide) * x).sum(-1)
        out.append(2 * y.real if paired else y)
    return torch.stack(out, dim=1).to(u.dtype), torch.view_as_real(x) if paired else x


def low_rank_state_space(
    u: BTD, a: Tensor, p: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[BTD, Tensor]:
    """x_t = (1 - A)^-1 ((1 + A) x_{t-1} + b u_t), A = Diag(a) - p p^*;  y_t = c x_t.

    a, p, b, c are complex128 (D, N), half of the conjugate pairs; the state is (B, D, N, 2).
    """
    dtype = accumulator(u, state)
    wide = dtype.to_complex()
    a, p, b, c = (torch.cat((t, t.conj()), -1) for t in (a, p, b, c))
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    A = torch.diag_embed(a) - p[..., :, None] * p.conj()[..., None, :]
    step = torch.linalg.solve(one - A, one + A).to(wide)
    write = torch.linalg.solve(one - A, b).to(wide)
    x = torch.zeros(u.shape[0], *a.shape, dtype=wide, device=u.device)
    if state is not None:
        half = torch.view_as_complex(state.to(dtype).contiguous())
        x = torch.cat((half, half.conj()), -1)
    out = []
    for t in range(u.shape[1]):
        x = (step @ x[..., None]).squeeze(-1) + write * u[:, t, :, None].to(dtype)
        out.append((c.to(wide) * x).sum(-1).real)
    last = x[..., : x.shape[-1] // 2].resolve_conj().contiguous()
    return torch.stack(out, dim=1).to(u.dtype), torch.view_as_real(last)


def short_conv(
    x: BTD,
    weight: DW,
    bias: D | None,
    state: Tensor | None,
    activation: Literal["none", "silu"],
) -> tuple[BTD, Tensor]:
    """y_t = act(bias + sum_w weight_w x_{t-W+1+w}); the state, (B, D, W-1), is the last inputs."""
    batch, tokens, width = x.shape
    taps = weight.shape[1]
    dtype = accumulator(x, weight, bias, state)
    if state is None:
        state = x.new_zeros(batch, width, taps - 1)
    past = [state[:, :, i].to(dtype) for i in range(taps - 1)]
    out = []
    for t in range(tokens):
        window = [*past, x[:, t].to(dtype)]
        y = sum((weight[:, w].to(dtype) * window[w] for w in range(taps)), start=torch.zeros(()))
        if bias is not None:
            y = y + bias.to(dtype)
        out.append(F.silu(y) if activation == "silu" else y)
        past = window[1:]
    final = torch.stack(past, dim=-1) if past else state
    return torch.stack(out, dim=1).to(x.dtype), final.to(state.dtype)


def long_conv(u: BTD, taps: Tensor) -> BTD:
    """y_t = sum_{s <= t} taps_{t-s} u_s, with taps (D, S)."""
    dtype = accumulator(u, taps)
    x, h = u.to(dtype), taps.to(dtype)
    out = []
    for t in range(u.shape[1]):
        seen = (h[:, t - s] * x[:, s] for s in range(t + 1))
        out.append(sum(seen, start=torch.zeros((), dtype=dtype)))
    return torch.stack(out, dim=1).to(u.dtype)


def rms_norm(
    x: Tensor,
    weight: D,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: Literal["silu", "sigmoid"],
    gate_first: bool,
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = w n act(gate), n = h / sqrt(mean h^2 + eps), or n of h act(gate)."""
    dtype = accumulator(x, weight, residual, gate)
    h = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    opening = torch.ones((), dtype=dtype, device=x.device)
    if gate is not None:
        opening = torch.sigmoid(gate.to(dtype))
        opening = gate.to(dtype) * opening if activation == "silu" else opening
    u = h * opening if gate_first else h
    y = weight.to(dtype) * u / (u.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    y = y if gate_first else y * opening
    return y.to(torch.promote_types(kind, weight.dtype)), h.to(kind)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    """z = W h; the loss log sum_a exp(z_a) - z_target, 0 where ignored, and log sum_a exp(z_a)."""
    dtype = accumulator(hidden, weight)
    losses, normalizers = [], []
    for h, target in zip(hidden.to(dtype), targets.tolist(), strict=True):
        z = weight.to(dtype) @ h
        total = torch.logsumexp(z, dim=0)
        losses.append(total * 0 if target == ignore else total - z[target])
        normalizers.append(total)
    return torch.stack(losses), torch.stack(normalizers)


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
    phase: int,
) -> tuple[BTHV | None, Learned]:
    """S_t = eta_t S_{t-1} - theta_t grad l(W_start; k_t, v_t), W_t = (1 - alpha_t) W_{t-1} + S_t,
    o_t = f(q_t; W_t); the gradient is autograd's."""
    dtype = learned.now[0].dtype
    out = []
    for t in range(k.shape[1]):
        k_, v_ = k[:, t].to(dtype), v[:, t].to(dtype)
        slopes = _inner_gradient(inner, learned.start, k_, v_, norm)
        theta = rate[:, t, :, None, None].to(dtype)
        steps = [-theta * slope for slope in slopes]
        if learned.momentum is not None and log_momentum is not None:
            eta = log_momentum[:, t, :, None, None].to(dtype).exp()
            steps = [eta * s + step for s, step in zip(learned.momentum, steps, strict=True)]
        kept = torch.ones_like(theta)
        if log_keep is not None:
            kept = log_keep[:, t, :, None, None].to(dtype).exp()
        now = [kept * w + s for w, s in zip(learned.now, steps, strict=True)]
        learned = Learned(learned.start, now, None if learned.momentum is None else steps)
        if q is not None:
            out.append(_inner_model(inner, now, q[:, t].to(dtype), norm))
        if (phase + t + 1) % batch_tokens == 0:
            learned = learned.next_batch()
    return (torch.stack(out, dim=1) if q is not None else None), learned


def slow_memory(
    x: BTHK,
    v: BTHV,
    rate: BTH,
    inner: Inner,
    norm: Norm,
    weights: list[Tensor],
    pending: list[Tensor],
    chunk: int,
    phase: int,
) -> tuple[BTHV, list[Tensor], list[Tensor]]:
    """o_t = f(x_t; W); at the end of a chunk W = W - sum_t theta_t grad |f(x_t; W) - v_t|^2."""
    dtype = weights[0].dtype
    out = []
    for t in range(x.shape[1]):
        x_, theta = x[:, t].to(dtype), rate[:, t, :, None, None].to(dtype)
        out.append(_inner_model(inner, weights, x_, norm))
        slopes = _inner_gradient(inner, weights, x_, v[:, t].to(dtype), norm)
        pending = [p + theta * s for p, s in zip(pending, slopes, strict=True)]
        if (phase + t + 1) % chunk == 0:
            weights = [w - p for w, p in zip(weights, pending, strict=True)]
            pending = [torch.zeros_like(p) for p in pending]
    return torch.stack(out, dim=1), weights, pending


def _inner_model(inner: Inner, weights: list[Tensor], x: Tensor, norm: Norm) -> Tensor:
    """f(x), (B, H, K) to (B, H, V), written out once more for the definitions."""
    h = x
    for i, weight in enumerate(weights):
        if i:
            h = F.gelu(h) if inner.activation == "gelu" else F.silu(h)
        if inner.bias:
            h = torch.cat((h, torch.ones_like(h[..., :1])), -1)
        h = torch.einsum("bhi,bhio->bho", h, weight)
    if inner.form == "residual-norm":
        assert norm is not None
        h = F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * norm[0] + norm[1]
    return h if inner.form == "plain" else x + h


def _inner_gradient(
    inner: Inner, weights: list[Tensor], x: Tensor, target: Tensor, norm: Norm
) -> tuple[Tensor, ...]:
    """autograd's gradient of scale |f(x) - target|^2 by the weights, itself differentiable."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        # Tensors of their own: x and target are data, even where they were read from these weights.
        own = [w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights]
        loss = inner.scale * (_inner_model(inner, own, x, norm) - target).square().sum()
        return torch.autograd.grad(loss, own, create_graph=outer)


def _initial(
    state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return state.to(dtype)
