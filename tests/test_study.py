"""A wrong study is refused with one line that names the place, and nothing is created."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mendel.search.driver import search
from mendel.search.study import StudyError, load_study

GOOD = """\
name: small
question: which design recalls best?
space:
  width: 16
  depth: [2, 4]
  operators:
    gqa: {heads: [2], kv_heads: [1, 2]}
    mamba2: {heads: [2]}
    swiglu: {expansion: [1.0, 2.0]}
  constraints:
    params: {max: 400000}
proxies:
  recall: {task: in-context-recall, steps: 8, batch: 4, length: 16}
train: {lr: 3e-3}
objectives: [quality, {cache_bytes: {context: 4096}}]
search: {trials: 4, population: 2, rungs: [0.5, 1.0]}
baselines: [transformer++, {name: retnet, genome: "[retnet(heads=2) > swiglu]*2"}]
workers: {executor: serial, device: cpu, memory_limit: 4GiB}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text + f"runs: {folder / 'runs'}\n")
    return path


def test_a_good_study(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, GOOD))
    assert study.train.lr == 3e-3
    assert study.workers.memory_limit == 4 * 2**30
    assert [g.label for g in study.goals] == ["quality", "cache_bytes"]
    assert [name for name, _ in study.baseline_genomes()] == ["transformer++", "retnet"]
    assert study.baseline_genomes()[0][1].width == 16
    assert study.steps(0) == {"recall": 4}
    assert study.folder == tmp_path / "runs" / "small"


