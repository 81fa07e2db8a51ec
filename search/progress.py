"""What a running search says: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.live import Live
from rich.text import Text

from .driver import Progress
from .terminal import ascii_text, console, unicode_works
from .units import duration_text

PLAIN_SECONDS = 15.0
"""Between two lines where the output is no terminal."""
_BAR = 16


class SearchProgress:
    """A context manager; call it with each `Progress`. Everything goes to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        # Asked before the live display puts itself in front of the streams.
        self._unicode = unicode_works(sys.stderr)
        self._console = console(stderr=True)
        self._live: Live | None = None
        self._said = float("-inf")
        self._trials = -1

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(Text("starting workers"), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, now: Progress) -> None:
        if self._quiet:
            return
        line = progress_line(now)
        if not self._unicode:
            line = ascii_text(line)
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            return
        # A log wants few lines: one at times, and the last one.
        due = time.monotonic() - self._said >= PLAIN_SECONDS and now.finished != self._trials
        if due or now.state == "complete":
            self._said, self._trials = time.monotonic(), now.finished
            self._console.print(Text(line), soft_wrap=True)


def progress_line(now: Progress) -> str:
    """One line: trials done, time left, front size, hypervolume, failures."""
    share = min(1.0, now.finished / now.trials) if now.trials else 1.0
    full = round(share * _BAR)
    parts = [f"{'━' * full}{'╌' * (_BAR - full)} {now.finished}/{now.trials} trials"]
    if now.running:
        parts.append(f"{now.running} running")
    parts.append(f"front {now.front}")
    parts.append(f"hv {now.hypervolume:.3f}")
    parts.append(f"{now.failed} failed")
    if now.state == "complete":
        parts.append(f"took {duration_text(now.elapsed)}")
    else:
        left = "?" if now.eta is None else duration_text(now.eta)
        parts.append(f"{duration_text(now.elapsed)}, {left} left")
    return " · ".join(parts)
