"""ModelError, and the sentences about activations that are not finite."""

from __future__ import annotations

import torch


class ModelError(ValueError):
    """The language model cannot be used as asked. `str(error)` is the whole message for the operator."""


class NoBlocksError(ModelError):
    """The language model has no chain of blocks."""


def non_finite_message(model: str, dtype: str) -> str:
    """The sentence about NaN or infinite activations of `model`, which ran in `dtype`: "float16", "bfloat16", …"""
    if dtype == "float16":
        return (
            f"the activations of {model} overflow in model.dtype = 'float16', whose largest number is 65504; set "
            'model.dtype = "bfloat16" or "float32"'
        )
    advice = "" if dtype == "float32" else ', or set model.dtype = "float32"'
    return f"{model} gives NaN or infinity here in {dtype}; use a checkpoint whose weights are sound{advice}"


def non_finite_hook_message(hook: str, model: str, dtype: torch.dtype) -> str:
    """The sentence about NaN or infinite activations at one hook of the settings."""
    return f"model.hooks = {hook!r}: {non_finite_message(model, str(dtype).removeprefix('torch.'))}"
