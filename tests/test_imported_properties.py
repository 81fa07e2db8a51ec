"""Drawn configurations of transformers' classes: an import that is not refused has the parameters
of the library's model, its logits where nothing is said to differ, and no field without effect."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from imported_spaces import SPACES, drawn
from imported_weights import AUTO, models
from reference_weights import error, tokens

from mendel.genome import imported
from mendel.genome.cost import cost
from mendel.genome.hash import canonical_hash
from mendel.genome.imported import FAMILIES, ConfigurationError, Imported

MOST = 3000
"""Draws, of which enough must be configurations to the library and genomes to us."""
APART = {"zamba2"}
"""Families whose logits are compared elsewhere, at one configuration."""
EXACT = {
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), 1e-6),
    # The kernels of xLSTM: float32, chunks that cut the text, and no epsilon, as in the papers.
    "autocast_kernel_dtype": "float32",
    "chunk_size": 16,
    "eps": 1e-12,
}
"""Settings of theirs that the comparison of logits fixes, where a configuration has them."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
HARMLESS = ("epsilon", "least step size", "second token", "cap on logits")
"""Differences that the comparison of logits takes away."""
WITHOUT_EFFECT = {
    ("gemma", "hidden_act"): "the library takes both names for the tanh form",
    ("nemotron_h", "n_shared_experts"): "the library's class does not read it",
    **{(name, "pad_token_id"): "of the text" for name in ("phi3", "kimi_linear")},
}


def _read(config: Any, whole: bool = True) -> Imported:
    return imported.read(json.loads(config.to_json_string(use_diff=not whole)))


def _accepted(family: str, seed: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Values and configurations that the library and we take."""
    generator = random.Random(seed)
    cls: Any = getattr(transformers, FAMILIES[family].reference)
    for _ in range(MOST):
        values = drawn(family, generator)
        # Classes and we refuse what does not fit together.
        with suppress(Exception):
            config = cls(**copy.deepcopy(values), experts_implementation="eager")
            _read(config)
            yield values, config
    raise AssertionError("too few draws are accepted")


@pytest.mark.parametrize("family", SPACES)
def test_parameters_are_those_of_the_library(family: str) -> None:
    draws = _accepted(family, seed=0)
    for _ in range(8):
        values, config = next(draws)
        with torch.device("meta"):
            theirs = AUTO.from_config(config)
        expected = sum(p.numel() for p in theirs.parameters())
        file = imported.read({"model_type": family, **values})
        for found in (_read(config), _read(config, whole=False), file):
            assert cost(found.genome).total.params == expected, values
            assert found.unread == ()


@pytest.mark.parametrize("family", [name for name in SPACES if name not in APART])
def test_logits_are_those_of_the_library_where_nothing_differs(family: str) -> None:
    draws, compared = _accepted(family, seed=9), 0
    while compared < 3:
        values, config = next(draws)
        found = _read(config)
        if any(not any(word in said for word in HARMLESS) for said in found.differs):
            continue
        for name, value in EXACT.items():
            if hasattr(config, name):
                setattr(config, name, value)
        theirs, ours = (model.double() for model in models(config, found.genome))
        x = tokens()
        with torch.no_grad():
            expected, logits = theirs(x, use_cache=False).logits, ours(x)[0]
        cap = next(filter(None, (getattr(config, name, None) for name in CAPS)), None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        assert error(logits, expected) < 1e-5, values
        compared += 1


@pytest.mark.parametrize("family", SPACES)
def test_no_field_is_without_effect(family: str) -> None:
    draws = _accepted(family, seed=2)
    waiting = {name for name, options in SPACES[family].items() if len(set(map(repr, options))) > 1}
    for _ in range(30):
        values, _ = next(draws)
        base = _outcome(family, values)
        for name in list(waiting):
            others = ({**values, name: other} for other in SPACES[family][name])
            if any(_outcome(family, other) != base for other in others):
                waiting.remove(name)
    assert waiting == {name for of, name in WITHOUT_EFFECT if of == family and name in waiting}


def _outcome(family: str, values: dict[str, Any]) -> object:
    try:
        found = imported.read({"model_type": family, **values})
    except ConfigurationError as refusal:
        return str(refusal)
    return canonical_hash(found.genome), found.differs
