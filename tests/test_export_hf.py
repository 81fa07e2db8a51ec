"""Exported models: the same function where Mendel is not, with a cache, padding, loss, saving."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import load, trained
from small_study import write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mendel.genome.build import build
from mendel.genome.notation import parse
from mendel.search.driver import search
from mendel.search.exports.folder import export
from mendel.search.exports.order import Order
from mendel.search.exports.verify import verify
from mendel.search.exports.weights import find
from mendel.search.source import find_genome
from mendel.search.terminal import Mistake

STRANGER = Path(__file__).parent / "stranger.py"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("training") / "small", seeds=2)


@pytest.fixture(scope="module")
def folder(training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    order = Order(find_genome(str(training)))
    return export(order, tmp_path_factory.mktemp("out") / "model", "hf")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def own(training: Path) -> Any:
    """The trained model in Mendel."""
    source = find_genome(str(training))
    weights = find(Order(source))
    assert weights is not None
    return weights.model(source.genome)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_stranger_uses_it(folder: Path, tmp_path: Path, own: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-I", str(STRANGER), str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    with torch.no_grad():
        close(torch.tensor(found.pop("logits")), own(tokens(2, 9))[0][:, -1])
    assert found == dict.fromkeys(found, True)


@torch.no_grad()
def test_logits_are_mendel_s(model: Any, own: Any) -> None:
    x = tokens(3, 21)
    assert torch.equal(model(x, use_cache=False).logits, own(x)[0])


@torch.no_grad()
def test_the_cache_goes_on_beyond_its_room(model: Any, own: Any) -> None:
    # 64 tokens of room, so that it is made anew on the way.
    x = tokens(2, 75)
    cache, pieces = None, []
    for piece in x.split([5, *[1] * 10, 30, *[1] * 30], 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert cache is not None
    assert cache.get_seq_length() == 75
    assert cache.room == 128
    close(torch.cat(pieces, 1), own(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_with_padding_give_what_they_give_alone(model: Any, own: Any, use_cache: bool) -> None:
    x = tokens(4, 20)
    mask = torch.ones_like(x)
    starts = [0, 7, 7, 19]
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    x[mask == 0] = 10**6
    logits = model(x, attention_mask=mask, use_cache=use_cache).logits
    for row, start in enumerate(starts):
        close(logits[row, start:], own(x[row : row + 1, start:])[0][0])


@torch.no_grad()
def test_padding_to_the_right_needs_no_cache(model: Any, own: Any) -> None:
    x = tokens(2, 12)
    mask = torch.ones_like(x)
    mask[1, 8:] = 0
    logits = model(x, attention_mask=mask, use_cache=False).logits
    close(logits[1, :8], own(x[1:, :8])[0][0])
    with pytest.raises(ValueError, match="pad to the left"):
        model(x, attention_mask=mask)


def test_masks_that_cannot_be_met_are_refused(model: Any) -> None:
    x = tokens(2, 6)
    for change, words in (
        ((0, 3), "between two tokens"),
        ((0, slice(None)), "a whole row"),
    ):
        mask = torch.ones_like(x)
        mask[change] = 0
        with pytest.raises(ValueError, match=words):
            model(x, attention_mask=mask)
    with pytest.raises(ValueError, match="6 columns"):
        model(x, attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_with_and_without_a_cache(model: Any, how: dict[str, Any]) -> None:
    x = tokens(3, 9)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(
            model.generate(
                x,
                attention_mask=mask,
                max_new_tokens=12,
                use_cache=use_cache,
                eos_token_id=7,
                pad_token_id=0,
                **how,
            )
        )
    assert torch.equal(*found)


def test_generation_follows_the_logits(model: Any, own: Any) -> None:
    x = tokens(1, 5)
    found = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        x = torch.cat([x, own(x)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(found, x)


def test_the_loss_is_shifted_and_ignores(model: Any) -> None:
    x = tokens(2, 8)
    labels = x.clone()
    labels[0, 5:] = -100
    out = model(x, labels=labels)
    kept = labels[:, 1:] != -100
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1][kept], labels[:, 1:][kept])
    torch.testing.assert_close(out.loss, wanted)
    assert out.past_key_values is None


def test_training_adds_what_operators_add(tmp_path: Path) -> None:
    genome = "{width=16} moh(heads=8) > swiglu"
    folder = export(Order(find_genome(genome)), tmp_path / "out", "hf")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.manual_seed(0)
    own = build(parse(genome))
    x = tokens(2, 16)
    plain = model.eval()(x, labels=x).loss
    learnt = model.train()(x, labels=x).loss
    own.train()(x)
    extra = own.auxiliary_loss()
    assert extra is not None
    assert float(extra.detach()) > 0
    torch.testing.assert_close(learnt, plain + extra)


def test_saved_again_it_is_the_same(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    x = tokens(2, 8)
    assert torch.equal(copy.deepcopy(model)(x).logits, copy.deepcopy(again)(x).logits)


FORMS = {
    "alibi": "{width=16, position=alibi} mha(heads=2) > gelu-mlp",
    "sinusoidal": "{width=16, position=sinusoidal, norm=layernorm} mha(heads=2) > gelu-mlp",
    "learned": "{width=16, position=learned, norm=dyt} mha(heads=2) > swiglu",
    "ngpt": "{width=16, residual=ngpt} mha(heads=2) > swiglu",
    "reversible": "{width=16, residual=reversible} mamba2(key_dim=8) > moe(experts=4)",
    "windows": "{width=16, placement=post} swa(heads=2, window=4) > rg-lru > mqa(heads=2)",
    "some tokens": "{width=16} [mha(heads=2) | s4d](join=top1, tokens=0.5) > [swiglu](tokens=0.3)",
    "latent": "{width=16, norm=none} mla(heads=2) > gated-deltanet(heads=2) > kan",
    "long": "{width=16} hyena(length=64) > s4d > rwkv7(heads=2) > mega",
    "choice": "{width=16} routing-attention(heads=2, window=8) > lstm > ttt-linear(heads=2)",
    "depth": (
        "{width=16} [mha(heads=2) | gru](join=top1) > [mqa(heads=2)](tokens=0.5) > swiglu > "
        "[gru](tokens=0.3)"
    ),
    "routers": "{width=16} gru > hash-layer(experts=4) > moe++(experts=4) > noisy-top-k(experts=4)",
}


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_every_form_survives(name: str, tmp_path: Path) -> None:
    """Constants, buffers and states of all kinds, through loading without memory."""
    genome = parse(FORMS[name])
    folder = export(Order(find_genome(FORMS[name])), tmp_path / name, "hf")
    torch.manual_seed(3)
    own = build(genome).eval()
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    fresh.save_pretrained(folder)
    model = load(folder)
    x = tokens(2, 11)
    wanted = own(x)[0]
    # A copy, because products round otherwise where a file's tensors lie, which nothing aligns.
    assert torch.equal(copy.deepcopy(model)(x, use_cache=False).logits, wanted)
    buffers = dict(own.named_buffers())
    assert all(torch.equal(model.model.get_buffer(k), v) for k, v in buffers.items())
    cache = model(x[:, :4], use_cache=True).past_key_values
    rest = [
        model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(4, 11)
    ]
    close(torch.cat(rest, 1), wanted[:, 4:])
    turned = model(x[:, :4], use_cache=True).past_key_values
    turned.reorder_cache(torch.tensor([1, 1]))
    x[0, :4] = x[1, :4]
    rest = [
        model(part, past_key_values=turned, use_cache=True).logits for part in x[:, 4:].split(3, 1)
    ]
    close(torch.cat(rest, 1), own(x)[0][:, 4:])
    half = load(folder, dtype=torch.bfloat16)
    torch.testing.assert_close(
        half(x, use_cache=False).logits, own.to(torch.bfloat16)(x)[0], rtol=0, atol=0
    )


def test_two_models_of_one_name_keep_their_code(tmp_path: Path) -> None:
    """transformers tells them apart by the files that the configuration names."""
    for place, genome in (("a", "{width=16} mha(heads=2)"), ("b", "{width=16} s4d > kan")):
        folder = export(Order(find_genome(genome)), tmp_path / place / "model", "hf")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        own = build(parse(genome))
        assert model.model.state_dict().keys() == own.state_dict().keys()


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    del weights["model.embedding.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the weights lack weight of a Embedding"):
        load(copy)


def test_the_folder_tells_whose_weights_it_holds(folder: Path) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    weights = facts["weights"]
    assert (weights["of"], weights["seed"], weights["step"]) == ("seed-0", 0, 4)
    assert weights["tokens"] == 4 * 4 * 16
    assert weights["data"]["corpus_fingerprint"]["sha256"]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["seeds"] == [0, 1]
    assert scores["summary"]["score"]["std"] is not None
    assert all(row["device"].startswith("cpu") for row in scores["trainings"])
    card = (folder / "README.md").read_text()
    assert "not a language model" in card
    assert "after_step" in card
    assert "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in card


def test_another_seed_is_asked_for(training: Path, tmp_path: Path) -> None:
    source = find_genome(str(training))
    out = export(Order(source, seed=1), tmp_path / "one", "hf")
    assert json.loads((out / "provenance.json").read_text())["weights"]["seed"] == 1


def test_a_trial_s_weights_by_proxy(tmp_path: Path) -> None:
    recall = {"task": "in-context-recall", "steps": 4, "batch": 4, "length": 16}
    recall |= {"train_examples": 32, "test_examples": 16}
    study = write(tmp_path, proxies__recall=recall, search__trials=1, baselines=["mamba2"])
    run = search(study)
    source = find_genome(f"{run.folder}:0")
    text = export(Order(source), tmp_path / "text", "hf")
    facts = json.loads((text / "provenance.json").read_text())
    assert facts["weights"]["of"] == "text"
    assert facts["weights"]["vocab"] == 256
    assert facts["run"]["proxies"]["text"]["corpus_fingerprint"]["sha256"]
    assert "device" in facts["run"]
    other = export(Order(source, proxy="recall"), tmp_path / "recall", "hf")
    facts = json.loads((other / "provenance.json").read_text())
    assert (facts["weights"]["of"], facts["weights"]["vocab"]) == ("recall", 16)
    model = load(other)
    assert model.config.vocab_size == 16
    costs = json.loads((other / "costs.json").read_text())
    assert (costs["vocab"], costs["params"]) == (16, sum(p.numel() for p in model.parameters()))
    assert "| vocabulary | 16 tokens |" in (other / "README.md").read_text()
    assert {r.state for r in verify(other)} == {"passed", "skipped"}
    with pytest.raises(Mistake, match="keeps no weights of speed; there are those of recall, text"):
        export(Order(source, proxy="speed"), tmp_path / "speed", "hf")
    with pytest.raises(Mistake, match="--proxy and --seed choose weights: for --format hf"):
        export(Order(source, proxy="text"), tmp_path / "speed")


def test_a_task_without_text_has_no_tokenizer(tmp_path: Path) -> None:
    training = trained(tmp_path / "recall", "{width=16} mha(heads=2)", "in-context-recall")
    folder = export(Order(find_genome(str(training))), tmp_path / "out", "hf")
    assert not (folder / "tokenizer.json").exists()
    assert "There is no tokenizer" in (folder / "README.md").read_text()
    assert load(folder).generation_config.eos_token_id is None


def test_a_design_alone_claims_no_training_and_no_text(tmp_path: Path) -> None:
    folder = export(
        Order(find_genome("{width=16, vocab=500} mha(heads=2)")), tmp_path / "out", "hf"
    )
    card = (folder / "README.md").read_text()
    assert "nothing was trained" in card
    assert "Trained on proxies" not in card
    assert "the model has 500 tokens" in card
    assert "model's task" not in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: Order(s, seed=7), "keeps no weights of seed-7; there are those of seed-0"),
        (lambda s: Order(s, proxy="text"), "--proxy chooses among the proxies of a trial"),
        (lambda _: Order(find_genome("mamba2"), seed=0), "--seed chooses among the seeds"),
        (lambda _: Order(find_genome("bilstm")), "--format hf is for causal language models"),
    ],
)
def test_orders_that_cannot_be_met(
    training: Path, tmp_path: Path, change: Callable[[Any], Order], words: str
) -> None:
    with pytest.raises(Mistake, match=re.escape(words)):
        export(change(find_genome(str(training))), tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_design_do_not_fit(training: Path, tmp_path: Path) -> None:
    plan = json.loads((training / "plan.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    plan["genome"]["norm"] = "layernorm"
    (other / "plan.json").write_text(json.dumps(plan))
    (other / "seed-0").symlink_to(training / "seed-0")
    with pytest.raises(Mistake, match="weights of another design"):
        export(Order(find_genome(str(other))), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
