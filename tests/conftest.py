"""Shapes are checked in every test: jaxtyping wraps the typed functions as they are imported."""

import torch
from jaxtyping import install_import_hook

# An int is a float here, as type checkers take it (PEP 484).
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

install_import_hook(["mendel.kernels", "mendel.primitives"], CHECKER)
torch.set_num_threads(1)
