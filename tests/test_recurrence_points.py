"""Points of the matrix-state recurrence against float64 loops written from the papers' equations.

Where transformers has the layer, it is compared too. Tolerances as in test_recurrence.py: 1e-5 of
the output's scale in float32, 1e-10 in float64.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.decays import InputDecay, LearnedDecay
from mendel.primitives.recurrence.features import FAVOR_LEAST, FeatureMap
from mendel.primitives.recurrence.matrix_state import Recurrence, RecurrenceConfig

LENGTH = 21


def build(name: str, layer: int = 1, depth: int = 4, **genes: Gene) -> Recurrence:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(64, "none", layer, depth), full)
    assert isinstance(made, RecurrenceConfig)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def check(ours: Recurrence, x: Tensor, y: Tensor, S: Tensor) -> None:
    """Output and final state, whole and with a state from the middle on."""
    assert error(ours(x)[0], y) < 1e-10
    state = ours.init_state(2, x.shape[1], x.dtype)
    first, middle = ours(x[:, :8], state)
    second, last = ours(x[:, 8:], middle)
    assert error(torch.cat((first, second), 1), y) < 1e-10
    assert last is not None
    assert error(last.tensors["matrix"], S) < 1e-10


def heads(t: Tensor, count: int) -> Tensor:
    return t.view(*t.shape[:2], count, -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def test_gla_is_the_loop_of_the_paper() -> None:
    """arXiv 2312.06635, eq. 3 and section 4.4: alpha = sigmoid(x W1 W2 + b)^(1/16)."""
    ours = build("gla")
    c, x = ours.config, tokens()
    assert (c.heads, c.key_dim, c.value_dim, c.decay_rank) == (4, 8, 16, 16)
    assert isinstance(ours.decay, InputDecay)
    assert ours.decay.up is not None
    r, v, k, q, low = (x @ ours.in_proj.weight.T).split([64, 64, 32, 32, 16], -1)
    v, k, q = heads(v, 4), heads(k, 4), heads(q, 4)
    alpha = torch.sigmoid(heads(low @ ours.decay.up.weight.T, 4) + ours.decay.bias) ** (1 / 16)
    S = x.new_zeros(2, 4, 8, 16)
    o = []
    for t in range(LENGTH):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append((q[:, t, :, :, None] * S).sum(2) / 8**0.5)
    read = rms(torch.stack(o, 1), ours.norm.weight).flatten(2)
    check(ours, x, (silu(r) * read) @ ours.out_proj.weight.T, S)


def test_hgrn2_is_the_loop_of_the_paper() -> None:
    """arXiv 2404.07904, eq. 6: h = Diag(f) h + (1 - f) i^T, y = h^T o, with a lower bound on f."""
    ours = build("hgrn2")
    x = tokens()
    assert isinstance(ours.decay, InputDecay)
    i, o, f = (heads(t, 4) for t in (x @ ours.in_proj.weight.T).split(64, -1))
    bound = torch.sigmoid(ours.decay.lower)
    f = bound + (1 - bound) * torch.sigmoid(f)
    o = silu(o)
    h = x.new_zeros(2, 4, 16, 16)
    y = []
    for t in range(LENGTH):
        h = f[:, t, :, :, None] * h + (1 - f[:, t])[..., None] * i[:, t, :, None, :]
        y.append((o[:, t, :, :, None] * h).sum(2) / 4)  # / sqrt(K), which the norm takes back
    normed = rms(torch.stack(y, 1).flatten(2), ours.norm.weight)
    check(ours, x, normed @ ours.out_proj.weight.T, h)


@pytest.mark.parametrize(("layer", "share"), [(0, 0.02), (1, 0.25), (3, 0.75)])
def test_hgrn2s_bound_starts_at_the_share_of_the_layers_below(layer: int, share: float) -> None:
    primitive, genes = resolve("hgrn2", {})
    module = primitive.configure(Site(64, "none", layer, 4), genes).build()
    assert isinstance(module, Recurrence)
    assert isinstance(module.decay, InputDecay)
    assert torch.sigmoid(module.decay.lower).unique().tolist() == pytest.approx([share], rel=1e-5)


def wkv(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """arXiv 2404.05892, eq. 19-20, token by token; w (B, T, H, K)."""
    S = r.new_zeros(2, *r.shape[2:], v.shape[-1])
    o = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(((S + u[..., None] * kv) * r[:, t, :, :, None]).sum(2) * scale)
        S = w[:, t, :, :, None] * S + kv
    return torch.stack(o, 1), S


def eagle_read_out(ours: Recurrence, o: Tensor, g: Tensor) -> Tensor:
    normed = F.group_norm(o.reshape(-1, 64), 4, ours.norm.weight, ours.norm.bias, 1e-5)
    return (silu(g) * normed.view(2, -1, 64)) @ ours.out_proj.weight.T


def test_rwkv5_is_the_loop_of_the_paper() -> None:
    """Eagle's time mixing (arXiv 2404.05892, section 4.1.2)."""
    ours = build("rwkv5")
    x = tokens()
    assert ours.shift is not None
    assert ours.bonus is not None
    assert isinstance(ours.decay, LearnedDecay)
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    mixed = [x + (before - x) * mu for mu in ours.shift.mix]
    g, v, k, r = (m @ w.T for m, w in zip(mixed, ours.in_proj.weight.split(64), strict=True))
    w = torch.exp(-torch.exp(ours.decay.p)).expand(2, LENGTH, 4, 16)
    o, S = wkv(heads(r, 4), heads(k, 4), heads(v, 4), w, ours.bonus, 16**-0.5)
    check(ours, x, eagle_read_out(ours, o, g), S)


