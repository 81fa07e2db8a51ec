"""Training tokens per second against the same architecture from `transformers`, in one run.

    python benchmarks/train_speed.py [--repeats 12]

The two models of a pair have the same shape and the same number of parameters (checked), the same
batch, loss and optimiser; their steps alternate, so that noise of the machine meets both. The
figure is the ratio of the two times of neighbouring steps: its median and spread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import save, spread
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from mendel.genome.build import build
from mendel.genome.genome import Genome
from mendel.genome.notation import show
from mendel.genome.presets import load

VOCAB = 256
SHAPES = [(128, 8, 128), (256, 4, 256)]
"""(width, batch, tokens)."""


def llama(genome: Genome) -> nn.Module:
    width, layers = genome.width, len(genome.slots) // 2
    inner = build(genome).operators[1].config.inner  # type: ignore[union-attr]
    heads = 4
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def mamba2(genome: Genome) -> nn.Module:
    config = build(genome).operators[0].config  # type: ignore[union-attr]
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=genome.width,
            num_hidden_layers=len(genome.slots),
            state_size=config.key_dim,  # type: ignore[union-attr]
            num_heads=config.heads,  # type: ignore[union-attr]
            head_dim=config.value_dim,  # type: ignore[union-attr]
            expand=2,
            n_groups=1,
            conv_kernel=4,
            chunk_size=64,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def step(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """A whole training step on tokens (B, T+1); returns its seconds."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run(tokens: Tensor) -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return time.perf_counter() - start

    return run


def pair(preset: str, reference: Callable[[Genome], nn.Module], repeats: int) -> list[dict]:
    rows = []
    for width, batch, length in SHAPES:
        genome = load(preset, width=width, depth=4)
        ours, theirs = build(genome), reference(genome)
        counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
        if counts[0] != counts[1]:
            raise SystemExit(f"{preset} at width {width}: {counts[0]} parameters, not {counts[1]}")
        run = step(ours, lambda t, m=ours: m(t)[0])
        run_theirs = step(theirs, lambda t, m=theirs: m(t).logits)
        times: list[tuple[float, float]] = []
        for index in range(repeats + 2):
            tokens = torch.randint(VOCAB, (batch, length + 1))
            both = run(tokens), run_theirs(tokens)
            if index >= 2:  # the first steps allocate
                times.append(both)
        tokens_per_step = batch * length
        rows.append(
            {
                "preset": preset,
                "width": width,
                "batch": batch,
                "tokens": length,
                "params": counts[0],
                "mendel tokens/s": spread([tokens_per_step / a for a, _ in times]),
                "transformers tokens/s": spread([tokens_per_step / b for _, b in times]),
                "ratio": spread([b / a for a, b in times]),
                "notation": show(genome),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = pair("transformer++", llama, arguments.repeats) + pair(
        "mamba2", mamba2, arguments.repeats
    )
    save(
        "train_speed",
        "How many training tokens per second, against transformers on the same device?",
        rows,
        dtype="float32",
        backend="torch sdpa; chunked",
    )


if __name__ == "__main__":
    main()
