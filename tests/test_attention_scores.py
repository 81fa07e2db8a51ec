"""From scores to outputs: against transformers, and against loops from the papers' equations."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_parts import (
    HEADS,
    TOKENS,
    WIDTH,
    build,
    causal_mask,
    check_forms_and_cost,
    check_gradients,
    config,
    copy_projections,
    error,
    inputs,
)
from torch import Tensor, nn
from transformers import DiffLlamaConfig, Gemma2Config, GptOssConfig
from transformers.models.diffllama import modeling_diffllama as diffllama
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from mendel.primitives.attention.attend import attend
from mendel.primitives.attention.keyvalues import KeyValues
from mendel.primitives.attention.patterns import Window
from mendel.primitives.attention.score import lambda_init
from mendel.primitives.attention.weigh import Score, Tape
from mendel.primitives.base import Gene, GeneError
from mendel.primitives.norm import RMSNORM_EPS

SETTINGS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "attn_implementation": "eager",
}


def stacked(reference: nn.Module) -> Tensor:
    """The gradients of q_proj, k_proj and v_proj as our one product holds them."""
    grads = [getattr(reference, f"{n}_proj").weight.grad for n in "qkv"]
    assert all(grad is not None for grad in grads)
    return torch.cat([grad for grad in grads if grad is not None])


@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_is_diffllamas(layer: int) -> None:
    settings = DiffLlamaConfig(**SETTINGS, rms_norm_eps=RMSNORM_EPS)
    torch.manual_seed(0)
    reference, x = diffllama.DiffLlamaAttention(settings, layer), inputs()
    # Their layer is two of our slots.
    ours = build({"kv_heads": 2, "score": "differential"}, layer=2 * layer)
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    scoring = ours.scoring
    assert scoring.vectors is not None
    assert isinstance(scoring.norm, nn.RMSNorm)
    vectors = [getattr(reference, f"lambda_{n}") for n in ("q1", "k1", "q2", "k2")]
    with torch.no_grad():
        scoring.vectors.copy_(torch.stack(vectors))
        # Theirs has no weight; the paper's code has.
        scoring.norm.weight.fill_(1.0)
    angles = diffllama.DiffLlamaRotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    expected, y = reference(x, angles, causal_mask())[0], ours(x)[0]
    assert error(y, expected) < 1e-5
    weight = torch.randn_like(y)
    for out in (expected, y):
        (out * weight).sum().backward()
    lambdas = torch.stack([v.grad for v in vectors])
    check_gradients(
        ours, reference, {"entry.weight": stacked(reference), "scoring.vectors": lambdas}
    )


@pytest.mark.parametrize("window", [None, 9])
def test_sink_logits_are_gpt_osss(window: int | None) -> None:
    settings = GptOssConfig(**SETTINGS, attention_bias=True, sliding_window=window)
    torch.manual_seed(0)
    reference, x = gpt_oss.GptOssAttention(settings, 0), inputs()
    nn.init.normal_(reference.sinks)
    for name in "qkvo":
        nn.init.normal_(getattr(reference, f"{name}_proj").bias, std=0.2)
    genes: dict[str, Gene] = {"kv_heads": 2, "sink_logits": True, "bias": True}
    if window is not None:
        genes |= {"pattern": "sliding", "window": window}
    ours = build(genes)
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    assert ours.scoring.sinks is not None
    with torch.no_grad():
        ours.scoring.sinks.copy_(reference.sinks)
        ours.entry.bias.copy_(torch.cat([getattr(reference, f"{n}_proj").bias for n in "qkv"]))
        ours.exit.bias.copy_(reference.o_proj.bias)
    # Their own table of angles holds YaRN's; the sinks are looked at here.
    plain = GptOssConfig(**SETTINGS, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    angles = gpt_oss.GptOssRotaryEmbedding(plain)(x, torch.arange(TOKENS)[None])
    expected, y = reference(x, angles, causal_mask(window=window))[0], ours(x)[0]
    assert error(y, expected) < 1e-5
    weight = torch.randn_like(y)
    for out in (expected, y):
        (out * weight).sum().backward()
    assert reference.sinks.grad is not None
    check_gradients(
        ours,
        reference,
        {"entry.weight": stacked(reference), "scoring.sinks": reference.sinks.grad},
    )


def test_the_logit_cap_is_gemma2s() -> None:
    settings = Gemma2Config(
        **SETTINGS, query_pre_attn_scalar=WIDTH // HEADS, attn_logit_softcapping=0.5
    )
    torch.manual_seed(0)
    reference, x = gemma2.Gemma2Attention(settings, 0), inputs()
    ours = build({"kv_heads": 2, "logit_cap": 0.5})
    copy_projections(ours, *(getattr(reference, f"{n}_proj").weight for n in "qkvo"))
    angles = gemma2.Gemma2RotaryEmbedding(settings)(x, torch.arange(TOKENS)[None])
    expected, y = reference(x, angles, causal_mask())[0], ours(x)[0]
    assert error(y, expected) < 1e-5
    weight = torch.randn_like(y)
    for out in (expected, y):
        (out * weight).sum().backward()
    check_gradients(ours, reference, {"entry.weight": stacked(reference)})


def loop(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, score: Score, earlier: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every token and head by itself: outputs (B, T, H * V) and raw scores (B, H, T, T)."""
    heads, tokens, width = q.shape[1:]
    per = heads // k.shape[1]
    scores = torch.zeros(q.shape[0], heads, tokens, tokens, dtype=q.dtype)
    rows = []
    for t in range(tokens):
        first = 0 if window is None else max(0, t - window + 1)
        raw = [
            (k[:, h // per, first : t + 1] * q[:, h, t, None]).sum(-1) / math.sqrt(width)
            for h in range(heads)
        ]
        if earlier is not None:
            raw = [r + earlier[:, h, t, first : t + 1] for h, r in enumerate(raw)]
        for h in range(heads):
            scores[:, h, t, first : t + 1] = raw[h]
        if score.cap:
            raw = [score.cap * torch.tanh(r / score.cap) for r in raw]
        if score.before is not None:
            raw = [sum(score.before[h, g] * raw[g] for g in range(heads)) for h in range(heads)]  # type: ignore[misc]
        if score.form == "sigmoid":
            maps = [1 / (1 + torch.exp(-(r - math.log(t + 1 - first)))) for r in raw]
        else:
            maps = []
            for h, r in enumerate(raw):
                total = r.exp().sum(-1, keepdim=True)
                if score.sinks is not None:
                    total = total + score.sinks[h].exp()
                maps.append(r.exp() / total)
        if score.after is not None:
            maps = [sum(score.after[h, g] * maps[g] for g in range(heads)) for h in range(heads)]  # type: ignore[misc]

        def read(weights: Tensor, group: int, first: int = first, t: int = t) -> Tensor:
            return (weights[..., None] * v[:, group, first : t + 1]).sum(1)

        if score.difference is None:
            row = [read(m, h // per) for h, m in enumerate(maps)]
        else:
            row, pairs = [], heads // 2
            for i in range(pairs):
                weights = maps[i] - score.difference * maps[i + pairs]
                row += [read(weights, i // per), read(weights, (i + pairs) // per)]
        rows.append(torch.cat(row, -1))
    return torch.stack(rows, 1), scores


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


FORMS = ["softmax", "sigmoid", "cap", "sinks", "talking", "difference", "residual", "many"]


def score_of(name: str, heads: int) -> tuple[Score, list[Tensor]]:
    """A form of that name with random parameters, and these."""
    found = {
        "softmax": Score(),
        "sigmoid": Score(form="sigmoid"),
        "cap": Score(cap=0.7),
        "sinks": Score(sinks=drawn(heads)),
        "talking": Score(before=drawn(heads, heads), after=drawn(heads, heads)),
        "difference": Score(difference=drawn(1).squeeze()),
        "residual": Score(),
        "many": Score(
            form="softmax",
            cap=0.7,
            sinks=drawn(heads),
            before=drawn(heads, heads),
            after=drawn(heads, heads),
        ),
    }[name]
    parts = (found.sinks, found.before, found.after, found.difference)
    return found, [part for part in parts if part is not None]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 7, 3], ids=["full", "masked", "banded"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_its_formula(name: str, window: int | None, groups: int) -> None:
    """Outputs, raw scores and gradients in float64; tolerances a thousand times its rounding."""
    torch.manual_seed(0)
    heads, tokens = 4, 19
    q, k, v = drawn(2, heads, tokens, 6), drawn(2, groups, tokens, 6), drawn(2, groups, tokens, 6)
    score, parts = score_of(name, heads)
    given = [q, k, v, *parts]
    if name == "residual":
        # Two layers: the second adds the raw scores of the first.
        q2, k2, v2 = (drawn(*t.shape) for t in (q, k, v))
        given = [q, k, q2, k2, v2]
        _, raw = loop(q, k, v, window, score, None)
        expected, _ = loop(q2, k2, v2, window, score, raw)
        kv, kv2 = KeyValues(k, v), KeyValues(k2, v2)
        first = Tape(None)
        attend(q, kv, Window(window), replace(score, tape=first), None)
        second = Tape(first.scores)
        out = attend(q2, kv2, Window(window), replace(score, tape=second), None)
    else:
        expected, _ = loop(q, k, v, window, score, None)
        out = attend(q, KeyValues(k, v), Window(window), score, None)
    out = out.transpose(1, 2).flatten(2)
    assert error(out, expected) < 1e-12
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    for ours, theirs in zip(torch.autograd.grad((out * weight).sum(), given), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_query_by_itself_is_its_formula() -> None:
    """The decoding form, which has no mask, for every form: the last row of the loop."""
    torch.manual_seed(0)
    q, k, v = drawn(2, 4, 9, 6), drawn(2, 2, 9, 6), drawn(2, 2, 9, 6)
    for name in FORMS:
        score, _ = score_of(name, 4)
        expected = loop(q, k, v, None, score, None)[0][:, -1]
        out = attend(q[:, :, -1:], KeyValues(k, v), Window(), score, None)
        assert error(out.flatten(1), expected) < 1e-12, name


@pytest.mark.parametrize(("active", "shared"), [(3, 0), (2, 1), (2, 2), (4, 2)])
def test_mixture_of_heads_is_its_formula(active: int, shared: int) -> None:
    """g_i of equations 5 to 9 token by token, over the outputs of the same layer without router."""
    genes: dict[str, Gene] = {"active_heads": active, "shared_heads": shared}
    ours, x = build(genes, dtype=torch.float64), inputs(dtype=torch.float64)
    plain = build({}, dtype=torch.float64)
    plain.entry.load_state_dict(ours.entry.state_dict())
    plain.exit = nn.Identity()  # type: ignore[assignment]
    router = ours.scoring.heads
    assert router is not None
    weight = router.router.weight.detach()
    routed, always = HEADS - shared, shared if shared > 1 else 0
    outputs = plain(x)[0].unflatten(2, (HEADS, -1))
    expected = torch.zeros_like(outputs)
    chosen = torch.zeros(routed, dtype=torch.float64)
    mean = torch.zeros(routed, dtype=torch.float64)
    for b in range(2):
        for t in range(TOKENS):
            scores = (weight[:routed] @ x[b, t]).softmax(0)
            one, two = 1.0, 1.0
            if shared:
                both = (weight[routed + always :] @ x[b, t]).softmax(0)
                one, two = float(both[0]), float(both[1])
                own = (weight[routed : routed + always] @ x[b, t]).softmax(0)
                for h in range(shared):
                    factor = one * float(own[h]) if shared > 1 else one
                    expected[b, t, h] = factor * outputs[b, t, h]
            mean += scores / (2 * TOKENS)
            for i in scores.topk(active).indices.tolist():
                expected[b, t, shared + i] = two * float(scores[i]) * outputs[b, t, shared + i]
                chosen[i] += 1 / (2 * TOKENS)
    assert error(ours(x)[0], ours.exit(expected.flatten(2))) < 1e-12
    loss = ours.auxiliary_loss()
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(0.01 * float((chosen * mean).sum()), rel=1e-12)
    assert ours.auxiliary_loss() is None
    assert ours.statistics()["head_load"] == pytest.approx(chosen.tolist(), rel=1e-12)
    assert torch.autograd.grad(loss, router.router.weight)[0].abs().max() > 0


def test_heads_without_a_router_report_nothing() -> None:
    ours = build({})
    ours(inputs())
    assert ours.auxiliary_loss() is None
    assert ours.statistics() == {}


LAYERS: dict[str, dict[str, Gene]] = {
    "differential": {"score": "differential", "kv_heads": 2},
    "differential-window": {"score": "differential", "pattern": "sliding", "window": 5},
    "differential-sinks-cap": {"score": "differential", "sink_logits": True, "logit_cap": 3.0},
    "sigmoid": {"score": "sigmoid", "kv_heads": 1},
    "sigmoid-window": {"score": "sigmoid", "pattern": "sliding", "window": 5},
    "sigmoid-alibi-talking": {"score": "sigmoid", "position": "alibi", "talking_heads": True},
    "cap": {"logit_cap": 5.0, "qk_norm": True},
    "sinks-window": {"sink_logits": True, "pattern": "sliding", "window": 9, "kv_heads": 3},
    "talking-window": {"talking_heads": True, "pattern": "sliding", "window": 9, "kv_heads": 2},
    "heads": {"active_heads": 2, "shared_heads": 2, "kv_heads": 2, "gate": "sigmoid"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_agree_and_cost_what_they_count(name: str) -> None:
    check_forms_and_cost(LAYERS[name])


def test_lambda_begins_by_depth() -> None:
    """0.8 - 0.6 exp(-0.3 (l - 1)) for layers l = 1, 2, ... of the paper, each two slots."""
    assert lambda_init(0) == pytest.approx(0.2)
    assert lambda_init(5) == pytest.approx(0.8 - 0.6 * math.exp(-1.5))
    inits = [config({"score": "differential"}, layer=i).score.lambda_init for i in range(4)]
    assert inits == [lambda_init(0)] * 2 + [lambda_init(1)] * 2
    assert config({}, layer=3) == config({}, layer=0)


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"score": "sigmoid", "sink_logits": True}, "weights of score=sigmoid share nothing"),
        ({"score": "differential", "heads": 3}, "heads=3 is odd"),
        ({"score": "differential", "kv_heads": 1}, "kv_heads=1 is odd"),
        ({"score": "differential", "talking_heads": True}, "choose one"),
        ({"score": "differential", "active_heads": 2}, "one by one"),
        ({"talking_heads": True, "heads": 1}, "nothing to mix"),
        ({"active_heads": 7}, "more than the 6 heads"),
        ({"active_heads": 1, "shared_heads": 5}, "leaves no two heads"),
    ],
)
def test_what_does_not_go_together_gets_a_sentence(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        config(genes)


def test_shared_heads_without_a_router_change_nothing() -> None:
    assert config({"shared_heads": 2}) == config({})
