"""Serve the dashboard from this process."""

from __future__ import annotations

import gc
import secrets
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from . import view_front
from .app import make_app
from .guard import is_loopback
from .watch import Watch

PORT = 8050


class _Quiet(WSGIRequestHandler):
    """One line per request would be a line every second."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


class Dashboard:
    """A server over a folder of runs. `port` 0 takes a free one; `address` is what to open.

    Beyond the loopback a token is needed; it stands in the address. Raises OSError where the
    address cannot be taken."""

    def __init__(
        self,
        runs: Path,
        host: str = "127.0.0.1",
        port: int = PORT,
        names: Sequence[str] = (),
    ) -> None:
        wide = not is_loopback(host)
        self.token = secrets.token_urlsafe(24) if wide else None
        self.watch = Watch(runs)
        app = make_app(self.watch, [host, *names], self.token, wide)
        # A port that is taken would end the process with werkzeug's own words.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        self._server: BaseWSGIServer = make_server(
            host, port, app.server, threaded=True, request_handler=_Quiet
        )
        self.port = self._server.server_port
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        query = f"?token={self.token}" if self.token else ""
        self.address = f"http://{shown}:{self.port}/{query}"

    def run(self) -> None:
        """Serve until `close` or an interrupt."""
        threading.Thread(target=self._read, daemon=True).start()
        self._server.serve_forever()

    def _read(self) -> None:
        """Read large runs before the first page asks for them."""
        self.watch.poll()
        with self.watch.lock:
            # The first plot of a process takes plotly half a second longer than the next.
            for watched in self.watch.runs.values():
                if watched.view is not None and watched.run.trials:
                    view_front.make(self.watch, watched, {})
                    break
        # The records of a large run are hundreds of thousands of objects that stay: a full
        # collection of garbage would look at each of them and hold a page up for half a second.
        gc.freeze()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
