"""The study that `mendel init` writes: small, commented, ready to run."""

from __future__ import annotations

from pathlib import Path

from .store import write_text
from .terminal import Mistake

TEMPLATE = """\
# A study: which designs are allowed, what judges them, what counts, how much to spend.
# Look before you run:   mendel search {file} --dry-run
# Run (and resume):      mendel search {file}
# What there is:         mendel primitives, mendel tasks, mendel presets

name: {name}                   # the run's folder is runs/{name}
question: which hybrid recalls best for the fewest cache bytes?

space:
  width: 64                    # a number, or a list to choose from
  depth: [4, 6]                # least and most slots
  position: [rope]             # also: alibi, t5, xl, learned, sinusoidal, none
  norm: [rmsnorm]              # also: layernorm, dyt, none
  placement: [pre]             # also: post, sandwich
  residual: [plain]            # also: layerscale, rezero, reversible, ngpt
  operators:                   # what a slot may hold; lists are ranges of an axis
    gqa: {{heads: [4], kv_heads: [1, 2]}}
    swa: {{heads: [4], window: [32]}}
    mamba2: {{key_dim: [16, 32]}}
    gated-deltanet: {{}}
    swiglu: {{expansion: [1.0, 2.0]}}
  pattern: alternate           # mixer, channel mixer, mixer, ...; or: free
  # slots:                     # choices per slot, the first rule that matches wins
  #   - {{at: 0, operators: [mamba2]}}
  parallel: {{branches: 2, share: 0.2}}        # up to two operators side by side
  join: [mean]                 # of them: also sum, norm, chain; by a router: gate, top1
  tokens: [1.0]                # shares of the tokens that a slot may take (mixture of depths)
  sharing: {{weights: true, features: true}}   # of weights, and of keys and values
  constraints:
    params: {{max: 400k}}      # also: active_params, flops_per_token, cache_bytes, attention_share

proxies:                       # tasks that judge a candidate, each with its budget
  recall: {{task: in-context-recall, steps: 240, batch: 16, length: 64}}
  text: {{task: byte-text, steps: 120, batch: 8, length: 128}}
  # own text: {{task: byte-text, text: path/to/file-or-folder, steps: 500, batch: 16, length: 256}}

train: {{lr: 0.01}}            # a list is a grid that every candidate tries

objectives:                    # the first stands on the vertical axis
  - quality                    # mean of the proxies' scores
  - cache_bytes: {{context: 4096, dtype: bf16}}
  # also: score:recall, params, active_params, flops_per_token, latency_decode, throughput, ...

search:
  sampler: evolution           # also: random, tpe
  trials: 24                   # candidates beside the baselines
  population: 8
  seed: 0
  rungs: [0.4, 1.0]            # only the better third trains on after 0.4 of the steps
  eta: 3

baselines: [transformer++, mamba2, striped]    # always run, same budget;
                               # without the key six presets, with [] none

workers:
  executor: ray                # also: serial, one after the other in this process
  count: auto
  time_limit: 300              # seconds for one rung of one trial
  memory_limit: 4GiB
"""


def write_template(path: Path) -> Path:
    """Write the study; into a folder as study.yaml. Raises Mistake rather than overwrite."""
    if path.is_dir():
        path = path / "study.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise Mistake(f"{path}: a study file ends in .yaml or .yml")
    if path.exists():
        raise Mistake(f"{path} exists already; choose another name")
    if not path.parent.is_dir():
        raise Mistake(f"{path.parent} is no folder")
    letters = [c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem]
    name = "".join(letters).lstrip("._-") or "study"
    write_text(path, TEMPLATE.format(file=path.name, name=name))
    return path
