"""The format `flame`: the configuration that flash-linear-attention's trainer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...genome.cost import cost
from ..terminal import Mistake
from .card import card
from .fla import NotExpressible, fla_config
from .genome import write_design
from .order import Order
from .proof import write

CONFIG = "config.json"

FILES = (
    "`config.json` is the design as a model of flash-linear-attention, `train.sh` a command of its "
    "trainer, flame; `genome.yaml` and `genome.json` hold the design as Mendel writes it, "
    "`costs.json` what it costs, `scores.json` what it and the baselines of the same budget "
    "scored, `provenance.json` how that came about and the sha256 of each file. flame takes the "
    "larger of `vocab_size` and the tokenizer's vocabulary, so the embeddings grow with the "
    "tokenizer; all else has the sizes that `costs.json` counts. Layers of attention need the "
    "package flash-attn."
)

WEIGHTLESS = "No weights are in this folder: flame begins with its own."

TRAIN = """\
#!/usr/bin/env bash
# To be called by its path from a checkout of https://github.com/fla-org/flame.
# {params:,} parameters with a vocabulary of {vocab:,}. Batch, data and steps are those of flame's
# own example for small models; change them to what you have.
set -euo pipefail
model=$(realpath "$(dirname "$0")")
NGPU=${{NGPU:-1}} bash train.sh \\
  --job.config_file flame/models/fla.toml \\
  --job.dump_folder "exp/{name}" \\
  --model.config "$model/config.json" \\
  --model.tokenizer_path "${{TOKENIZER:-fla-hub/transformer-1.3B-100B}}" \\
  --optimizer.name AdamW \\
  --optimizer.eps 1e-15 \\
  --optimizer.lr 1e-3 \\
  --lr_scheduler.warmup_steps 1024 \\
  --lr_scheduler.lr_min 0.1 \\
  --lr_scheduler.decay_type cosine \\
  --training.batch_size 1 \\
  --training.seq_len 65536 \\
  --training.context_len 4096 \\
  --training.varlen \\
  --training.gradient_accumulation_steps 1 \\
  --training.steps 20480 \\
  --training.max_norm 1.0 \\
  --training.skip_nan_inf \\
  --training.dataset HuggingFaceFW/fineweb-edu \\
  --training.dataset_name sample-100BT \\
  --training.dataset_split train \\
  --training.num_workers 32 \\
  --training.seed 42 \\
  --checkpoint.interval 2048 \\
  --checkpoint.load_step -1 \\
  --metrics.log_freq 1
"""


def write_flame(order: Order, folder: Path) -> dict[str, Any]:
    """Write configuration, command, genome, costs, scores and card.

    Raises Mistake with the slot that no model of flash-linear-attention has.
    """
    genome = order.source.genome
    try:
        config = fla_config(genome)
    except NotExpressible as error:
        raise Mistake(
            f"{order.source.name} is no model of flash-linear-attention: {error}"
        ) from None
    write(folder / CONFIG, config)
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in order.source.name)
    text = TRAIN.format(name=name, params=cost(genome).total.params, vocab=genome.vocab)
    script = folder / "train.sh"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    write_design(order, folder)
    uses = ("cd flame && bash /path/of/this/folder/train.sh    # in a checkout of flame",)
    page = card(order.source, weights=WEIGHTLESS, files=FILES, uses=uses)
    (folder / "README.md").write_text(page, encoding="utf-8")
    return {}
