"""Recurrent layers against transformers' own CPU path, and how their time grows with the length.

    python benchmarks/recurrences.py [--repeats 7] [--only growth|speed]

Speed: the same layer and shape, T = 2,048, float32, forward and forward with backward; calls of a
pair alternate, so that noise of the machine meets both, and the figure is the ratio of neighbouring
times. The numbers of parameters are compared first. Growth: a layer's forward time at T = 16,384
over that at T = 1,024, which is 16 where it is linear; attention stands beside for comparison.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from record import save, spread
from torch import Tensor, nn
from transformers import (
    KimiLinearConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    xLSTMConfig,
)
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaRecurrentBlock,
)
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from mendel.primitives.base import Site, is_causal
from mendel.primitives.catalogue import names, resolve

WIDTH = 256
NARROW = {"mamba": 64}
"""Autograd through transformers' loop over tokens makes a gradient of the whole sequence for every
token: minutes at the full width."""
TOKENS = 2048
SHORT, LONG = 1024, 16384
GROWTH_LIMIT = 20.0
ENOUGH_SECONDS = 60.0
"""A pair ends at three repeats where they have taken so long, or at one where each is slow."""
SLOW_SECONDS = 20.0


def layer(name: str, width: int = WIDTH, **genes: Any) -> nn.Module:
    primitive, full = resolve(name, genes)
    return primitive.configure(Site(width, "rope", layer=1, depth=4), full).build()


def mamba(c: Any) -> nn.Module:
    return MambaMixer(
        MambaConfig(
            hidden_size=c.width, state_size=c.rows, conv_kernel=c.conv, time_step_rank=c.rank
        ),
        0,
    )


def mamba2(c: Any) -> nn.Module:
    return Mamba2Mixer(
        Mamba2Config(
            hidden_size=WIDTH,
            num_heads=c.heads,
            head_dim=c.value_dim,
            state_size=c.key_dim,
            n_groups=c.groups,
            conv_kernel=c.conv,
            chunk_size=64,
        ),
        0,
    )


def gated_delta(c: Any) -> nn.Module:
    return Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_value_heads=c.heads,
            linear_num_key_heads=c.groups,
            linear_key_head_dim=c.key_dim,
            linear_value_head_dim=c.value_dim,
            linear_conv_kernel_dim=c.conv,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    )


def kimi(c: Any) -> nn.Module:
    return KimiLinearDeltaAttention(
        KimiLinearConfig(
            hidden_size=WIDTH,
            linear_num_heads=c.heads,
            linear_head_dim=c.key_dim,
            linear_conv_kernel_dim=c.conv,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    )


def lightning(c: Any) -> nn.Module:
    return MiniMaxLightningAttention(
        MiniMaxConfig(
            hidden_size=WIDTH,
            num_attention_heads=c.heads,
            head_dim=c.value_dim,
            num_hidden_layers=4,
            layer_types=["linear_attention"] * 4,
            block_size=256,
        ),
        1,
    )


def mlstm(c: Any) -> nn.Module:
    return xLSTMLayer(
        xLSTMConfig(
            hidden_size=WIDTH,
            num_heads=c.heads,
            num_hidden_layers=1,
            qk_dim_factor=0.5,
            v_dim_factor=1.0,
            gate_soft_cap=c.cap,
            autocast_kernel_dtype="float32",
            chunk_size=64,
        )
    )


def rg_lru(c: Any) -> nn.Module:
    return RecurrentGemmaRecurrentBlock(
        RecurrentGemmaConfig(
            hidden_size=c.width,
            lru_width=c.inner,
            num_attention_heads=c.blocks,
            conv1d_width=c.conv,
            num_hidden_layers=1,
        ),
        0,
    )


def rwkv4(c: Any) -> nn.Module:
    return RwkvSelfAttention(RwkvConfig(hidden_size=WIDTH, num_hidden_layers=1), 0)


def short_conv(c: Any) -> nn.Module:
    return Lfm2ShortConv(
        Lfm2Config(
            hidden_size=WIDTH, conv_L_cache=c.taps, num_hidden_layers=1, layer_types=["conv"]
        ),
        0,
    )


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def plain(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: first(module(x))


def with_positions(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: first(
        module(x, torch.arange(x.shape[1])[None], torch.ones(x.shape[:2]), use_cache=False)
    )


def with_mask(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: first(module(x, position_embeddings=None, attention_mask=None))


PAIRS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[nn.Module], Any], bool]] = {
    # Point: what makes the other layer, how it is called, whether it has a backward pass.
    "mamba2": (mamba2, plain, True),
    "gated-deltanet": (gated_delta, plain, True),
    "kda": (kimi, plain, True),
    "lightning-attention": (lightning, with_mask, True),
    "mlstm": (mlstm, plain, True),
    "rg-lru": (rg_lru, with_positions, True),
    # Its backward pass fails in transformers 5.23 (an in-place operation).
    "rwkv4": (rwkv4, plain, False),
    "lfm2-conv": (short_conv, plain, True),
    "mamba": (mamba, plain, True),
}


def forward(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    def run(x: Tensor) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            call(x)
        return time.perf_counter() - began

    return run


def both_ways(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    def run(x: Tensor) -> float:
        module.zero_grad(set_to_none=True)
        x = x.clone().requires_grad_()
        began = time.perf_counter()
        call(x).square().mean().backward()
        return time.perf_counter() - began

    return run


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def speed(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, (make, calling, backward) in PAIRS.items():
        torch.manual_seed(0)
        width = NARROW.get(name, WIDTH)
        ours = layer(name, width)
        theirs = make(ours.config)
        call, call_theirs = plain(ours), calling(theirs)
        ways = [("forward", forward(call), forward(call_theirs))]
        if backward:
            ways.append(
                ("forward and backward", both_ways(ours, call), both_ways(theirs, call_theirs))
            )
        for way, run, run_theirs in ways:
            times: list[tuple[float, float]] = []
            x = torch.randn(1, TOKENS, width)
            began = time.perf_counter()
            for index in range(repeats + 1):
                pair = run(x), run_theirs(x)
                if index or sum(pair) > SLOW_SECONDS:  # the first calls allocate
                    times.append(pair)
                least = 1 if sum(pair) > SLOW_SECONDS else 3
                if len(times) >= least and time.perf_counter() - began > ENOUGH_SECONDS:
                    break
            rows.append(
                {
                    "layer": name,
                    "way": way,
                    "width": width,
                    "tokens": TOKENS,
                    "params": count(ours),
                    "params, transformers": count(theirs),
                    "mendel, ms": spread([1e3 * a for a, _ in times]),
                    "transformers, ms": spread([1e3 * b for _, b in times]),
                    "ratio": spread([b / a for a, b in times]),
                }
            )
            print(name, way, rows[-1]["ratio"], flush=True)
    return rows


def growth(repeats: int, width: int = 64) -> list[dict[str, Any]]:
    """Every causal mixer of the catalogue, a layer each."""
    rows = []
    for name in names():
        primitive, full = resolve(name, {})
        if primitive.kind != "mixer" or (primitive.name == "attention" and name != "mha"):
            continue
        config = primitive.configure(Site(width, "rope", layer=1, depth=4), full)
        if not is_causal(config):
            continue
        run = forward(plain(layer(name, width)))
        times: list[tuple[float, float]] = []
        try:
            for index in range(repeats + 1):
                pair = run(torch.randn(1, SHORT, width)), run(torch.randn(1, LONG, width))
                if index:
                    times.append(pair)
                if times and sum(map(sum, times)) > ENOUGH_SECONDS / 4:
                    break
        except ValueError as error:  # a table of positions that ends
            print(f"{name}: {error}")
            continue
        ratio = spread([b / a for a, b in times])
        rows.append(
            {
                "layer": name,
                f"{SHORT} tokens, ms": spread([1e3 * a for a, _ in times]),
                f"{LONG} tokens, ms": spread([1e3 * b for _, b in times]),
                "growth": ratio,
                "limit": GROWTH_LIMIT,
            }
        )
        print(name, ratio, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["speed", "growth"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    notes = {"dtype": "float32", "backend": "chunked, scan and FFT forms in torch"}
    if arguments.only != "growth":
        save(
            "recurrences_speed",
            f"How fast is a recurrent layer against transformers' CPU path, T = {TOKENS:,}?",
            speed(arguments.repeats),
            **notes,
            load_of_the_machine=os.getloadavg()[0],
        )
    if arguments.only != "speed":
        save(
            "recurrences_growth",
            f"How does a layer's time grow from {SHORT:,} to {LONG:,} tokens (16 is linear)?",
            growth(arguments.repeats),
            **notes,
            load_of_the_machine=os.getloadavg()[0],
        )


if __name__ == "__main__":
    main()
