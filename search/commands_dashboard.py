"""The command that serves the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import examples
from .source import RUNS
from .terminal import Mistake, say

app = typer.Typer()


@app.command(
    epilog=examples(
        "mendel dashboard",
        "mendel dashboard runs/quickstart --port 9000",
        "mendel dashboard /data/runs --host 0.0.0.0",
    )
)
def dashboard(
    runs: Annotated[
        Path, typer.Argument(help="The folder of the runs, or one run's folder.")
    ] = RUNS,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8050,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name under which browsers may reach it; repeatable."),
    ] = None,
) -> None:
    """Serve a web page that follows the runs: fronts, trials, comparisons, what matters."""
    # Dash takes a second to load, which no other command should pay.
    from .dashboard.serve import Dashboard

    if runs != RUNS and not runs.is_dir():
        what = "is no folder" if runs.exists() else "does not exist"
        raise Mistake(f"{runs} {what}; give the folder that holds the runs")
    try:
        served = Dashboard(runs, host, port, name or [])
    except OSError as error:
        raise Mistake(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; "
            "choose another with --port or --host"
        ) from None
    say(f"The dashboard of {runs} is at {served.address}")
    say("Ctrl-C ends it; the runs are only read.")
    served.run()