def test_rwkv6_is_the_loop_of_the_paper() -> None:
    """Finch's time mixing (arXiv 2404.05892, section 4.2): ddlerp, and decays from the input."""
    ours = build("rwkv6")
    x = tokens()
    shift = ours.shift
    assert shift is not None
    assert ours.bonus is not None
    assert isinstance(ours.decay, InputDecay)
    assert ours.decay.up is not None
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    low = x + (before - x) * shift.first
    mixed = []
    for s, a in enumerate(shift.down.weight.split(32)):
        lora = shift.mix[s] + torch.tanh(low @ a.T) @ shift.up[s]
        mixed.append(x + (before - x) * lora)
    rows = ours.in_proj.weight.split([64, 64, 64, 64, 64])
    g, v, k, r, d = (m @ w.T for m, w in zip(mixed, rows, strict=True))
    d = heads(torch.tanh(d) @ ours.decay.up.weight.T, 4) + ours.decay.bias
    w = torch.exp(-torch.exp(d))
    o, S = wkv(heads(r, 4), heads(k, 4), heads(v, 4), w, ours.bonus, 16**-0.5)
    check(ours, x, eagle_read_out(ours, o, g), S)


def features_by_hand(module: FeatureMap, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The papers' maps, one vector at a time."""
    found = []
    for t, query in ((q, True), (k, False)):
        rows = []
        for head in range(t.shape[2]):
            vectors = t[:, :, head].reshape(-1, t.shape[-1])
            rows.append(torch.stack([one_feature(module, x, head, query) for x in vectors]))
        stacked = torch.stack(rows, 1)
        found.append(stacked.view(*t.shape[:3], -1))
    return found[0], found[1]


def one_feature(module: FeatureMap, x: Tensor, head: int, query: bool) -> Tensor:
    width = len(x)
    if module.feature == "hedgehog":
        y = x @ (module.query_map if query else module.key_map)[head]
        return torch.cat((torch.softmax(y, 0), torch.softmax(-y, 0)))
    x = x / width**0.25
    if module.feature == "taylor":
        return torch.cat((x.new_ones(1), x, torch.outer(x, x).flatten() / math.sqrt(2)))
    exponent = module.projection @ x - x @ x / 2
    y = torch.exp(exponent - (exponent.max() if query else 0)) + FAVOR_LEAST
    return y / math.sqrt(len(module.projection))


@pytest.mark.parametrize("name", ["performer", "based", "hedgehog"])
def test_feature_maps_are_the_loops_of_the_papers(name: str) -> None:
    """2009.14794 (lemma 1 and section 2.4), 2402.18668 (section 4.1), 2402.04347 (section 4)."""
    ours = build(name)
    c, x = ours.config, tokens(12)
    assert ours.feature is not None
    keys = c.heads * c.key_dim
    v, k, q = (heads(t, 4) for t in (x @ ours.in_proj.weight.T).split([64, keys, keys], -1))
    q, k = features_by_hand(ours.feature, q, k)
    S, z = x.new_zeros(2, 4, c.rows, 16), x.new_zeros(2, 4, c.rows)
    o = []
    for t in range(12):
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + k[:, t]
        total = (q[:, t] * z).sum(-1, keepdim=True)
        o.append((q[:, t, :, :, None] * S).sum(2) / total)
    y = torch.stack(o, 1).flatten(2) @ ours.out_proj.weight.T
    check(ours, x, y, torch.cat((S, z[..., None]), -1))


def test_random_features_estimate_the_softmax_kernel() -> None:
    """E[phi(q) phi(k)] = exp(q.k / sqrt(K)), up to the factor that is c's, over many draws."""
    torch.manual_seed(0)
    q, k = 0.7 * torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    found = []
    for _ in range(400):
        module = FeatureMap("favor", 1, 16).double()
        a, b = module(q, k)
        x = q.flatten() / 2
        top = (module.projection @ x - x @ x / 2).max()
        found.append(((a * b).sum() * top.exp()).item())
    right = torch.exp((q * k).sum() / 4).item()
    mean = sum(found) / len(found)
    spread = (sum((f - mean) ** 2 for f in found) / len(found)) ** 0.5
    # Four standard errors, and the features' least value, which adds about 1e-3.
    assert abs(mean - right) < 4 * spread / len(found) ** 0.5 + 5e-3
    rows = FeatureMap("favor", 1, 16).projection[:16]
    assert (rows @ rows.T - torch.diag(rows.square().sum(-1))).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("length", [1, 37])
def test_lightning_attention_is_the_layer_of_transformers(length: int, layer: int) -> None:
    ours = build("lightning-attention", layer, 4).float()
    c = ours.config
    theirs_config = MiniMaxConfig(
        hidden_size=64,
        num_attention_heads=c.heads,
        head_dim=c.value_dim,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
        block_size=16,
        vocab_size=32,
    )
    theirs = MiniMaxLightningAttention(theirs_config, layer).eval()
    # Their read-out is not divided by sqrt(K); in the norm that is a factor of eps.
    theirs.norm.variance_epsilon = 1e-5 * c.key_dim
    gate, v, k, q = ours.in_proj.weight.detach().split(64)
    by_head = [t.view(c.heads, -1, 64) for t in (q, k, v)]
    theirs.load_state_dict(
        {
            **theirs.state_dict(),
            "qkv_proj.weight": torch.cat(by_head, 1).flatten(0, 1),
            "output_gate.weight": gate,
            "norm.weight": ours.norm.weight.detach(),
            "out_proj.weight": ours.out_proj.weight.detach(),
        }
    )
    x = tokens(length).float()
    nothing = (torch.empty(0), torch.empty(0))
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    cotangent = torch.randn(x.shape)
    y, (reference, matrix) = ours(mine)[0], theirs(yours, nothing, None)
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["matrix"], matrix) < 1e-5


