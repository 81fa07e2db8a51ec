"""The tokenizer of models over the bytes of text, in the files that transformers reads.

A byte's token is its value. The zero byte, which stands after each document of the training text
and which plain text does not contain, is also the token for begin, end and padding.
"""

from __future__ import annotations

from typing import Any

END = "\0"
"""The text of the one special token, which is its byte too: text that holds it comes back whole."""


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (as GPT-2's has it).

    Printable characters of Latin-1 stand for themselves, the other bytes for the characters from
    256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json: 256 tokens and no merges."""
    tokens = [END, *byte_characters()[1:]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: byte for byte, token in enumerate(tokens)},
            "merges": [],
        },
    }


def settings(length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json; `length` is what the model was trained at."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
    }
