"""The fields of a model's configuration file: checked, completed by the family's defaults, and
watched, so that what nobody read is named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        "attention_dropout", "auto_map", "bos_token_id", "chunk_size",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
        "dtype", "embd_pdrop", "eos_token_id", "ep_size", "final_w_init_variance_scale",
        "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "label2id", "language", "mamba_chunk_size",
        "mamba_ssm_cache_dtype", "max_position_embeddings", "max_window_layers",
        "model_max_length", "model_type", "num_logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
        "problem_type", "quantization_config", "rescale_prenorm_residual", "resid_pdrop",
        "residual_in_fp32", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
        "sep_token_id", "seq_aux", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "use_associative_scan", "use_bfloat16", "use_cache",
        "use_mamba_kernels", "use_mambapy", "use_return_dict", "w_init_variance_scale",
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
    ) -> None:
        """`aliases`: other names of fields, as older files have them."""
        self._values = dict(values)
        self._defaults = defaults
        self._asked: set[str] = set()
        self.differs: list[str] = []
        for old, name in (aliases or {}).items():
            if old in self._values:
                self._values.setdefault(name, self._values.pop(old))

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

    def whole(self, name: str, low: int = 1) -> int:
        """A whole number of at least `low`."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigurationError(
                f"{name} is a whole number of at least {low}, not {shown(value)}"
            )
        return value

    def optional(self, name: str) -> int | None:
        """A whole number of at least 1; None where the field is null or absent."""
        return None if self.get(name) is None else self.whole(name)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigurationError(f"{name} is a number above 0, not {shown(value)}")
        if not math.isfinite(value):
            raise ConfigurationError(f"{name} is a finite number, not {shown(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigurationError(f"{name} is true or false, not {shown(value)}")
        return bool(value)

    def option(self, name: str, allowed: Iterable[str]) -> str:
        """One of some words."""
        value, words = self.get(name), list(allowed)
        if value not in words:
            raise ConfigurationError(f"{name} is one of {', '.join(words)}, not {shown(value)}")
        return str(value)

    def list_of(self, name: str, kind: type, what: str) -> list[Any] | None:
        """A list of whole numbers or of numbers; None where the field is null or absent."""
        value = self.get(name)
        if value is None:
            return None
        allowed = int | float if kind is float else kind
        fine = isinstance(value, list | tuple) and all(
            isinstance(item, allowed) and not isinstance(item, bool) for item in value
        )
        if not fine:
            raise ConfigurationError(f"{name} is a list of {what}, not {shown(value)}")
        return [kind(item) for item in value]

    def mapping(self, name: str) -> dict[str, Any]:
        """A mapping; empty where the field is null or absent."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{name} is a mapping or null, not {shown(value)}")
        return dict(value)

    def layers(self, name: str, kinds: Mapping[str, str]) -> list[str] | None:
        """A list of layers' kinds, in the words of `kinds`' values; None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise ConfigurationError(f"{name} is a list of layers' kinds, not {shown(value)}")
        for kind in value:
            if not isinstance(kind, str) or kind not in kinds:
                raise ConfigurationError(
                    f"{name} holds {', '.join(kinds)}, not {shown(kind)}: no genome has that layer"
                )
        return [kinds[kind] for kind in value]

    def refuse(self, name: str, why: str) -> ConfigurationError:
        """The refusal of a field's value, to be raised."""
        return ConfigurationError(f"{name} is {shown(self.get(name))}: {why}")

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

    def note(self, sentence: str) -> None:
        """Adds to what the genome does not have, once."""
        if sentence not in self.differs:
            self.differs.append(sentence)

    def neutral(self, name: str, *values: object, what: str) -> None:
        """Notes a field that is none of `values`, which the genome's function has."""
        value = self.get(name)
        if value not in values:
            self.note(f"{what} ({name}={shown(value)})")

    def epsilon(self, name: str, inside: float | None = None) -> None:
        """Notes a norm's epsilon that is not the genome's; `inside` is that of its operator's own
        norm, which takes the same field."""
        found = self.number(name)
        if found != RMSNORM_EPS or inside not in (None, found):
            own = f"{RMSNORM_EPS:g}" if inside is None else f"{RMSNORM_EPS:g} and {inside:g}"
            self.note(f"the norms' epsilon ({name}={found:g}; a genome's is {own})")

    def unread(self) -> list[str]:
        """The file's fields that nobody knows here and that may mean something."""
        return sorted(set(self._values) - self._asked - set(self._defaults) - SILENT)

    def genome(
        self, slots: Sequence[Slot], position: str = "rope", placement: str = "pre"
    ) -> Genome:
        """The genome of the slots, with width, vocabulary and tying of the fields."""
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
