"""Shapes are checked in every test: jaxtyping wraps the typed functions as they are imported."""

import torch
from jaxtyping import install_import_hook

install_import_hook(["mendel.kernels", "mendel.primitives"], "beartype.beartype")
torch.set_num_threads(1)
