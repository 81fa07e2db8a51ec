"""How a model is trained: optimiser, schedule, precision. One recipe for every task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from .task import ProxyError


class TrainConfig(BaseModel):
    """The training recipe.

    AdamW (arXiv 1711.05101); linear warm-up, then a cosine to `min_lr` at the last step of the
    whole training; the gradient's norm is clipped. Weight decay acts on parameters with two or more
    axes, embeddings included, and not on norms, biases and per-channel vectors, as in nanoGPT.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float | tuple[float, ...] = Field(
        default=3e-3, description="peak learning rate, or a list to choose from (see `grid`)"
    )
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate of the last step")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled, times the learning rate")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="AdamW's averaging of moments"
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="part of the steps in linear warm-up"
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16 is autocast; auto is bf16 on CUDA devices that have it, else fp32",
    )
    compile: bool = Field(
        default=False, description="use torch.compile (needs a C++ compiler on a CPU)"
    )
    grid: float = Field(
        default=0.1, gt=0, le=1, description="part of the steps that each lr of a list is tried for"
    )
    eval_every: int = Field(
        default=0, ge=0, description="steps between evaluations in the curve; 0: none"
    )

    @field_validator("lr")
    @classmethod
    def _positive(cls, lr: float | tuple[float, ...]) -> float | tuple[float, ...]:
        rates = lr if isinstance(lr, tuple) else (lr,)
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ValueError("lr is a number above 0, or a list of them")
        if len(set(rates)) < len(rates):
            raise ValueError("lr lists a learning rate twice")
        return lr

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("betas are two numbers from 0 to below 1")
        return betas

    @model_validator(mode="after")
    def _order(self) -> TrainConfig:
        if self.min_lr > min(self.rates()):
            raise ValueError(f"min_lr ({self.min_lr:g}) is above lr ({min(self.rates()):g})")
        return self

    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from, one or several."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)


def learning_rate(config: TrainConfig, peak: float, step: int, steps: int) -> float:
    """The rate of a step, counted from 0, in a training of `steps`.

    Warm-up reaches `peak` at its last step; the cosine begins at `peak` and ends at `min_lr` at
    step `steps - 1`.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    span = steps - 1 - warmup
    done = 1.0 if span <= 0 else min(1.0, (step - warmup) / span)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on parameters of two or more axes; its learning rate is set per step."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One fused kernel: for models this small the loop over parameters costs more than the update.
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=config.betas, eps=1e-8, fused=True
    )


def resolve_dtype(dtype: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The dtype of matrix products on that device.

    Raises ProxyError where bf16 is asked for and the device would only emulate it.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == "bf16" and not native:
        raise ProxyError(f"dtype: {device} has no native bf16; use fp32 or auto")
    if dtype == "bf16" or (dtype == "auto" and native and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype`; nothing at all for float32, which costs time on small models."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
