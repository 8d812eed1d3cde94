"""GGUF files, the format of llama.cpp, as models: read by transformers, which unpacks quantised weights (extra `gguf`).

The weights become the numbers that the file's blocks stand for, in the dtype that is asked for; nothing of the
quantisation remains. Configuration and tokenizer come from the file's header.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from producer.lm.errors import ModelError

SUFFIX = ".gguf"


def gguf_options(path: Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers takes for the GGUF file `path`: (folder, options).

    Raises ModelError without the packages of the extra `gguf`.
    """
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(
            f"model.name = {str(path)!r}: GGUF files need the package {' and '.join(missing)}; "
            'pip install "sluice-sae[gguf]"'
        )
    return str(path.parent), {"gguf_file": path.name}


def drop_quantization(network: Any) -> None:
    """Takes the quantisation out of the configuration of a network whose weights transformers has unpacked.

    With it, `save_pretrained` refuses, and the fingerprint would name the file.
    """
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.is_quantized = False
    network.hf_quantizer = None


def save_as_folder(path: Path, folder: Path) -> None:
    """Writes the language model of the GGUF file `path` into `folder`, with its tokenizer, in float32.

    Progress goes to stderr where that is a terminal. Raises ModelError without the packages of the extra `gguf`.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    source, options = gguf_options(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    drop_quantization(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
