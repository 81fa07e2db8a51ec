"""What the published models' own configuration files say, where it is not the class' default."""

from __future__ import annotations

from typing import Any

import transformers

ATTENTION = "attention"
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NEMOTRON_47B = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-"
    "M-M-M-"
)
NEMOTRON_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B = 6 * "M-M-M-M*-" + "M-M-M-M-"
LFM2: dict[str, Any] = {
    "vocab_size": 65536,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "block_auto_adjust_ff_dim": True,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "conv_bias": False,
    "conv_L_cache": 3,
    "tie_word_embeddings": True,
}
MINI: dict[str, Any] = {"use_shared_attention_adapter": True, "use_mem_rope": True}
GRANITE: dict[str, Any] = {
    "vocab_size": 100352,
    "num_hidden_layers": 40,
    "layer_types": [ATTENTION if i % 10 == 5 else "mamba" for i in range(40)],
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
REFERENCES: dict[str, Any] = {
    "llama-4-scout": lambda: transformers.Llama4TextConfig(),
    "olmoe-1b-7b": lambda: transformers.OlmoeConfig(intermediate_size=1024),
    "lfm2-350m": lambda: transformers.Lfm2Config(
        **LFM2, hidden_size=1024, num_attention_heads=16, intermediate_size=6656
    ),
    "lfm2-700m": lambda: transformers.Lfm2Config(
        **LFM2, hidden_size=1536, num_attention_heads=24, intermediate_size=10240
    ),
    "lfm2-1.2b": lambda: transformers.Lfm2Config(
        **LFM2, hidden_size=2048, num_attention_heads=32, intermediate_size=12288
    ),
    "lfm2-2.6b": lambda: transformers.Lfm2Config(
        **LFM2
        | {
            "num_hidden_layers": 30,
            "full_attn_idxs": [2, 5, 9, 13, 17, 21, 24, 27],
            "block_auto_adjust_ff_dim": False,
        },
        hidden_size=2048,
        num_attention_heads=32,
        intermediate_size=10752,
    ),
    "falcon-h1-0.5b": lambda: falcon_h1((1024, 2048), 36, (8, 64), (24, 64, 128), 32784, False),
    "falcon-h1-7b": lambda: falcon_h1((3072, 12288), 44, (12, 128), (24, 128, 256), 130049, True),
    "granite-4.0-h-micro": lambda: transformers.GraniteMoeHybridConfig(
        **GRANITE,
        hidden_size=2048,
        intermediate_size=8192,
        shared_intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=64,
    ),
    "granite-4.0-h-tiny": lambda: transformers.GraniteMoeHybridConfig(
        **GRANITE,
        hidden_size=1536,
        intermediate_size=512,
        shared_intermediate_size=1024,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=64,
        num_experts_per_tok=6,
        mamba_n_heads=48,
    ),
    "granite-4.0-h-small": lambda: transformers.GraniteMoeHybridConfig(
        **GRANITE,
        hidden_size=4096,
        intermediate_size=768,
        shared_intermediate_size=1536,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=72,
        num_experts_per_tok=10,
        mamba_n_heads=128,
    ),
    # The class' defaults but for the places of the seven attentions.
    "kimi-linear-48b-a3b": lambda: transformers.KimiLinearConfig(
        layer_types=[
            "full_attention" if i in (4, 8, 12, 16, 20, 24, 27) else "linear_attention"
            for i in range(1, 28)
        ]
    ),
    "recurrentgemma-2b": lambda: transformers.RecurrentGemmaConfig(
        intermediate_size=15360, num_key_value_heads=1
    ),
    "recurrentgemma-9b": lambda: transformers.RecurrentGemmaConfig(
        hidden_size=4096,
        intermediate_size=24576,
        num_hidden_layers=38,
        num_attention_heads=16,
        num_key_value_heads=1,
    ),
    "zamba2-1.2b": lambda: zamba2(2048, 38, [5, 11, 17, 23, 29, 35], mamba_d_state=128, **MINI),
    "zamba2-2.7b": lambda: zamba2(2560, 54, None, num_mem_blocks=2),
    "zamba2-7b": lambda: zamba2(
        3584,
        81,
        [6, 11, *range(17, 78, 6)],
        mamba_ngroups=2,
        num_mem_blocks=2,
        use_mem_rope=True,
    ),
    "xlstm-7b": lambda: transformers.xLSTMConfig(),
    # The classes' defaults are the larger gpt-oss and Qwen3-Next.
    "gpt-oss-20b": lambda: transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": lambda: transformers.GptOssConfig(),
    "qwen3-next-80b-a3b": lambda: transformers.Qwen3NextConfig(),
    "nemotron-h-4b": lambda: nemotron(NEMOTRON, (3072, 12288), 32, (112, 64, 128)),
    "nemotron-h-8b": lambda: nemotron(NEMOTRON, (4096, 21504), 32, (128, 64, 128)),
    "nemotron-h-47b": lambda: nemotron(NEMOTRON_47B, (8192, 30720), 64, (256, 64, 256)),
    "nemotron-h-56b": lambda: nemotron(NEMOTRON_56B, (8192, 32768), 64, (256, 64, 256)),
    "nemotron-nano-9b-v2": lambda: nemotron(NANO_9B, (4480, 15680), 40, (128, 80, 128)),
    "nemotron-nano-12b-v2": lambda: nemotron(NANO_12B, (5120, 20480), 40, (128, 80, 128)),
}


def falcon_h1(
    widths: tuple[int, int],
    layers: int,
    heads: tuple[int, int],
    mamba: tuple[int, int, int],
    vocab: int,
    normed: bool,
) -> transformers.PreTrainedConfig:
    """`widths` of the stream and the MLP; heads and their width; heads, width of a head and state
    of Mamba-2, and whether it norms."""
    # The class reads the width of a head and does not declare it.
    own: dict[str, Any] = {"head_dim": heads[1]}
    return transformers.FalconH1Config(
        vocab_size=vocab,
        hidden_size=widths[0],
        intermediate_size=widths[1],
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=2,
        **own,
        mamba_d_ssm=mamba[0] * mamba[1],
        mamba_n_heads=mamba[0],
        mamba_d_head=mamba[1],
        mamba_n_groups=1,
        mamba_d_state=mamba[2],
        mamba_d_conv=4,
        mamba_rms_norm=normed,
        mamba_norm_before_gate=False,
        tie_word_embeddings=False,
    )


def zamba2(
    width: int, layers: int, hybrids: list[int] | None, **more: Any
) -> transformers.PreTrainedConfig:
    """`hybrids` are the layers with a shared block; None for the class' own."""
    if hybrids is not None:
        kinds = ["hybrid" if i in hybrids else "mamba" for i in range(layers)]
        more["layers_block_type"] = kinds
    return transformers.Zamba2Config(
        hidden_size=width, num_hidden_layers=layers, n_mamba_heads=width // 32, **more
    )


def nemotron(
    pattern: str, widths: tuple[int, int], heads: int, mamba: tuple[int, int, int]
) -> transformers.PreTrainedConfig:
    """`widths` of the stream and the MLP; heads, width of a head and state of Mamba-2."""
    return transformers.NemotronHConfig(
        vocab_size=131072,
        hidden_size=widths[0],
        intermediate_size=widths[1],
        layers_block_type=[{"M": "mamba", "-": "mlp", "*": ATTENTION}[c] for c in pattern],
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=mamba[0],
        mamba_head_dim=mamba[1],
        ssm_state_size=mamba[2],
        n_groups=8,
        conv_kernel=4,
        use_conv_bias=True,
        use_bias=False,
        tie_word_embeddings=False,
    )
