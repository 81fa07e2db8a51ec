"""Mixtures of experts against transformers: the same weights, the same outputs, gradients, losses.

Float32 tolerance 1e-5 of the scale: the same products summed in another order agree to about
sqrt(terms) * 2^-24, a tenth of that at these sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.longcat_flash import modeling_longcat_flash as longcat
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.channel.balance import balance_loss
from mendel.primitives.channel.moe import Moe
from mendel.primitives.channel.router import BALANCE_RATE

WIDTH = 48
EAGER = {"experts_implementation": "eager"}
Named = Mapping[str, Tensor]


def made(name: str, **genes: Gene) -> Moe:
    torch.manual_seed(0)
    primitive, full = resolve(name, genes)
    module = primitive.configure(Site(WIDTH), full).build()
    assert isinstance(module, Moe)
    return module


def inputs(tokens: int = 33, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def like_mixtral(theirs: Named) -> dict[str, Tensor]:
    """transformers' tensors (weights or gradients) under our names, in our layout."""
    found = {
        "router.weight": theirs["gate.weight"],
        "experts.entry": theirs["experts.gate_up_proj"],
        "experts.exit": theirs["experts.down_proj"],
    }
    for shared in ("shared_experts", "shared_expert"):
        if f"{shared}.gate_proj.weight" in theirs:
            parts = (theirs[f"{shared}.{which}_proj.weight"] for which in ("gate", "up"))
            found["shared.entry.weight"] = torch.cat(tuple(parts))
            found["shared.exit.weight"] = theirs[f"{shared}.down_proj.weight"]
    if "shared_expert_gate.weight" in theirs:
        found["shared_gate"] = theirs["shared_expert_gate.weight"]
    return found


def like_switch(theirs: Named) -> dict[str, Tensor]:
    count = sum(name.endswith("wi.weight") for name in theirs)
    experts = [f"experts.expert_{e}" for e in range(count)]
    return {
        "router.weight": theirs["router.classifier.weight"],
        "experts.entry": torch.stack([theirs[f"{e}.wi.weight"] for e in experts]),
        "experts.exit": torch.stack([theirs[f"{e}.wo.weight"] for e in experts]),
    }


def like_gpt_oss(theirs: Named) -> dict[str, Tensor]:
    """Gate and up alternate there, and matrices are (E, in, out)."""
    entry, bias = theirs["experts.gate_up_proj"], theirs["experts.gate_up_proj_bias"]
    return {
        "router.weight": theirs["router.weight"],
        "router.bias": theirs["router.bias"],
        "experts.entry": torch.cat((entry[..., ::2], entry[..., 1::2]), -1).mT,
        "experts.entry_bias": torch.cat((bias[..., ::2], bias[..., 1::2]), -1),
        "experts.exit": theirs["experts.down_proj"].mT,
        "experts.exit_bias": theirs["experts.down_proj_bias"],
    }


def like_llama4(theirs: Named) -> dict[str, Tensor]:
    """Matrices of experts are (E, in, out)."""
    turned = {name: value.mT for name, value in theirs.items() if name.startswith("experts.")}
    return like_mixtral({**theirs, **turned, "gate.weight": theirs["router.weight"]})


def like_longcat(theirs: Named) -> dict[str, Tensor]:
    """It holds weights, unused, for identity experts too."""
    exit_ = theirs["experts.down_proj"]
    return {
        "router.weight": theirs["router.classifier.weight"],
        "experts.entry": theirs["experts.gate_up_proj"][: exit_.shape[0]],
        "experts.exit": exit_,
    }


@dataclass(frozen=True)
class Case:
    """A point (with genes beside it), transformers' module for its config, the way of weights."""

    point: str
    theirs: Callable[[Moe], nn.Module]
    tensors: Callable[[Named], dict[str, Tensor]] = like_mixtral
    genes: tuple[tuple[str, Gene], ...] = ()


def mixtral_block(ours: Moe) -> nn.Module:
    settings = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=ours.config.experts.inner, **EAGER
    )
    return mixtral.MixtralSparseMoeBlock(settings)


def qwen2_block(ours: Moe) -> nn.Module:
    config = ours.config
    assert config.shared is not None
    settings = Qwen2MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=config.experts.inner,
        shared_expert_intermediate_size=config.shared.inner,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        **EAGER,
    )
    return qwen2_moe.Qwen2MoeSparseMoeBlock(settings)


def olmoe_block(ours: Moe) -> nn.Module:
    settings = OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=ours.config.experts.inner,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        **EAGER,
    )
    return olmoe.OlmoeSparseMoeBlock(settings)


