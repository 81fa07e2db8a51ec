"""What somebody does with an exported model who has no Mendel: run alone, without the test suite.

stranger.py FOLDER SCRATCH prints JSON: logits, and what was seen to hold.
"""

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ABSENT = ("mendel", "jaxtyping", "beartype", "triton")
"""What this process is to find nowhere, though it may be installed."""


class Absent:
    """An import hook for which those packages do not exist."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def no_spec(name: str, package: str | None = None) -> ModuleSpec | None:
    """`importlib.util.find_spec`, which says None where the hook would raise."""
    return None if name.partition(".")[0] in ABSENT else FIND_SPEC(name, package)


FIND_SPEC = importlib.util.find_spec
importlib.util.find_spec = no_spec
sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]


def main(folder: Path, scratch: Path) -> None:
    os.environ["HF_MODULES_CACHE"] = str(scratch / "modules")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    seen = {}
    x = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x).logits[:, -1]
    text = "déjà vu\n"
    prompt = tokenizer([text, "a"], padding=True, return_tensors="pt")
    seen["text comes back"] = tokenizer.decode(prompt.input_ids[0]) == text
    runs = [
        model.generate(**prompt, max_new_tokens=8, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    seen["a cache changes nothing"] = torch.equal(*runs)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(float(loss))
    seen["every weight has a gradient"] = all(p.grad is not None for p in model.parameters())
    seen["it learns"] = losses[-1] < losses[0]
    model.eval().save_pretrained(scratch / "again")
    again = AutoModelForCausalLM.from_pretrained(scratch / "again", trust_remote_code=True)
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    seen["saved again it is the same"] = all(
        a == b and torch.equal(v, w) for (a, v), (b, w) in pairs
    )
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="bfloat16")
    seen["half precision"] = bool(half(x).logits.isfinite().all()) and half.dtype == torch.bfloat16
    seen["mendel stayed away"] = not any(m.partition(".")[0] == "mendel" for m in sys.modules)
    print(json.dumps({"logits": logits.tolist(), **seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
