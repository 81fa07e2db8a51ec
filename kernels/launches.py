"""The configurations of every Triton kernel, the default first, and why they are worth a try.

No default was timed. They fit sm_80, sm_90 and sm_100, and in bfloat16 at K = V = 128 the code for
sm_90 keeps everything in registers and leaves two warps or more to every scheduler: a test reads
both off the machine code, and `benchmarks/README.md` has the table. What a list holds beside its
default answers a question that only a device can. Lists are short because each entry is one more
compilation of the kernel for every case that is tuned; none varies the chunk, on which the kernels
of an operator must agree.
"""

from __future__ import annotations

from .autotune import Choices, Config

SIDES = ("TILE_K", "TILE_V")

ACROSS = (
    Config((64, 64), 4, 2),
    # Twice and four times the programs, where batch times heads does not fill the chip. On Hopper
    # a side of 32 is multiplied by mma.sync, not wgmma; a walk waits for memory anyway.
    Config((32, 64), 4, 2),
    Config((32, 32), 4, 2),
    # Half the reads of x and y, each of which is read once per tile of the other side.
    Config((128, 64), 8, 2),
    # The next chunk's tiles under way earlier: a walk waits for memory and nothing else.
    Config((64, 64), 4, 3),
)
"""Walks over the chunks with a tile of the state in registers."""

OUTPUTS = (
    Config((64, 64), 4, 2),
    # More warps that wait for memory at once.
    Config((64, 64), 8, 2),
    # Less shared memory, so more programs on a multiprocessor.
    Config((32, 32), 4, 2),
    Config((64, 64), 4, 1),
    # One turn of the loops at K = V = 128.
    Config((128, 64), 8, 1),
)
"""Chunks on their own: scores of (C, C), then loops over tiles of keys and values."""

GRADIENTS = (
    # With four warps the (C, C) scores, their gradients and a tile of each side spill.
    Config((64, 64), 8, 2),
    Config((64, 64), 8, 1),
    # Fewer registers and longer loops; four warps in two programs, or eight in one.
    Config((32, 64), 8, 2),
    Config((32, 32), 4, 2),
)
"""The gradients of chunks: two times (C, C), then loops over both sides."""

WHOLE_ROWS = (
    Config((32,), 4, 1),
    # W S needs all K rows of the state in one program: narrower tiles are more programs ...
    Config((16,), 4, 1),
    # ... and wider ones read k and W less often.
    Config((64,), 8, 1),
    Config((32,), 8, 1),
    Config((32,), 4, 2),
)
"""Walks of the delta rule, one program per head and tile of values."""

SOLVE = (
    Config((64, 64), 4, 1),
    # The inverse is a chain of (C, C) products, in which more warps wait for each other.
    Config((64, 64), 2, 1),
    Config((64, 64), 8, 1),
    Config((32, 32), 4, 1),
)
"""Triangular systems: log2(C) products, one after the other, then loops over the sides."""

HALVES = (
    # Every level has exponentials of its own alive: wider tiles of keys or fewer warps spill ...
    Config((16, 64), 8, 1),
    # ... in the gradient kernels, but take half as many turns.
    Config((32, 64), 8, 1),
    # Less shared memory.
    Config((16, 32), 8, 1),
    # Two programs where there was one: they wait apart from each other.
    Config((16, 32), 4, 1),
)
"""Products with a decay per channel: log2(C) levels for every tile of keys."""

TOKENS = (
    Config((16, 32), 1, 1),
    # Fewer registers, so more programs that wait for memory at once ...
    Config((8, 32), 1, 1),
    # ... or more loads under way in each.
    Config((32, 32), 1, 1),
    # Fewer programs to start; their warps share nothing.
    Config((16, 128), 4, 1),
)
"""Scans along the tokens of a channel, a channel per thread and 32 per warp, whatever the tile."""

