"""Which offsets of a compiled kernel can leave 32 bits, read off its Triton IR.

Every whole number gets the range that it can have where no size exceeds `LARGEST` and no axis of
the grid what CUDA allows in y and z, or `LARGEST` in x. Products of 32 bits that leave their range
wrap around on a GPU, and no interpreter of small shapes sees it.
"""

from __future__ import annotations

import re

LARGEST = 2**17
"""Of a size (tokens, channels, heads, programs): every size alone fits, and two of them do not."""
Range = tuple[int, int]
WIDE: Range = (-(2**63), 2**63 - 1)

RESULT = re.compile(r"\s*%([\w-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
VALUE = re.compile(r"%([\w-]+(?:#\d+)?)")
LOOP = re.compile(r"%([\w-]+) = %([\w-]+(?:#\d+)?) to %([\w-]+(?:#\d+)?) step")
PASSED = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi")


def wrapping_offsets(ir: str) -> list[str]:
    """The lines that add an offset to a pointer in which a sum or product of 32 bits can wrap."""
    ranges: dict[str, Range] = {}
    wraps: set[str] = set()
    found = []
    for full in ir.splitlines():
        line = full.split(" loc(")[0]
        if "tt.func" in line:
            for name in re.findall(r"%(\w+): i(?:32|64)", full):
                ranges[name] = (0, LARGEST)
            continue
        if "scf.for" in line and (loop := LOOP.search(line)):
            low, high = (ranges.get(loop[i], WIDE) for i in (2, 3))
            ranges[loop[1]] = (low[0], high[1])
            carried = re.findall(r"%([\w-]+) = ", line.partition("iter_args")[2])
            kinds = line.partition(" -> (")[2].partition(")")[0].split(", ")
            # A number that a loop carries may grow with every turn.
            wraps |= {v for v, kind in zip(carried, kinds, strict=False) if kind.endswith("i32")}
            continue
        match = RESULT.match(line)
        if match is None:
            continue
        name, op, rest = match.groups()
        inputs = [v for v in VALUE.findall(rest) if v != name]
        if op == "tt.addptr":
            if inputs[1] in wraps:
                found.append(line.strip())
            continue
        ranges[name] = _range(op, rest, [ranges.get(v, WIDE) for v in inputs])
        wraps.discard(name)  # regions beside each other use a name again
        narrow = re.search(r"(?:x|: )i32(?:>|$)", rest.rstrip()) is not None
        computed = op in ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
        low, high = ranges[name]
        if (narrow and computed and not -(2**31) <= low <= high < 2**31) or (
            op.startswith(("arith.", "tt.")) and op != "tt.load" and wraps.intersection(inputs)
        ):
            wraps.add(name)
    return found


def _range(op: str, rest: str, given: list[Range]) -> Range:
    if op == "arith.constant":
        number = re.search(r"dense<(-?\d+)>|^ (-?\d+) :", rest)
        return (int(number[1] or number[2]),) * 2 if number else WIDE
    if op == "tt.get_program_id":
        return (0, LARGEST if " x" in rest else 2**16 - 1)
    if op == "tt.get_num_programs":
        return (1, LARGEST)
    if op == "tt.make_range":
        end, start = (int(re.search(rf"{key} = (\d+)", rest)[1]) for key in ("end", "start"))  # type: ignore[index]
        return (start, end - 1)
    if op in PASSED:
        return given[0]
    if op == "arith.trunci":  # a number that the kernel knows to be one size
        return (max(given[0][0], -LARGEST), min(given[0][1], LARGEST))
    if len(given) < 2:
        return WIDE
    (a, b), (c, d) = given[-2:]
    corners = {
        "arith.addi": (a + c, b + d),
        "arith.subi": (a - d, b - c),
        "arith.muli": (a * c, a * d, b * c, b * d),
        "arith.divsi": (a, b, a // max(c, 1), b // max(c, 1), 0),
        "arith.remsi": (0, min(b, d - 1)),
        "arith.minsi": (min(a, c), min(b, d)),
        "arith.maxsi": (max(a, c), max(b, d)),
        "arith.select": (a, b, c, d),
    }.get(op, WIDE)
    return (min(corners), max(corners))
