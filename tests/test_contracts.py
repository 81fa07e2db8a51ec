"""What every row of the catalogue keeps, without naming any primitive.

Tolerances: parallel and step forms add the same terms in another order, so float32 agrees to about
sqrt(terms) * 2^-24 of the largest term; 1e-5 of the output's scale leaves a factor of ten at the
sizes here. float64 gets 1e-10 for the same reason. bf16 has 8 bits of mantissa, so two orders of
rounding through a few products differ by a few per cent.
"""

from dataclasses import fields, is_dataclass

import pytest
import torch
from flop_count import counter as flop_counter
from torch import Tensor, nn

from mendel.primitives.base import (
    BidirectionalError,
    Config,
    Gene,
    GeneError,
    Site,
    State,
    is_causal,
)
from mendel.primitives.catalogue import CATALOGUE, names, resolve

WIDTH = 64
TOKENS = 37
ALL = names()
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 6e-2}


def configure(name: str, **genes: Gene) -> Config:
    primitive, full = resolve(name, genes)
    return primitive.configure(Site(WIDTH, "rope", layer=1, depth=4), full)


CASES = [name for name in ALL if is_causal(configure(name))]
BIDIRECTIONAL = [name for name in ALL if name not in CASES]


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In training mode."""
    torch.manual_seed(0)
    return configure(name).build().to(dtype)


def settled(module: nn.Module, x: Tensor) -> nn.Module:
    """The module in training mode, or in eval mode where training drops tokens or adds noise: that
    belongs to training alone, so a call with a state does it in no mode."""
    with torch.no_grad():
        trained, plain = module.train()(x)[0], module.eval()(x)[0]
    return module.train(torch.equal(trained, plain))


def tokens(length: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the scale of the reference."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-3)).item()


def decode(module: nn.Module, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    """The output over x, given to the module in pieces of those lengths, and the last state."""
    state = module.init_state(x.shape[0], x.shape[1], x.dtype, x.device)  # type: ignore[operator]
    outputs, at = [], 0
    for n in pieces:
        y, state = module(x[:, at : at + n], state)
        outputs.append(y)
        at += n
    assert at == x.shape[1]
    return torch.cat(outputs, 1), state


def with_auxiliary(loss: Tensor, module: nn.Module) -> Tensor:
    """The loss and what the operator adds to it in training."""
    ask = getattr(module, "auxiliary_loss", None)
    extra = None if ask is None else ask()
    return loss if extra is None else loss + extra


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_parallel_form(name: str, dtype: torch.dtype) -> None:
    module, x = build(name, dtype).eval(), tokens(TOKENS, dtype)
    with torch.no_grad():
        whole, none = module(x)
        steps, state = decode(module, x, [1] * TOKENS)
    assert none is None
    assert state.length == TOKENS
    assert whole.dtype == dtype
    assert error(steps, whole) < TOLERANCE[dtype]


@pytest.mark.parametrize("pieces", [[37], [36, 1], [1, 36], [5, 17, 1, 14], [20, 17]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_split_anywhere_equals_whole(name: str, pieces: list[int]) -> None:
    module, x = build(name).eval(), tokens(TOKENS)
    with torch.no_grad():
        assert error(decode(module, x, pieces)[0], module(x)[0]) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 3, 63, 65, 200])
@pytest.mark.parametrize("name", CASES)
def test_any_length(name: str, length: int) -> None:
    module, x = build(name).eval(), tokens(length)
    with torch.no_grad():
        whole = module(x)[0]
        cut = length // 2
        assert whole.shape == x.shape
        if cut:
            assert error(decode(module, x, [cut, length - cut])[0], whole) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_causal(name: str) -> None:
    """No output depends on a later input: exact zeros in the gradient, and the same prefix."""
    module, x = build(name, torch.float64), tokens(TOKENS, torch.float64).requires_grad_()
    at = TOKENS // 2
    (gradient,) = torch.autograd.grad(module(x)[0][:, at].square().sum(), x)
    assert gradient[:, at + 1 :].abs().max() == 0
    assert gradient[:, at].abs().max() > 0


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_bidirectional_operator_reads_later_tokens_and_has_no_state(name: str) -> None:
    """Another ending changes the first output; there need be no gradient, as where experts choose
    among all tokens."""
    module, x = build(name, torch.float64), tokens(TOKENS, torch.float64)
    with torch.no_grad():
        other = torch.cat((x[:, :1], -3 * x[:, 1:]), 1)
        assert error(module(other)[0][:, 0], module(x)[0][:, 0]) > 1e-6
    with pytest.raises(BidirectionalError, match="reads the whole sequence"):
        module.init_state(1, 8, torch.float64)  # type: ignore[operator]
    with pytest.raises(BidirectionalError, match="reads the whole sequence"):
        module(x, State())
    assert configure(name).cost(TOKENS, torch.float32).state_bytes == 0


@pytest.mark.parametrize("length", [1, 2, 37, 64])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_bidirectional_operator_takes_any_length(name: str, length: int) -> None:
    module, x = build(name, torch.float64), tokens(length)
    with torch.no_grad():
        whole = module(x.double())[0]
        single = module.float()(x)[0]
    assert whole.shape == x.shape
    assert error(single, whole) < 1e-5


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_flops_of_a_bidirectional_operator_are_those_of_one_pass(name: str) -> None:
    module, config = build(name), configure(name)
    with torch.no_grad(), flop_counter() as counter:
        module(tokens(TOKENS, batch=1))
    assert counter.get_total_flops() == pytest.approx(
        config.cost(TOKENS, torch.float32).flops_per_token * TOKENS, rel=1e-12
    )


@pytest.mark.parametrize("name", ALL)
def test_sequences_do_not_mix(name: str) -> None:
    module, x = build(name, torch.float64), tokens(TOKENS, torch.float64)
    with torch.no_grad():
        assert error(module(x[:1])[0], module(x)[0][:1]) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    module, x = build(name), tokens(TOKENS, batch=8).requires_grad_()
    with_auxiliary(module(x)[0].square().sum(), module).backward()  # type: ignore[no-untyped-call]
    for label, parameter in [*module.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_steps(name: str) -> None:
    """The backward pass of the parallel form against autograd through pieces with a state."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    gradients = []
    for parallel in (True, False):
        x = tokens(TOKENS, torch.float64).requires_grad_()
        module = settled(build(name, torch.float64), x)
        y = module(x)[0] if parallel else decode(module, x, [TOKENS])[0]
        with_auxiliary((y * weight).sum(), module).backward()  # type: ignore[no-untyped-call]
        gradients.append({n: p.grad for n, p in [*module.named_parameters(), ("x", x)]})
    assert gradients[0]["x"] is not None
    for label, reference in gradients[0].items():
        got = gradients[1][label]
        if reference is None or got is None:
            # What serves the noise of training alone has no gradient in eval mode.
            assert reference is got, label
            assert not module.training, label
        else:
            assert error(got, reference) < 1e-8, label


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
@pytest.mark.parametrize("name", ALL)
def test_extreme_inputs_stay_finite(name: str, scale: float) -> None:
    module, x = build(name), (tokens(TOKENS) * scale).requires_grad_()
    y = module(x)[0]
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_counted_parameters_are_the_real_ones(name: str) -> None:
    config = configure(name)
    cost = config.cost(64, torch.float32)
    assert cost.params == sum(p.numel() for p in config.build().parameters())
    # A Fourier transform has no parameter.
    assert 0 <= cost.active_params <= cost.params


