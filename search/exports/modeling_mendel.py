"""An exported Mendel model for transformers: loss, generation with a cache, padding.

The model itself is `LanguageModel` in `mendel_genome_model.py`; this file is the way between it and
transformers. It needs torch and transformers alone.

Padding. A causal model gives the same logits whatever stands to the right, so columns to the right
need no mask. Columns to the left are taken out before the model reads a row: without a cache the
rows are moved to the left for the call, with a cache rows that begin at the same column have a
state of their own.

Training. What operators add to the loss (experts, learned spans) is added in training mode. Call
`model.after_step()` after every step of an optimiser: experts adjust their balance, and weights
that live on a sphere return to it; where neither is there it does nothing. Slots that take a share
of the tokens choose it in training mode among all columns, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...genome.encoded import decode
from ...genome.model import LanguageModel, ModelState
from ...genome.routing import RowStates
from .configuration_mendel import MendelConfig
from .mendel_parts import CLASSES

IGNORED = -100
"""A label that carries no loss."""

LEAST_ROOM = 64
"""Tokens that a cache has room for where nobody says how many will come."""


class MendelCache(Cache):  # type: ignore[misc]
    """What a batch of sequences carries from call to call.

    States have room for a fixed number of tokens; when it is used up they are made anew with twice
    the room, from the tokens, which are kept for that.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__(layers=[])
        self.room = room
        self.tokens: Tensor | None = None
        """(B, T): every column so far, padding included."""
        self.pads: list[int] = []
        """The columns of padding to the left of each row."""
        self.groups: list[tuple[Tensor, ModelState]] = []
        """Rows with the same padding, and their state."""

    def read(self, model: LanguageModel, ids: Tensor, pads: list[int] | None) -> Tensor:
        """Logits (B, T, A) of the next T columns; zeros where a column is padding.

        `pads` are the columns of padding to the left of each row, asked of the first call only.
        """
        if self.tokens is None:
            self.tokens = ids
            self.pads = [0] * ids.shape[0] if pads is None else pads
        else:
            self.tokens = torch.cat([self.tokens, ids], 1)
        needed = self.tokens.shape[1]
        if self.groups and needed <= self.room:
            return self._read(model, ids)
        self._start(model, needed)
        return self._read(model, self.tokens)[:, -ids.shape[1] :]

    def _start(self, model: LanguageModel, needed: int) -> None:
        """Empty states: with room for more than is needed, where the model allows it."""
        for room in (max(needed, 2 * self.room if self.groups else self.room, LEAST_ROOM), needed):
            try:
                self.groups = [
                    (rows, model.init_state(len(rows), room)) for rows in _alike(self.pads)
                ]
            except ValueError:
                if room == needed:
                    raise
            else:
                self.room = room
                return

    def _read(self, model: LanguageModel, ids: Tensor) -> Tensor:
        """Logits of columns that follow what the states have seen."""
        logits: Tensor | None = None
        for number, (rows, state) in enumerate(self.groups):
            # A state that has seen nothing begins at its rows' first column that is no padding.
            skipped = self.pads[int(rows[0])] if state.length == 0 else 0
            y: Tensor
            y, new = model(ids[rows.to(ids.device), skipped:], state)
            assert new is not None
            self.groups[number] = (rows, new)
            if logits is None:
                logits = y.new_zeros(*ids.shape, y.shape[-1])
            logits[rows.to(ids.device), skipped:] = y
        assert logits is not None
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]

    def select(self, indices: Iterable[int]) -> None:
        """Take these rows, in this order, once or more often."""
        if self.tokens is None:
            return
        chosen = list(indices)
        old = {
            int(row): (state, place)
            for rows, state in self.groups
            for place, row in enumerate(rows.tolist())
        }
        self.pads = [self.pads[row] for row in chosen]
        self.tokens = self.tokens[torch.tensor(chosen, device=self.tokens.device)]
        self.groups = [
            (rows, _rows_of(old[chosen[rows[0]]][0], [old[chosen[r]][1] for r in rows.tolist()]))
            for rows in _alike(self.pads)
        ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = range(len(self.pads))
        self.select(torch.tensor(rows, device=indices.device)[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(row for row in range(len(self.pads)) for _ in range(repeats))

    def reset(self) -> None:
        self.tokens, self.pads, self.groups = None, [], []

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a Mendel cache cannot be cropped: its states only go forward")

    @property
    def batch_size(self) -> int:
        return len(self.pads) or -1

    @property
    def is_initialized(self) -> bool:
        return self.tokens is not None

    @property
    def is_croppable(self) -> bool:
        return False


class MendelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model over an alphabet of `config.vocab_size` tokens."""

    config_class = MendelConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False
    _is_stateful = True
    model: LanguageModel

    def __init__(self, config: MendelConfig) -> None:
        super().__init__(config)
        here, dtype = torch.empty(0).device, torch.get_default_dtype()
        # Weights are drawn and constants computed as Mendel does it: on the CPU, in float32.
        # transformers loads a model by building it without memory (device `meta`) in half
        # precision, where neither could be done.
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                self.model = LanguageModel(decode(config.blueprint, CLASSES), config.vocab_size)
        finally:
            torch.set_default_dtype(dtype)
        self.model.to(device=None if here.type == "meta" else here, dtype=dtype)
        self._constants = {
            module: {
                name: tensor.clone()
                for name, tensor in module.named_buffers(recurse=False)
                if name in module._non_persistent_buffers_set
            }
            for module in self.modules()
        }
        self._built = False
        self.post_init()
        self._built = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MendelCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, A) of `input_ids` (B, T).

        `attention_mask` is 1 for tokens and 0 for padding, over all columns so far, to the left or
        to the right of a row's tokens but not between them. `labels` are the tokens themselves:
        they are shifted here, and -100 carries no loss. Raises ValueError.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("a Mendel model gives logits alone: no attentions, no hidden states")
        if use_cache is None:
            plain = labels is None and not self.training
            use_cache = past_key_values is not None or (plain and bool(self.config.use_cache))
        if past_key_values is not None and not isinstance(past_key_values, MendelCache):
            raise ValueError(f"past_key_values is a MendelCache, not {type(past_key_values)}")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        pads = _left_pads(attention_mask, past, input_ids)
        if use_cache or past:
            if past == 0 and attention_mask is not None and not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "padding stands to the right of tokens that a cache should continue: "
                    "pad to the left, or use_cache=False"
                )
            cache = MendelCache() if past_key_values is None else past_key_values
            logits = cache.read(self.model, input_ids, pads if past == 0 else None)
        else:
            cache = None
            logits = self._whole(input_ids, attention_mask, pads)
        loss = None if labels is None else self._loss(logits, labels)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return tuple(v for v in (loss, logits, cache) if v is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _whole(self, ids: Tensor, mask: Tensor | None, pads: list[int] | None) -> Tensor:
        """Logits of whole sequences, in the form that training takes."""
        if mask is not None:
            # A tokenizer may pad with a token that the alphabet has not.
            ids = ids.masked_fill(mask == 0, 0)
        if pads is None or not any(pads):
            logits: Tensor = self.model(ids)[0]
            return logits
        left = torch.tensor(pads, device=ids.device)[:, None]
        columns = torch.arange(ids.shape[1], device=ids.device)
        moved: Tensor = self.model(ids.gather(1, (columns + left) % ids.shape[1]))[0]
        back = (columns - left) % ids.shape[1]
        return moved.gather(1, back[..., None].expand_as(moved))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(logits.device),
            ignore_index=IGNORED,
        )
        extra = self.model.auxiliary_loss() if self.training else None
        return loss if extra is None else loss + extra

    def after_step(self) -> None:
        """To be called after every step of an optimiser."""
        self.model.after_step()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the tables of a Mendel model are those that it was built with")

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the embedding is the head too."""
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        raise NotImplementedError("the alphabet of a Mendel model is fixed")

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation chooses among caches of keys and values; a Mendel model has "
                "its own cache"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = MendelCache(max_cache_length)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn here: the model drew its weights when it was built.

        After loading, transformers asks for what no file holds: constants come back, and weights
        that are missing are refused.
        """
        if not self._built:
            return
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(
                    f"the weights lack {name} of a {type(module).__name__}; "
                    "AutoModelForCausalLM.from_config makes a model with fresh weights"
                )
        for name, value in self._constants.get(module, {}).items():
            buffer = module.get_buffer(name)
            buffer.copy_(value)


def _left_pads(mask: Tensor | None, past: int, ids: Tensor) -> list[int] | None:
    """The columns of padding to the left of each row; None for none. Raises ValueError."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape != (ids.shape[0], past + ids.shape[1]):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it has one entry for each of the "
            f"{past + ids.shape[1]} columns so far of each of the {ids.shape[0]} rows"
        )
    told = mask != 0
    if past:
        if not bool(told[:, past:].all()):
            raise ValueError("attention_mask hides a token that continues a sequence")
        return None
    if bool(told.all()):
        return None
    length = told.sum(1)
    columns = torch.arange(told.shape[1], device=told.device)
    first = torch.where(told, columns, told.shape[1]).amin(1)
    last = torch.where(told, columns, -1).amax(1)
    if not bool((length > 0).all()):
        raise ValueError("attention_mask hides a whole row")
    if not bool((last - first + 1 == length).all()):
        raise ValueError("attention_mask hides columns between two tokens of a row")
    pads: list[int] = first.tolist()
    return pads


def _alike(pads: list[int]) -> list[Tensor]:
    """The rows of each amount of padding."""
    return [
        torch.tensor([row for row, own in enumerate(pads) if own == amount])
        for amount in sorted(set(pads))
    ]


def _rows_of(state: ModelState, rows: list[int]) -> ModelState:
    """A copy of a state with these sequences of its batch."""
    new = state.clone()
    for slot in new.operators:
        for part in slot:
            if isinstance(part, RowStates):
                part.rows = [part.rows[row].clone() for row in rows]
                continue
            for name, tensor in part.tensors.items():
                part.tensors[name] = tensor[torch.tensor(rows, device=tensor.device)]
    return new
