"""Configurations of transformers as genomes: their classes' defaults and parameters, the published
models, what is refused and what is said to differ."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import Call, caller, loads
from model_configs import CONFIGS
from published_references import REFERENCES

from mendel.genome import files, imported, published
from mendel.genome.cost import cost
from mendel.genome.hash import canonical_hash
from mendel.genome.imported import FAMILIES, ConfigurationError

NONSENSE: tuple[Any, ...] = ("x", -1, 0, 1.5, True, None, [], [None], {"x": "y"}, 10**9)
OWN = [family for family in FAMILIES if not FAMILIES[family].reference.startswith("fla.")]
"""Families of the library itself."""
AUTO: Any = transformers.AutoModelForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    # The class has no default for the one, and a width of experts that no genome has for the other.
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    # Without it the class forgets its window.
    **{name: {"use_sliding_window": True} for name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")},
}
"""What a class needs to be a model, and to keep its defaults."""

DERIVED = ("rope_theta", "partial_rotary_factor")
"""Defaults that the classes keep inside `rope_parameters`."""
IN_CODE = {
    *("first_k_dense_replace", "full_attention_interval", "sliding_window_pattern"),
    *("rope_parameters", "rope_local_base_freq"),
}
"""Defaults that stand in the code of some classes. What follows from them is compared below."""


BASES = {"falcon-h1-0.5b": 1e11, "falcon-h1-7b": 1e11, "qwen3-next-80b-a3b": 1e7}
"""Of RoPE, where the reference, which is there to be counted, has the class' default."""


def _class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family].reference)


def _values(config: Any, whole: bool) -> Any:
    """The file of a configuration, with or without what is the class' default."""
    return json.loads(config.to_json_string(use_diff=not whole))


@pytest.mark.parametrize("family", OWN)
def test_defaults_are_those_of_the_class(family: str) -> None:
    theirs = _class(family)(**SIZES.get(family, {}))
    assert theirs.model_type == family
    others = {new: old for old, new in FAMILIES[family].aliases.items()}
    known = theirs.to_dict()
    turns = known.get("rope_parameters") or {}
    turns = turns.get("full_attention", turns)
    known |= {name: turns[name] for name in DERIVED if name in turns}
    for name, value in FAMILIES[family].defaults.items():
        if value != "auto" and name not in IN_CODE and name not in SIZES.get(family, {}):
            assert (known[name] if name in known else known[others[name]]) == value, name


@pytest.mark.parametrize("family", OWN)
def test_parameters_are_those_of_the_class_at_its_default_size(family: str) -> None:
    config = _class(family)(**SIZES.get(family, {}))
    found = imported.read(_values(config, whole=True))
    assert found.family == family
    with torch.device("meta"):
        theirs = AUTO.from_config(config)
    assert cost(found.genome).total.params == sum(p.numel() for p in theirs.parameters())
    # What a file leaves out is the class' default.
    bare = {"model_type": family, **SIZES.get(family, {})}
    for values in (_values(config, whole=False), bare):
        again = imported.read(values)
        assert canonical_hash(again.genome) == canonical_hash(found.genome)
        assert again.differs == found.differs
        assert found.unread == again.unread == ()


@pytest.mark.parametrize("family", [name for name in OWN if _class(name).attribute_map])
def test_other_names_of_fields_are_those_of_the_class(family: str) -> None:
    bare = {"model_type": family, **SIZES.get(family, {})}
    defaults = FAMILIES[family].defaults
    for other, name in _class(family).attribute_map.items():
        one, two = (
            key if key in defaults else FAMILIES[family].aliases.get(key, key)
            for key in (other, name)
        )
        assert one == two or not {one, two} & set(defaults), (other, name)
        value = defaults.get(one)
        if isinstance(value, int) and not isinstance(value, bool):
            read = [imported.read({**bare, key: value * 2}) for key in (other, name)]
            assert read[0] == read[1]
            assert read[0].unread == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_are_their_genomes(name: str) -> None:
    found = imported.read(CONFIGS[name])
    assert canonical_hash(found.genome) == canonical_hash(published.load(name))
    assert found.unread == ()
    _are_told(found.differs, name)


@pytest.mark.parametrize("name", REFERENCES)
def test_published_models_are_their_genomes_by_the_library(name: str) -> None:
    values = _values(REFERENCES[name](), whole=True)
    if name in BASES:
        values["rope_parameters"]["rope_theta"] = BASES[name]
    found = imported.read(values)
    assert canonical_hash(found.genome) == canonical_hash(published.load(name))
    assert found.unread == ()
    _are_told(found.differs, name)


def _are_told(differs: tuple[str, ...], name: str) -> None:
    """Differences other than an epsilon are said of the published model too."""
    assert all("epsilon" in said for said in differs) or published.describe(name).differs


