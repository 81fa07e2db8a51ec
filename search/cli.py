"""The command line: `mendel`. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from ..genome.devices import DeviceError
from ..genome.files import GenomeFileError
from ..genome.imported import ConfigurationError
from ..genome.notation import NotationError
from ..genome.presets import PresetError
from ..genome.rules import InvalidGenome
from ..genome.scale import ScaleError
from ..genome.small import SmallError
from ..genome.star import StarError
from ..primitives.base import GeneError
from ..proxies.task import ProxyError
from .commands_compare import app as comparing
from .commands_dashboard import app as web
from .commands_import import app as importing
from .commands_list import app as listing
from .commands_look import app as look
from .commands_result import app as result
from .commands_run import app as compute
from .commands_scale import app as scaling
from .commands_setup import app as setup
from .driver import Interrupted
from .store import RunError
from .study_file import StudyError
from .terminal import Mistake, say, warn

USAGE, INTERRUPTED, BROKEN_PIPE, FAULT = 2, 130, 141, 1
"""Exit codes: a user's mistake; Ctrl-C and a closed pipe as shells count them; a fault of ours."""

MISTAKES = (
    Mistake,
    StudyError,
    RunError,
    GeneError,
    NotationError,
    GenomeFileError,
    ConfigurationError,
    InvalidGenome,
    PresetError,
    SmallError,
    ProxyError,
    DeviceError,
    ScaleError,
    StarError,
)

# The parser's error class has moved between versions of typer; this relation holds in all of them.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="mendel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Breed hybrid language models: search an architecture space, look at what it found, "
    "take the winners along.",
    epilog="Begin with: mendel init, then mendel search study.yaml",
)
for _part in (compute, result, look, comparing, scaling, listing, importing, web, setup):
    app.add_typer(_part)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"mendel {version('mendel')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also: MENDEL_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        # In the environment, so that worker processes see it too.
        os.environ["MENDEL_DEBUG"] = "1"


def debugging() -> bool:
    return os.environ.get("MENDEL_DEBUG", "") not in ("", "0")


def run(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Errors go to stderr as one line."""
    try:
        result = app(arguments, prog_name="mendel", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            # How newer versions of typer hand on a Ctrl-C; older ones raise Abort.
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except Interrupted as error:
        warn(f"mendel: {error}")
        return INTERRUPTED
    except _UsageError as error:
        return _usage(error)
    except BrokenPipeError:
        # The reader has gone; nothing more can be said to it, and the flush at exit must not try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        warn("mendel: interrupted")
        return INTERRUPTED
    except MISTAKES as error:
        return _mistake(error, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _mistake(error, f"{where}{error.strerror or error}")
    except Exception as error:
        if debugging():
            traceback.print_exc()
        words = " ".join(str(error).split())
        warn(
            f"mendel: {type(error).__name__}: {words} "
            "(a fault of mendel; MENDEL_DEBUG=1 shows where)"
        )
        return FAULT


def _usage(error: Exception) -> int:
    message = str(getattr(error, "format_message", error.__str__)())
    context = getattr(error, "ctx", None)
    if not message.strip() or type(error).__name__ == "NoArgsIsHelpError":
        # A command that was called with nothing at all shows its help.
        say(context.get_help() if context is not None else "")
        return USAGE
    command = context.command_path if context is not None else "mendel"
    return _mistake(error, f"{message.rstrip('.')} (see {command} --help)", command)


def _mistake(error: Exception, message: str, command: str = "mendel") -> int:
    if debugging():
        traceback.print_exception(error)
    warn(f"{command}: {' '.join(message.split())}")
    return USAGE


def main() -> None:
    """The entry point `mendel`."""
    # What a cluster's scheduler sends ends a command as Ctrl-C does: nothing half-written stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(run())
