"""A study whose space lies around a given genome in small: `mendel import MODEL --study FILE`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from ..genome.cost import cost
from ..genome.genome import Genome
from ..genome.notation import show as notation
from ..genome.resolve import genes_of, primitive_of
from ..genome.small import alternates, small
from ..primitives.base import Gene, show_gene
from .study import load_study

MORE = 2
"""Slots beyond those of the small genome that a candidate may have."""

NEIGHBOURS: Mapping[str, tuple[Gene, ...]] = {
    "kv_heads": (1, 2),
    "window": (16, 32),
    "key_dim": (8, 16, 32),
    "experts": (4, 8),
    "top_k": (1, 2),
}
"""Values of an axis that are tried beside the genome's own."""

OTHERS: Mapping[str, tuple[str, str]] = {
    "gqa": ("attention", "{heads: [4], kv_heads: [1, 2]}"),
    "mamba2": ("recurrence", "{key_dim: [16, 32]}"),
    "gated-deltanet": ("delta", "{key_dim: [16]}"),
}
"""Operators that a model may lack: primitive, and axes."""

BUDGET = 1.5
"""The most parameters of a candidate over those of the small genome."""

TEXT = """\
# A search around {family}, read from {source}:
# the model in small, its operators with values around its own, and operators that it does not have.
# The front says which changes are worth a try at the model's own size; it does not say how the
# model itself scores.
# Look before you run:   mendel search {file} --dry-run
# Run (and resume):      mendel search {file}
# What there is:         mendel primitives, mendel tasks, mendel presets
#
# The model:             {whole}
# In small:              {little}

name: {name}
question: which changes to {family} recall better, or keep less cache?

space:
  width: {width}
  depth: [{least}, {most}]                  # slots; the small model has {depth}
{header}\
  operators:                   # the model's own first; lists are ranges of an axis
{own}\
{others}\
  pattern: {pattern}
{parallel}\
{sharing}\
  constraints:
    params: {{max: {budget}}}      # {ratio:g} times the small model's

proxies:                       # tasks that judge a candidate, each with its budget
  recall: {{task: in-context-recall, steps: 240, batch: 16, length: 64}}
  text: {{task: byte-text, steps: 120, batch: 8, length: 128}}
  # own text: {{task: byte-text, text: path/to/file-or-folder, steps: 500, batch: 16, length: 256}}

train: {{lr: 0.01}}            # a list is a grid that every candidate tries

objectives:
  - quality                    # mean of the proxies' scores
  - cache_bytes: {{context: 4096, dtype: bf16}}
  # also: score:recall, params, active_params, flops_per_token, latency_decode, throughput, ...

search:
  sampler: evolution
  trials: 24                   # candidates beside the baselines
  population: 8
  seed: 0
  rungs: [0.4, 1.0]            # only the better third trains on after 0.4 of the steps
  eta: 3

baselines:                     # always run, same budget: the model in small stands on every plot
  - name: {name}-small
    genome: "{little}"
  - transformer++
  - mamba2

workers:
  executor: ray                # also: serial, one after the other in this process
  count: auto
  time_limit: 300              # seconds for one rung of one trial
  memory_limit: 4GiB
"""


def study_around(genome: Genome, family: str, source: str, file: Path) -> str:
    """The text of the study. Raises SmallError where the genome has no small form."""
    little = small(genome)
    depth = len(little.slots)
    even = alternates(little)
    primitives = {primitive_of(op).name for *_, op in little.ops()}
    others = [
        f"    {name}: {axes}\n"
        for name, (primitive, axes) in OTHERS.items()
        if primitive not in primitives
    ]
    if all(primitive_of(op).kind == "mixer" for *_, op in little.ops()):
        others.append("    swiglu: {expansion: [2.0]}\n")
    if others:
        others.insert(0, "    # not in the model:\n")
    joins = sorted({slot.join for slot in little.slots if len(slot.branches) > 1})
    branches = max(len(slot.branches) for slot in little.slots)
    parallel = ""
    if joins:
        parallel = f"  parallel: {{branches: {branches}, share: 0.5}}\n"
        parallel += f"  join: [{', '.join(joins)}]\n"
    ops = [op for *_, op in genome.ops()]
    shared = [kind for kind in ("weights", "features") if any(getattr(op, kind) for op in ops)]
    sharing = f"  sharing: {{{', '.join(f'{kind}: true' for kind in shared)}}}\n" if shared else ""
    text = TEXT.format(
        family=family,
        source=" ".join(source.split()),
        file=file.name,
        whole=notation(genome),
        little=notation(little),
        name=_name(file),
        width=little.width,
        least=max(2, depth - MORE),
        most=depth + MORE,
        depth=depth,
        header=_header(little),
        own="".join(_operators(little)),
        others="".join(others),
        pattern="alternate           # mixer, channel mixer, mixer, ...; or: free"
        if even
        else "free                # any operator in any slot; or: alternate",
        parallel=parallel,
        sharing=sharing,
        budget=int(BUDGET * cost(little).total.params),
        ratio=BUDGET,
    )
    with TemporaryDirectory() as folder:
        # It must run: read as `mendel search` will, before anybody sees it.
        trial = Path(folder) / file.name
        trial.write_text(text, encoding="utf-8")
        load_study(trial)
    return text


def _name(file: Path) -> str:
    letters = [c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in file.stem]
    return "".join(letters).lstrip("._-") or "study"


def _header(genome: Genome) -> str:
    """The header's genes that are not a space's defaults."""
    plain = Genome(genome.width, genome.slots)
    lines = [
        f"  {name}: [{show_gene(getattr(genome, name))}]\n"
        for name in ("position", "norm", "placement", "residual", "embedding_norm")
        if getattr(genome, name) != getattr(plain, name)
    ]
    return "".join(lines)


def _operators(genome: Genome) -> Iterable[str]:
    """A line for every operator by name: each axis that it sets somewhere, with the values that it
    has there and their neighbours."""
    by_name: dict[str, list[Mapping[str, Gene]]] = {}
    written: dict[str, dict[str, None]] = {}
    for *_, op in genome.ops():
        by_name.setdefault(op.name, []).append(genes_of(op))
        written.setdefault(op.name, {}).update(dict.fromkeys(dict(op.genes)))
    for name, uses in by_name.items():
        axes = []
        for axis in written[name]:
            values = {genes[axis]: None for genes in uses}
            values |= dict.fromkeys(_neighbours(axis, uses))
            axes.append(f"{axis}: [{', '.join(show_gene(v) for v in values)}]")
        yield f"    {name}: {{{', '.join(axes)}}}\n"


def _neighbours(axis: str, uses: list[Mapping[str, Gene]]) -> tuple[Gene, ...]:
    """Values beside those of the genome, where all uses can have them."""
    if axis == "kv_heads" and any(genes[axis] == 0 for genes in uses):
        return ()
    if axis == "top_k" and any(genes.get("experts", 0) == 1 for genes in uses):
        return ()
    return NEIGHBOURS.get(axis, ())
