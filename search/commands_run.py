"""Commands that compute: search and train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from ..proxies.recipe import TrainConfig
from ..proxies.task import leak
from ..proxies.tasks import TASKS, ProxyConfig, find_task
from .commands_result import print_outcome
from .driver import Interrupted, search
from .dryrun import dry_run, print_dry_run
from .evaluate import resolve_device
from .front import outcome_dict, outcome_of
from .options import WHAT, AsJson, Depth, Width, examples
from .progress import SearchProgress
from .report import write_report
from .source import Source, find_genome
from .standalone import Plan, claim, train_seed, write_outcome
from .study import load_study
from .study_check import missing_device, unreachable
from .terminal import Mistake, console, print_json, print_table, say
from .winners import write_winners

app = typer.Typer()

DEFAULT_STEPS = 1000


@app.command(
    name="search",
    epilog=examples(
        "mendel search studies/quickstart.yaml",
        "mendel search study.yaml --dry-run",
        "mendel search study.yaml --executor serial --set search.trials=8",
        "mendel search study.yaml --address ray://head:10001",
    ),
)
def search_command(
    study: Annotated[Path, typer.Argument(help="A study file (YAML); see mendel init.")],
    only_look: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the study, show its size and cost, run nothing."),
    ] = False,
    executor: Annotated[
        str | None, typer.Option(help="serial or ray, instead of the study's.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to join; implies ray.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of workers, instead of the study's.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of candidates, instead of the study's.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value in the study, such as search.seed=1; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on with it where it was stopped: the same command resumes.

    Ends with the Pareto table, the report and the winners' files in the run's folder.
    """
    kind = _executor(executor, address)
    overrides = _overrides(settings or [])
    for key, value in (("workers.count", workers), ("search.trials", trials)):
        if value is not None:
            overrides[key] = value
    asked = load_study(study, overrides)
    if only_look:
        found = dry_run(asked)
        if as_json:
            print_json(found)
        else:
            print_dry_run(found)
        return
    with SearchProgress(quiet=as_json) as progress:
        run = search(asked, executor=kind, address=address, progress=progress)
    found_outcome = outcome_of(run)
    report = write_report(run)
    winners = write_winners(run, found_outcome)
    if as_json:
        print_json(
            {
                "run": str(run.folder),
                "study": run.study.name,
                "state": run.state,
                "report": str(report),
                "winners": [str(p) for p in winners],
            }
            | outcome_dict(found_outcome)
        )
        return
    say()
    print_outcome(run, found_outcome)
    say()
    say(f"report   {report}")
    say(f"winners  {run.folder / 'winners'} ({len(winners)} designs)")


def _executor(name: str | None, address: str | None) -> Literal["serial", "ray"] | None:
    if name not in (None, "serial", "ray"):
        raise Mistake(f"--executor is serial or ray, not {name!r}")
    if name == "serial" and address is not None:
        raise Mistake("--address joins a Ray cluster; leave out --executor serial")
    if address is not None and (why := unreachable(address)) is not None:
        raise Mistake(f"--address: {why}")
    return "serial" if name == "serial" else "ray" if name == "ray" else None


