"""Triton kernels of the selective scan: states stay on the chip, never in memory token by token.

A program holds the N states of some channels and walks over a span of tokens, a tile at a time.
Tiles are (tokens, N / L, channels, L): by Triton's default layout a thread then has all tokens of
the tile and N / L states of a channel, so that the walk from token to token and most of the sum
over states cost no exchange between threads. There is one span where batch and channels make
programs enough; else a first kernel takes what each span writes from nothing, and a scan over the
spans makes their starts. The state before every chunk is kept for the backward pass, which makes
all others again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, rounded, tuned
from .triton_common import check_device, check_width, common_dtype, on_device_of, one_token
from .triton_diagonal_scan import diagonal_scan

OP = "selective_scan"
LANES = {"ends": 4, "forward": 4, "backward": 8}
"""Threads that share a channel's states, by kernel. More of them make a sum over states dearer and
one over channels, which only the backward pass has, cheaper."""
LARGEST_TILE_D = 64
CHUNK = 64
"""Tokens from one kept state to the next: at N = 16 a quarter of a number per token and state."""
PROGRAMS = 512
"""Some for every multiprocessor: with fewer, a sequence is cut into spans."""
SHORTEST_SPAN = 256
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `selective_scan.selective_scan`.

    Raises `Unsupported` for float64, more than `WIDEST` states per channel and tensors that are not
    on a GPU.
    """
    check_device(OP, x)
    common_dtype(OP, x, dt, a, b, c)
    check_width(OP, N=a.shape[1])
    if not torch.is_grad_enabled():
        # Else the states of chunks would be kept for a parameter that requires gradients.
        x, dt, a, b, c = (t.detach() for t in (x, dt, a, b, c))
    y, last = _Scan.apply(  # type: ignore[no-untyped-call]
        *(t.contiguous() for t in (x, dt, a, b, c)),
        None if state is None else state.float().contiguous(),
    )
    return y, last


def _chunk(tokens: int) -> int:
    return min(CHUNK, rounded(tokens))


