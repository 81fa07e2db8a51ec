"""The fields of a model's configuration file: checked, completed by the family's defaults, and
watched, so that what nobody read is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...primitives.base import Gene, GeneError
from ...primitives.catalogue import find
from ...primitives.norm import RMSNORM_EPS
from ..genome import Genome, Op, Slot
from ..header import MAX_SLOTS, with_header
from ..rules import violations


class ConfigurationError(ValueError):
    """A configuration that is no genome: one line that names the field."""


SILENT = frozenset(
    {
        "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures",
        "attention_dropout", "auto_map", "bos_token_id", "cache_implementation",
        "calc_logits_for_entire_prompt", "chunk_size", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "embd_pdrop",
        "eos_token_id", "ep_size", "final_w_init_variance_scale", "hidden_dropout", "id2label",
        "init_method", "initializer_range", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "label2id", "language", "mamba_chunk_size",
        "mamba_ssm_cache_dtype", "max_position_embeddings", "max_window_layers", "model_max_length",
        "model_type", "num_logits_to_keep", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
        "quantization_config", "rescale_prenorm_residual", "resid_pdrop", "residual_in_fp32",
        "return_dict", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "seq_aux",
        "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
        "use_associative_scan", "use_bfloat16", "use_cache", "use_mamba_kernels", "use_mambapy",
        "use_return_dict", "w_init_variance_scale",
    }
)  # fmt: skip
"""Fields about training, storing and serving: they decide nothing about the model's function."""


