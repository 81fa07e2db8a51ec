"""How long the dashboard's front of a large run takes to show and to follow, in a real browser.

Needs Chromium (Debian: apt-get install chromium). The server is `mendel dashboard` in a process of
its own; times are the browser's: from the navigation until the points are drawn, and, for an
update, from the callback's request until the first byte of its answer (server time).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Page, sync_playwright
from record import save, spread
from synthetic_runs import Synthetic

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
DRAWN = ".js-plotly-plot .scatterlayer .point"


def first_view(page: Page, cdp: CDPSession, address: str) -> tuple[float, int, int]:
    """Seconds until points are drawn, bytes over the wire, bytes of answers to callbacks."""
    asked: set[str] = set()
    wire, answers = [0.0], [0.0]

    def sent(event: dict[str, Any]) -> None:
        if "_dash-update" in event["request"]["url"]:
            asked.add(event["requestId"])

    def received(event: dict[str, Any]) -> None:
        if event["requestId"] in asked:
            answers[0] += event["dataLength"]

    def finished(event: dict[str, Any]) -> None:
        wire[0] += event["encodedDataLength"]

    cdp.on("Network.requestWillBeSent", sent)
    cdp.on("Network.dataReceived", received)
    cdp.on("Network.loadingFinished", finished)
    began = time.perf_counter()
    page.goto(f"{address}front", wait_until="commit")
    page.wait_for_selector(DRAWN, timeout=60_000)
    seconds = time.perf_counter() - began
    page.wait_for_timeout(1000)
    return seconds, int(wire[0]), int(answers[0])


def updates(page: Page, run: Synthetic, count: int) -> tuple[list[float], list[float]]:
    """Server seconds of the update after each ten appended trials, and seconds until it shows."""
    server: list[float] = []
    shown: list[float] = []

    def heard(request: Any) -> None:
        if "_dash-update" in request.url and "front-graph" in (request.post_data or ""):
            timing = request.timing
            server.append((timing["responseStart"] - timing["requestStart"]) / 1000)

    page.on("requestfinished", heard)
    for _ in range(count):
        before = page.inner_text("#front-head")
        run.append(10)
        began = time.perf_counter()
        while page.inner_text("#front-head") == before:
            if time.perf_counter() - began > 30:
                raise RuntimeError("appended trials did not show within 30 seconds")
            page.wait_for_timeout(50)
        shown.append(time.perf_counter() - began)
        page.wait_for_timeout(500)
    return server, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        runs = Path(scratch) / "runs"
        run = Synthetic(runs, "large", 2 * options.trials)
        run.append(options.trials)
        command = [str(Path(sys.executable).parent / "mendel"), "dashboard", str(runs)]
        command += ["--port", "0"]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        try:
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address is not None
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
            times, wires, answers = [], [], []
            for attempt in range(options.repeats + 1):
                page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
                cdp = page.context.new_cdp_session(page)
                cdp.send("Network.enable")
                seconds, wire, answer = first_view(page, cdp, address[0])
                if attempt == 0:
                    cold = seconds
                else:
                    times.append(seconds)
                    wires.append(wire / 1e6)
                    answers.append(answer / 1e6)
                if attempt < options.repeats:
                    page.context.close()
            served, shown = updates(page, run, options.repeats)
            browser.close()
        finally:
            server.terminate()
            server.wait()
        rows = [
            {"measured": "first view, s", "value": spread(times), "limit": 2.0},
            {"measured": "first view right after the start, s", "value": cold, "limit": None},
            {"measured": "update, server time, s", "value": spread(served), "limit": 0.3},
            {"measured": "new trial shows after, s", "value": spread(shown), "limit": 5.0},
            {"measured": "first view, MB over the wire", "value": spread(wires), "limit": 3.0},
            {"measured": "first view, MB of data unpacked", "value": spread(answers), "limit": 3.0},
        ]
    load = os.getloadavg()[0]
    save(
        "dashboard",
        f"How does the dashboard bear {options.trials:,} trials?",
        rows,
        trials=options.trials,
        load_of_the_machine=load,
    )


if __name__ == "__main__":
    main()
