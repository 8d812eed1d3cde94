"""Quantised models: weights of 4 or 8 bits, by `model.load` or as the checkpoint has them, read by transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers

from producer.lm.errors import ModelError

PACKAGES = {
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "gptq": ("accelerate", "optimum", "gptqmodel"),
    "awq": ("accelerate", "gptqmodel"),
    "compressed-tensors": ("accelerate", "compressed_tensors"),
    "torchao": ("accelerate", "torchao"),
    "hqq": ("accelerate", "hqq"),
    "quanto": ("accelerate", "optimum.quanto"),
}
"""What transformers needs for each method; for another one, such as fp8, accelerate."""
EXTRA = ("accelerate", "bitsandbytes")
"""Packages of the extra `quantized`."""


def quantization_method(config: Any) -> str | None:
    """The method by which a checkpoint is quantised; None where it is not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method)).lower()


def quantization_options(
    setting: str, load: str | None, method: str | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Options of `from_pretrained` for a quantised model on one device; none for one that is not quantised.

    `load` is model.load, `method` what the checkpoint is quantised by. Raises ModelError, naming `setting`, where a
    package is absent or both are given.
    """
    if load is None and method is None:
        return {}
    if load is not None and method is not None:
        raise ModelError(f"{setting}: its checkpoint is quantised already ({method}); leave model.load out")
    packages = PACKAGES.get(method or "bitsandbytes", ("accelerate",))
    if missing := [name for name in packages if not _is_installed(name)]:
        command = 'sluice-sae[quantized]"' if set(missing) <= set(EXTRA) else " ".join(missing).replace("_", "-") + '"'
        raise ModelError(
            f"{setting}: weights quantised by {method or 'bitsandbytes'} need the package "
            f'{" and ".join(missing)}; pip install "{command}'
        )
    options: dict[str, Any] = {"device_map": {"": device}}
    if load == "4bit":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif load == "8bit":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return options


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package inside one that is absent
        return False
