"""Transformers with experts: Mixtral, DeepSeek-V2 and V3, Qwen 2 and 3, OLMoE, Llama 4, gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from .dense import qwen_kinds, qwen_windows
from .fields import ConfigurationError, Fields, family, op
from .parts import (
    INPUT_BIAS,
    WINDOWS,
    activation,
    attention,
    attentions,
    expansion,
    heads_of,
    layer_count,
    layers,
    mlp,
    stack,
    window,
)
from .turns import rope, rope_base

CHUNKS = {"full_attention": "full", "chunked_attention": "chunked"}
DEEPSEEK_ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}


def experts(
    f: Fields,
    point: str,
    sums: bool,
    count: str = "num_experts",
    size: str = "moe_intermediate_size",
    /,
    **genes: Gene,
) -> Op:
    """A mixture from the fields of its sizes. `sums`: the weights of a token's experts sum to one.
    Without the gene, the activation is `hidden_act`."""
    top_k = f.whole("num_experts_per_tok")
    if sums and top_k == 1:
        f.note("the weight of a single expert, 1 (num_experts_per_tok=1); a genome's is its score")
    if "activation" not in genes:
        genes["activation"] = activation(f)
    sizes = {"experts": f.whole(count), "top_k": top_k, "expansion": expansion(f, size)}
    return op(point, **sizes, renormalise=sums, **genes)


def sparse(
    f: Fields,
    mixers: Sequence[Op],
    dense: Sequence[bool],
    routed: Op,
    size: str = "intermediate_size",
) -> list[Slot]:
    """Layers with experts, but with a gated MLP, of the inner width `size`, where they are
    `dense`."""
    f.known(size)
    return stack(mixers, [mlp(f, size=size) if one else routed for one in dense])


def beside(routed: Op, inner: int, dense: Op, always_on: int) -> Slot:
    """Experts of an inner width, and an MLP of the width `always_on` that every token takes: as
    shared experts where it is a multiple of theirs, else as a parallel operator."""
    if always_on % inner == 0:
        return Slot((routed.with_genes(shared=always_on // inner),))
    return Slot((routed, dense), "sum")


@family(
    "MixtralConfig", {"num_experts": "num_local_experts"},
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, num_experts_per_tok=2,
    num_local_experts=8, hidden_act="silu",
)  # fmt: skip
def mixtral(f: Fields) -> Genome:
    """The chosen experts' scores sum to one."""
    mixer = attention(f, **window(f), **rope(f))
    channel = experts(f, "mixtral", True, "num_local_experts", "intermediate_size")
    return f.genome(stack([mixer] * layer_count(f), channel))


def latent_attention(f: Fields, turns: Mapping[str, Gene]) -> Op:
    """Multi-head latent attention by DeepSeek's fields, with the genes of its RoPE."""
    f.never("attention_bias", why="its biases are on some projections only")
    f.known("head_dim", "qk_head_dim")
    heads, head_dim = f.whole("num_attention_heads"), f.whole("qk_nope_head_dim")
    f.same("num_key_value_heads", heads, f"every one of {heads} heads has keys of its own")
    value_dim = f.whole("v_head_dim")
    return op(
        "mla",
        heads=heads,
        head_dim=head_dim,
        latent=f.whole("kv_lora_rank"),
        rope_dim=f.whole("qk_rope_head_dim"),
        q_rank=f.optional("q_lora_rank") or 0,
        value_dim=0 if value_dim == head_dim else value_dim,
        **turns,
    )