def _spans(x: Tensor, rows: int) -> tuple[int, int]:
    """How many spans a sequence is cut into, and their tokens, a multiple of a chunk."""
    batch, tokens, width = x.shape
    tile = min(LARGEST_TILE_D, max(1, 512 // rounded(rows)))
    wanted = triton.cdiv(PROGRAMS, batch * triton.cdiv(width, tile))
    count = max(1, min(wanted, tokens // SHORTEST_SPAN))
    length = triton.cdiv(triton.cdiv(tokens, count), _chunk(tokens)) * _chunk(tokens)
    return triton.cdiv(tokens, length), length


def tile_of_states(config: dict[str, int], kind: str, width: int, rows: int) -> dict[str, int]:
    """A launch's constants with channels and lanes in place of NUMBERS, states of a tile."""
    full = rounded(rows)
    low = min(LANES[kind], full)
    tile = min(LARGEST_TILE_D, max(1, config["NUMBERS"] // full), rounded(width))
    constants = {name: size for name, size in config.items() if name != "NUMBERS"}
    return {**constants, "HIGH": full // low, "LOW": low, "TILE_D": tile}


def _launch(
    kind: str, kernel: Any, x: Tensor, rows: int, given: tuple[Tensor | None, ...],
    run: Callable[..., Any], *flags: bool,
) -> Any:  # fmt: skip
    """`run` with the number of tiles of the channels of x (B, T, D) and the kernel's constants.

    The tiles of a step are as short as it is, so that it moves its state and little else.
    """
    batch, tokens, width = x.shape

    def call(config: dict[str, int]) -> Any:
        constants = tile_of_states(config, kind, width, rows)
        return run(triton.cdiv(width, constants["TILE_D"]), constants)

    with on_device_of(x):
        return tuned(
            f"{OP}.{kind}", kernel, x, call,
            limits=(_chunk(tokens), rounded(rows) * LARGEST_TILE_D), sizes=(batch, tokens, width),
            exact=(rows, *flags, *kinds(*given)),
        )  # fmt: skip


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        rows, chunk = a.shape[1], _chunk(tokens)
        spans, length = _spans(x, rows)
        real: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        ctx.started = start is not None
        if spans > 1:
            start = _starts(x, dt, a, b, start, spans, length, reverse=False)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        last = torch.empty((batch, spans, width, rows), **real)
        states = None
        if any(ctx.needs_input_grad):
            states = torch.empty((batch, triton.cdiv(tokens, chunk), width, rows), **real)

        def run(tiles: int, constants: dict[str, int]) -> None:
            _forward[(batch * spans, tiles)](
                x, dt, a, b, c, start, y, states, last, tokens, width, rows, spans, length,
                CHUNK=chunk, **constants,
            )  # fmt: skip

        _launch("forward", _forward, x, rows, (dt, a, b, c, start, states), run)
        ctx.save_for_backward(x, dt, a, b, c, states)
        return y, last[:, -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, states = ctx.saved_tensors
        batch, tokens, width = x.shape
        rows, chunk = a.shape[1], _chunk(tokens)
        spans, length = _spans(x, rows)
        real: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        dy, ahead = dy.contiguous(), dlast.contiguous()
        if spans > 1:
            ahead = _starts(dy, dt, a, c, ahead, spans, length, reverse=True)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
        da = torch.empty((batch * spans, width, rows), **real)
        dstart = torch.empty((batch, spans, width, rows), **real)

        def run(tiles: int, constants: dict[str, int]) -> tuple[Tensor, Tensor]:
            db = torch.empty((tiles, batch, tokens, rows), **real)
            dc = torch.empty((tiles, batch, tokens, rows), **real)
            inside = (batch * spans, chunk // constants["TILE_T"], width, rows)
            _backward[(batch * spans, tiles)](
                x, dt, a, b, c, states, dy, ahead, torch.empty(inside, **real),
                dx, ddt, da, db, dc, dstart, tokens, width, rows, spans, length,
                CHUNK=chunk, **constants,
            )  # fmt: skip
            # Every program leaves its sums over channels: added in one order, whatever ran first.
            return db.sum(dim=0), dc.sum(dim=0)

        db, dc = _launch("backward", _backward, x, rows, (dt, a, b, c, dy), run)
        da = da.sum(dim=0).to(a.dtype)
        return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dstart[:, 0] if ctx.started else None


def _starts(
    v: Tensor,
    dt: Tensor,
    a: Tensor,
    r: Tensor,
    start: Tensor | None,
    spans: int,
    length: int,
    *,
    reverse: bool,
) -> Tensor:
    """The states before every span, (B, spans, D, N); with `reverse`, the gradients after it.

    First what a span writes by itself, v r = x B and dt deciding how much (with `reverse` what it
    gives to its start, v r = dy C), then a scan over the spans.
    """
    batch, tokens, width = v.shape
    rows = a.shape[1]
    real: dict[str, Any] = {"dtype": torch.float32, "device": v.device}
    written = torch.empty((batch, spans, width, rows), **real)
    total = torch.empty((batch, spans, width), **real)

    def run(tiles: int, constants: dict[str, int]) -> None:
        _ends[(batch * spans, tiles)](
            v, dt, a, r, written, total, tokens, width, rows, spans, length,
            REVERSE=reverse, **constants,
        )  # fmt: skip

    _launch("ends", _ends, v, rows, (dt, a, r), run, reverse)
    log_a = (total[..., None] * a.float()).flatten(2)
    written = written.flatten(2)
    if reverse:
        log_a, written = log_a.flip(1), written.flip(1)
    first = written.new_zeros((batch, width * rows)) if start is None else start.flatten(1)
    states, _ = diagonal_scan(log_a, written, first)
    states = torch.cat((first[:, None], states[:, :-1]), dim=1)
    return (states.flip(1) if reverse else states).view(batch, spans, width, rows)


@triton.jit
@no_type_check
def _span(spans, length, T):
    """The program's walk (sequence and span), its sequence, its first token and where it stops."""
    walk = tl.program_id(0).to(tl.int64)
    first = (walk % spans * length).to(tl.int32)
    return walk, walk // spans, first, tl.minimum(first + length, T)


@triton.jit
@no_type_check
def _entries(walk, D, N, HIGH: tl.constexpr, LOW: tl.constexpr, TILE_D: tl.constexpr):
    """Channels, states, the place of both in (D, N), the first of (walks, D, N), and the mask."""
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    row = tl.arange(0, HIGH)[:, None] * LOW + tl.arange(0, LOW)[None, :]
    entry = column[None, :, None].to(tl.int64) * N + row[:, None, :]
    there = (column[None, :, None] < D) & (row[:, None, :] < N)
    return column, row, entry, walk * D * N, there


@triton.jit
@no_type_check
def _channels(ptr, sequence, t, T, D, column, mask):
    """Tokens t of (B, T, D) in float32, (TILE_T, TILE_D); 0 where the mask is false."""
    spot = (sequence * T + t)[:, None] * D + column[None, :]
    return tl.load(ptr + spot, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _states(ptr, sequence, t, T, N, row, mask):
    """Tokens t of (B, T, N) in float32, (TILE_T, HIGH, LOW)."""
    spot = (sequence * T + t)[:, None, None] * N + row[None, :, :]
    return tl.load(ptr + spot, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _outer(channels, states):
    """(TILE_T, HIGH, TILE_D, LOW)."""
    return channels[:, None, :, None] * states[:, :, None, :]


@triton.jit
@no_type_check
def _tile(x_ptr, dt_ptr, sequence, t, stop, T, D, N, column, row):
    """The tokens t: which there are, for channels and for states, their dt and x.

    Past the end a dt of 0 keeps the state.
    """
    inside = (t[:, None] < stop) & (column[None, :] < D)
    filled = (t[:, None, None] < stop) & (row[None, :, :] < N)
    step = _channels(dt_ptr, sequence, t, T, D, column, inside)
    x = _channels(x_ptr, sequence, t, T, D, column, inside)
    return inside, filled, step, x


@triton.jit
@no_type_check
def _decays(step, rate):
    """exp(dt A), (TILE_T, HIGH, TILE_D, LOW), from A / ln 2."""
    return tl.exp2(step[:, None, :, None] * rate[None, :, :, :])


@triton.jit
@no_type_check
def _over_states(tile):
    """Sums over a channel's states: first those that a thread holds."""
    return tl.sum(tl.sum(tile, axis=1), axis=2)


@triton.jit(do_not_specialize=["T", "N", "spans", "length"])
@no_type_check
def _ends(
    v_ptr, dt_ptr, a_ptr, r_ptr, written_ptr, total_ptr, T, D, N, spans, length,
    HIGH: tl.constexpr, LOW: tl.constexpr, TILE_T: tl.constexpr,
    TILE_D: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a span leaves behind from nothing, and the sum of its dt."""
    walk, sequence, first, stop = _span(spans, length, T)
    column, row, entry, base, there = _entries(walk, D, N, HIGH, LOW, TILE_D)
    place = tl.arange(0, TILE_T)
    token = place[:, None, None, None]
    rate = tl.load(a_ptr + entry, mask=there, other=0.0).to(tl.float32) * LOG2E
    now = tl.zeros((HIGH, TILE_D, LOW), dtype=tl.float32)
    total = tl.zeros((TILE_D,), dtype=tl.float32)
    tiles = tl.cdiv(stop - first, TILE_T)
    for n in range(tiles):
        t = first + (tiles - 1 - n if REVERSE else n) * TILE_T + place
        _, filled, step, v = _tile(v_ptr, dt_ptr, sequence, t, stop, T, D, N, column, row)
        r = _states(r_ptr, sequence, t, T, N, row, filled)
        total += tl.sum(step, axis=0)
        kept = _decays(step, rate)
        if REVERSE:
            new = _outer(v, r)
            for i in tl.static_range(TILE_T):
                late = TILE_T - 1 - i
                now = one_token(kept, token, late) * (now + one_token(new, token, late))
        else:
            new = _outer(step * v, r)
            for i in tl.static_range(TILE_T):
                now = one_token(kept, token, i) * now + one_token(new, token, i)
    tl.store(written_ptr + base + entry, now, mask=there)
    tl.store(total_ptr + walk * D + column, total, mask=column < D)


@triton.jit(do_not_specialize=["T", "N", "spans", "length"])
@no_type_check
def _forward(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, start_ptr, y_ptr, states_ptr, last_ptr,
    T, D, N, spans, length,
    HIGH: tl.constexpr, LOW: tl.constexpr, TILE_T: tl.constexpr,
    TILE_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    walk, sequence, first, stop = _span(spans, length, T)
    column, row, entry, base, there = _entries(walk, D, N, HIGH, LOW, TILE_D)
    place = tl.arange(0, TILE_T)
    token = place[:, None, None, None]
    rate = tl.load(a_ptr + entry, mask=there, other=0.0).to(tl.float32) * LOG2E
    now = tl.zeros((HIGH, TILE_D, LOW), dtype=tl.float32)
    if start_ptr is not None:
        now = tl.load(start_ptr + base + entry, mask=there, other=0.0)
    for n in range(tl.cdiv(stop - first, TILE_T)):
        begin = first + n * TILE_T
        if states_ptr is not None:
            chunk = (sequence * tl.cdiv(T, CHUNK) + begin // CHUNK) * D * N
            tl.store(states_ptr + chunk + entry, now, mask=there & (begin % CHUNK == 0))
        t = begin + place
        inside, filled, step, x = _tile(x_ptr, dt_ptr, sequence, t, stop, T, D, N, column, row)
        b = _states(b_ptr, sequence, t, T, N, row, filled)
        c = _states(c_ptr, sequence, t, T, N, row, filled)
        kept = _decays(step, rate)
        new = _outer(step * x, b)
        h = new
        for i in tl.static_range(TILE_T):
            now = one_token(kept, token, i) * now + one_token(new, token, i)
            h = tl.where(token == i, now[None, :, :, :], h)
        y = _over_states(h * c[:, :, None, :])
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        tl.store(y_ptr + spot, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(last_ptr + base + entry, now, mask=there)


@triton.jit(do_not_specialize=["T", "N", "spans", "length"])
@no_type_check
def _backward(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, states_ptr, dy_ptr, ahead_ptr, starts_ptr,
    dx_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr, dstart_ptr, T, D, N, spans, length,
    HIGH: tl.constexpr, LOW: tl.constexpr, TILE_T: tl.constexpr,
    TILE_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """e_t = dy_t C_t + exp(dt_{t+1} A) e_{t+1} from the end, the gradient of h_t.

    With p_t = exp(dt_t A) h_{t-1} and q_t = sum_n e_t B_t: dx_t = dt_t q_t,
    ddt_t = x_t q_t + sum_n A e_t p_t, dA = sum_t dt_t e_t p_t, and over channels
    dB_t = sum_d e_t dt_t x_t, dC_t = sum_d dy_t h_t. A chunk's tiles are walked through twice: for
    the states that they start with, then from the last to the first.
    """
    walk, sequence, first, stop = _span(spans, length, T)
    column, row, entry, base, there = _entries(walk, D, N, HIGH, LOW, TILE_D)
    place = tl.arange(0, TILE_T)
    token = place[:, None, None, None]
    rate = tl.load(a_ptr + entry, mask=there, other=0.0).to(tl.float32) * LOG2E
    late = tl.load(ahead_ptr + base + entry, mask=there, other=0.0)
    da = tl.zeros((HIGH, TILE_D, LOW), dtype=tl.float32)
    TILES: tl.constexpr = CHUNK // TILE_T
    sums = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // spans) + sequence) * T
    chunks = tl.cdiv(stop - first, CHUNK)
    for m in range(chunks):
        begin = first + (chunks - 1 - m) * CHUNK
        tiles = tl.cdiv(tl.minimum(begin + CHUNK, stop) - begin, TILE_T)
        chunk = (sequence * tl.cdiv(T, CHUNK) + begin // CHUNK) * D * N
        now = tl.load(states_ptr + chunk + entry, mask=there, other=0.0)
        for n in range(tiles):
            tl.store(starts_ptr + (walk * TILES + n) * D * N + entry, now, mask=there)
            t = begin + n * TILE_T + place
            _, filled, step, x = _tile(x_ptr, dt_ptr, sequence, t, stop, T, D, N, column, row)
            b = _states(b_ptr, sequence, t, T, N, row, filled)
            kept = _decays(step, rate)
            new = _outer(step * x, b)
            for i in tl.static_range(TILE_T):
                now = one_token(kept, token, i) * now + one_token(new, token, i)
        # Other threads of the program may read what this one has written.
        tl.debug_barrier()
        for n in range(tiles):
            at = tiles - 1 - n
            start = (walk * TILES + at) * D * N
            now = tl.load(starts_ptr + start + entry, mask=there, other=0.0)
            t = begin + at * TILE_T + place
            inside, filled, step, x = _tile(x_ptr, dt_ptr, sequence, t, stop, T, D, N, column, row)
            dy = _channels(dy_ptr, sequence, t, T, D, column, inside)
            b = _states(b_ptr, sequence, t, T, N, row, filled)
            c = _states(c_ptr, sequence, t, T, N, row, filled)
            kept = _decays(step, rate)
            new = _outer(step * x, b)
            p = new
            for i in tl.static_range(TILE_T):
                now = one_token(kept, token, i) * now
                p = tl.where(token == i, now[None, :, :, :], p)
                now += one_token(new, token, i)
            spot = (sums + t)[:, None, None] * N + row[None, :, :]
            dc = tl.sum(dy[:, None, :, None] * (p + new), axis=2)
            tl.store(dc_ptr + spot, dc, mask=filled)
            e = _outer(dy, c)
            for i in tl.static_range(TILE_T):
                late += one_token(e, token, TILE_T - 1 - i)
                e = tl.where(token == TILE_T - 1 - i, late[None, :, :, :], e)
                late = late * one_token(kept, token, TILE_T - 1 - i)
            db = tl.sum((step * x)[:, None, :, None] * e, axis=2)
            tl.store(db_ptr + spot, db, mask=filled)
            q = _over_states(e * b[:, :, None, :])
            p = e * p
            da += tl.sum(p * step[:, None, :, None], axis=0)
            ddt = x * q + _over_states(p * rate[None, :, :, :]) * LN2
            spot = (sequence * T + t)[:, None] * D + column[None, :]
            tl.store(dx_ptr + spot, (step * q).to(dx_ptr.dtype.element_ty), mask=inside)
            tl.store(ddt_ptr + spot, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    tl.store(dstart_ptr + base + entry, late, mask=there)
    tl.store(da_ptr + base + entry, da, mask=there)
