"""The configurations of flash-linear-attention: parameters by its classes' own definitions, which
are written down here a second time, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, caller, loads
from hypothesis import given, settings
from hypothesis import strategies as st

from mendel.genome import published
from mendel.genome.cost import cost
from mendel.genome.files import load
from mendel.genome.notation import parse
from mendel.search.exports.fla import NotExpressible, fla_config

Json = dict[str, Any]


def parameters(c: Json) -> int:
    """What `AutoModelForCausalLM.from_config` of the library has, counted from its classes."""
    width, layers = c["hidden_size"], c["num_hidden_layers"]
    embeddings = (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * width
    if c["model_type"] in ("mamba", "mamba2"):
        layer = width + (mamba(c) if c["model_type"] == "mamba" else mamba2(c))
        return embeddings + layers * layer + width
    inner = c.get("intermediate_size")
    if c["model_type"] == "rwkv7":
        return embeddings + rwkv7(c)
    if c["model_type"] == "samba":
        # Its MLP is given the ratio only.
        inner = 256 * -(-int(width * c["hidden_ratio"] * 2 / 3) // 256)
    specs = c.get("attn") or []
    specs = [specs] if isinstance(specs, dict) else specs
    total = embeddings + width
    for i in range(layers):
        spec = next((s for s in specs if i in s["layers"]), None)
        mixer = attention(width, spec) if spec else NATIVE[c["model_type"]](c)
        total += 2 * width + 3 * width * inner + mixer
    return total


def attention(width: int, c: Json) -> int:
    kv = c["num_kv_heads"] * (width // c["num_heads"])
    norms = 2 * (width // c["num_heads"]) if c.get("qk_norm") else 0
    return width * (2 * width + 2 * kv) + c["qkv_bias"] * (width + 2 * kv) + norms


def latent(c: Json) -> int:
    width, heads, rank = c["hidden_size"], c["num_heads"], c["q_lora_rank"]
    queries = heads * c["qk_head_dim"]
    q = width * queries if rank is None else width * rank + rank + rank * queries
    made = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    kv = width * c["kv_lora_rank"] + c["kv_lora_rank"] * (1 + made)
    return q + width * c["qk_rope_head_dim"] + kv + heads * c["v_head_dim"] * width


def mamba(c: Json) -> int:
    width, state = c["hidden_size"], c["state_size"]
    inner, rank = int(c["expand"] * width), c.get("dt_rank", c.get("time_step_rank"))
    conv = inner * (c["conv_kernel"] + 1)
    selected = inner * (rank + 2 * state) + rank * inner + inner
    return 2 * width * inner + conv + selected + inner * state + inner + inner * width


def mamba2(c: Json) -> int:
    width = c["hidden_size"]
    inner = int(c["expand"] * width)
    heads = inner // c["head_dim"]
    mixed = inner + 2 * c["n_groups"] * c["state_size"]
    conv = mixed * (c["conv_kernel"] + 1)
    return width * (inner + mixed + heads) + conv + 3 * heads + inner + inner * width


def gla(c: Json) -> int:
    width = c["hidden_size"]
    keys, values = int(width * c["expand_k"]), int(width * c["expand_v"])
    decay = 16 * (width + keys) + keys
    return width * (2 * keys + 3 * values) + decay + values // c["num_heads"]


def retnet(c: Json) -> int:
    width = c["hidden_size"]
    keys, values = int(width * c["expand_k"]), int(width * c["expand_v"])
    return width * (2 * keys + 3 * values) + values // c["num_heads"]


def deltanet(c: Json) -> int:
    width = c["hidden_size"]
    keys, values = int(width * c["expand_k"]), int(width * c["expand_v"])
    conv = (2 * keys + values) * c["conv_size"] if c["use_short_conv"] else 0
    gate = width * values if c["use_gate"] else 0
    beta = width * c["num_heads"]
    return width * (2 * keys + 2 * values) + beta + conv + gate + values // c["num_heads"]


def gated_deltanet(c: Json) -> int:
    width, heads = c["hidden_size"], c["num_v_heads"]
    value_dim = int(c["head_dim"] * c["expand_v"])
    keys, values = c["num_heads"] * c["head_dim"], heads * value_dim
    conv = (2 * keys + values) * c["conv_size"] if c["use_short_conv"] else 0
    gate = width * values if c["use_gate"] else 0
    return width * (2 * keys + 2 * values + 2 * heads) + 2 * heads + conv + gate + value_dim


def deltaproduct(c: Json) -> int:
    width, heads, steps = c["hidden_size"], c["num_heads"], c["num_householder"]
    value_dim = int(c["head_dim"] * c["expand_v"])
    keys, values = heads * c["head_dim"], heads * value_dim
    mixed = keys + steps * (keys + values)
    conv = mixed * c["conv_size"] if c["use_short_conv"] else 0
    gate = width * values if c["use_output_gate"] else 0
    decay = (width + 2) * heads if c["use_forget_gate"] else 0
    return width * (mixed + steps * heads + values) + decay + conv + gate + value_dim


def rwkv7(c: Json) -> int:
    """All layers and norms: the first has no low-rank map of values, and a norm before it."""
    width, layers = c["hidden_size"], c["num_hidden_layers"]
    low = 2 * c["decay_low_rank_dim"] * width + width
    low += 2 * c["a_low_rank_dim"] * width + width + 2 * c["gate_low_rank_dim"] * width
    values = 2 * c["v_low_rank_dim"] * width + width
    mixer = 6 * width + 3 * width + 4 * width * width + low + 2 * width
    channel = width + 2 * width * c["intermediate_size"]
    norms = 2 * width * (2 * layers + 1 + c["norm_first"])
    return layers * (mixer + channel) + (layers - 1) * values + norms


NATIVE: dict[str, Any] = {
    "transformer": lambda c: attention(c["hidden_size"], c),
    "mla": latent,
    "samba": mamba,
    "gla": gla,
    "retnet": retnet,
    "delta_net": deltanet,
    "gated_deltanet": gated_deltanet,
    "gated_deltaproduct": deltaproduct,
}

EXPRESSIBLE = {
    "{width=64} [gqa(kv_heads=2) > swiglu]*2": "transformer",
    "{width=64, tied=false} [swa(qk_norm=true, bias=true, bias_at=inputs) > swiglu]": "transformer",
    "{width=64} [mha > swiglu > swa(window=16) > swiglu]*2": "gla",
    "{width=64} [gated-deltanet > swiglu > swa(window=16) > swiglu]*2": "gated_deltanet",
    "{width=64} [gated-deltanet(heads=4, groups=2, gate=none) > swiglu]*2": "gated_deltanet",
    "{width=64} [deltanet > swiglu]*2": "delta_net",
    "{width=64} [deltanet(gate=silu, conv=0, negative_eigenvalues=true) > swiglu]*2": "delta_net",
    "{width=64} [deltaproduct > swiglu]*2": "gated_deltaproduct",
    "{width=64} [deltaproduct(gate=silu, decay=scalar, steps=3) > swiglu]*2": "gated_deltaproduct",
    "{width=96} [gla(heads=3) > swiglu]*2 > mqa(heads=3) > swiglu": "gla",
    "{width=64} [retnet(norm=rmsnorm) > swiglu]*2": "retnet",
    "{width=64} [mamba(expand=1.5) > swiglu(expansion=4) > swa > swiglu(expansion=4)]*2": "samba",
    "{width=64} [mamba > swiglu(expansion=4)]*2": "samba",
    "{width=64} [mla > swiglu]*2": "mla",
    "{width=64} [mla(q_rank=24, value_dim=8) > swiglu]*2": "mla",
    "{width=64} mamba*3": "mamba",
    "{width=64, tied=false} mamba2(groups=2, heads=4, expand=1.5, key_dim=16)*3": "mamba2",
}


@pytest.mark.parametrize("notation", EXPRESSIBLE)
def test_the_librarys_model_has_the_genomes_parameters(notation: str) -> None:
    genome = parse(notation)
    config = fla_config(genome)
    assert config["model_type"] == EXPRESSIBLE[notation]
    assert parameters(json.loads(json.dumps(config))) == cost(genome).total.params


@pytest.mark.parametrize(
    "name", ["llama-2-7b", "mamba-2.8b", "mamba2-130m", "samba-421m", "rwkv7-0.1b", "rwkv7-2.9b"]
)
def test_published_models_have_theirs(name: str) -> None:
    genome = published.load(name)
    assert parameters(fla_config(genome)) == cost(genome).total.params


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 40).map(lambda n: 8 * n),
    heads=st.integers(1, 6),
    key_dim=st.integers(1, 48),
    expand=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    point=st.sampled_from(["gla", "deltanet", "gated-deltanet", "mamba", "mamba2"]),
)
def test_no_rounding_of_a_ratio_loses_a_channel(
    width: int, heads: int, key_dim: int, expand: float, point: str
) -> None:
    if int(width * expand) % heads:
        width *= heads
    genes = f"heads={heads}, key_dim={key_dim}, " if point != "mamba" else ""
    then = " > swiglu" if point not in ("mamba", "mamba2") else ""
    genome = parse(f"{{width={width}}} [{point}({genes}expand={expand}){then}]*2")
    assert parameters(fla_config(genome)) == cost(genome).total.params


@pytest.mark.parametrize(
    ("notation", "sentence"),
    [
        ("{width=64} mha > swiglu > [gla | mha] > swiglu", "slot 2: operators side by side"),
        ("{width=64} [mamba2 > swiglu]*2", "slot 0: mamba2: decay=scalar"),
        ("{width=64} [gla > swiglu > mamba > swiglu]", "slot 2: mamba is not the gla of slot 0"),
        ("{width=64} [retnet > swiglu]", "slot 0: retnet: norm=groupnorm is not"),
        (
            "{width=1024} [retnet(norm=rmsnorm, heads=2) > swiglu]",
            "slot 0: retnet: keys of 512 channels: retnet has at most 256 there",
        ),
        ("{width=64} [kda > swiglu]", "slot 0: kda: Kimi Delta Attention has a bias"),
        ("{width=64} mha > swiglu > mha", "slot 2: the library has a SwiGLU after every mixer"),
        ("{width=64} mha > swiglu > mha > geglu", "slot 3: geglu stands where"),
        ("{width=64} mha > swiglu > mha > moe", "slot 3: moe stands where"),
        ("{width=64} mha > swiglu > swiglu > mha", "slot 2: swiglu stands where"),
        ("{width=64} mha > swiglu > mha > swiglu(expansion=2)", "slot 3: its inner width"),
        ("{width=64} [mamba > swiglu]", "slot 1: an inner width of 168: in Samba"),
        ("{width=64} mamba2*2 > mamba2(key_dim=16)", "slot 2: mamba2 is not the mamba2 of slot 0"),
        ("{width=64} [gla > swiglu > mha(qk_norm=true) > swiglu]", "slot 2: mha: qk_norm=true"),
        ("{width=64} [mha(norm_over=all, qk_norm=true) > swiglu]", "slot 0: mha: attention norms"),
        ("{width=64} [mha(norm_scales=false, qk_norm=true) > swiglu]", "slot 0: mha: attention n"),
        ("{width=64} [mha > swiglu > bigbird > swiglu]", "slot 2: bigbird: attention is full or"),
        ("{width=64} [mha(head_dim=32) > swiglu]", "slot 0: mha: 4 heads of 32 channels are"),
        ("{width=64, position=none} [mha > swiglu]", "slot 0: mha: attention turns all channels"),
        ("{width=64} [mha(weights=@a) > swiglu]*2", "slot 0: weights=@a is shared"),
        ("{width=64} [mla > swiglu > mha > swiglu]", "slot 2: latent attention stands beside"),
        ("{width=64} [jamba-mamba > moe]*2", "slot 0: jamba-mamba: Mamba has a convolution"),
        ("{width=64, norm=layernorm} [gla > swiglu]", "norm=layernorm: every layer of the library"),
        ("{width=64, norm=layernorm} [rwkv7 > rwkv7-channel]", "slot 0: rwkv7: value_mix=none is"),
        ("{width=64} [rwkv7 > rwkv7-channel]", "norm=rmsnorm: every layer of the library has"),
        ("{width=64, norm=layernorm} [rwkv7 > swiglu]", "slot 0: rwkv7: value_mix=none"),
        ("{width=64, norm=layernorm} mha > swiglu > rwkv7 > swiglu", "slot 0: mha stands where"),
        ("{width=64, residual=rezero} [gla > swiglu]", "residual=rezero: every layer"),
        ("{width=64, embedding_norm=true} [gla > swiglu]", "embedding_norm=true: the library"),
        (
            "{width=64, position=alibi} [gla > swiglu]",
            "position=alibi: the library has no positions",
        ),
    ],
)
def test_what_no_model_is_names_its_slot(notation: str, sentence: str) -> None:
    with pytest.raises(NotExpressible) as caught:
        fla_config(parse(notation))
    assert str(caught.value).startswith(sentence)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


def test_the_export_holds_configuration_command_and_genome(tmp_path: Path, call: Call) -> None:
    notation = "{width=64} [gated-deltanet > swiglu > swa(window=16) > swiglu]*2"
    made = loads(call("export", notation, "--format", "flame", "--out", "mine", "--json"))
    folder = tmp_path / "mine"
    assert {"config.json", "train.sh", "genome.yaml", "provenance.json"} <= set(made["files"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == fla_config(parse(notation))
    assert config["attn"]["layers"] == [1, 3]
    assert load(folder / "genome.yaml") == parse(notation)
    script = (folder / "train.sh").read_text(encoding="utf-8")
    assert '--model.config "$model/config.json"' in script
    assert os.access(folder / "train.sh", os.X_OK)
    proof = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert proof["format"] == "flame"
    assert "train.sh" in proof["files"]


def test_a_refusal_writes_nothing(tmp_path: Path, call: Call) -> None:
    code, out, err = call("export", "jamba-v0.1", "--format", "flame", "--out", "new/mine")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "jamba-v0.1 is no model of flash-linear-attention: slot 0: jamba-mamba: Mamba has" in err
    assert list(tmp_path.iterdir()) == []