@pytest.mark.parametrize("name", CASES)
def test_counted_flops_are_the_real_ones(name: str) -> None:
    module, config = build(name), configure(name)
    with torch.no_grad(), flop_counter() as counter:
        decode(module, tokens(TOKENS, batch=1), [1] * TOKENS)
    assert counter.get_total_flops() == pytest.approx(
        config.cost(TOKENS, torch.float32).flops_per_token * TOKENS, rel=1e-12
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("context", [1, 37, 5000])
@pytest.mark.parametrize("name", CASES)
def test_counted_state_is_the_real_one(name: str, context: int, dtype: torch.dtype) -> None:
    module, config = build(name, dtype), configure(name)
    state = module.init_state(1, context, dtype, "cpu")  # type: ignore[operator]
    counted = config.cost(context, dtype).state_bytes
    assert state.bytes() == counted
    with torch.no_grad():
        _, state = module(tokens(1, dtype, batch=1), state)
    assert state.bytes() == counted, "the state grew or shrank by a call"
    assert module.init_state(3, context, dtype, "cpu").bytes() == 3 * counted  # type: ignore[operator]


@pytest.mark.parametrize("name", ALL)
def test_config_is_final_and_equal_by_value(name: str) -> None:
    config = configure(name)
    assert is_dataclass(config)
    assert config == configure(name)
    assert hash(config) == hash(configure(name))
    with pytest.raises(AttributeError):
        setattr(config, fields(config)[0].name, None)


@pytest.mark.parametrize("name", ALL)
def test_every_searched_value_builds_or_says_why(name: str) -> None:
    primitive, _ = resolve(name, {})
    for axis in primitive.axes:
        for value in (*axis.search, *axis.options):
            try:
                config = configure(name, **{axis.name: value})
            except GeneError as refusal:
                sentence = str(refusal)
            else:
                module = config.build()
                real = sum(p.numel() for p in module.parameters())
                with torch.no_grad():
                    assert module(tokens(5))[0].isfinite().all()
                assert config.cost(64, torch.float32).params == real
                continue
            assert len(sentence) > 10


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_gene_gets_a_sentence(name: str) -> None:
    primitive, _ = resolve(name, {})
    with pytest.raises(GeneError, match="has no axis 'nonsense'"):
        resolve(name, {"nonsense": 1})
    for axis in primitive.axes:
        with pytest.raises(GeneError, match=axis.name):
            resolve(name, {axis.name: "no such value"})


def test_rows_describe_themselves() -> None:
    for primitive in CATALOGUE:
        assert primitive.summary
        assert primitive.source
        assert primitive.kind in ("mixer", "channel")
        for axis in primitive.axes:
            assert axis.doc
            for value in (axis.default, *axis.search):
                axis.check(value)
        for point in primitive.points:
            assert point.source
            primitive.complete(point.genes)
