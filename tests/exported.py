"""Small trainings to export, and the models that transformers makes of exports."""

from pathlib import Path
from typing import Any

from mendel.genome.notation import parse
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig
from mendel.search.standalone import Plan, claim, train_seed, write_outcome

GENOME = (
    "{width=32, tied=false} mamba2(key_dim=8, weights=@a) > moe(experts=4, top_k=2) > "
    "gqa(heads=2, kv_heads=1, features=@k) > [gqa(heads=2, kv_heads=1, features=@k) | "
    "mamba2(key_dim=8, weights=@a)]"
)
"""Experts, shared weights, shared keys and values, parallel operators, a head of its own."""


def trained(folder: Path, genome: str = GENOME, task: str = "byte-text", seeds: int = 1) -> Path:
    """The folder of a short training."""
    settings: dict[str, Any] = {"task": task, "steps": 4, "batch": 4, "length": 16}
    folder.mkdir(parents=True, exist_ok=True)
    if task == "byte-text":
        text = folder.parent / "text.txt"
        text.write_text("a small text about nothing in particular, said again. " * 100)
        settings |= {"text": str(text), "test_bytes": 256}
    else:
        settings |= {"train_examples": 32, "test_examples": 16}
    config = ProxyConfig.model_validate(settings)
    plan = Plan(parse(genome), "small", config, TrainConfig(), "cpu")
    claim(plan, folder)
    results = [train_seed(plan, seed, folder, lambda *_: None) for seed in range(seeds)]
    write_outcome(plan, results, folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The model of an export, as a stranger loads it, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, **options)
    return model.eval()
