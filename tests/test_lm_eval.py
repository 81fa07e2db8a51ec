"""An exported model under lm-eval: the scores are those of Mendel's own model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import load, trained
from torch import Tensor

from mendel.search.exports.folder import export
from mendel.search.exports.order import Order
from mendel.search.exports.weights import find
from mendel.search.source import find_genome

# No context ends in a space, which lm-eval would move to what follows.
DOCUMENTS: list[dict[str, Any]] = [
    {"context": "a small text about", "options": [" nothing", " everything at all"], "right": 0},
    {"context": "nothing in", "options": [" general", " particular"], "right": 1},
    {"context": "said", "options": [" again", " never", " once"], "right": 0},
]


def documents(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(DOCUMENTS)}


COMMON = {"custom_dataset": documents, "test_split": "test", "num_fewshot": 0}
TASKS: list[dict[str, Any]] = [
    {
        **COMMON,
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    {
        **COMMON,
        "task": "prose",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    {
        **COMMON,
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{options[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
]


def told(model: Any, context: str, rest: str) -> float:
    """The log-likelihood of the bytes of `rest` after those of `context`, by Mendel's model."""
    before, after = list(context.encode()), list(rest.encode())
    x = torch.tensor([before + after])
    with torch.no_grad():
        rows: Tensor = model(x[:, :-1])[0][0].log_softmax(-1)
    at = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(float(rows[i, x[0, i + 1]]) for i in at)


def test_scores_are_mendel_s(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    training = find_genome(str(trained(tmp_path / "small")))
    weights = find(Order(training))
    assert weights is not None
    own = weights.model(training.genome)
    folder = export(Order(training), tmp_path / "out", "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lm = HFLM(
        pretrained=load(folder), tokenizer=tokenizer, batch_size=3, device="cpu", max_length=64
    )
    found = simple_evaluate(model=lm, tasks=TASKS, log_samples=True, bootstrap_iters=0)
    samples = {
        name: sorted(rows, key=lambda row: int(row["doc_id"]))
        for name, rows in found["samples"].items()
    }
    hits = 0
    for row, doc in zip(samples["choice"], DOCUMENTS, strict=True):
        wanted = [told(own, doc["context"], o) for o in doc["options"]]
        given = [float(answer[0][0]) for answer in row["resps"]]
        assert given == pytest.approx(wanted, rel=1e-4)
        hits += wanted.index(max(wanted)) == doc["right"]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(hits / 3)
    nats = [told(own, "\0", doc["context"]) for doc in DOCUMENTS]
    count = sum(len(doc["context"].encode()) for doc in DOCUMENTS)
    perplexity = found["results"]["prose"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(nats) / count), rel=1e-4)
    for row, doc in zip(samples["writing"], DOCUMENTS, strict=True):
        x = torch.tensor([list(doc["context"].encode())])
        start = x.shape[1]
        for _ in range(5):
            x = torch.cat([x, own(x)[0][:, -1:].argmax(-1)], 1)
        assert row["resps"][0][0] == tokenizer.decode(x[0, start:]).split("\n")[0]