def forms() -> Iterator[tuple[str, str, str]]:
    for decay in ("scalar", "vector"):
        for form in ("dt", "sigmoid", "complement", "exp"):
            yield decay, form, f"{decay}-{form}"


@torch.no_grad()
def stepped(module: Recurrence, x: Tensor) -> Tensor:
    """The outputs for x (B, T, D), token by token."""
    state, steps = module.init_state(x.shape[0], x.shape[1], x.dtype), []
    for t in range(x.shape[1]):
        out, after = module(x[:, t : t + 1], state)
        assert after is not None
        steps.append(out)
        state = after
    return torch.cat(steps, 1)


@pytest.mark.parametrize(("decay", "form"), [pytest.param(d, f, id=name) for d, f, name in forms()])
@pytest.mark.parametrize("size", [1e-3, 30.0, 3000.0])
def test_extreme_decays_of_every_form(decay: str, form: str, size: float) -> None:
    """Near 1, near 0 and everything forgotten: finite, and the steps agree with the whole."""
    module = build("recurrence", decay=decay, decay_form=form, decay_rank=0, gate="none").float()
    with torch.no_grad():
        module.in_proj.weight[-module.config.splits[2] :].mul_(size)
    x = tokens(70).float()
    y = module(x)[0]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    # In float32 a projection of values of thousands is itself rounded by 1e-4, differently for one
    # token and for many, and a decay is its exponential: there only float64 tells the forms apart.
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        if dtype == torch.float64 or size < 3000:
            assert error(stepped(module.to(dtype), x.to(dtype)), module(x.to(dtype))[0]) < bound
