"""Norms of queries and keys, and the gate on the output, against transformers' layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_parts import (
    HEADS,
    TOKENS,
    WIDTH,
    build,
    causal_mask,
    config,
    copy_projections,
    error,
    inputs,
)
from torch import Tensor, nn
from transformers import OlmoeConfig, Qwen3Config
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from mendel.primitives.attention.layer import Attention
from mendel.primitives.base import Gene


def agree(ours: Attention, reference: Any, rotary: nn.Module, x: Tensor) -> None:
    """With the reference's weights, its norms' scales drawn, our layer has its outputs."""
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    assert ours.q_norm is not None
    assert ours.k_norm is not None
    for norm, theirs in ((ours.q_norm, reference.q_norm), (ours.k_norm, reference.k_norm)):
        nn.init.uniform_(theirs.weight, 0.5, 1.5)
        norm.load_state_dict(theirs.state_dict())
    angles = rotary(x, torch.arange(TOKENS)[None])
    assert error(ours(x)[0], reference(x, angles, causal_mask(TOKENS))[0]) < 1e-5


@torch.no_grad()
def test_qk_norm_is_qwen3s() -> None:
    settings = Qwen3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=3,
        head_dim=10,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = qwen3.Qwen3Attention(settings, 0), inputs()
    ours = build({"kv_heads": 3, "head_dim": 10, "qk_norm": True})
    agree(ours, reference, qwen3.Qwen3RotaryEmbedding(settings), x)


@torch.no_grad()
def test_a_norm_over_all_heads_is_olmoes() -> None:
    settings = OlmoeConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=3,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = olmoe.OlmoeAttention(settings, 0), inputs()
    ours = build({"kv_heads": 3, "qk_norm": True, "norm_over": "all"})
    agree(ours, reference, olmoe.OlmoeRotaryEmbedding(settings), x)


@pytest.mark.parametrize("over", ["head", "all"])
@torch.no_grad()
def test_a_norm_without_scales_has_scales_of_1(over: str) -> None:
    genes: dict[str, Gene] = {"kv_heads": 2, "qk_norm": True, "norm_over": over}
    scaled, plain = build(genes), build({**genes, "norm_scales": False})
    for norm in (scaled.q_norm, scaled.k_norm):
        assert norm is not None
        for scales in norm.parameters():
            nn.init.ones_(scales)
    own = scaled.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    assert error(plain(inputs())[0], scaled(inputs())[0]) < 1e-6
    assert config({**genes, "norm_scales": False}).cost(9, torch.float32).params == sum(
        p.numel() for p in plain.parameters()
    )


@torch.no_grad()
def test_the_output_gate_is_qwen3_nexts() -> None:
    settings = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=WIDTH // HEADS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference, x = qwen3_next.Qwen3NextAttention(settings, 0), inputs()
    ours = build({"kv_heads": 2, "qk_norm": True, "gate": "sigmoid"})
    pairs = reference.q_proj.weight.unflatten(0, (HEADS, 2, -1))
    q, gate = (pairs[:, i].flatten(0, 1) for i in (0, 1))
    ours.entry.weight.copy_(torch.cat((q, reference.k_proj.weight, reference.v_proj.weight, gate)))
    ours.exit.load_state_dict(reference.o_proj.state_dict())
    for norm, theirs in ((ours.q_norm, reference.q_norm), (ours.k_norm, reference.k_norm)):
        assert norm is not None
        # Theirs multiplies by 1 + weight.
        norm.load_state_dict({"weight": 1 + theirs.weight})
    angles = qwen3_next.Qwen3NextRotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    assert error(ours(x)[0], reference(x, angles, causal_mask(TOKENS))[0]) < 1e-5
