"""MLPs and mixtures of experts against independent implementations, routing, balance and cost.

Float32 tolerance 1e-5 of the output's scale: the same products summed in another order agree to
about sqrt(terms) * 2^-24, a tenth of that at these sizes.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama import modeling_llama as llama

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.channel.experts import product_form
from mendel.primitives.channel.mlp import ACTIVATIONS, Mlp, MlpConfig, activate, inner_width
from mendel.primitives.channel.moe import Moe, MoeConfig
from mendel.primitives.channel.router import Routing

WIDTH = 48
MIXTURES: dict[str, dict[str, Gene]] = {
    "default": {},
    "fine": {"experts": 16, "top_k": 5, "expansion": 0.25, "shared": 2},
    "one": {"experts": 4, "top_k": 1},
    "single": {"experts": 1, "top_k": 1, "balance": "none"},
    "all": {"experts": 3, "top_k": 3, "score": "sigmoid", "scale": 2.5},
    "plain": {"activation": "relu2", "gated": False, "renormalise": False, "balance": "none"},
}


def mlp(name: str, **genes: Gene) -> Mlp:
    primitive, full = resolve(name, genes)
    module = primitive.configure(Site(WIDTH), full).build()
    assert isinstance(module, Mlp)
    return module


def moe_config(name: str = "moe", **genes: Gene) -> MoeConfig:
    primitive, full = resolve(name, genes)
    config = primitive.configure(Site(WIDTH), full)
    assert isinstance(config, MoeConfig)
    return config


def moe(name: str = "moe", **genes: Gene) -> Moe:
    torch.manual_seed(0)
    return moe_config(name, **genes).build()


def inputs(tokens: int = 33, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def router_weight(module: Moe) -> Tensor:
    assert module.router.weight is not None
    return module.router.weight


def routed(module: Moe, rows: Tensor) -> Routing:
    return module.router.route(rows[None])


def by_the_formula(module: Moe, x: Tensor) -> Tensor:
    """Token by token and expert by expert, as the docstrings of moe.py and router.py write it."""
    config, experts, router = module.config.router, module.config.experts, module.router
    assert router.weight is not None
    y = torch.zeros_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])).tolist():
        row = x[*index]
        logits = router.weight @ row
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(0)
        biased = scores + config.unit * router.steps if config.balance != "none" else scores
        chosen = sorted(range(config.experts), key=lambda e: -biased[e].item())[: config.top_k]
        total = sum((scores[e] for e in chosen), torch.zeros(()))
        for e in chosen:
            hidden = module.experts.entry[e] @ row
            if experts.gated:
                up = hidden[experts.inner :]
                hidden = activate(experts.activation, hidden[: experts.inner]) * up
            else:
                hidden = activate(experts.activation, hidden)
            weight = config.scale * scores[e] / (total if config.renormalise else 1.0)
            y[*index] += weight * (module.experts.exit[e] @ hidden)
        if module.shared is not None:
            y[*index] += module.shared(row[None, None])[0][0, 0]
    return y


@torch.no_grad()
def test_swiglu_is_llamas_mlp() -> None:
    torch.manual_seed(0)
    ours = mlp("swiglu")
    settings = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, intermediate_size=ours.config.inner
    )
    theirs, x = llama.LlamaMLP(settings), inputs()
    ours.entry.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
    ours.exit.load_state_dict(theirs.down_proj.state_dict())
    assert error(ours(x)[0], theirs(x)) < 1e-5


@pytest.mark.parametrize(("activation", "theirs_is"), [("gelu", "gelu"), ("gelu-tanh", "gelu_new")])
@torch.no_grad()
def test_gelu_mlp_is_gpt2s(activation: str, theirs_is: str) -> None:
    torch.manual_seed(0)
    ours = mlp("gelu-mlp", activation=activation)
    settings = GPT2Config(n_embd=WIDTH, activation_function=theirs_is, resid_pdrop=0.0)
    theirs, x = gpt2.GPT2MLP(4 * WIDTH, settings), inputs()
    for to, given in ((ours.entry, theirs.c_fc), (ours.exit, theirs.c_proj)):
        nn.init.normal_(given.bias)
        to.weight.copy_(given.weight.T)
        to.bias.copy_(given.bias)
    assert error(ours(x)[0], theirs(x)) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_an_mlp_is_its_formula(activation: str, gated: bool) -> None:
    functions = {
        "relu": lambda x: x.clamp_min(0),
        "relu2": lambda x: x.clamp_min(0) ** 2,
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu-tanh": lambda x: (
            x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        ),
        "silu": lambda x: x / (1 + (-x).exp()),
    }
    ours, x = mlp("mlp", activation=activation, gated=gated, bias=True), inputs()
    hidden = x @ ours.entry.weight.T + ours.entry.bias
    if gated:
        half = ours.config.inner
        hidden = functions[activation](hidden[..., :half]) * hidden[..., half:]
    else:
        hidden = functions[activation](hidden)
    assert error(ours(x)[0], hidden @ ours.exit.weight.T + ours.exit.bias) < 1e-5


def test_an_unknown_activation_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="relu, relu2, gelu, gelu-tanh, silu, not tanh"):
        activate("tanh", torch.zeros(1))


def test_inner_width_is_the_nearest_multiple_of_8() -> None:
    assert [inner_width(64, e) for e in (8 / 3, 4.0, 0.01, 1.05, 1.07)] == [168, 256, 8, 64, 72]
    assert inner_width(4096, 3.5) == 14336


def test_mixtral_at_its_own_width_has_its_published_size() -> None:
    """Mixtral 8x7B: experts of 14336 at width 4096; 12.9 B of 46.7 B active in 32 layers."""
    primitive, genes = resolve("mixtral", {})
    config = primitive.configure(Site(4096), genes)
    assert isinstance(config, MoeConfig)
    assert config.experts.inner == 14336
    cost = config.cost(1, torch.bfloat16)
    assert cost.params == 4096 * 8 + 8 * 3 * 4096 * 14336
    assert cost.active_params == 4096 * 8 + 2 * 3 * 4096 * 14336


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_a_mixture_is_its_formula(name: str, dtype: torch.dtype) -> None:
    module = moe(**MIXTURES[name]).to(dtype)
    module.router.steps.random_(-100, 100)
    for tokens in (1, 2, 33):
        x = inputs(tokens, dtype)
        limit = 1e-5 if dtype == torch.float32 else 1e-12
        assert error(module(x)[0], by_the_formula(module, x)) < limit


@pytest.mark.parametrize("width", [48, 42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_forms_of_the_product_agree(dtype: torch.dtype, width: int) -> None:
    """Outputs and gradients; 42 float32 or bf16 channels are no multiple of 16 bytes."""
    primitive, genes = resolve("moe", {"shared": 1})
    torch.manual_seed(0)
    module = primitive.configure(Site(width), genes).build().to(dtype)
    assert isinstance(module, Moe)
    x = torch.randn(4, 21, width).to(dtype)
    few, many = 8, 4 * 21 * 2
    assert product_form(few, module.experts.entry) == "gathered"
    segments = dtype == torch.float64 or width == 42
    assert product_form(many, module.experts.entry) == ("segments" if segments else "grouped")
    results = []
    for pieces in (x.split(21, 1), x.split(1, 1)):
        module.zero_grad()
        y = torch.cat([module(part)[0] for part in pieces], 1)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    # bf16: 8 bits, and the gradient of a weight is rounded once per call.
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    for whole, stepped in zip(*results, strict=True):
        assert whole is not None
        assert stepped is not None
        assert error(stepped, whole) < limit


@torch.no_grad()
def test_ties_go_to_the_lowest_expert_whatever_the_batch() -> None:
    module = moe(experts=16, top_k=3)
    router_weight(module).zero_()
    for rows in (1, 2, 17, 300, 3000):
        routing = routed(module, torch.randn(rows, WIDTH))
        assert torch.equal(routing.experts, torch.arange(3).expand(rows, 3))
        torch.testing.assert_close(routing.weights, torch.full((rows, 3), 1 / 3))


@torch.no_grad()
def test_a_token_does_not_depend_on_its_batch() -> None:
    module, x = moe(experts=8, top_k=2), inputs(40, batch=5)
    whole = module.router.route(x).experts.reshape(5, 40, 2)
    for i in range(5):
        assert torch.equal(routed(module, x[i]).experts, whole[i])
        assert error(module(x[i : i + 1, :1])[0], module(x)[0][i : i + 1, :1]) < 1e-5


@torch.no_grad()
def test_routing_is_in_float32_for_bf16() -> None:
    module = moe(experts=8, top_k=2).to(torch.bfloat16)
    x = inputs(64, torch.bfloat16)
    expected = (x.double().flatten(0, 1) @ router_weight(module).double().T).topk(2, -1).indices
    assert torch.equal(module.router.route(x).experts, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.router.route(x).weights.dtype == torch.float32


def test_autocast_runs_forward_and_backward() -> None:
    module, x = moe(shared=1), inputs(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)[0]
    assert error(y, module(x)[0]) < 6e-2
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_bias_evens_the_load_and_gets_no_gradient() -> None:
    module = moe(experts=4, top_k=1, score="sigmoid")
    with torch.no_grad():
        # Expert 0 wins everywhere by a little.
        router_weight(module).mul_(0.01)
        router_weight(module)[0] += 0.02 * torch.ones(WIDTH)
    x = inputs(64).abs()
    module(x)
    before = module.statistics()["load"]
    for _ in range(400):
        module(x)
        module.balance()
    after = module.statistics()["load"]
    assert isinstance(before, list)
    assert isinstance(after, list)
    assert max(before) > 0.9
    assert max(after) < 0.4
    assert sum(after) == pytest.approx(1.0)
    assert "router.steps" not in dict(module.named_parameters())


def test_balance_moves_each_bias_by_one_step() -> None:
    module = moe(experts=4, top_k=1)
    module.ledger.counts.copy_(torch.tensor([10, 2, 4, 0]))
    module.balance()
    assert module.router.steps.tolist() == [-1, 1, 0, 1]
    assert module.statistics() == {"load": [10 / 16, 2 / 16, 4 / 16, 0.0], "dropped": 0.0}
    assert module.ledger.counts.sum() == 0
    module.to(torch.bfloat16).to(torch.float32)
    assert module.router.steps.tolist() == [-1, 1, 0, 1]


def test_only_training_counts() -> None:
    module = moe().eval()
    module(inputs())
    assert module.ledger.counts.sum() == 0
    assert module.statistics() == {"load": [0.0] * 8, "dropped": 0.0}
    module.train()(inputs())
    assert module.ledger.counts.sum() == 2 * 33 * 2


def test_without_balance_no_bias_moves() -> None:
    module = moe(balance="none")
    module(inputs())
    module.balance()
    assert module.router.steps.abs().sum() == 0
    assert module.ledger.load.sum() == 2 * 33 * 2


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_cost_is_the_real_one(name: str) -> None:
    config = moe_config(**MIXTURES[name])
    module, counted = config.build(), config.cost(33, torch.float32)
    assert counted.params == sum(p.numel() for p in module.parameters())
    one = module.experts.entry[0].numel() + module.experts.exit[0].numel()
    idle = (config.experts.experts - config.router.top_k) * one
    assert counted.active_params == counted.params - idle
    assert counted.state_bytes == module.init_state(1, 33, torch.float32).bytes() == 0
    state = module.init_state(1, 33, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for part in inputs(batch=1).split(1, 1):
            _, state = module(part, state)
    assert state.length == 33
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * 33, rel=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    module = moe(**MIXTURES[name])
    module(inputs())[0].square().sum().backward()
    for label, parameter in module.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label
        # One expert of one has nothing to choose.
        assert parameter.grad.abs().max() > 0 or (name, label) == ("single", "router.weight")


def test_an_mlps_cost_and_state() -> None:
    for gated in (False, True):
        module = mlp("mlp", gated=gated, bias=True)
        config = module.config
        assert isinstance(config, MlpConfig)
        counted = config.cost(5, torch.float32)
        assert counted.params == sum(p.numel() for p in module.parameters())
        with FlopCounterMode(display=False) as counter:
            _, state = module(inputs(1, batch=1), module.init_state(1, 5, torch.float32))
        assert counter.get_total_flops() == counted.flops_per_token
        assert state is not None
        assert (state.length, state.bytes()) == (1, counted.state_bytes)


def test_more_choices_than_experts_get_a_sentence() -> None:
    with pytest.raises(GeneError, match="top_k=4 is more than experts=2"):
        moe_config(experts=2, top_k=4)
