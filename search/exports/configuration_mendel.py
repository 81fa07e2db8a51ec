"""The configuration of an exported Mendel model, as transformers reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    # transformers takes this class for that of another model if the files that it names are equal;
    # then it takes that model's code too. So it names all files.
    from .mendel_parts import CLASSES as CLASSES
    from .modeling_mendel import MendelForCausalLM as MendelForCausalLM


class MendelConfig(PreTrainedConfig):  # type: ignore[misc]
    """Everything that decides the model.

    `blueprint` is the genome with the final numbers of every operator: the model is built from it
    alone. `genome` is the same design for people and for Mendel, with the version of its grammar.
    `max_position_embeddings` is the length that the weights were trained at; most operators go on
    beyond it. `trained_on` names the task; None where there are no trained weights.
    """

    model_type = "mendel"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        blueprint: dict[str, Any] | None = None,
        genome: dict[str, Any] | None = None,
        vocab_size: int = 256,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        max_position_embeddings: int = 2048,
        trained_on: str | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.blueprint = blueprint
        self.genome = genome
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        self.trained_on = trained_on
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