@pytest.mark.parametrize("family", OWN)
def test_nonsense_raises_nothing_but_a_sentence(family: str) -> None:
    small = {} if family in ("nemotron_h", "zamba2") else {"num_hidden_layers": 4}
    values = _values(_class(family)(**SIZES.get(family, {}), **small), True)
    aliases, defaults = FAMILIES[family].aliases, FAMILIES[family].defaults
    names = sorted({*values, *aliases, *defaults, "rope_scaling"} - {"model_type"})
    for name in names:
        for nonsense in NONSENSE:
            # Any other error fails the test.
            with suppress(ConfigurationError):
                imported.read({**values, name: nonsense})


FLA: dict[str, dict[str, Any]] = {
    "samba-1.3b": {"model_type": "samba"},
    "samba-421m": {
        "model_type": "samba",
        "hidden_size": 1536,
        "num_hidden_layers": 12,
        "attn": {"layers": [1, 3, 5, 7, 9, 11], "num_heads": 12, "window_size": 2048},
    },
    "rwkv7-1.5b": {
        "model_type": "rwkv7",
        "a_low_rank_dim": 96,
        "attn": None,
        "attn_mode": "chunk",
        "decay_low_rank_dim": 96,
        "fuse_norm": True,
        "gate_low_rank_dim": 256,
        "head_dim": 64,
        "hidden_act": "sqrelu",
        "hidden_ratio": 4.0,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "norm_bias": True,
        "norm_eps": 1e-05,
        "norm_first": True,
        "num_heads": 32,
        "num_hidden_layers": 24,
        "v_low_rank_dim": 64,
        "value_dim": [2048] * 24,
        "vocab_size": 65536,
    },
}


@pytest.mark.parametrize("name", FLA)
def test_published_models_of_flash_linear_attention_are_their_genomes(name: str) -> None:
    found = imported.read(FLA[name])
    own = published.load(name)
    # The paper's Samba is tied.
    assert canonical_hash(replace(found.genome, tied=own.tied)) == canonical_hash(own)
    assert found.unread == ()


@pytest.mark.parametrize("name", FLA)
def test_nonsense_there_is_a_sentence_and_no_field_swallows_it(name: str) -> None:
    usual = _outcome(FLA[name])
    for field in FAMILIES[FLA[name]["model_type"]].defaults:
        # Any error but a refusal fails the test.
        found = {_outcome({**FLA[name], field: nonsense}) for nonsense in NONSENSE}
        assert found - {usual}, field