def test_baselines_run_unless_there_are_to_be_none(tmp_path: Path) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith("baselines")]
    absent = "\n".join(lines) + "\n"
    six = ["transformer++", "mamba2", "striped", "jamba-like", "griffin-like", "samba-like"]
    study = load_study(write(tmp_path, absent))
    assert [name for name, _ in study.baseline_genomes()] == six
    assert load_study(write(tmp_path, absent + "baselines: []\n")).baseline_genomes() == []
    odd = absent.replace("width: 16", "width: 100")
    with pytest.raises(StudyError, match=r"baselines\.\d: .*runs unless baselines: names others"):
        load_study(write(tmp_path, odd))


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        # Unknown keys, near and far, at every depth.
        ("train: {lr:", "train: {lrr:", "14:9: train.lrr", "did you mean lr? Allowed: lr, min_lr"),
        ("question:", "qestion:", "2:1: qestion", "did you mean question?"),
        ("{trials: 4,", "{trails: 4,", "16:10: search.trails", "did you mean trials?"),
        ("max: 400000", "most: 4", "11:14: space.constraints.params.most", "Allowed: min, max"),
        ("context: 4096", "contxt: 4096", "15:38: objectives.1.cache_bytes.contxt", "context"),
        (
            "batch: 4, length",
            "batch: 4, lenth",
            "13:57: proxies.recall.lenth",
            "did you mean length?",
        ),
        ("width: 16", "widht: 16", "4:3: space.widht", "did you mean width?"),
        # Wrong types and values.
        ("trials: 4", "trials: many", "16:10: search.trials", "'many'"),
        ("trials: 4", "trials: 0", "16:10: search.trials", "greater than or equal to 1"),
        ("trials: 4", "trials: true", "16:10: search.trials", "integer"),
        ("lr: 3e-3", "lr: -1", "14:9: train.lr", "above 0"),
        ("[0.5, 1.0]", "[1.0, 0.5]", "16:36: search.rungs", "rise"),
        ("steps: 8", "steps: 1", "16:36: search.rungs", "0.5 and 1 of the 1 steps of recall both"),
        ("[0.5, 1.0]", "[0.5, 0.51, 1.0]", "16:36: search.rungs", "of recall both end at step 4"),
        ("depth: [2, 4]", "depth: [4, 2]", "5:3: space.depth", "least"),
        ("4GiB", "much", "18:42: workers.memory_limit", "64KiB"),
        ("executor: serial", "executor: slurm", "18:11: workers.executor", "'serial' or 'ray'"),
        ("device: cpu", "device: tpu", "18:29: workers.device", "tpu"),
        ("name: small", "name: a/b", "1:1: name", "a/b"),
        ("heads: [2], kv", "heads: [-2], kv", "7:", "space.operators.gqa.heads"),
        # Names of nothing.
        ("quality,", "qualty,", "15:14: objectives.0", "did you mean quality?"),
        ("quality,", "score:text,", "objectives", "there are recall"),
        ("transformer++", "transformer", "17:13: baselines.0", "transformer++"),
        ("task: in-context-recall", "task: recal", "13:12: proxies.recall.task", "byte-text"),
        ("{trials: 4", "{sampler: nsga, trials: 4", "16:10: search.sampler", "'evolution'"),
        ("mamba2: {heads", "mamba3: {heads", "8:5: space.operators.mamba3", "mamba2"),
        # A genome that cannot be read.
        ('"[retnet(heads=2)', '"[retnt(heads=2)', "17:28: baselines.1", "retnt"),
        # Empty and impossible.
        ("max: 400000", "max: 10", "11:5: space.constraints.params", "closest"),
        ("  width: 16\n", "  width: []\n", "4:3: space.width", "empty"),
        # The file itself.
        ("width: 16", "width: 16\n  width: 32", "5:3: width", "twice, first in line 4"),
        ("width: 16", "width: [16", "5:8", "not valid YAML"),
        ("name: small\n", "", "name", "missing"),
    ],
)
def test_a_wrong_study(tmp_path: Path, old: str, new: str, place: str, words: str) -> None:
    assert GOOD.count(old) == 1
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(StudyError) as caught:
        search(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}:")
    assert place in line
    assert words in line
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def test_an_unwritable_folder(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD + "runs: /dev/null/runs\n")
    with pytest.raises(StudyError, match="19:1: runs: /dev/null is not a folder"):
        search(path)
    # Root may write there as far as the file system says, and yet no folder can be made.
    path.write_text(GOOD + "runs: /proc/runs\n")
    with pytest.raises(StudyError, match=r"study\.yaml:19:1: runs: /proc.* cannot be"):
        search(path)
    with pytest.raises(StudyError, match=r"^runs: /proc/elsewhere.* cannot be"):
        search(write(tmp_path, GOOD), out="/proc/elsewhere")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate: nowhere:evaluate", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("evaluate: chaos:absent", "cannot be loaded: AttributeError: module 'chaos'"),
        ("evaluate: chaos:DIES", "chaos:DIES is not a function"),
        ("storage: nonsense", "nonsense cannot be opened: "),
        ("storage: nosuchsql://host/runs", "cannot be opened: "),
        ("storage: sqlite:///{folder}/absent/runs.db", "absent is not a folder"),
        ("storage: sqlite:///{folder}/study.yaml", "file is not a database"),
    ],
)
def test_what_cannot_be_loaded_or_opened(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, GOOD + line.format(folder=tmp_path) + "\n")
    with pytest.raises(StudyError) as caught:
        search(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:19:1: {line.partition(':')[0]}: ")
    assert words in message
    assert "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]
    # The same of a study that was made in Python.
    changed = load_study(path, check=False).model_copy()
    with pytest.raises(StudyError):
        search(changed)
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def test_a_database_that_will_be_made(tmp_path: Path) -> None:
    load_study(write(tmp_path, GOOD + f"storage: sqlite:///{tmp_path}/runs.db\n"))
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"18:29: workers\.device: torch finds no CUDA device"):
        load_study(write(tmp_path, GOOD.replace("device: cpu", "device: cuda")))
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def test_text_that_is_missing(tmp_path: Path) -> None:
    text = "  text: {task: byte-text, steps: 8, text: nowhere.txt}\ntrain:"
    path = write(tmp_path, GOOD.replace("train:", text))
    with pytest.raises(StudyError, match=r"study.yaml:14:37: proxies.text.text: .*nowhere.txt"):
        search(path)
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such file"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(StudyError, match="cannot be read"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 20_000, "it is nested too deep"),
        ("name: &a [*a]", "name: it should be a valid string"),
        ('name: "\0"', "not valid YAML: unacceptable character"),
        # Lists of lists of lists: a walk through every path would take minutes.
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghijkl")
            ),
            "a: there is no such key",
        ),
    ],
)
def test_yaml_at_its_worst(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError) as error:
        load_study(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_space(tmp_path: Path) -> None:
    data: dict[str, Any] = yaml.safe_load(GOOD)
    data["space"]["operators"] = {}
    with pytest.raises(StudyError, match=r"space\.operators: is empty"):
        load_study(write(tmp_path, yaml.safe_dump(data)))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    study = load_study(path, {"search.trials": 9, "workers.executor": "ray"})
    assert (study.search.trials, study.workers.executor) == (9, "ray")
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(study.text)
    assert load_study(frozen).search.trials == 9
    with pytest.raises(StudyError, match=r"search\.trials: "):
        load_study(path, {"search.trials": -1})
    with pytest.raises(StudyError, match=r"search\.trails: there is no such key"):
        load_study(path, {"search.trails": 3})


def test_labels_of_objectives_that_stand_twice(tmp_path: Path) -> None:
    twice = "objectives: [params, {cache_bytes: {context: 64}}, cache_bytes, score:recall]"
    lines = [twice if line.startswith("objectives") else line for line in GOOD.splitlines()]
    study = load_study(write(tmp_path, "\n".join(lines) + "\n"))
    assert [g.label for g in study.goals] == [
        "params",
        "cache_bytes@context=64,dtype=bf16",
        "cache_bytes@context=4096,dtype=bf16",
        "score:recall",
    ]
    same = GOOD.replace("[quality,", "[quality, quality,")
    with pytest.raises(StudyError, match="quality stands twice"):
        load_study(write(tmp_path, same))
