"""A real Chromium for the tests of the dashboard, and where it comes from when it is missing."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mendel.search.dashboard.serve import Dashboard

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Plots in space need WebGL, which without a graphics card is drawn by the processor.
    "--enable-unsafe-swiftshader",
]
ARTIFACTS = Path(__file__).parent.parent / "test-artifacts"
MISSING = (
    f"{CHROMIUM} is missing: the dashboard's browser tests need it. Debian and Ubuntu: "
    "apt-get install -y chromium; elsewhere name it: CHROMIUM=/path/to/chromium make test"
)


def require_chromium() -> None:
    """Skip where there is no Chromium, with the sentence; under CI=true fail instead."""
    if CHROMIUM.exists():
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


@contextmanager
def serving(runs: Path) -> Iterator[Dashboard]:
    """The dashboard of a folder, in a thread of this process, on a free port."""
    served = Dashboard(runs, port=0)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.close()
        thread.join(10)


class Visit:
    """A page with its address; everything that the browser complains of is kept."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address.rstrip("/")
        self.troubles: list[str] = []
        self.asked: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.troubles.append(message.text)

    def open(self, path: str, waits_for: str = "main h1") -> None:
        self.page.goto(self.address + path)
        self.page.wait_for_selector(waits_for)

    def text(self, selector: str = "main") -> str:
        return str(self.page.inner_text(selector))

    def sees(self, text: str, selector: str = "main", seconds: float = 15) -> None:
        """Wait until a text stands in an element."""
        self.page.wait_for_function(
            "([s, t]) => { const e = document.querySelector(s);"
            " return e && (e.innerText || e.textContent).includes(t); }",
            arg=[selector, text],
            timeout=1000 * seconds,
        )

    def points(self, selector: str = "#front-graph") -> int:
        return int(self.page.locator(f"{selector} .scatterlayer .point").count())

    def shoot(self, name: str) -> Path:
        """A picture of the whole page among the artifacts of the test run."""
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{re.sub(r'[^a-z0-9-]', '-', name)}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def is_clean(self) -> None:
        """No error in the console, and nothing asked of another host."""
        assert not self.troubles, self.troubles
        foreign = [u for u in self.asked if not u.startswith((self.address, "data:", "blob:"))]
        assert not foreign, foreign