def _overrides(settings: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise Mistake(f"--set takes key=value, such as search.seed=1, not {setting!r}")
        found[key.strip()] = _value(value, setting)
    return found


def _value(text: str, setting: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise Mistake(f"--set {setting}: the value is no YAML") from None


@app.command(
    epilog=examples(
        "mendel train transformer++ --proxy in-context-recall --steps 500 --out trained",
        "mendel train '[mamba2 > swiglu]*2' --proxy byte-text --seeds 0,1,2 --lr 0.003 --out t2",
        "mendel train runs/quickstart:12 --proxy recall --steps 4000 --out longer",
    )
)
def train(
    what: Annotated[str, typer.Argument(help=WHAT)],
    proxy: Annotated[
        str, typer.Option(help="A task (mendel tasks), or with RUN:TRIAL one of its proxies.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for curves, checkpoints and scores.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Training steps; {DEFAULT_STEPS} if absent.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per step.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    lr: Annotated[
        str | None, typer.Option(help="Peak learning rate, or several with commas to choose from.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the task, such as length=256; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    width: Width = None,
    depth: Depth = None,
    as_json: AsJson = False,
) -> None:
    """Train one design on one proxy; stopped at any time, the same command goes on.

    Writes curves, a checkpoint per seed, and scores with their spread over the seeds.

    The learning-rate schedule spans the whole training, so a finished one cannot
    be lengthened with the same --out: for more steps choose a new one.
    """
    source = find_genome(what, width, depth)
    config = _proxy(source, proxy, steps, batch, settings or [])
    plan = Plan(source.genome, source.name, config, _recipe(source, lr), _device(device))
    chosen = _seeds(seeds)
    problem = leak(plan.genome, config.task, TASKS[config.task].bidirectional)
    if problem is not None:
        raise Mistake(f"--proxy: {problem}")
    claim(plan, out)
    screen = console(stderr=True)
    with screen.status("", spinner="line") as status:

        def progress(seed: int, step: int) -> None:
            if step % 10 == 0 or step == config.steps:
                status.update(f"seed {seed}: step {step} of {config.steps}")

        try:
            results = [train_seed(plan, seed, out, progress) for seed in chosen]
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; the same command goes on in {out}") from None
    found = write_outcome(plan, results, out)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            name,
            f"{s['mean']:.4f}",
            "-" if s["std"] is None else f"{s['std']:.4f}",
            f"{s['min']:.4f}",
            f"{s['max']:.4f}",
        ]
        for name, s in found["summary"].items()
    ]
    columns = ["metric", "mean", "std", "least", "most"]
    count = f"{len(chosen)} seed{'' if len(chosen) == 1 else 's'}"
    title = f"{plan.name} on {config.task}, {config.steps} steps, {count}"
    if rows:
        print_table(columns, rows, right=columns[1:], title=title)
    for result in results:
        if result["failure"] is not None:
            say(f"seed {result['seed']}: {result['failure']}")
    say(f"Wrote {out}: scores.json, curves.html and a checkpoint per seed.")
    if len(found["failed"]) == len(results):
        raise typer.Exit(1)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise Mistake(f"--seeds is a list of whole numbers such as 0,1,2, not {text!r}")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) != len(seeds):
        raise Mistake("--seeds names a seed twice")
    return seeds


def _proxy(
    source: Source, name: str, steps: int | None, batch: int | None, settings: list[str]
) -> ProxyConfig:
    study = source.run.study if source.run is not None else None
    if study is not None and name in study.proxies:
        data = study.proxies[name].model_dump(mode="json")
    elif study is not None and name not in TASKS:
        raise Mistake(
            f"--proxy: the run has no proxy {name!r}; it has {', '.join(study.proxies)}; "
            f"tasks are {', '.join(TASKS)}"
        )
    else:
        data = {"task": find_task(name).name, "steps": DEFAULT_STEPS}
    data |= {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    data |= _overrides(settings)
    try:
        return ProxyConfig.model_validate(data)
    except ValidationError as error:
        raise Mistake(f"--set: {_first(error)}") from None


def _recipe(source: Source, lr: str | None) -> TrainConfig:
    base = source.run.study.train if source.run is not None else TrainConfig.model_validate({})
    if lr is None:
        return base
    try:
        rates = [float(part) for part in lr.split(",")]
    except ValueError:
        raise Mistake(f"--lr is a number, or several with commas, not {lr!r}") from None
    data = base.model_dump(mode="json") | {"lr": rates[0] if len(rates) == 1 else rates}
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise Mistake(f"--{_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first problem that pydantic found, as one line."""
    found = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return f"there is no setting {where!r}; mendel tasks TASK lists a task's"
    words = found["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    return f"{where}: {words}" if where and not words.startswith(where) else words


def _device(name: str) -> str:
    known = name in ("auto", "cpu", "cuda") or (
        name.startswith("cuda:") and name.removeprefix("cuda:").isdigit()
    )
    if not known:
        raise Mistake(f"--device is auto, cpu, cuda or cuda:N, not {name!r}")
    if (missing := missing_device(name)) is not None:
        raise Mistake(f"--device: {missing}")
    return resolve_device(name)
