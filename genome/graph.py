"""A genome as a directed graph: what the drawing shows and the canonical hash reads."""

from __future__ import annotations

from typing import Literal

import networkx as nx

from ..primitives.base import EMBEDDING, carries, reads_stream
from ..primitives.position import ADDED
from .genome import Genome
from .residual import entry_norm, final_norm, join_of, norms_before, norms_of
from .resolve import configs, groups, primitive_of

NodeKind = Literal["embedding", "norm", "operator", "join", "add", "head"]
EdgeKind = Literal["data", "weights", "features"]


def graph(genome: Genome) -> nx.DiGraph[str]:
    """The genome's graph. Raises GeneError where an operator cannot be built.

    Nodes have a `kind` of NodeKind and, but for embedding and head, a `slot` from 0 (the norm
    before the head, and the sum of a reversible backbone's two streams, stand in slot
    `len(genome.slots)`, a norm after the embedding in slot 0). The embedding says which position
    encoding is `added` to it: what the operators' configs do not hold. An operator `slot3.1` has
    its `config`, its `op` and its `primitive` (the row's name); a join its `join`; an addition the
    share of `tokens` that its slot takes.
    Edges have a `kind`: `data` follows the residual stream; `weights` goes from the first operator
    of a group to each other one, `features` from the lender to each borrower.
    """
    made: nx.DiGraph[str] = nx.DiGraph()
    made.add_node(
        "embedding",
        kind="embedding",
        vocab=genome.vocab,
        width=genome.width,
        added=genome.position if genome.position in ADDED else "none",
    )
    placement = norms_of(genome)[1]
    sphere = genome.residual == "ngpt"
    within = sphere or placement == "sandwich"
    after = sphere or placement == "post"
    # A reversible backbone has two streams, which its slots change in turn.
    start = "embedding"
    if entry_norm(genome) != "none":
        start = _after(made, start, "embedding.norm", "norm", 0)
    streams = [start] * (2 if genome.residual == "reversible" else 1)
    for i, (slot, row) in enumerate(zip(genome.slots, configs(genome), strict=True)):
        name = f"slot{i}"
        own, read = i % len(streams), (i + 1) % len(streams)
        source = streams[read]
        if norms_before(genome, row):
            source = _after(made, source, f"{name}.norm", "norm", i)
        outputs: list[str] = []
        join = join_of(genome, slot)
        for j, (op, config) in enumerate(zip(slot.branches, row, strict=True)):
            outputs.append(f"{name}.{j}")
            made.add_node(
                outputs[-1],
                kind="operator",
                slot=i,
                op=op,
                config=config,
                primitive=primitive_of(op).name,
            )
            entry = streams[read] if reads_stream(config) else source
            made.add_edge(entry, outputs[-1], kind="data")
            if carries(config) == EMBEDDING:
                made.add_edge(start, outputs[-1], kind="data")
            if join == "chain" and j:
                made.add_edge(outputs[-2], outputs[-1], kind="data")
        result = outputs[0]
        if len(outputs) > 1:
            result = f"{name}.join"
            made.add_node(result, kind="join", slot=i, join=join)
            for output in outputs[-1:] if join == "chain" else outputs:
                made.add_edge(output, result, kind="data")
        if within:
            result = _after(made, result, f"{name}.norm2", "norm", i)
        added = _after(made, result, f"{name}.add", "add", i)
        made.nodes[added]["tokens"] = slot.tokens
        made.add_edge(streams[own], added, kind="data")
        streams[own] = _after(made, added, f"{name}.norm", "norm", i) if after else added
    stream = streams[0]
    if len(streams) > 1:
        stream = _after(made, stream, "add", "add", len(genome.slots))
        made.add_edge(streams[1], stream, kind="data")
    if final_norm(genome) != "none":
        stream = _after(made, stream, "norm", "norm", len(genome.slots))
    made.add_node("head", kind="head", vocab=genome.vocab, tied=genome.tied)
    made.add_edge(stream, "head", kind="data")
    for label_kind in ("weights", "features"):
        for members in groups(genome, label_kind).values():
            first, *others = (f"slot{i}.{j}" for i, j in members)
            made.add_edges_from((first, other, {"kind": label_kind}) for other in others)
    return made


def _after(made: nx.DiGraph[str], source: str, name: str, kind: NodeKind, slot: int) -> str:
    made.add_node(name, kind=kind, slot=slot)
    made.add_edge(source, name, kind="data")
    return name
