"""The report and its plots: self-contained, escaped, with every group and a table beside each."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import QUESTION, REASON, made_run, made_study

from mendel.search.figures import curves_figure, hypervolume_figure
from mendel.search.figures_front import front_figure
from mendel.search.front import outcome_dict, outcome_of, shown_value
from mendel.search.pareto import as_losses
from mendel.search.report import report, write_report
from mendel.search.run import RunView, open_run
from mendel.search.source import find_genome
from mendel.search.store import RunStore
from mendel.search.terminal import Mistake


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return open_run(made_run(tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="module")
def html(run: RunView) -> str:
    return report(run)


class Reader(HTMLParser):
    """Tags with attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    page = Reader(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            assert name not in attributes, (tag, name)
    styles = re.findall(r"<style>(.*?)</style>", html, re.S)
    assert not any("url(" in style or "@import" in style for style in styles)


def test_text_from_a_study_is_escaped(html: str) -> None:
    page = Reader(html)
    assert QUESTION in "".join(page.text)
    assert REASON in "".join(page.text)
    # Ours: plotly, the figures' data, the page's own.
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == [
        None,
        "application/json",
        None,
    ]
    assert "alert(1)" not in "".join(re.findall(r"<script>(.*?)</script>", html, re.S)[-1:])


def test_the_figures_are_strict_json_with_a_place_each(html: str) -> None:
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    assert data is not None
    figures = json.loads(data[1], parse_constant=lambda name: pytest.fail(name))
    places = [a["id"] for tag, a in Reader(html).tags if a.get("class") == "plot"]
    # Two fronts, one hypervolume, one set of curves per proxy.
    assert list(figures) == places
    assert len(figures) == 5


def test_a_table_stands_beside_every_plot(html: str) -> None:
    parts = [p for p in re.split("<h[23]>", html) if 'class="plot"' in p]
    assert len(parts) == 4
    for part in parts:
        assert part.rindex('class="plot"') < part.index("<table")


def test_the_page_names_what_happened(run: RunView, html: str) -> None:
    text = "".join(Reader(html).text)
    for name in ("transformer++", "mamba2", "striped", "jamba-like", "griffin-like"):
        assert name in text
    for trial in outcome_of(run).front:
        assert trial.notation in text
    assert "params.max by 120" in text
    assert "the space holds no more candidates" in text
    assert html.count('<svg class="genome"') == min(
        8, sum(t.baseline is None for t in outcome_of(run).front)
    )


def test_it_is_written_into_the_run(run: RunView, tmp_path: Path) -> None:
    assert write_report(run) == run.folder / "report.html"
    assert write_report(run, tmp_path / "x.html").read_text(encoding="utf-8").startswith("<!doc")


def test_an_empty_run_has_a_report_too(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    with RunStore.open(study):
        pass
    page = "".join(Reader(report(open_run(study.folder))).text)
    assert "no front yet" in page
    assert "new" in page


def newer(tmp_path: Path) -> RunView:
    """A run whose genomes another version wrote."""
    folder = made_run(tmp_path)
    events = folder / "events.jsonl"
    text = events.read_text()
    assert '"grammar":1' in text
    events.write_text(text.replace('"grammar":1', '"grammar":99'))
    return open_run(folder)


def test_genomes_of_another_version_are_not_drawn_but_told(tmp_path: Path) -> None:
    run = newer(tmp_path)
    page = " ".join(Reader(report(run)).text)
    assert "This version of mendel cannot draw it: grammar 99 is newer than" in page
    trial = outcome_of(run).front[0]
    with pytest.raises(Mistake, match=f"made:{trial.number}: grammar 99 is newer"):
        find_genome(f"{run.folder}:{trial.number}")


def test_the_front_is_not_dominated_and_dominates_the_rest(run: RunView) -> None:
    found = outcome_of(run)

    def losses(trial: object) -> list[float]:
        return [g.loss(trial.values[g.label]) for g in found.goals]  # type: ignore[attr-defined]

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    for trial in found.front:
        assert not any(beats(losses(o), losses(trial)) for o in found.complete)
    for trial in found.dominated:
        assert any(beats(losses(o), losses(trial)) for o in found.front)
    assert found.knee in {t.number for t in found.front}
    assert len(found.failed) == len(found.infeasible) == 1
    volumes = [v for _, v in found.history]
    assert volumes == sorted(volumes)
    rows = as_losses([losses(t) for t in found.front])
    assert volumes[-1] == pytest.approx(run.frame().hypervolume(rows))


def test_some_of_the_objectives(run: RunView) -> None:
    found = outcome_of(run, ["cache_bytes"])
    least = min(t.values["cache_bytes"] for t in found.complete)
    assert {t.values["cache_bytes"] for t in found.front} == {least}
    with pytest.raises(Mistake, match="has no objective 'speed'; it has quality, cache_bytes"):
        outcome_of(run, ["speed"])


def test_every_trial_stands_in_the_listing_once(run: RunView) -> None:
    listing = outcome_dict(outcome_of(run))
    parts = ("front", "dominated", "stopped", "infeasible", "failed", "running")
    numbers = sorted(t["trial"] for part in parts for t in listing[part])
    assert numbers == [t.number for t in run.trials]
    assert listing["failed"][0]["failure"] == {"kind": "memory", "reason": REASON}
    json.dumps(listing, allow_nan=False)


def test_groups_have_shapes_of_their_own(run: RunView) -> None:
    found = outcome_of(run)
    figure = front_figure(found, found.goals[1], found.goals[0])
    points = [t for t in figure.data if t.mode == "markers"]
    assert len({t.marker.symbol for t in points}) == len(points) >= 3
    assert sum(len(t.x) for t in points) == sum(
        bool(t.values) for t in run.trials if t.state != "running"
    )
    labels = {a.text for a in figure.layout.annotations}
    assert {str(t.baseline) for t in found.baselines} <= labels
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.yaxis.type == "linear"


def test_measured_values_have_error_bars(run: RunView) -> None:
    found = outcome_of(run)
    figure = front_figure(found, found.goals[2], found.goals[0])
    for trace in figure.data:
        if trace.mode == "markers":
            assert all(v > 0 for v in trace.error_x.array)
            assert trace.error_y.array is None
    low, high = figure.layout.xaxis.range
    highs = [t.rungs[-1].measurements["latency_decode"].high for t in found.complete]
    to_axis = math.log10 if figure.layout.xaxis.type == "log" else float
    assert low < to_axis(max(highs)) < high


def test_a_measured_value_shows_its_spread(run: RunView) -> None:
    found = outcome_of(run)
    text = shown_value(found.front[0], found.goals[2])
    assert re.fullmatch(r"[\d.]+ (ms|µs) \([\d.]+( µs| ms)? to [\d.]+ (ms|µs)\)", text)


def test_hypervolume_marks_the_baselines(run: RunView) -> None:
    found = outcome_of(run)
    lines = {t.name: t for t in hypervolume_figure(found).data}
    assert len(lines["baseline"].x) == len(found.baselines)
    assert len(lines["hypervolume"].x) == len(found.complete)


def test_curves_leave_out_what_has_no_value() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0}]
    figure = curves_figure({"a<b": rows}, "loss", "loss", {"a<b"})
    assert list(figure.data[0].x) == [1, 3]
    assert figure.data[0].name == "a&lt;b"
    assert figure.data[0].line.dash == "dash"
