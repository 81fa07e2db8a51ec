"""The catalogue: every primitive, one row each. Adding a primitive is one file and one row."""

from __future__ import annotations

from collections.abc import Mapping

from .attention.axes import ATTENTION
from .attention.shared_axes import SHARED_BLOCK
from .base import Gene, GeneError, Point, Primitive
from .channel.kan import KAN
from .channel.mlp import MLP
from .channel.moe_axes import MOE
from .channel.rwkv import RWKV_CHANNEL
from .convolution.conv_block import CONV_BLOCK
from .convolution.fourier import FOURIER
from .convolution.hyena import HYENA
from .convolution.short_conv import SHORT_CONV
from .convolution.token_mlp import TOKEN_MLP
from .diagonal.gated_scan import GATED_SCAN
from .diagonal.hgrn import HGRN
from .diagonal.mega import MEGA
from .diagonal.rwkv4 import RWKV4
from .diagonal.s4 import STATE_SPACE
from .diagonal.s5 import SHARED_STATE_SPACE
from .diagonal.selective import SELECTIVE
from .memory.axes import LEARNED_MEMORY
from .memory.beside_axes import MEMORY_ATTENTION
from .memory.continuum import CONTINUUM
from .nearest import unknown
from .recurrence.delta_axes import DELTA
from .recurrence.matrix_axes import RECURRENCE
from .recurrence.mlstm import MLSTM
from .recurrence.nonlinear import NONLINEAR
from .recurrence.rwkv7 import RWKV7

CATALOGUE: tuple[Primitive, ...] = (
    ATTENTION,
    SHARED_BLOCK,
    RECURRENCE,
    DELTA,
    RWKV7,
    MLSTM,
    SELECTIVE,
    STATE_SPACE,
    SHARED_STATE_SPACE,
    MEGA,
    GATED_SCAN,
    HGRN,
    RWKV4,
    NONLINEAR,
    LEARNED_MEMORY,
    MEMORY_ATTENTION,
    CONTINUUM,
    SHORT_CONV,
    CONV_BLOCK,
    HYENA,
    FOURIER,
    TOKEN_MLP,
    MLP,
    MOE,
    RWKV_CHANNEL,
    KAN,
)

_BY_NAME: dict[str, tuple[Primitive, Point | None]] = {}
for _primitive in CATALOGUE:
    _BY_NAME[_primitive.name] = (_primitive, None)
    for _point in _primitive.points:
        if _point.name in _BY_NAME:
            raise RuntimeError(f"two rows of the catalogue are named {_point.name}")
        _BY_NAME[_point.name] = (_primitive, _point)


def names() -> list[str]:
    """Every name that a genome can use: primitives and named points, sorted."""
    return sorted(_BY_NAME)


def find(name: str) -> tuple[Primitive, Point | None]:
    """The primitive of that name, and the point where the name is a point's."""
    try:
        return _BY_NAME[name]
    except KeyError:
        sentence, allowed = f"no primitive is named {name!r}", f"there are {', '.join(names())}"
        raise GeneError(unknown(sentence, name, names(), allowed)) from None


def resolve(name: str, genes: Mapping[str, Gene]) -> tuple[Primitive, dict[str, Gene]]:
    """The primitive and every axis' checked value: default, then the point's, then `genes`."""
    primitive, point = find(name)
    return primitive, primitive.complete({**(point.genes if point else {}), **genes})
