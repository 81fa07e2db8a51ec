"""Is an exported model the model that was trained? The checks of the format `hf`.

The model is loaded as anybody loads it, by transformers and its own code, and compared with the
logits that were stored at the export and with Mendel's own model of the same genome and weights.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...genome.build import build
from ...genome.check import EXACT, TOLERANCE
from ...genome.cost import cost
from ...genome.encoded import encode
from ...genome.files import to_dict
from ...genome.model import LanguageModel
from ...genome.notation import parse
from ...genome.resolve import blueprint
from ..terminal import Mistake
from .drift import Failed, Skipped, differs, same_code
from .hf import AUTO_MAP, PREFIX, REFERENCE, WEIGHTS
from .proof import files_of
from .verify import Check

LARGEST = 300_000_000
"""Parameters of the largest model without weights that is built to be checked."""

LENGTH = 24
"""Tokens of the sequences that are decoded step by step."""

NEEDED = (
    "to verify a model needs transformers: pip install 'mendel[hf]' (or pip install transformers)"
)


def transformers() -> Any:
    """The package, quiet, with the code of models in a place that vanishes. Raises Mistake."""
    if "HF_MODULES_CACHE" not in os.environ:
        place = tempfile.mkdtemp(prefix="mendel-verify-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ["HF_MODULES_CACHE"] = place
    try:
        import transformers as package
    except ImportError:
        raise Mistake(NEEDED) from None
    package.logging.disable_progress_bar()
    package.logging.set_verbosity_error()
    return package


class Exported:
    """A folder's model, made when a check first asks for it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder.resolve()
        self.facts = facts
        self.genome = parse(facts["genome"]["notation"])
        self.package = transformers()

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return found

    @cached_property
    def tensors(self) -> dict[str, Tensor] | None:
        """What the file of weights holds; None where there is none."""
        path = self.folder / WEIGHTS
        return load_file(path) if path.exists() else None

    @cached_property
    def fresh(self) -> LanguageModel:
        """Mendel's model of the genome, with weights of seed 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(self.genome, self.config["vocab_size"])

    @cached_property
    def own(self) -> LanguageModel:
        """Mendel's model with the folder's weights, or its fresh ones."""
        if self.tensors is not None:
            tensors = {k.removeprefix(PREFIX): t for k, t in self.tensors.items()}
            self.fresh.load_state_dict(tensors)
        return self.fresh.eval()

    @cached_property
    def model(self) -> Any:
        """The model of the folder's own code."""
        return self.load()

    @cached_property
    def exact(self) -> Any:
        """The same in float64, where two forms of one function agree however they round."""
        return copy.deepcopy(self.model).to(torch.float64)

    def load(self, folder: Path | None = None) -> Any:
        """From a folder, or this one, as anybody does it; without weights fresh ones of seed 0."""
        auto = self.package.AutoModelForCausalLM
        if self.tensors is not None or folder is not None:
            place = str(folder or self.folder)
            return auto.from_pretrained(place, trust_remote_code=True, dtype=torch.float32).eval()
        config = self.package.AutoConfig.from_pretrained(str(self.folder), trust_remote_code=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(config, trust_remote_code=True)
        return model.eval()

    def tokens(self, rows: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config["vocab_size"], (rows, length), generator=generator)


def checks(folder: Path, facts: dict[str, Any]) -> list[Check]:
    """The checks of a model in the order in which one stands on another. Raises Mistake."""
    it = Exported(folder, facts)
    first = [
        Check("config", lambda: _config(it), gate=True),
        Check("code", lambda: same_code(it.folder, it.genome, facts)),
        Check("weights", lambda: _weights(it), gate=True),
    ]
    params = cost(it.genome).total.params
    if params > LARGEST and not (folder / WEIGHTS).exists():
        return [*first, Check("load", lambda: _too_large(params))]
    return [
        *first,
        Check("load", lambda: _load(it), gate=True),
        Check("logits", lambda: _logits(it)),
        Check("cache", lambda: _cache(it)),
        Check("generation", lambda: _generation(it)),
        Check("padding", lambda: _padding(it)),
        Check("tied", lambda: _tied(it)),
        Check("gradients", lambda: _gradients(it)),
        Check("save", lambda: _save(it)),
        Check("tokenizer", lambda: _tokenizer(it)),
    ]


def _too_large(params: int) -> str:
    raise Skipped(f"{params:,} parameters without weights are not built to be checked")


def _config(it: Exported) -> str:
    """config.json is what the genome's blueprint says."""
    if it.config.get("genome") != to_dict(it.genome):
        raise Failed("config.json holds another genome")
    if it.config.get("auto_map") != AUTO_MAP:
        raise Failed("config.json names other code than the folder's")
    if it.config.get("blueprint") != json.loads(json.dumps(encode(blueprint(it.genome)))):
        differs("the blueprint in config.json is not the genome's in this version", it.facts)
    return "the blueprint is the genome's"


def _weights(it: Exported) -> str:
    """The file has the weights of the genome's model, all, finite and each once."""
    if it.tensors is None:
        raise Skipped("there are no weights: a model that is built has fresh ones")
    shapes = {PREFIX + k: t.shape for k, t in it.fresh.state_dict().items()}
    found = {k: t.shape for k, t in it.tensors.items()}
    if shapes != found:
        odd = sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k))
        raise Failed(f"{WEIGHTS} does not fit the genome: {odd[0]}")
    broken = [k for k, t in it.tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise Failed(f"{WEIGHTS} holds numbers that are not finite: {broken[0]}")
    return f"{len(found)} tensors fit the genome"


def _load(it: Exported) -> str:
    """transformers loads the model, with these weights and no others."""
    state = it.model.state_dict()
    for name, tensor in (it.tensors or {}).items():
        if not torch.equal(state[name], tensor):
            raise Failed(f"after loading {name} is not what {WEIGHTS} holds")
    return f"loaded by transformers {it.package.__version__}"


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the scale of what was wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


def _require(found: Tensor, wanted: Tensor, most: float, what: str) -> float:
    difference = _difference(found, wanted)
    # Written so that nan fails.
    if not difference <= most:
        raise Failed(f"{what} differs by {difference:.1e} of the logits' scale, at most {most:.0e}")
    return difference


@torch.no_grad()
def _logits(it: Exported) -> str:
    """The logits are the trained model's."""
    x = it.tokens()
    same = _require(it.model(x, use_cache=False).logits, it.own(x)[0], TOLERANCE, "Mendel's model")
    if it.tensors is None:
        return f"within {same:.1e} of Mendel's model with the same fresh weights"
    stored = load_file(it.folder / REFERENCE)
    logits = it.model(stored["tokens"], use_cache=False).logits
    was = _require(logits, stored["logits"], TOLERANCE, "the trained model")
    return f"within {was:.1e} of the trained model's, {same:.1e} of Mendel's"


@torch.no_grad()
def _cache(it: Exported) -> str:
    """Decoding token by token gives what the whole sequence gives."""
    x = it.tokens()
    cache, steps = None, []
    for token in torch.split(x, 1, 1):
        out = it.exact(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    whole = it.exact(x, use_cache=False).logits
    found = _require(torch.cat(steps, 1), whole, EXACT, "decoding with the cache")
    return f"within {found:.1e} in float64 over {x.shape[1]} steps"


def _generation(it: Exported) -> str:
    """`generate` gives the same tokens with and without a cache, greedy and with beams."""
    x = it.tokens(2, 8)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    for beams in (1, 2):
        found = [
            it.exact.generate(
                x,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                num_beams=beams,
                use_cache=use_cache,
                eos_token_id=None,
                pad_token_id=0,
            )
            for use_cache in (True, False)
        ]
        if not torch.equal(*found):
            raise Failed(f"generation with {beams} beams gives other tokens without the cache")
    return "greedy and with beams, with and without the cache"


@torch.no_grad()
def _padding(it: Exported) -> str:
    """A row with padding gives what it gives alone."""
    x = it.tokens(3, 16)
    starts = (0, 5, 9)
    mask = torch.ones_like(x)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    most = 0.0
    for use_cache in (True, False):
        logits = it.exact(x, attention_mask=mask, use_cache=use_cache).logits
        for row, start in enumerate(starts):
            alone = it.exact(x[row : row + 1, start:], use_cache=False).logits
            words = f"row {row} with {start} columns of padding"
            most = max(most, _require(logits[row : row + 1, start:], alone, EXACT, words))
    mask = torch.ones_like(x)
    mask[0, 4] = 0
    try:
        it.exact(x, attention_mask=mask)
    except ValueError:
        return f"within {most:.1e} in float64; a hidden token between others is refused"
    raise Failed("a mask that hides a token between others was taken")


def _tied(it: Exported) -> str:
    """Tables that are one stand once, and shared operators too."""
    head, table = it.model.get_output_embeddings(), it.model.get_input_embeddings()
    if it.genome.tied != (head is None):
        raise Failed(f"the genome's tables are {'' if it.genome.tied else 'not '}tied")
    if head is not None and head.weight.data_ptr() == table.weight.data_ptr():
        raise Failed("head and embedding are one tensor, and the genome has two")
    counted = cost(replace(it.genome, vocab=it.config["vocab_size"])).total.params
    found = sum(p.numel() for p in it.model.parameters())
    if counted != found:
        raise Failed(f"{found:,} parameters; the genome has {counted:,}, shared ones counted once")
    return f"{found:,} parameters, shared ones once; tables {'tied' if head is None else 'apart'}"


def _gradients(it: Exported) -> str:
    """Labels give a loss, and the loss gradients."""
    x = it.tokens()
    model = copy.deepcopy(it.model).train()
    out = model(x, labels=x)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    out.loss.backward()
    if not bool(out.loss.isfinite()) or float(out.loss.detach()) < float(plain.detach()) - 1e-4:
        raise Failed(f"the loss is {float(out.loss.detach())}, the logits' {float(plain.detach())}")
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or not all(bool(g.isfinite().all()) for g in grads):
        raise Failed("a gradient is not finite")
    model.after_step()
    return f"loss {float(out.loss.detach()):.4f}"


@torch.no_grad()
def _save(it: Exported) -> str:
    """Saved by transformers and loaded again the model is the same, bit for bit."""
    with tempfile.TemporaryDirectory(prefix="mendel-saved-") as scratch:
        place = Path(scratch) / it.folder.name
        it.model.save_pretrained(place)
        for path in files_of(it.folder):
            saved = place / path.name
            if path.suffix == ".py" and saved.read_bytes() != path.read_bytes():
                raise Failed(f"{path.name} was not saved as it is")
        again = it.load(folder=place)
    state = it.model.state_dict()
    if state.keys() != again.state_dict().keys():
        raise Failed("saved and loaded again, the model has other weights")
    for name, tensor in again.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise Failed(f"{name} is not the same after saving and loading")
    # Copies, because products round differently where tensors lie as a file has them: not aligned.
    x = it.tokens()
    found = [copy.deepcopy(model)(x, use_cache=False).logits for model in (it.model, again)]
    if not torch.equal(*found):
        raise Failed("the logits are not the same after saving and loading")
    return "the same, bit for bit"


TEXT = "Text: déjà vu, 日本語, \N{GRINNING FACE}\n\t\0end"


def _tokenizer(it: Exported) -> str:
    """Text becomes its bytes and comes back."""
    if not (it.folder / "tokenizer.json").exists():
        raise Skipped("the alphabet is no text, so there is no tokenizer")
    tokenizer = it.package.AutoTokenizer.from_pretrained(str(it.folder), trust_remote_code=True)
    ids = tokenizer(TEXT).input_ids
    if ids != list(TEXT.encode()) or tokenizer.decode(ids) != TEXT:
        raise Failed("text does not become its bytes and come back")
    return "text becomes its bytes and comes back"
