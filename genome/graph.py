"""A genome as a directed graph: what the drawing shows and the canonical hash reads."""

from __future__ import annotations

from typing import Literal

import networkx as nx

from .genome import Genome
from .resolve import configs, groups, primitive_of

NodeKind = Literal["embedding", "norm", "operator", "join", "add", "head"]
EdgeKind = Literal["data", "weights", "features"]


def graph(genome: Genome) -> nx.DiGraph[str]:
    """The genome's graph. Raises GeneError where an operator cannot be built.

    Nodes have a `kind` of NodeKind and, but for embedding and head, a `slot` from 0 (the norm
    before the head stands in slot `len(genome.slots)`). The embedding says whether positions are
    `learned`: the one position encoding that the operators' configs do not hold. An operator
    `slot3.1` has its `config`, its `op` and its `primitive` (the row's name); a join its `join`.
    Edges have a `kind`: `data` follows the residual stream; `weights` goes from the first operator
    of a group to each other one, `features` from the lender to each borrower.
    """
    made: nx.DiGraph[str] = nx.DiGraph()
    made.add_node(
        "embedding",
        kind="embedding",
        vocab=genome.vocab,
        width=genome.width,
        learned=genome.position == "learned",
    )
    stream = "embedding"
    for i, (slot, row) in enumerate(zip(genome.slots, configs(genome), strict=True)):
        name = f"slot{i}"
        source = stream
        if genome.placement != "post":
            source = _after(made, stream, f"{name}.norm", "norm", i)
        outputs = []
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
            made.add_edge(source, outputs[-1], kind="data")
        result = outputs[0]
        if len(outputs) > 1:
            result = f"{name}.join"
            made.add_node(result, kind="join", slot=i, join=slot.join)
            for output in outputs:
                made.add_edge(output, result, kind="data")
        if genome.placement == "sandwich":
            result = _after(made, result, f"{name}.norm2", "norm", i)
        added = _after(made, result, f"{name}.add", "add", i)
        made.add_edge(stream, added, kind="data")
        stream = added
        if genome.placement == "post":
            stream = _after(made, stream, f"{name}.norm", "norm", i)
    if genome.placement != "post":
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
