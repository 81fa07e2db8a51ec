"""The terminal drawing and the SVG: width, alphabet, repeats, branches, sharing, totals."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.notation import parse
from mendel.genome.presets import load, names
from mendel.search.draw import drawing
from mendel.search.outline import Outline, outline
from mendel.search.picture import picture
from mendel.search.units import bytes_text, count_text, duration_text, ratio_text, value_text

SHARING = (
    "{width=64} gqa(kv_heads=2, features=@a) > swiglu(weights=@b) > [mamba2 > swiglu]*3 > "
    "[gqa(kv_heads=2, features=@a) | mamba2] > swiglu(weights=@b)"
)
LATE = (
    "{width=64} [gated-deltanet(weights=@a) | gqa(kv_heads=2, features=@k) | "
    "mamba2(weights=@m)](join=norm) > swiglu > [gated-deltanet(weights=@a) | "
    "gqa(kv_heads=2, features=@k) | mamba2(weights=@m)](join=gate)"
)
"""Several branches of a slot share."""
MANY = "{width=64} [mha | mamba2 | gqa(kv_heads=2) | swa(window=128) | retnet] > swiglu"
LONG = "{width=64} gqa(heads=4, kv_heads=2, window=64, pattern=sliding) > deepseek-moe"


def content(notation: str | Genome) -> Outline:
    genome = parse(notation) if isinstance(notation, str) else notation
    return outline(genome, cost(genome))


def lines(notation: str | Genome, width: int = 80, unicode: bool = True) -> list[str]:
    return [line.plain for line in drawing(content(notation), width, unicode)]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("notation", [SHARING, MANY, LONG])
def test_no_line_is_longer_than_the_terminal(notation: str, width: int) -> None:
    assert max(map(len, lines(notation, width))) <= width


@pytest.mark.parametrize("name", names())
def test_every_preset_is_drawn_at_eighty_columns(name: str) -> None:
    drawn = lines(load(name, depth=12))
    assert max(map(len, drawn)) <= 80
    assert any("whole model" in line for line in drawn)


@pytest.mark.parametrize("notation", [SHARING, MANY, LONG])
def test_without_unicode_there_is_only_ascii(notation: str) -> None:
    fancy, bare = lines(notation), lines(notation, unicode=False)
    assert all(line.isascii() for line in bare)
    assert [len(line) for line in bare] == [len(line) for line in fancy]


def test_repeats_are_folded_and_counted() -> None:
    drawn = lines("{width=64} [mamba2 > swiglu]*5")
    text = "\n".join(drawn)
    assert "×5" in text
    assert text.count("mamba2") == text.count("swiglu") == 1


def test_a_fold_begins_at_a_mixer() -> None:
    found = content("{width=64} mha > swiglu > [mamba2 > swiglu]*3")
    repeated = next(block for block in found.blocks if block.count > 1)
    assert repeated.rows[0].boxes[0].name == "mamba2"
    assert sum(block.count * len(block.rows) for block in found.blocks) == 8


@pytest.mark.parametrize("notation", [SHARING, MANY, LONG, "{width=64} [mamba2*2 > mha]*4"])
def test_the_fold_holds_every_slot_once(notation: str) -> None:
    genome = parse(notation)
    unfolded = [
        row.pattern
        for block in content(notation).blocks
        for _ in range(block.count)
        for row in block.rows
    ]
    single = outline(genome, cost(genome))
    costs = [cost(genome).slots[i] for i in range(len(genome.slots))]
    assert [p[2] for p in unfolded] == costs
    names_drawn = [sorted(box.name for box in p[0]) for p in unfolded]
    assert names_drawn == [sorted(op.name for op in slot.branches) for slot in genome.slots]
    assert single.links == content(notation).links


def test_a_chain_stands_one_below_the_other() -> None:
    chain = "[shared-block(weights=@a) | mamba2](join=chain{})"
    genome = f"{{width=64}} {chain.format(', tokens=0.5')} > swiglu > {chain.format('')}"
    drawn = lines(genome)[1:]
    names = ("shared-block", "chain", "mamba2", "swiglu")
    order = [name for line in drawn for name in names if name in line]
    assert order == ["shared-block", "chain", "mamba2", "swiglu", "shared-block", "chain", "mamba2"]
    # The rail of shared weights ends at the blocks.
    assert [line for line in drawn if "├─╮" in line or "├─╯" in line] == [
        line for line in drawn if "shared-block" in line
    ]
    svg = picture(content(genome), "a chain")
    found = re.findall(">(shared-block|chain|mamba2|tokens=0.5)<", svg)
    assert found == [
        *("shared-block", "tokens=0.5", "chain", "mamba2"),
        *("shared-block", "chain", "mamba2"),
    ]


def test_branches_stand_side_by_side_with_their_join() -> None:
    drawn = lines("{width=64} [gqa(kv_heads=2) | mamba2](join=norm) > swiglu")
    row = next(line for line in drawn if "gqa" in line)
    assert "mamba2" in row
    assert any("norm" in line and "╰" in line and "╯" in line for line in drawn)


def test_sharing_is_drawn_as_rails() -> None:
    drawn = lines(SHARING)
    lends = next(i for i, line in enumerate(drawn) if "lends kv a" in line)
    takes = max(i for i, line in enumerate(drawn) if "◂" in line)
    assert lends < takes
    # The arrow ends at the branch that takes, which stands next to the rails.
    short = lines("{width=64} gqa(features=@a) > [gqa(features=@a) | mamba2] > swiglu")
    slot = next(line for line in short if "gqa" in line and "mamba2" in line)
    assert slot.index("mamba2") < slot.index("gqa") < slot.index("◂")
    assert all("│" in line[44:60] or "┼" in line[44:60] for line in drawn[lends + 1 : takes])
    assert sum("weights b" in line for line in drawn) == 2
    assert any("┆" in line for line in drawn)


def test_numbers_are_the_costs() -> None:
    genome = parse("{width=64} mha > moe(experts=8, top_k=2)")
    total = cost(genome).total
    text = "\n".join(lines(genome))
    whole = next(line for line in lines(genome) if "whole model" in line)
    assert whole.split()[2:] == [
        count_text(total.params),
        *bytes_text(total.state_bytes).split(),
        count_text(total.flops_per_token),
    ]
    assert count_text(total.active_params) in text
    for slot in cost(genome).slots:
        assert count_text(slot.params) in text


@pytest.mark.parametrize("notation", [SHARING, MANY, LONG])
def test_the_svg_is_well_formed_and_needs_nothing(notation: str) -> None:
    svg = picture(content(notation), "a <title> & more")
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root[0].text == "a <title> & more"
    assert "href" not in svg
    assert "url(" not in svg
    shown = {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {op.name for _, _, op in parse(notation).ops()} <= shown


def test_the_svg_keeps_everything_inside() -> None:
    root = ET.fromstring(picture(content(SHARING), "x"))
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + w <= width
        assert y >= 0
        assert y + h <= height
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path.attrib["d"])]
        assert max(numbers[0::2]) <= width
        assert max(numbers[1::2]) <= height


def test_no_two_rails_run_into_each_other() -> None:
    drawn = lines(LATE)
    assert sum("├─" in line or "◂" in line for line in drawn) == 6


def test_what_does_not_fit_side_by_side_is_stacked_uncut() -> None:
    text = "\n".join(
        lines("{width=64} [mha(conv=4) | gated-deltanet | rg-lru](join=top1) > swiglu", 60)
    )
    for word in ("3 branches, top1", "mha(conv=4)", "gated-deltanet", "rg-lru"):
        assert word in text


SVG = "{http://www.w3.org/2000/svg}"


def boxes(root: ET.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of every box."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        found.append((x, y, x + w, y + h))
    return found


@pytest.mark.parametrize("notation", [SHARING, LATE, MANY, LONG])
def test_the_svg_keeps_words_in_their_boxes(notation: str) -> None:
    root = ET.fromstring(picture(content(notation), "x"))
    seen = 0
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        if text.attrib["text-anchor"] != "middle":
            continue
        wide = 7.9 * len(text.text or "") / 2
        left, _, right, _ = next(b for b in boxes(root) if b[0] < x < b[2] and b[1] < y < b[3])
        assert left <= x - wide
        assert x + wide <= right
        seen += 1
    assert seen > 4


@pytest.mark.parametrize("notation", [SHARING, LATE])
def test_no_rail_of_the_svg_crosses_a_box(notation: str) -> None:
    root = ET.fromstring(picture(content(notation), "x"))
    rails = [p for p in root.iter(f"{SVG}path") if p.attrib["class"] in ("features", "weights")]
    assert len(rails) >= 6
    for path in rails:
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path.attrib["d"])]
        points = list(zip(numbers[0::2], numbers[1::2], strict=True))
        for (x, y), (to, end) in pairwise(points):
            for left, top, right, bottom in boxes(root):
                across = y == end and top < y < bottom and min(x, to) < right and max(x, to) > left
                assert not across, path.attrib["d"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.96e3, "1.00M"),
        (1234, "1.23K"),
        (45_600, "45.6K"),
        (7e9, "7.00G"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.50 KiB")]
)
def test_bytes(value: float, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0871, "0.0871"), (1.0, "1.00"), (9.678, "9.68"), (99.94, "99.9"), (315.08, "315")],
)
def test_ratios(value: float, text: str) -> None:
    assert ratio_text(value) == text


def test_durations_and_values() -> None:
    assert duration_text(59.7) == "1 min 00 s"
    assert duration_text(3725) == "1 h 02 min"
    assert value_text(0.00123, "s") == "1.23 ms"
    assert value_text(0.5, "score") == "0.500"