def deepseek_v2_block(ours: Moe) -> nn.Module:
    router = ours.config.router
    settings = DeepseekV2Config(
        hidden_size=WIDTH,
        moe_intermediate_size=ours.config.experts.inner,
        n_routed_experts=router.experts,
        num_experts_per_tok=router.top_k,
        n_shared_experts=2,
        num_attention_heads=4,
        n_group=router.groups,
        topk_group=router.top_groups,
        topk_method="greedy" if router.groups == 1 else "group_limited_greedy",
        routed_scaling_factor=router.scale,
        **EAGER,
    )
    return deepseek_v2.DeepseekV2Moe(settings)


def deepseek_v3_block(ours: Moe) -> nn.Module:
    router = ours.config.router
    settings = DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=ours.config.experts.inner,
        n_routed_experts=router.experts,
        num_local_experts=router.experts,
        num_experts_per_tok=router.top_k,
        n_shared_experts=1,
        n_group=router.groups,
        topk_group=router.top_groups,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        **EAGER,
    )
    theirs = deepseek_v3.DeepseekV3MoE(settings)
    ours.router.steps.random_(-200, 200)
    theirs.gate.e_score_correction_bias.copy_(ours.router.steps * BALANCE_RATE)
    return theirs


def gpt_oss_block(ours: Moe) -> nn.Module:
    settings = GptOssConfig(
        hidden_size=WIDTH,
        intermediate_size=ours.config.experts.inner,
        num_local_experts=32,
        num_experts_per_tok=4,
        **EAGER,
    )
    return gpt_oss.GptOssMLP(settings)


def longcat_block(ours: Moe) -> nn.Module:
    router = ours.config.router
    settings = LongcatFlashConfig(
        hidden_size=WIDTH,
        expert_ffn_hidden_size=ours.config.experts.inner,
        n_routed_experts=router.experts,
        zero_expert_num=router.special,
        moe_topk=router.top_k,
        num_experts_per_tok=router.top_k,
        routed_scaling_factor=6.0,
    )
    theirs = longcat.LongcatFlashMoE(settings)
    ours.router.steps.random_(-3, 3).mul_(round(0.001 / router.unit))
    theirs.router.e_score_correction_bias.copy_(ours.router.steps * router.unit)
    return theirs


def llama4_block(ours: Moe) -> nn.Module:
    settings = Llama4TextConfig(
        hidden_size=WIDTH,
        intermediate_size=ours.config.experts.inner,
        num_local_experts=16,
        num_experts_per_tok=ours.config.router.top_k,
    )
    theirs = llama4.Llama4TextMoe(settings)
    # It gives tokens in a row.
    theirs.register_forward_hook(lambda _, x, y: y[0].view_as(x[0]))
    return theirs


def switch_block(ours: Moe, tokens: int = 33) -> nn.Module:
    """Its capacity, in tokens per sequence, is the one that we count for this many tokens."""
    settings = SwitchTransformersConfig(
        d_model=WIDTH,
        d_ff=ours.config.experts.inner,
        num_experts=8,
        expert_capacity=ours.config.router.room(tokens)[0],
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    return switch.SwitchTransformersSparseMLP(settings)


SMALL = (("experts", 16), ("copy", 8))
CASES = {
    "mixtral": Case("mixtral", mixtral_block),
    "qwen2-moe": Case("qwen2-moe", qwen2_block),
    "olmoe": Case("olmoe", olmoe_block),
    # transformers has no DeepSeekMoE 16B; V2-Lite's layer, `greedy`, is the same function.
    "deepseek-moe": Case("deepseek-moe", deepseek_v2_block),
    "deepseek-v2 groups": Case(
        "deepseek-moe",
        deepseek_v2_block,
        genes=(("experts", 32), ("groups", 8), ("top_groups", 3), ("scale", 16.0)),
    ),
    "llama4-moe": Case("llama4-moe", llama4_block, like_llama4),
    "llama4 two experts": Case("llama4-moe", llama4_block, like_llama4, genes=(("top_k", 2),)),
    "deepseek-v3-moe": Case("deepseek-v3-moe", deepseek_v3_block, genes=(("experts", 64),)),
    "deepseek-v3 one group": Case(
        "deepseek-v3-moe", deepseek_v3_block, genes=(("experts", 16), ("groups", 1), ("top_k", 4))
    ),
    "gpt-oss-moe": Case("gpt-oss-moe", gpt_oss_block, like_gpt_oss),
    "longcat-moe": Case("longcat-moe", longcat_block, like_longcat, SMALL),
    "switch": Case("switch", switch_block, like_switch, (("noise", "none"),)),
}


def both(case: Case) -> tuple[Moe, nn.Module]:
    """Our layer and theirs with the same random weights."""
    ours = made(case.point, **dict(case.genes))
    theirs = case.theirs(ours)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2)
        given = case.tensors(dict(theirs.named_parameters()))
        own = dict(ours.named_parameters())
        assert own.keys() == given.keys()
        for name, value in given.items():
            own[name].copy_(value)
    return ours, theirs