CHOICES: dict[str, Choices] = {
    "matrix_state.states": Choices(SIDES, ACROSS),
    "matrix_state.outputs": Choices(SIDES, OUTPUTS),
    "matrix_state.gradients": Choices(SIDES, GRADIENTS),
    "delta_rule.states": Choices(("TILE_V",), WHOLE_ROWS),
    "delta_rule.gradients": Choices(("TILE_V",), WHOLE_ROWS),
    "delta_solve.solve": Choices(SIDES, SOLVE),
    "delta_solve.gradients": Choices(SIDES, SOLVE),
    "vector_decay.decayed": Choices(
        ("TILE_K",),
        # Elementwise but for a sum over the chunk: only the programs' number matters.
        (Config((64,), 4, 1), Config((32,), 4, 1), Config((128,), 8, 1)),
    ),
    "vector_decay.states": Choices(SIDES, ACROSS),
    "vector_decay.outputs": Choices(SIDES, HALVES),
    "vector_decay.gradients": Choices(SIDES, HALVES),
    "low_rank.states": Choices(("TILE_V",), WHOLE_ROWS),
    "low_rank.gradients": Choices(("TILE_V",), WHOLE_ROWS),
    "low_rank.solve": Choices(SIDES, HALVES),
    "low_rank.direct": Choices(SIDES, HALVES),
    "low_rank.solve_gradients": Choices(SIDES, HALVES),
    "diagonal_scan": Choices(("TILE_T", "TILE_D"), TOKENS),
    "complex_scan": Choices(("TILE_T", "TILE_D"), TOKENS),
    "selective_scan.ends": Choices(
        ("TILE_T", "NUMBERS"), (Config((8, 512), 4, 1), Config((4, 512), 4, 1))
    ),
    "selective_scan.forward": Choices(
        ("TILE_T", "NUMBERS"),
        (
            # Numbers of a program's states: 4 per thread, at each of its tokens ...
            Config((8, 512), 4, 1),
            # ... in fewer registers ...
            Config((4, 512), 4, 1),
            # ... or in more programs.
            Config((8, 256), 2, 1),
        ),
    ),
    "selective_scan.backward": Choices(
        ("TILE_T", "NUMBERS"),
        (
            Config((8, 1024), 8, 1),
            Config((4, 1024), 8, 1),
            # Twice the partial sums of the gradients of B and C, but no wait of eight warps.
            Config((8, 512), 4, 1),
        ),
    ),
    "short_conv.forward": Choices(
        ("TILE_T", "TILE_D"),
        (
            Config((16, 64), 4, 1),
            # Half the registers, so more warps that wait for memory at once.
            Config((16, 64), 8, 1),
            # More of a tile's inputs are its own: W - 1 of TILE_T + W - 1 rows are read again.
            Config((32, 64), 8, 1),
            Config((16, 128), 8, 1),
        ),
    ),
    "short_conv.backward": Choices(
        ("TILE_T", "TILE_D"),
        (
            # Two numbers per thread, each with W inputs and W gradients around it; four leave two
            # warps to a scheduler, eight spill.
            Config((16, 32), 8, 1),
            # Wider rows, and twice the partial sums: (W + 1) D per program, whatever its tile ...
            Config((8, 64), 8, 1),
            # ... or as many, with the waits of sixteen warps.
            Config((16, 64), 16, 1),
            Config((16, 32), 4, 1),
        ),
    ),
    "rms_norm": Choices(
        ("NUMBERS",),
        (
            # Numbers of a program's rows: 16 per thread ...
            Config((2048,), 4, 1),
            # ... 8, to have more programs and registers to spare with residual and gate ...
            Config((1024,), 4, 1),
            Config((2048,), 8, 1),
            # ... or 32, for longer loads.
            Config((4096,), 4, 1),
        ),
    ),
    "step": Choices(
        ("TILE_V",),
        (
            Config((32,), 4, 1),
            # A step only moves the state: its tiles decide how many programs ask for memory.
            Config((16,), 4, 1),
            Config((64,), 4, 1),
            Config((32,), 2, 1),
            Config((64,), 8, 1),
        ),
    ),
    "moe_permute": Choices(
        ("TILE_D",),
        # Whole sectors of a row: numbers of a program, 8 per thread, or 4.
        (Config((1024,), 4, 1), Config((512,), 4, 1), Config((2048,), 8, 1)),
    ),
    "linear_cross_entropy": Choices(
        ("TILE_A",),
        (
            # A program walks over a row of logits twice: 16 numbers per thread and turn, ...
            Config((4096,), 8, 1),
            Config((8192,), 16, 1),
            Config((2048,), 4, 2),
            # ... or 8, with the next turn's under way.
            Config((4096,), 16, 2),
        ),
    ),
}
"""By kernel: `operator.kernel`, or the operator where its kernels are launched alike."""