@family(
    "DeepseekV2Config", DEEPSEEK_ALIASES,
    vocab_size=102400, intermediate_size=11008, attention_bias=False, mlp_bias=False,
    first_k_dense_replace=0, kv_lora_rank=512, q_lora_rank=1536, n_routed_experts=64,
    n_shared_experts=2, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=1.0,
    topk_method="greedy", norm_topk_prob=False, v_head_dim=128, moe_intermediate_size=1407,
    hidden_act="silu",
)  # fmt: skip
def deepseek_v2(f: Fields) -> Genome:
    """Softmax scores, which the chosen experts keep."""
    f.never("mlp_bias")
    groups: dict[str, Gene] = {}
    if f.option("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy":
        groups = _groups(f)
    f.known("n_group", "topk_group", "aux_loss_alpha")
    f.neutral("scoring_func", None, "softmax", what="the scores of the router")
    f.never("norm_topk_prob", why="the library's class keeps the scores, whatever it says")
    scale = f.number("routed_scaling_factor")
    shared = f.count("n_shared_experts")
    channel = experts(
        f, "deepseek-moe", False, "n_routed_experts", shared=shared, scale=scale, **groups
    )
    dense = dense_first(f)
    mixers = [latent_attention(f, rope_base(f))] * len(dense)
    return f.genome(sparse(f, mixers, dense, channel))


@family(
    "DeepseekV3Config", {**DEEPSEEK_ALIASES, "num_mtp_layers": "num_nextn_predict_layers"},
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_attention_heads=128, n_shared_experts=1, n_routed_experts=256,
    routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
    v_head_dim=128, qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8,
    first_k_dense_replace=3, norm_topk_prob=True, attention_bias=False, num_nextn_predict_layers=1,
    hidden_act="silu",
)  # fmt: skip
def deepseek_v3(f: Fields) -> Genome:
    """Sigmoid scores and a balance by biases."""
    f.neutral("scoring_func", None, "sigmoid", what="the scores of the router")
    f.neutral("topk_method", None, "noaux_tc", what="the choice of experts")
    f.known("aux_loss_alpha", "rope_interleave")
    if f.count("num_nextn_predict_layers"):
        f.note("the module that predicts a second token")
    channel = sigmoid_experts(f, "deepseek-v3-moe", shared=f.count("n_shared_experts"))
    dense = dense_first(f)
    mixers = [latent_attention(f, rope_base(f))] * len(dense)
    return f.genome(sparse(f, mixers, dense, channel))


def sigmoid_experts(f: Fields, point: str = "moe", **genes: Gene) -> Op:
    """Experts by DeepSeek-V3's router; shared experts are the caller's."""
    genes |= {**_groups(f), "score": "sigmoid", "scale": f.number("routed_scaling_factor")}
    if f.whole("n_group") > 1:
        genes["group_score"] = "top2"
    return experts(f, point, f.flag("norm_topk_prob"), "n_routed_experts", **genes)


def _groups(f: Fields) -> dict[str, Gene]:
    groups, chosen = f.whole("n_group"), f.whole("topk_group")
    if chosen > groups:
        raise f.refuse("topk_group", f"there are n_group={groups} groups")
    return {"groups": groups, "top_groups": chosen}


def dense_first(f: Fields) -> list[bool]:
    """For every layer, whether it is one of the first, which are dense."""
    f.same("moe_layer_freq", 1, "experts stand in every layer after the dense ones")
    first, count = f.count("first_k_dense_replace"), layer_count(f)
    if first > count:
        raise ConfigurationError(f"first_k_dense_replace={first} of {count} layers")
    return [i < first for i in range(count)]


@family(
    "Qwen2MoeConfig", {"num_local_experts": "num_experts"},
    vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
    num_attention_heads=16, num_key_value_heads=16, use_sliding_window=False, sliding_window=4096,
    max_window_layers=28, decoder_sparse_step=1, moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632, num_experts_per_tok=4, num_experts=60,
    norm_topk_prob=False, mlp_only_layers=[], qkv_bias=True, hidden_act="silu",
)  # fmt: skip
def qwen2_moe(f: Fields) -> Genome:
    """Shared experts behind a gate per token; windows, if any, in every other of the first
    layers."""
    first = f.whole("max_window_layers", low=0)
    kinds = qwen_kinds(f, lambda i: i % 2 == 0 and i < first)
    bias = INPUT_BIAS if f.flag("qkv_bias") else {}
    mixers = attentions(f, kinds, **bias, **rope(f))
    return f.genome(qwen_layers(f, mixers, gated_experts(f, "qwen2-moe")))


@family(
    "Qwen3MoeConfig", {"num_experts": "num_local_experts"},
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
    num_key_value_heads=4, attention_bias=False, use_sliding_window=False, sliding_window=4096,
    decoder_sparse_step=1, moe_intermediate_size=768, num_experts_per_tok=8, num_local_experts=128,
    norm_topk_prob=False, mlp_only_layers=[], hidden_act="silu",
)  # fmt: skip
def qwen3_moe(f: Fields) -> Genome:
    """Qwen 3 with experts in every layer, or in every so many; windows everywhere or nowhere."""
    kinds = ["sliding" if qwen_windows(f) else "full"] * layer_count(f)
    mixers = attentions(f, kinds, qk_norm=True, bias=f.flag("attention_bias"), **rope(f))
    sums = f.flag("norm_topk_prob")
    return f.genome(qwen_layers(f, mixers, experts(f, "mixtral", sums, "num_local_experts")))


@family(
    "OlmoeConfig", {"num_local_experts": "num_experts"},
    vocab_size=50304, hidden_size=2048, intermediate_size=2048, num_hidden_layers=16,
    num_attention_heads=16, rms_norm_eps=1e-5, attention_bias=False, num_experts_per_tok=8,
    num_experts=64, norm_topk_prob=False, hidden_act="silu",
)  # fmt: skip
def olmoe(f: Fields) -> Genome:
    """Norms of the queries, and of the keys, of all heads together."""
    f.neutral("clip_qkv", None, what="bounds on queries, keys and values")
    heads, _, head_dim = heads_of(f)
    if heads * head_dim != f.whole("hidden_size"):
        raise f.refuse("head_dim", "the library's norm of queries is as wide as the stream")
    bias = f.flag("attention_bias")
    mixer = attention(f, qk_norm=True, norm_over="all", bias=bias, **rope(f))
    sums = f.flag("norm_topk_prob")
    channel = experts(f, "olmoe", sums, "num_experts", "intermediate_size")
    return f.genome(stack([mixer] * layer_count(f), channel))


def gated_experts(f: Fields, point: str = "moe") -> Op:
    """Experts, and shared ones behind a gate, which are a multiple of them in width."""
    inner = f.whole("moe_intermediate_size")
    shared = f.whole("shared_expert_intermediate_size")
    if shared % inner:
        raise f.refuse(
            "shared_expert_intermediate_size",
            f"with a gate it is a multiple of moe_intermediate_size={inner} in a genome",
        )
    return experts(
        f,
        point,
        f.flag("norm_topk_prob"),
        shared=shared // inner,
        shared_gate=True,
        balance="none",
    )


def qwen_layers(f: Fields, mixers: list[Op], routed: Op) -> list[Slot]:
    """A channel mixer after each mixer: experts, or a dense MLP where Qwen's two fields say so."""
    step = f.whole("decoder_sparse_step")
    plain = f.list_of("mlp_only_layers", int, "layers' numbers")
    dense = [i in plain or bool((i + 1) % step) for i in range(len(mixers))]
    return sparse(f, mixers, dense, routed)


@family(
    "Llama4TextConfig",
    vocab_size=202048, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384,
    num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-5, num_experts_per_tok=1, num_local_experts=16, interleave_moe_layer_step=1,
    use_qk_norm=True, rope_theta=500000.0, no_rope_layer_interval=4, attention_chunk_size=8192,
    attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1, attention_bias=False,
    hidden_act="silu",
)  # fmt: skip
def llama4(f: Fields) -> Genome:
    """Attention within chunks with RoPE, in every fourth layer over all tokens without it."""
    count = layer_count(f)
    period, step = f.whole("no_rope_layer_interval"), f.whole("interleave_moe_layer_step")
    listed = f.list_of("no_rope_layers", int, "1 for RoPE, 0 for none")
    turned = [bool(one) for one in listed] or [bool((i + 1) % period) for i in range(count)]
    if len(turned) < count:
        raise f.refuse("no_rope_layers", f"there are {count} layers")
    kinds = layers(f, CHUNKS, lambda i: "chunked" if turned[i] else "full")
    if f.flag("attn_temperature_tuning") and not all(turned[:count]):
        f.note("scores that grow beyond floor_scale tokens in layers without RoPE")
    f.known("floor_scale", "attn_scale")
    turns, far = rope(f), dict[str, Gene](position="none")
    if f.flag("use_qk_norm"):
        if turns.get("rope_scaling") == "yarn":
            f.note("a norm after RoPE, which takes away YaRN's factor on queries and keys")
        turns |= {"qk_norm": True, "norm_scales": False}
    chunk: dict[str, Gene] = {}
    if "chunked" in kinds:
        chunk = {"pattern": "chunked", "window": f.whole("attention_chunk_size")}
    bias = f.flag("attention_bias")
    mixers = [
        attention(f, bias=bias, **(turns if turn else far), **(chunk if kind == "chunked" else {}))
        for turn, kind in zip(turned, kinds, strict=False)
    ]
    channel = experts(f, "llama4-moe", False, "num_local_experts", "intermediate_size")
    places = f.list_of("moe_layers", int, "layers' numbers")
    if f.get("moe_layers") is None:
        places = list(range(step - 1, count, step))
    dense = [i not in places for i in range(count)]
    return f.genome(sparse(f, mixers, dense, channel, "intermediate_size_mlp"))


@family(
    "GptOssConfig",
    {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
    num_local_experts=128, head_dim=64, num_attention_heads=64, num_key_value_heads=8,
    sliding_window=128, rms_norm_eps=1e-5, rope_theta=150000.0, num_experts_per_tok=4,
    swiglu_alpha=1.702, swiglu_limit=7.0, attention_bias=True, hidden_act="silu",
    rope_parameters={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
)  # fmt: skip
def gpt_oss(f: Fields) -> Genome:
    """Sinks, biases everywhere, windows in every other layer, clamped experts."""
    f.neutral("hidden_act", "silu", what="the activation")
    f.neutral("swiglu_alpha", 1.702, what="a factor of its own inside the experts' unit")
    f.neutral("swiglu_limit", 7.0, what="a limit of its own of the experts' unit")
    kinds = layers(f, WINDOWS, lambda i: "full" if i % 2 else "sliding")
    f.known("initial_context_length")
    mixers = attentions(f, kinds, sink_logits=True, bias=f.flag("attention_bias"), **rope(f))
    channel = experts(
        f, "gpt-oss-moe", True, "num_local_experts", "intermediate_size", activation="clamped"
    )
    return f.genome(stack(mixers, channel))
