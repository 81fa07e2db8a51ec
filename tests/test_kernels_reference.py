"""The operators against independent implementations in `transformers`, and torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import RecurrentGemmaConfig
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from mendel.kernels.delta_rule import delta_rule
from mendel.kernels.diagonal_scan import diagonal_scan
from mendel.kernels.matrix_state import matrix_state
from mendel.kernels.short_conv import short_conv

# The references compute in float32 with other sums: some hundred roundings of 6e-8.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
B, T, H, K, V = 2, 100, 3, 16, 8


def test_mamba2() -> None:
    """S = exp(dt A) S + (dt B) x^T, y = C^T S: keys are B, queries C, values dt x."""
    torch.manual_seed(0)
    x, b, c = torch.randn(B, T, H, V), torch.randn(B, T, H, K), torch.randn(B, T, H, K)
    dt, a = torch.rand(B, T, H), -torch.rand(H) * 4
    state = torch.randn(B, H, V, K)
    want, want_state = mamba2_chunk_scan(
        x, dt, a, b, c, chunk_size=32, initial_states=state, return_final_states=True
    )
    have, have_state = matrix_state(c, b, x * dt[..., None], dt * a, state.mT, scale=1.0)
    torch.testing.assert_close(have, want, **CLOSE)
    torch.testing.assert_close(have_state.mT, want_state, **CLOSE)


def test_gated_delta_rule() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1)
    v, beta, g = torch.randn(B, T, H, V), torch.rand(B, T, H), -torch.rand(B, T, H)
    state = torch.randn(B, H, K, V)
    want, want_state = torch_chunk_gated_delta_rule(
        q, k, v, g, beta, chunk_size=32, initial_state=state, output_final_state=True
    )
    have, have_state = delta_rule(q, k, v, beta, g, state)
    torch.testing.assert_close(have, want, **CLOSE)
    torch.testing.assert_close(have_state, want_state, **CLOSE)


def test_rg_lru() -> None:
    torch.manual_seed(0)
    layer = RecurrentGemmaRglru(
        RecurrentGemmaConfig(hidden_size=K, lru_width=K, num_attention_heads=1)
    )
    a, b, state = torch.rand(B, T, K), torch.randn(B, T, K), torch.randn(B, K)
    reset = torch.zeros(B, T, 1, dtype=torch.bool)
    want, want_state = layer._rnn_scan(b, a, reset, state)
    have, have_state = diagonal_scan(a.log(), b, state)
    torch.testing.assert_close(have, want, **CLOSE)
    torch.testing.assert_close(have_state, want_state, **CLOSE)


def test_convolution() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, T, K), torch.randn(K, 4), torch.randn(K)
    want = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=K).mT
    torch.testing.assert_close(short_conv(x, weight, bias)[0], want, **CLOSE)
    torch.testing.assert_close(
        short_conv(x, weight, bias, activation="silu")[0], F.silu(want), **CLOSE
    )


@pytest.mark.parametrize("start", [True, False])
def test_counted_operations_of_a_step(start: bool) -> None:
    """What torch counts for one token is what the costs of the primitives say."""
    q = torch.randn(B, 1, H, K)
    v, beta, g = torch.randn(B, 1, H, V), torch.rand(B, 1, H), -torch.rand(B, 1, H)
    state = torch.randn(B, H, K, V) if start else None
    x, weight = torch.randn(B, 1, K), torch.randn(K, 4)
    for log_decay in (None, g[0, 0], g, -q.abs()):
        with FlopCounterMode(display=False) as counter:
            matrix_state(q, q, v, log_decay, state)
        assert counter.get_total_flops() == B * H * 4 * K * V
    for log_decay in (None, g):
        with FlopCounterMode(display=False) as counter:
            delta_rule(q, q, v, beta, log_decay, state)
        assert counter.get_total_flops() == B * H * 6 * K * V
    with FlopCounterMode(display=False) as counter:
        diagonal_scan(-x.abs(), x, x[:, 0] if start else None)
    assert counter.get_total_flops() == 0
    with FlopCounterMode(display=False) as counter:
        short_conv(x, weight, None, torch.randn(B, K, 3) if start else None)
    assert counter.get_total_flops() == B * 2 * 4 * K
