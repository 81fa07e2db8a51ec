"""Projections of an attention whose pattern the data decide: entry, rotation, gate, exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Gene, GeneError, Operator, Site
from ..genes import choice, flag, only, whole
from ..position import Rotary
from ..rope import RopeForm
from .position_axes import position_of, rope_of


def head_counts(site: Site, genes: Mapping[str, Gene]) -> tuple[int, int, int]:
    """Query heads, key-value heads and the width of a head; GeneError where they do not divide."""
    heads, head_dim = whole(genes, "heads"), whole(genes, "head_dim")
    kv_heads = whole(genes, "kv_heads") or heads
    if heads % kv_heads:
        raise GeneError(f"kv_heads={kv_heads} does not divide heads={heads}")
    if head_dim == 0:
        if site.width % heads:
            raise GeneError(
                f"heads={heads} does not divide the width {site.width}; set head_dim as well"
            )
        head_dim = site.width // heads
    return heads, kv_heads, head_dim


@dataclass(frozen=True)
class HeadsConfig:
    """What these attentions have in common."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_channels: int
    """0: nothing is turned."""
    rope_form: RopeForm
    gate: str
    bias: bool

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of the keys, and as many of the values."""
        return self.kv_heads * self.head_dim

    @property
    def gate_width(self) -> int:
        return self.query_width if self.gate == "sigmoid" else 0

    def linear(self, entry: int) -> tuple[int, int]:
        """Parameters and multiply-adds of the projections, `entry` channels without the gate."""
        products = self.width * (entry + self.gate_width + self.query_width)
        biases = entry + self.gate_width + self.width if self.bias else 0
        return products + biases, products


def heads_config(name: str, site: Site, genes: Mapping[str, Gene]) -> dict[str, Any]:
    """The fields of HeadsConfig for the pattern `name`. Raises GeneError."""
    if site.borrows:
        raise GeneError(
            f"pattern={name} chooses among keys of its own: it borrows no keys and values"
        )
    only(genes, "pattern", {"qk_norm": False, "conv": 0})
    heads, kv_heads, head_dim = head_counts(site, genes)
    position = position_of(site, genes)
    if position not in ("rope", "rope3d", "none"):
        raise GeneError(
            f"pattern={name} goes with position=rope, rope3d or none, not {position}: its keys "
            "stand in no order of distance"
        )
    channels, theta, form = rope_of(genes, position, head_dim)
    return {
        "width": site.width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_channels": channels,
        "rope_form": form,
        "gate": choice(genes, "gate"),
        "bias": flag(genes, "bias"),
    }


class HeadsOperator(Operator):
    """The projections. `entry` makes `parts` (channels each) and then the gate, in one product."""

    def __init__(self, config: HeadsConfig, parts: list[int]) -> None:
        super().__init__()
        self.parts = parts
        self.head_dim = config.head_dim
        self.entry = nn.Linear(config.width, sum(parts) + config.gate_width, bias=config.bias)
        self.exit = nn.Linear(config.query_width, config.width, bias=config.bias)
        self.rotary: Rotary | None = None
        if config.rope_channels:
            self.rotary = Rotary(config.rope_channels, config.rope_theta, config.rope_form)

    def project(self, x: BTD) -> tuple[list[Tensor], Tensor | None]:
        """The parts as (B, T, heads, K), and the gate's input (B, T, H K) where there is a gate."""
        mixed = self.entry(x)
        used = sum(self.parts)
        gate = mixed[..., used:] if mixed.shape[-1] > used else None
        split = mixed[..., :used].split(self.parts, -1)
        return [part.reshape(*x.shape[:2], -1, self.head_dim) for part in split], gate

    def turn(self, heads: Tensor, start: int) -> Tensor:
        """(B, T, heads, K), whose first token has position `start`, turned, as (B, heads, T, K)."""
        turned: Tensor = heads if self.rotary is None else self.rotary(heads, start)
        return turned.transpose(1, 2)

    def output(self, out: Tensor, gate: Tensor | None) -> BTD:
        """(B, H, T, K) to the layer's output."""
        flat = out.transpose(1, 2).flatten(2)
        if gate is not None:
            flat = flat * torch.sigmoid(gate)
        return self.exit(flat)  # type: ignore[no-any-return]
