"""RoPE from version 5's `rope_parameters` or the older fields."""

from __future__ import annotations

from collections.abc import Mapping

from ...primitives.base import Gene
from .fields import Fields
from .parts import heads_of

BASE = "rope_theta"
PARTIAL = "partial_rotary_factor"
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What of YaRN the genome's form has fixed (`primitives/rope.py`)."""
TEMPERATURE = ("attention_factor", "mscale", "mscale_all_dim")
"""Other factors on queries and keys than YaRN's own."""
ORIGINAL = "original_max_position_embeddings"
SCALINGS = (
    *("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("short_mscale", "long_mscale", "truncate", ORIGINAL, *YARN, *TEMPERATURE),
)
"""What kinds of scaling read, beside the base."""


def rope(
    f: Fields, kind: str | None = None, base: str = BASE, partial: bool = False
) -> dict[str, Gene]:
    """The genes of RoPE. As in the library, `rope_scaling` stands before `rope_parameters`.

    `kind`: the layers' kind, where `rope_parameters` has one entry for each; `rope_scaling` is that
    of full attention. `base`: the older field of the base. `partial`: the class turns a share of
    each head where a field says so.
    """
    own = _parameters(f, kind)
    f.known(base)
    theta = own.number(BASE) if own.given(BASE) else f.number(base)
    genes: dict[str, Gene] = {"rope_theta": theta}
    where = own if own.given(PARTIAL) else f
    share = None if where.get(PARTIAL) is None else where.number(PARTIAL)
    if partial and share is not None:
        turned = int(heads_of(f)[2] * share)
        if turned % 2:
            raise where.refuse(PARTIAL, f"{turned} channels of a head are no pairs to turn")
        genes["rope_fraction"] = share
    elif share not in (None, 1.0):
        raise where.refuse(PARTIAL, "the library's class turns whole heads")
    scaling = own.get("rope_type") or "default"
    if scaling == "linear":
        genes |= {"rope_scaling": "linear", "rope_factor": own.number("factor")}
    elif scaling == "yarn" and _is_plain_yarn(own):
        genes |= {
            "rope_scaling": "yarn",
            "rope_factor": own.number("factor"),
            "rope_original": own.whole(ORIGINAL),
            "rope_rounded": own.flag("truncate"),
        }
    elif scaling != "default":
        f.note(f"a scaling of RoPE ({scaling})")
    return genes


def rope_base(f: Fields) -> dict[str, Gene]:
    """The base of RoPE alone, for operators that take no scaling; a scaling is noted."""
    genes = rope(f)
    if "rope_scaling" in genes:
        f.note(f"a scaling of RoPE ({genes['rope_scaling']})")
    return {"rope_theta": genes["rope_theta"]}


def without_rope(f: Fields) -> None:
    """Without positions nothing reads the fields of RoPE, which files have all the same."""
    f.known(BASE, PARTIAL, "rope_scaling", "rope_parameters")


def _parameters(f: Fields, kind: str | None) -> Fields:
    """The fields of RoPE that stand in one field; those that stand by themselves are known."""
    f.known(PARTIAL, "rope_parameters")
    name, defaults = "rope_parameters", {"truncate": True}
    where = f if kind is None else f.inside(name, {})
    if f.get("rope_scaling") and kind in (None, "full_attention"):
        more = where.get(kind) if kind is not None else None
        where, name = f, "rope_scaling"
        defaults |= dict(more) if isinstance(more, Mapping) else {}
    elif kind is not None:
        name = kind
    own = where.inside(name, defaults, {"type": "rope_type"})
    own.known(BASE, *SCALINGS)
    return own


def _is_plain_yarn(own: Fields) -> bool:
    original = own.get(ORIGINAL)
    if not isinstance(original, int) or isinstance(original, bool):
        return False
    fixed = all(own.get(name) in (None, value) for name, value in YARN.items())
    return fixed and all(own.get(name) is None for name in TEMPERATURE)
