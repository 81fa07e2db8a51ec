"""The dashboard in a real browser: what a person does there."""

import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import ARGUMENTS, CHROMIUM, Visit, require_chromium, serving
from playwright.sync_api import Browser, sync_playwright
from runs import QUESTION, made_run

from mendel.genome.files import from_dict
from mendel.search.driver import search
from mendel.search.run import open_run
from mendel.search.study import load_study

LIVE = """\
name: live
space:
  width: 16
  depth: [2, 3]
  operators: {{gqa: {{heads: [2]}}, mamba2: {{key_dim: [8]}}, swiglu: {{expansion: [1.0]}}}}
proxies: {{recall: {{task: in-context-recall, steps: 3, batch: 2, length: 16}}}}
objectives: [quality, params]
search: {{trials: 6, population: 2}}
baselines: []
workers: {{executor: serial}}
runs: "{runs}"
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require_chromium()
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    made_run(folder, trials=40)
    (folder / "made.yaml").unlink()
    return folder


@pytest.fixture(scope="module")
def address(browser: Browser, runs: Path) -> Iterator[str]:
    with serving(runs) as served:
        yield served.address


@pytest.fixture(params=["light"])
def visit(browser: Browser, address: str, request: Any) -> Iterator[Visit]:
    yield from _visit(browser, address, request.param)


def _visit(browser: Browser, address: str, scheme: str = "light") -> Iterator[Visit]:
    context = browser.new_context(
        viewport={"width": 1360, "height": 900}, color_scheme=scheme, accept_downloads=True
    )
    context.set_default_timeout(15_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    made = Visit(context.new_page(), address)
    yield made
    context.close()
    made.is_clean()


def test_runs_are_listed_and_lead_to_the_front(visit: Visit) -> None:
    visit.open("/", "main table")
    assert QUESTION in visit.text()
    assert visit.text("main tbody tr").split("\t")[1:2] == ["complete"]
    visit.shoot("runs")
    visit.page.click("main table a")
    visit.sees("Front of made")


def test_axes_are_chosen_and_the_plot_follows(visit: Visit) -> None:
    visit.open("/front?run=made", "#front-graph .point")
    assert visit.points() > 30
    for name in ("transformer++", "knee"):
        assert name in visit.text("#front-graph")
    visit.shoot("front")
    _choose(visit, "front-x", "latency_decode ↓")
    visit.sees("latency_decode ↓", "#front-graph .g-xtitle")
    # Latency was measured: its spread stands as bars.
    visit.page.wait_for_selector("#front-graph .xerror", state="attached")
    _choose(visit, "front-third", "cache_bytes ↓")
    visit.page.wait_for_selector("#front-graph .colorbar")
    visit.shoot("front-colour")
    _choose(visit, "front-mode", "third axis")
    visit.page.wait_for_selector("#front-graph .gl-container canvas")
    visit.page.wait_for_timeout(500)
    visit.shoot("front-space")


def test_a_narrow_window_cuts_nothing(visit: Visit) -> None:
    names = ".annotation:has(.annotation-arrow-g)"
    visit.open("/front?run=made", "#front-graph .point")
    assert visit.page.locator(f"#front-graph {names}:visible").count() > 3
    visit.page.set_viewport_size({"width": 420, "height": 900})
    assert visit.page.locator(f"#front-graph {names}:visible").count() == 0
    for view in ("front", "trial", "compare", "matters", "budget"):
        visit.open(f"/{view}?run=made")
        visit.page.wait_for_selector(".js-plotly-plot .main-svg")
        wide = visit.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, view
    visit.open("/matters?run=made", "#matters-parallel .xtick")
    # plotly draws labels that would leave the plot transparent.
    shown = visit.page.evaluate(
        """() => [...document.querySelectorAll('#matters-parallel .xtick text')]
            .filter(t => getComputedStyle(t).opacity > 0 && getComputedStyle(t).display != 'none')
            .map(t => t.textContent)"""
    )
    assert {"cache_bytes ↓", "latency_decode ↓"} <= set(shown)
    visit.shoot("narrow-matters")


def _choose(visit: Visit, control: str, option: str) -> None:
    visit.page.click(f"#{control}")
    visit.page.get_by_role("option", name=option).or_(
        visit.page.locator(".dash-dropdown-option", has_text=option)
    ).first.click()


def test_seeds_give_bars_and_random_search_stands_beside(browser: Browser, tmp_path: Path) -> None:
    """The baselines were trained by both seeds; their bars span what the two runs scored."""
    made_run(tmp_path, trials=12)
    made_run(tmp_path, trials=12, name="other-seed", seed=1)
    made_run(tmp_path, trials=12, name="by-chance", seed=2, sampler="random")
    runs = {name: open_run(tmp_path / name) for name in ("made", "other-seed")}
    with serving(tmp_path) as served:
        for visit in _visit(browser, served.address):
            visit.open("/front?run=made", "#front-graph .point")
            visit.page.wait_for_selector("#front-graph .yerror", state="attached")
            bars = visit.page.evaluate(
                """() => {
                  const found = {};
                  for (const t of document.querySelector('#front-graph .js-plotly-plot')._fullData)
                    (t.customdata || []).forEach((n, i) => {
                      const bar = t.error_y;
                      if (bar && bar.array) found[n] = [t.y[i] - bar.arrayminus[i],
                                                        t.y[i] + bar.array[i]];
                    });
                  return found;
                }"""
            )
            scores = sorted(run.trial(1).values["quality"] for run in runs.values())
            assert bars["1"] == pytest.approx(scores)
            assert scores[0] < scores[1]
            visit.sees("by-chance is random search with the same study.", "#front-progress")
            assert "by-chance" in visit.text("#volume-trials")
            visit.shoot("front-seeds")


def test_a_point_is_selected_and_its_detail_shows(visit: Visit, runs: Path) -> None:
    visit.open("/front?run=made", "#front-graph .point")
    found = open_run(runs / "made")
    best = min(found.trials, key=lambda t: t.values.get("cache_bytes", 1e12))
    place = visit.page.evaluate(
        """number => {
          const plot = document.querySelector('#front-graph .js-plotly-plot');
          for (const trace of plot._fullData) {
            const at = Array.from(trace.customdata || []).indexOf(number);
            if (at >= 0) {
              const box = plot.getBoundingClientRect(), layout = plot._fullLayout;
              return [box.x + layout.xaxis._offset + layout.xaxis.d2p(trace.x[at]),
                      box.y + layout.yaxis._offset + layout.yaxis.d2p(trace.y[at])];
            }
          }
        }""",
        best.number,
    )
    visit.page.mouse.move(place[0], place[1])
    visit.page.wait_for_selector("#front-graph .hovertext")
    visit.page.mouse.click(place[0], place[1])
    visit.sees(best.notation, "#front-detail")
    visit.sees("chosen", "#front-graph .legend")
    picture = visit.page.locator("#front-detail img")
    visit.page.wait_for_function("document.querySelector('#front-detail img').naturalWidth > 200")
    assert best.notation in str(picture.get_attribute("alt"))
    visit.shoot("front-chosen")
    visit.page.click("#front-detail a:has-text('All about it')")
    visit.sees("Costs per slot")


def test_a_trial_shows_everything_and_its_notation_is_copied(visit: Visit, runs: Path) -> None:
    visit.open("/trial?run=made&trial=17", "main h2")
    trial = open_run(runs / "made").trial(17)
    visit.sees("Lineage")
    assert visit.text("main .wrap table tbody tr").split("\t")[-1] == "250 µs"
    for text in ("recall", "copying", "Scores per rung", "crossover: slots cut at 1", "baseline"):
        assert text in visit.text()
    visit.page.wait_for_selector("#trial-curve-1 .js-plotly-plot .lines")
    visit.page.click("#copy")
    visit.sees("Copied.")
    assert visit.page.evaluate("navigator.clipboard.readText()") == trial.notation
    visit.shoot("trial")
    failed = next(t for t in open_run(runs / "made").trials if t.state == "failed")
    visit.page.fill("#trial-number", str(failed.number))
    visit.page.press("#trial-number", "Enter")
    visit.sees("Why it failed")
    assert "<b>tried</b>" in visit.text()
    visit.shoot("trial-failed")


def test_an_export_is_downloaded_and_reads_back(visit: Visit, runs: Path) -> None:
    visit.open("/trial?run=made&trial=17", "text=Download genome")
    with visit.page.expect_download() as waiting:
        visit.page.click("text=Download genome")
    packed = zipfile.ZipFile(io.BytesIO(Path(waiting.value.path()).read_bytes()))
    name = next(n for n in packed.namelist() if n.endswith("genome.json"))
    genome = from_dict(json.loads(packed.read(name)))
    assert genome == from_dict(open_run(runs / "made").trial(17).genome)


def test_designs_are_compared(visit: Visit) -> None:
    visit.open("/compare?run=made&with=17,0,preset:mamba2", "#compare-body table")
    visit.sees("From trial 17 to transformer++")
    assert "×" in visit.text("#compare-body")
    assert "not trained" in visit.text("#compare-body")
    assert visit.page.locator(".pictures img").count() == 3
    visit.page.wait_for_selector("#compare-curve-0 .lines")
    assert "Training loss on recall" in visit.page.content()
    visit.shoot("compare")
    visit.page.fill("#compare-add", "20")
    visit.page.press("#compare-add", "Enter")
    visit.sees("From trial 17 to trial 20")


def test_what_matters_and_the_budget(visit: Visit) -> None:
    visit.open("/matters?run=made", "#matters-importance .point path")
    assert "PED-ANOVA" in visit.text()
    _choose(visit, "matters-goal", "cache_bytes ↓")
    visit.sees("Importance for cache_bytes")
    visit.page.wait_for_selector("#matters-parallel .lines")
    assert "Traits and objectives per trial" in visit.page.content()
    visit.shoot("matters")
    visit.page.click("nav >> text=Budget")
    visit.page.wait_for_selector("#budget-rungs .bars")
    assert "trials stopped early" in visit.text()
    visit.shoot("budget")


def test_keyboard_alone_reaches_a_trial(visit: Visit) -> None:
    visit.open("/front?run=made", "#front-table table")
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("document.activeElement.closest('#front-table a') !== null"):
            break
    visit.page.keyboard.press("Enter")
    visit.sees("Costs per slot")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, address: str, scheme: str) -> None:
    views = {
        "/": "main table",
        "/front?run=made": "#front-graph .point",
        "/trial?run=made&trial=17": "#trial-curve-1 .lines",
        "/compare?run=made": "#compare-body table",
        "/matters?run=made": "#matters-parallel .lines",
        "/budget?run=made": "#budget-rungs .bars",
    }
    for visit in _visit(browser, address, scheme):
        for path, waits_for in views.items():
            visit.open(path, waits_for)
            found = Axe().run(visit.page).response["violations"]
            assert [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found] == [], path
            visit.shoot(f"axe-{scheme}-{path.strip('/').partition('?')[0] or 'runs'}")


def test_a_real_search_shows_while_it_runs(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "live.yaml"
    runs = tmp_path / "runs"
    runs.mkdir()
    path.write_text(LIVE.format(runs=runs), encoding="utf-8")
    study = load_study(path)
    with serving(runs) as served:
        for visit in _visit(browser, served.address):
            visit.open("/front?run=live")
            visit.sees("There is no run")
            thread = threading.Thread(target=search, args=(study,))
            thread.start()
            visit.page.wait_for_selector("#front-graph .point", timeout=60_000)
            _zoom_in(visit)
            before = visit.page.evaluate(_RANGE)
            visit.sees("6 / 6", "#front-head", 60)
            thread.join()
            visit.sees("complete", "#where", 10)
            assert visit.page.evaluate(_RANGE) == before
            visit.shoot("live")


_RANGE = "document.querySelector('#front-graph .js-plotly-plot')._fullLayout.xaxis.range.slice()"


def _zoom_in(visit: Visit) -> None:
    box = visit.page.locator("#front-graph .nsewdrag").first.bounding_box()
    assert box is not None
    before = visit.page.evaluate(_RANGE)
    visit.page.mouse.move(box["x"] + 60, box["y"] + 60)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 260, box["y"] + 260, steps=4)
    visit.page.mouse.up()
    visit.page.wait_for_function(f"JSON.stringify({_RANGE}) !== '{json.dumps(before)}'")


def test_a_folder_that_goes_and_comes_back(browser: Browser, tmp_path: Path, runs: Path) -> None:
    place = tmp_path / "runs"
    shutil.copytree(runs, place)
    with serving(place) as served:
        for visit in _visit(browser, served.address):
            visit.open("/front?run=made", "#front-graph .point")
            shutil.rmtree(place / "made")
            visit.sees("There is no run in")
            shutil.rmtree(place)
            visit.sees("does not exist")
            visit.shoot("gone")
            shutil.copytree(runs, place)
            visit.page.wait_for_selector("#front-graph .point")


def _started(**other: Any) -> dict[str, Any]:
    """The `start` event of a small genome, for journals written by hand."""
    genome = {"grammar": 1, "width": 16, "slots": [{"op": "gqa", "genes": {"heads": 2}}]}
    event = {"event": "start", "at": "2026-01-01T00:00:00.000+00:00", "trial": 0}
    event |= {"genome": genome, "notation": "gqa(heads=2)", "hash": "ab", "baseline": None}
    return event | {"parents": [], "variation": "random", "constraints": {}, **other}


def _journal(runs: Path, name: str, lines: list[Any], tail: str = "") -> None:
    folder = runs / name
    folder.mkdir(parents=True)
    study = LIVE.format(runs=runs).replace("name: live", "name: made-by-hand")
    (folder / "study.yaml").write_text(study, encoding="utf-8")
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (folder / "events.jsonl").write_text(text + tail, encoding="utf-8")


def _robust_runs(runs: Path) -> None:
    at = "2026-01-01T00:00:05.000+00:00"
    begin = {"event": "begin", "at": at, "study": "x", "workers": 1}
    failure = {"kind": "diverged", "reason": "the <i>loss</i> is not finite", "detail": ""}
    failed = {"event": "end", "at": at, "trial": 0, "state": "failed", "failure": failure}
    newer = {"grammar": 99, "width": 16, "slots": [{"op": "hyper-mixer"}]}
    _journal(runs, "fresh", [begin])
    _journal(runs, "under-way", [begin, _started()])
    _journal(runs, "only-failures", [begin, _started(), failed])
    _journal(runs, "truncated", [begin, _started(), "{not json", '{"event":"end"'], '{"ev')
    _journal(runs, "newer", [begin, _started(genome=newer, notation="hyper-mixer")])
    _journal(runs, "<b>odd & näme", [begin, _started()])
    (runs / "broken").mkdir()
    (runs / "broken" / "study.yaml").write_text("name: [unclosed", encoding="utf-8")


def test_every_trouble_is_a_sentence(browser: Browser, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with serving(runs) as served:
        for visit in _visit(browser, served.address):
            visit.open("/")
            visit.sees("There is no run in")
            visit.shoot("robust-empty")
            _robust_runs(runs)
            visit.sees("unreadable")
            visit.sees("<b>odd & näme")
            expected = {
                "fresh": {"front": "No trial has begun yet"},
                "under-way": {
                    "front": "no front yet",
                    "trial": "No rung of its training has ended",
                    "matters": "0 trials were trained to the end",
                    "budget": "No rung of any trial has ended yet",
                    "compare": "Costs and results",
                },
                "only-failures": {"front": "failed", "trial": "the <i>loss</i> is not finite"},
                "truncated": {"front": "2 lines of this run's events could not be read"},
                "newer": {"trial": "newer than this version of mendel", "front": "no front yet"},
                "broken": {"front": "This run cannot be read"},
                "gone": {"front": "There is no run gone"},
                "../../etc": {"front": "There is no run ../../etc"},
            }
            for name, views in expected.items():
                for view, words in views.items():
                    visit.open(f"/{view}?run={quote(name)}", "main h1")
                    visit.sees(words)
                    if view in ("front", "trial"):
                        visit.shoot(f"robust-{name.strip('./')}-{view}")
            visit.open("/front?run=broken")
            visit.sees("unreadable", "#where")
            visit.open("/trial?run=under-way&trial=7", "main h1")
            visit.sees("The run has no trial 7")
