"""Tiny random models of many architectures, in fp32 on the CPU, and what transformers alone gives for them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig

from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import ModelSettings

WORDS = 60
LAYERS = 4
WIDTH = 32
CONTEXT = 12

SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": WIDTH,
    "sliding_window": 4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
"""One size for all; a configuration keeps what it has no use for."""

BLOCKS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox sequential": "gpt_neox.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "mamba": "backbone.layers",
    "bert": "bert.encoder.layer",
    "modernbert": "model.layers",
}
"""Where each architecture keeps its blocks, as its authors named them."""

MIDDLES = {
    "gpt2": ("ln_2", "mlp"),
    "llama": ("post_attention_layernorm", "mlp"),
    "gpt_neox sequential": ("post_attention_layernorm", "mlp"),
    "gemma2": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "qwen2": ("post_attention_layernorm", "mlp"),
    "qwen3": ("post_attention_layernorm", "mlp"),
    "opt": ("final_layer_norm", "fc2"),
    "bloom": ("post_attention_layernorm", "mlp.dense_4h_to_h"),
    "modernbert": ("mlp_norm", "mlp"),
}
"""Where in a sequential block the middle of the residual stream goes in, and where the MLP's contribution comes out."""

OVERRIDES = {
    "gpt_neox sequential": {"use_parallel_residual": False},
    "bert": {"is_decoder": False},
    "bert decoder": {"is_decoder": True},
    "opt post-norm": {"do_layer_norm_before": False},
    "mpt": {"d_model": WIDTH, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 32},
    "whisper": {"d_model": WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": 2, "max_target_positions": 32},
}
UNWANTED = {
    "falcon": {"head_dim"},
    "mamba": {"intermediate_size", "max_position_embeddings"},
    "mpt": {"max_position_embeddings"},
}


MODELS = tempfile.TemporaryDirectory()
"""Where `tiny` keeps its models until the process ends."""


@cache
def tiny(architecture: str) -> Path:
    """Folder of a random model and its tokenizer, the same at every call: tiny("llama")."""
    torch.set_num_threads(1)  # these models are far too small for two
    folder = Path(MODELS.name) / architecture.replace(" ", "_")
    folder.mkdir()
    save_model(architecture, folder)
    save_tokenizer(folder)
    return folder


def save_model(architecture: str, folder: Path) -> None:
    kind = architecture.split(" ")[0]
    sizes = {key: value for key, value in SIZES.items() if key not in UNWANTED.get(kind, ())}
    config = AutoConfig.for_model(kind, **(sizes | OVERRIDES.get(architecture, {})))
    torch.manual_seed(0)
    network = whole_class(architecture).from_config(config)
    for name, parameter in network.named_parameters():
        # Fresh ones are all 1 or 0, which would hide mistakes.
        if any(part in name.lower() for part in ("norm", "ln_", "bias")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    network.save_pretrained(folder)


def save_tokenizer(folder: Path, words: int = WORDS) -> None:
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def whole_class(architecture: str) -> Any:
    encoder = architecture in ("bert", "modernbert", "albert", "fnet", "convbert", "xlm-roberta")
    return transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM


def whole_model(architecture: str, folder: Path) -> nn.Module:
    """The model as transformers alone loads it."""
    return whole_class(architecture).from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path | str, *hooks: str, whole: bool = False, **settings) -> LanguageModel:
    return load_language_model(
        ModelSettings(**{"name": str(folder), "hooks": list(hooks), "device": "cpu", "dtype": "float32", **settings}),
        whole=whole,
    )


def windows(count: int = 3, context: int = CONTEXT) -> Tensor:
    return torch.randint(4, WORDS, (count, context), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def observe(
    network: nn.Module, tokens: Tensor, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Any]:
    """Runs the whole model; returns inputs of modules (`inputs`) and outputs (`outputs`) by path, and its result."""
    tensors: dict[str, Tensor] = {}

    def record_input(path: str, module: nn.Module, args: tuple) -> None:
        tensors[path] = args[0].clone()

    def record_output(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        tensors[path] = (output[0] if isinstance(output, tuple) else output).clone()

    find = network.get_submodule
    handles = [find(path).register_forward_pre_hook(partial(record_input, path)) for path in inputs]
    handles += [find(path).register_forward_hook(partial(record_output, path)) for path in outputs]
    result = network(input_ids=tokens, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return tensors, result


def refusal(folder: Path | str, *hooks: str, whole: bool = False, **settings) -> str:
    with pytest.raises(ModelError) as error:
        load(folder, *(hooks or ("blocks.0.hook_resid_post",)), whole=whole, **settings)
    return str(error.value)


def copy_of(folder: Path, to: Path, without: str = "") -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if not (without and file.name.startswith(without)):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def model_with_code(folder: Path, name: str, code: str) -> Path:
    """A copy of the tiny Llama whose class comes from a Python file beside it, as `trust_remote_code` allows."""
    copy_of(tiny("llama"), folder)
    (folder / f"{name.lower()}.py").write_text(code)
    change_config(
        folder,
        model_type=name.lower(),
        architectures=[f"{name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"{name.lower()}.{name}Config",
            "AutoModelForCausalLM": f"{name.lower()}.{name}ForCausalLM",
        },
    )
    return folder


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
