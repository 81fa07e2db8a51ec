"""Shapes are checked in every test: jaxtyping wraps the typed functions as they are imported."""

import os
import tempfile

import torch
from jaxtyping import install_import_hook

# An int is a float here, as type checkers take it (PEP 484).
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

# Code of exported models is copied there when transformers loads it; and nothing asks a hub.
_MODULES = tempfile.TemporaryDirectory(prefix="mendel-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"

# torch lists the functions that make tensors at the first `with torch.device(...)` of a process;
# transformers replaces torch.linspace while it builds a model, and a list taken then lacks the real
# one (torch 2.13 and transformers 5.23; until transformers leaves torch.linspace alone).
with torch.device("meta"):
    torch.empty(0)

install_import_hook(["mendel.kernels", "mendel.primitives"], CHECKER)
torch.set_num_threads(1)