def _outcome(values: dict[str, Any]) -> str | tuple[str, tuple[str, ...]]:
    """The refusal, or what is made of a configuration."""
    try:
        found = imported.read(values)
    except ConfigurationError as refusal:
        return str(refusal)
    return canonical_hash(found.genome), found.differs


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not read; did you mean llama"),
        ({"model_type": "zamba"}, "model_type 'zamba' is no genome: its Mamba has heads with"),
        (
            {"model_type": "zamba2"},
            "num_hidden_layers is 32: without layers_block_type the class has 54",
        ),
        ({"model_type": None}, "model_type is null; it is one of llama"),
        ({"hidden_size": "4096"}, "hidden_size is a whole number of at least 1, not '4096'"),
        (
            {"num_key_value_heads": 5},
            "num_key_value_heads=5 does not divide num_attention_heads=32",
        ),
        ({"intermediate_size": 11009}, "gives an inner width of 11009: a genome's are multiples"),
        ({"hidden_act": "mish"}, "hidden_act is one of silu"),
        ({"model_type": "mamba", "use_conv_bias": False}, "use_conv_bias is false: a genome's"),
        ({"model_type": "lfm2", "conv_bias": True}, "conv_bias is true: no axis"),
        ({"num_hidden_layers": 600}, "num_hidden_layers=600: a genome has at most 512 slots"),
        ({"model_type": "nemotron_h", "tie_word_embeddings": True}, "has a head of its own"),
        (
            {"model_type": "jamba", "mamba_inner_layernorms": False},
            "a genome's Jamba norms the step",
        ),
        ({"model_type": "phi3", "attention_bias": True}, "the library's Phi-3 has none"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: the library's class turns"),
        (
            {"model_type": "bamba", "partial_rotary_factor": 0.25},
            "partial_rotary_factor is 0.25: the library's class turns half",
        ),
        (
            {"model_type": "phi3", "head_dim": 10, "partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5: 5 channels of a head are no pairs to turn",
        ),
        (
            {"model_type": "lfm2", "block_ff_dim": 4096},
            "block_ff_dim is 4096 and intermediate_size is 11008: they are two names of one field",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "rope_scaling.factor is a number above 0, not '4'",
        ),
    ],
)
def test_what_no_genome_has_is_refused_by_its_field(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        imported.read({**CONFIGS["llama-2-7b"], **changes})
    assert sentence in str(caught.value)


def test_what_differs_is_said() -> None:
    found = imported.read({**CONFIGS["deepseek-v3"], "new_trick": 3})
    assert found.differs == (
        "the module that predicts a second token",
        "a scaling of RoPE (yarn)",
    )
    assert found.unread == ("new_trick",)
    assert imported.read(CONFIGS["llama-2-7b"]).differs == (
        "the norms' epsilon (rms_norm_eps=1e-05; a genome's is 1e-06)",
    )


def test_of_a_model_that_also_sees_the_language_model_is_read() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    found = imported.read({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert found.genome == imported.read(text).genome
    assert found.differs[-1] == "gemma3's parts beside its language model"
    untied = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    assert not imported.read(untied).genome.tied


def test_what_kimis_router_and_positions_are_is_not_passed_over() -> None:
    changes = {"moe_router_activation_func": "softmax", "mla_use_nope": False}
    found = imported.read({**CONFIGS["kimi-linear-48b-a3b"], **changes})
    assert set(found.differs) - set(imported.read(CONFIGS["kimi-linear-48b-a3b"]).differs) == {
        "the scores of the router (moe_router_activation_func='softmax')",
        "RoPE in latent attention (mla_use_nope=false)",
    }


def test_a_scaling_of_rope_that_the_genome_has_is_no_difference() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for scaling, text in ((yarn, "yarn"), ({"rope_type": "linear", "factor": 4.0}, "linear")):
        found = imported.read({**CONFIGS["llama-2-7b"], "rope_scaling": scaling})
        assert len(found.differs) == 1
        assert ("rope_scaling", text) in found.genome.slots[0].branches[0].genes


def test_of_two_descriptions_of_rope_the_scaling_stands_first_as_in_the_library() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    both = {"rope_scaling": scaling, "rope_parameters": {"rope_type": "default"}}
    found = imported.read({**CONFIGS["llama-2-7b"], **both}).genome
    assert found == imported.read({**CONFIGS["llama-2-7b"], "rope_scaling": scaling}).genome
    assert found != imported.read(CONFIGS["llama-2-7b"]).genome


def test_fields_inside_of_fields_are_read_or_named() -> None:
    kinds = {"full_attention": {"rope_theta": 500.0}, "factor": 2.0}
    found = imported.read({**CONFIGS["llama-2-7b"], "rope_scaling": kinds})
    assert found.unread == ("rope_scaling.full_attention",)
    linear = {**CONFIGS["kimi-linear-48b-a3b"]["linear_attn_config"], "gate": 3}
    kimi = imported.read({**CONFIGS["kimi-linear-48b-a3b"], "linear_attn_config": linear})
    assert kimi.unread == ("linear_attn_config.gate",)


def test_the_weight_of_a_single_expert_is_a_difference() -> None:
    """The library divides it by itself; a genome does not, for then no router would learn."""
    found = imported.read({**CONFIGS["mixtral-8x7b"], "num_experts_per_tok": 1})
    assert "the weight of a single expert" in " ".join(found.differs)


def test_experts_without_shared_ones() -> None:
    found = imported.read({**CONFIGS["deepseek-v3"], "n_shared_experts": 0})
    assert ("shared", 0) in found.genome.slots[-1].branches[0].genes


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


def test_the_command_reads_a_folder_and_writes_a_genome(tmp_path: Path, call: Call) -> None:
    model, out = tmp_path / "model", tmp_path / "genome.yaml"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-8b"]), encoding="utf-8")
    code, shown, _ = call("import", "model", "--out", "genome.yaml", "--context", "262144")
    assert code == 0
    assert "8,030,261,248 parameters" in shown
    assert f"cache {262144 * 131072:,} bytes" in shown
    assert "a scaling of RoPE (llama3)" in shown
    assert files.load(out) == imported.read(CONFIGS["llama-3.1-8b"]).genome
    assert "# Not in the genome: a scaling of RoPE (llama3)." in out.read_text(encoding="utf-8")
    printed = loads(call("import", "model/config.json", "--json"))
    assert printed["family"] == "llama"
    assert printed["params"] == 8_030_261_248
    assert files.from_dict(printed["genome"]) == files.load(out)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "config.json: cannot be read: No such file or directory"),
        ("{", "config.json: line 1, column 2: not JSON"),
        ("[]", "config.json: a configuration is a mapping, not a list"),
        ('{"model_type": "bert"}', "config.json: model_type 'bert' is not read"),
        ('{"model_type": ["llama"]}', "config.json: model_type is a list; it is one of"),
        ("[" * 100_000, "config.json: it is nested too deep, or a number has too many digits"),
        (f'{{"model_type": "llama", "rope_theta": {10**400}}}', "a number in it is larger than"),
    ],
)
def test_a_bad_file_is_one_line(
    text: str | None, sentence: str, tmp_path: Path, call: Call
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    code, out, err = call("import", ".", "--out", "genome.yaml")
    assert code == 2
    assert sentence in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "genome.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-2-7b"]), encoding="utf-8")
    (tmp_path / "genome.yaml").write_text("mine", encoding="utf-8")
    code, _, err = call("import", ".", "--out", "genome.yaml")
    assert code == 2
    assert "exists already" in err
    assert (tmp_path / "genome.yaml").read_text(encoding="utf-8") == "mine"