class Fields:
    """One configuration. Readers ask for every field that means something; `unread` are the rest.

    `differs` collects sentences about what the genome does not have: nothing with parameters or a
    cache, for that is refused.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        within: str = "",
    ) -> None:
        """`aliases`: other names of fields. `within`: the name of the field that these stand in.

        Raises ConfigurationError where two names of one field disagree.
        """
        self._values = dict(values)
        self._defaults = defaults
        self._asked: set[str] = set()
        self._within = f"{within}." if within else ""
        self._nested: dict[str, Fields] = {}
        self.differs: list[str] = []
        self.inner_epsilon: float | None = None
        """That of an operator's own norm, whose field is that of the layers' norms."""
        for other, name in (aliases or {}).items():
            if other not in self._values:
                continue
            value = self._values.pop(other)
            if self._values.setdefault(name, value) != value:
                raise ConfigurationError(
                    f"{self._within}{other} is {shown(value)} and {name} is "
                    f"{shown(self._values[name])}: they are two names of one field"
                )

    def get(self, name: str) -> Any:
        """The field as it stands, or its default; None where there is neither."""
        self._asked.add(name)
        return self._values.get(name, self._defaults.get(name))

    def known(self, *names: str) -> None:
        """Fields that mean nothing here, or nothing beside the others."""
        self._asked.update(names)

    def given(self, name: str) -> bool:
        """The file itself has the field, and not as null."""
        return self._values.get(name) is not None

    def expect(self, name: str, what: str) -> ConfigurationError:
        """The refusal of a value of another kind, to be raised."""
        return ConfigurationError(f"{self._within}{name} is {what}, not {shown(self.get(name))}")

    def whole(self, name: str, low: int = 1) -> int:
        """A whole number of at least `low`."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.expect(name, f"a whole number of at least {low}")
        return value

    def optional(self, name: str) -> int | None:
        """A whole number of at least 1; None where the field is null or absent."""
        return None if self.get(name) is None else self.whole(name)

    def count(self, name: str) -> int:
        """A whole number of at least 0, which null is."""
        return 0 if self.get(name) is None else self.whole(name, low=0)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.expect(name, "a number above 0")
        if not math.isfinite(value):
            raise self.expect(name, "a finite number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.expect(name, "true or false")
        return bool(value)

    def option(self, name: str, allowed: Iterable[str]) -> str:
        """One of some words."""
        value, words = self.get(name), list(allowed)
        if value not in words:
            raise self.expect(name, f"one of {', '.join(words)}")
        return str(value)

    def list_of(self, name: str, kind: type, what: str) -> list[Any]:
        """A list of whole numbers or of numbers; empty where the field is null or absent."""
        value = self.get(name)
        allowed = int | float if kind is float else kind
        fine = isinstance(value, list | tuple) and all(
            isinstance(item, allowed) and not isinstance(item, bool) for item in value
        )
        if value is not None and not fine:
            raise self.expect(name, f"a list of {what}")
        return [kind(item) for item in value or ()]

    def inside(
        self, name: str, defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None
    ) -> Fields:
        """The fields of a field; none where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.expect(name, "a mapping or null")
        if name not in self._nested:
            found = Fields(value or {}, defaults, aliases, self._within + name)
            found.differs = self.differs
            self._nested[name] = found
        return self._nested[name]

    def layers(self, name: str, kinds: Mapping[str, str]) -> list[str] | None:
        """A list of layers' kinds, in the words of `kinds`' values; None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.expect(name, "a list of layers' kinds")
        for kind in value:
            if not isinstance(kind, str) or kind not in kinds:
                raise ConfigurationError(
                    f"{name} holds {', '.join(kinds)}, not {shown(kind)}: no genome has that layer"
                )
        return [kinds[kind] for kind in value]

    def refuse(self, name: str, why: str) -> ConfigurationError:
        """The refusal of a field's value, to be raised."""
        return ConfigurationError(f"{self._within}{name} is {shown(self.get(name))}: {why}")

    def never(self, *names: str, why: str = "no axis of the genome has these parameters") -> None:
        """Refuses fields that are set: something with parameters or a cache hangs on each."""
        for name in names:
            if self.get(name) not in (None, False, 0, []):
                raise self.refuse(name, why)

    def always(self, *names: str, why: str = "the genome's operator always has them") -> None:
        """Refuses fields that are off."""
        for name in names:
            if self.get(name) is not True:
                raise self.refuse(name, why)

    def same(self, name: str, value: object, why: str) -> None:
        """Refuses a field that says something else than what follows from others."""
        if self.get(name) not in (None, value):
            raise self.refuse(name, why)

    def note(self, sentence: str) -> None:
        """Adds to what the genome does not have, once."""
        if sentence not in self.differs:
            self.differs.append(sentence)

    def neutral(self, name: str, *values: object, what: str) -> None:
        """Notes a field that is none of `values`, which the genome's function has."""
        value = self.get(name)
        if value not in values:
            self.note(f"{what} ({self._within}{name}={shown(value)})")

    def unread(self) -> list[str]:
        """The file's fields that nobody knows here and that may mean something."""
        own = set(self._values) - self._asked - set(self._defaults) - SILENT
        nested = (name for fields in self._nested.values() for name in fields.unread())
        return sorted({*(self._within + name for name in own), *nested})

    def genome(
        self,
        slots: Sequence[Slot],
        *,
        position: str = "rope",
        placement: str = "pre",
        epsilon: str | None = "rms_norm_eps",
    ) -> Genome:
        """The genome of the slots, with width, vocabulary and tying of the fields.

        `epsilon`: the field of the norms' epsilon, which is noted where it is not the genome's.
        """
        if epsilon is not None:
            self._epsilon(epsilon)
        header: dict[str, Gene] = {
            "width": self.whole("hidden_size"),
            "vocab": self.whole("vocab_size"),
            "tied": self.flag("tie_word_embeddings"),
            "position": position,
            "placement": placement,
        }
        if len(slots) > MAX_SLOTS:
            raise ConfigurationError(
                f"the model has {len(slots)} slots; a genome has at most {MAX_SLOTS}"
            )
        try:
            genome = with_header(header, slots)
        except GeneError as error:
            raise ConfigurationError(str(error)) from None
        broken = violations(genome)
        if broken:
            raise ConfigurationError(str(broken[0]))
        return genome

    def _epsilon(self, name: str) -> None:
        found, inner = self.number(name), self.inner_epsilon
        if found != RMSNORM_EPS or inner not in (None, found):
            own = f"{RMSNORM_EPS:g}" if inner is None else f"{RMSNORM_EPS:g} and {inner:g}"
            self.note(f"the norms' epsilon ({name}={found:g}; a genome's is {own})")


@dataclass(frozen=True)
class Family:
    """How the configurations of one model_type are read."""

    reference: str
    """The class whose defaults `defaults` are: of `transformers`, or with `fla.` before it of
    flash-linear-attention."""
    read: Callable[[Fields], Genome]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields, as older files or the class have them."""


STACK: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
TRANSFORMER: Mapping[str, Any] = {
    **STACK,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
TURNED: Mapping[str, Any] = {**TRANSFORMER, "rope_theta": 10000.0}
"""Defaults that many classes have: of any stack of layers, with attention, and with RoPE."""


def family(
    reference: str,
    aliases: Mapping[str, str] | None = None,
    base: Mapping[str, Any] = TURNED,
    **defaults: Any,
) -> Callable[[Callable[[Fields], Genome]], Family]:
    """Makes a reader of fields a family, whose class has the defaults of `base` but for these."""
    return lambda read: Family(reference, read, {**base, **defaults}, aliases or {})


def op(name: str, **genes: Gene) -> Op:
    """An operator with checked genes, those that it has anyway left out."""
    primitive, point = find(name)
    own = dict(point.genes) if point else {}
    written: dict[str, Gene] = {}
    for axis_name, value in genes.items():
        axis = primitive.axis(axis_name)
        try:
            checked = axis.check(value)
        except GeneError as error:
            raise ConfigurationError(f"{name}: {error}") from None
        if checked != axis.check(own.get(axis_name, axis.default)):
            written[axis_name] = checked
    return Op(name, tuple(written.items()))


def alone(*operators: Op) -> list[Slot]:
    """Serial slots of one operator each."""
    return [Slot((one,)) for one in operators]


def shown(value: object) -> str:
    """A field's value in a sentence."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return repr(value)