def passed(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The output, the gradient of the input and those of the parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_transformers(name: str) -> None:
    case, x = CASES[name], inputs()
    ours, theirs = both(case)
    y, dx, grads = passed(ours, x)
    y_, dx_, grads_ = passed(theirs, x)
    assert error(y, y_) < 1e-5
    assert error(dx, dx_) < 1e-5
    for label, reference in case.tensors(grads_).items():
        assert reference.abs().max() > 0, label
        assert error(grads[label], reference) < 1e-5, label


@pytest.mark.parametrize("name", [name for name in CASES if name != "switch"])
@torch.no_grad()
def test_one_token_is_that_of_transformers(name: str) -> None:
    """The form of decoding."""
    ours, theirs = both(CASES[name])
    x = inputs(1)
    y = theirs.eval()(x)
    assert error(ours.eval()(x)[0], y[0] if isinstance(y, tuple) else y) < 1e-5


@torch.no_grad()
def test_switch_drops_tokens_in_training_alone() -> None:
    ours, theirs = both(CASES["switch"])
    x = inputs()
    ours(x)
    dropped = ours.statistics()["dropped"]
    silent = (theirs(x) == 0).all(-1)
    assert dropped > 0.01
    assert dropped == silent.double().mean().item()
    theirs.router.expert_capacity = 33
    assert error(ours.eval()(x)[0], theirs(x)) < 1e-5


@torch.no_grad()
def test_the_bias_of_deepseek_v3_decides_here() -> None:
    ours, theirs = both(CASES["deepseek-v3-moe"])
    ours.router.steps.zero_()
    x = inputs()
    assert error(ours(x)[0], theirs(x)) > 1e-2


@torch.no_grad()
def test_gpt_oss_clamps_its_gated_unit() -> None:
    ours, theirs = both(CASES["gpt-oss-moe"])
    x = 10 * inputs()
    clamped = ours(x)[0]
    assert error(clamped, theirs(x)[0]) < 1e-5
    theirs.experts.limit = 1e9
    assert error(clamped, theirs(x)[0]) > 1e-2


@torch.no_grad()
def test_groups_limit_the_choice_here() -> None:
    case = CASES["deepseek-v2 groups"]
    ours, theirs = both(case)
    x = inputs()
    reference = theirs(x)
    free = made(case.point, **{**dict(case.genes), "groups": 1})
    free.load_state_dict(ours.state_dict())
    assert error(free(x)[0], reference) > 1e-2


def test_the_balancing_loss_is_that_of_transformers() -> None:
    """Theirs counts all k choices, so it is k times ours."""
    ours, x = made("mixtral"), inputs()
    routing = ours.router.route(x)
    assert routing.logits is not None
    theirs = mixtral.load_balancing_loss_func((routing.logits,), 8, 2)
    assert error(2 * balance_loss("batch", ours.router, routing, 2), theirs) < 1e-6
    ours(x)
    loss = ours.auxiliary_loss()
    assert loss is not None
    assert error(loss, 0.001 * theirs) < 1e-5
    assert ours.auxiliary_loss() is None


def test_the_losses_of_switch_and_st_moe_are_those_of_transformers() -> None:
    """Switch's is averaged over groups there; a group is a sequence."""
    ours = made("switch", noise="none", aux="sequence", aux_weight=0.5, z_weight=0.25)
    x = inputs()
    routing = ours.router.route(x)
    assert routing.logits is not None
    assert routing.scores is not None
    shaped = routing.scores.view(2, 33, 8)
    expected = 0.5 * switch.load_balancing_loss_func(shaped, routing.experts.view(2, 33))
    expected = expected + 0.25 * switch.router_z_loss_func(routing.logits.view(2, 33, 8))
    ours(x)
    loss = ours.auxiliary_loss()
    assert loss is not None
    assert error(loss, expected) < 1e-5
    got = torch.autograd.grad(loss, ours.router.parameters())
    want = torch.autograd.grad(expected, ours.router.parameters())
    assert error(got[0], want[0]) < 1e-5
