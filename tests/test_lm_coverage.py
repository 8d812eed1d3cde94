"""Which hooks each architecture of transformers has, for all of which a tiny random configuration can be made.

    =   in some block, the activation is bit for bit that of plain transformers, and putting it back changes no logit
    .   refused with a sentence that says why: there is no such place
    -   refused likewise, though there is one: the rules do not find it. Gemma 3n and 4 normalise values, and Gemma 4
        scales the sum; where a block with experts scales it, their hidden layer is not one module's

The whole table runs with the proofs, some of it always. `python -m tests.test_lm_coverage` prints it.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from producer.lm.errors import ModelError
from producer.lm.hooks import HookPoint, module_input, module_output
from producer.lm.locations import BLOCK_KINDS, EMBED, FINAL_NORM
from producer.lm.model import LanguageModel
from tests.small_language_models import LAYERS, SIZES, WIDTH, load, save_tokenizer, windows

HEAD = "attn.hook_z[1]"
KINDS = (EMBED, *BLOCK_KINDS, HEAD, FINAL_NORM)

# From KINDS' left to right: embed, resid_pre, resid_post, attn_out, resid_mid, mlp_in, hook_post, mlp_out, q, k, v, z,
# one head of z, final norm; then whether the model predicts the next token (CE is measured) with an unembedding.
TABLE = {
    "gpt2": "================",
    "gemma": "================",
    "gemma2": "================",
    "gemma3_text": "================",
    "gemma3": "================",
    "gemma3n_text": "=.......-----.==",
    "gemma4_text": "===---=------===",
    "llama": "================",
    "mistral": "================",
    "ministral3": "================",
    "qwen2": "================",
    "qwen3": "================",
    "qwen3_5_text": "================",
    "phi": "====.===========",
    "phi3": "================",
    "olmo": "================",
    "olmo2": "================",
    "olmo3": "================",
    "gpt_neox": "====.===========",
    "gpt_neox sequential": "================",
    "gptj": "====.===========",
    "gpt_neo": "================",
    "opt": "================",
    "bloom": "================",
    "falcon": "====.===========",
    "falcon new": "====.===========",
    "mpt": "================",
    "stablelm": "================",
    "starcoder2": "================",
    "smollm3": "================",
    "granite": "================",
    "cohere": "====.===========",
    "cohere2": "====.===========",
    "nemotron": "================",
    "exaone4": "================",
    "glm4": "================",
    "mixtral": "======.=========",
    "gpt_oss": "======.=========",
    "qwen2_moe": "======.=========",
    "qwen3_moe": "======.=========",
    "olmoe": "======.=========",
    "phimoe": "======.=========",
    "deepseek_v2": "=========.======",
    "deepseek_v3": "=========.======",
    "glm4_moe": "================",
    "llama4_text": "======.=========",
    "mamba": "===..........===",
    "mamba2": "===..........===",
    "falcon_mamba": "===..........===",
    "recurrent_gemma": "================",
    "rwkv": "========.....===",
    "jamba": "================",
    "granitemoehybrid": "===...-.========",
    "falcon_h1": "===...=.========",
    "lfm2": "================",
    "qwen3_next": "======.=========",
    "persimmon": "================",
    "codegen": "====.===========",
    "gpt_bigcode": "================",
    "biogpt": "================",
    "xglm": "================",
    "qwen2_vl": "================",
    "qwen2_5_vl": "================",
    "qwen3_vl": "================",
    "llava": "================",
    "bert": "===...=.=====...",
    "roberta": "===...=.=====...",
    "modernbert": "==============..",
    "distilbert": "===...=.=====...",
    "deberta-v2": "===...=.=====...",
    "electra": "===...=.=====...",
    "esm": "==============..",
    "albert": "................",
    "t5": "................",
    "vit": "................",
    "dinov2": "................",
    "whisper": "================",
}

SIGHT = {
    "hidden_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
    "patch_size": 14, "image_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
IMAGES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
EXPERTS = {
    "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
STATE = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0,
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * LAYERS,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | EXPERTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": LAYERS, "num_heads": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "phi3": {"original_max_position_embeddings": 32},
    "mpt": {"d_model": WIDTH, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 32},
    "falcon new": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "mixtral": EXPERTS, "gpt_oss": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
    "phimoe": EXPERTS, "glm4_moe": EXPERTS, "llama4_text": EXPERTS, "deepseek_v2": EXPERTS | LATENT,
    "deepseek_v3": EXPERTS | LATENT,
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": WIDTH, "block_types": ["recurrent", "attention"]},
    "jamba": EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "granitemoehybrid": EXPERTS | STATE | {"layer_types": ["mamba", "attention"] * 2},
    "falcon_h1": STATE,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "exaone4": {"sliding_window_pattern": 2},
    "whisper": {"d_model": WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": 2, "max_target_positions": 32},
    "llava": {
        "text_config": {"model_type": "llama", **SIZES}, "vision_config": {"model_type": "clip_vision_model", **SIGHT},
        "image_token_index": 60,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **SIZES}, "vision_config": SIGHT,
        "mm_tokens_per_image": 1, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62,
    },
    **{
        f"qwen{version}_vl": {"text_config": SIZES | SECTIONS, "vision_config": SIGHT, **IMAGES}
        for version in ("2", "2_5", "3")
    },
    "vit": {"image_size": 28, "patch_size": 14}, "dinov2": {"image_size": 28, "patch_size": 14},
}  # fmt: skip
DROPPED = {
    "falcon": {"head_dim"}, "falcon new": {"head_dim"}, "mamba": {"intermediate_size", "max_position_embeddings"},
    "falcon_mamba": {"intermediate_size"}, "mamba2": {"intermediate_size", "num_attention_heads"},
    "mpt": {"max_position_embeddings"}, "rwkv": {"intermediate_size", "num_attention_heads"},
    "deepseek_v2": {"head_dim"}, "deepseek_v3": {"head_dim"},
}  # fmt: skip
ENCODERS = ("bert", "roberta", "modernbert", "distilbert", "deberta-v2", "electra", "esm", "albert")
ARCHITECTURES = (
    "gpt2", "gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4_text", "llama", "mistral", "ministral3",
    "qwen2", "qwen3", "qwen3_5_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "gpt_neox", "gpt_neox sequential",
    "gptj", "gpt_neo", "opt", "bloom", "falcon", "falcon new", "mpt", "stablelm", "starcoder2", "smollm3", "granite",
    "cohere", "cohere2", "nemotron", "exaone4", "glm4", "mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "olmoe",
    "phimoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text", "mamba", "mamba2", "falcon_mamba",
    "recurrent_gemma", "rwkv", "jamba", "granitemoehybrid", "falcon_h1", "lfm2", "qwen3_next", "persimmon", "codegen",
    "gpt_bigcode", "biogpt", "xglm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", *ENCODERS, "t5", "vit", "dinov2",
    "whisper",
)  # fmt: skip
QUICK = ("gpt2", "gemma3n_text", "qwen3_5_text", "falcon new", "deepseek_v3", "mixtral", "jamba", "qwen2_vl", "vit")


@cache
def save(architecture: str, folder: Path) -> Path:
    """A random model of an architecture, with a tokenizer."""
    torch.set_num_threads(1)
    kind = architecture.split(" ")[0]
    sizes = {key: value for key, value in SIZES.items() if key not in DROPPED.get(architecture, ())}
    options = OPTIONS.get(architecture, {})
    config = AutoConfig.for_model(kind, **(options if "text_config" in options else sizes | options))
    torch.manual_seed(0)
    network = auto_class(architecture).from_config(config)
    for name, parameter in network.named_parameters():
        if any(part in name.lower() for part in ("norm", "ln_", "bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    network.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def auto_class(architecture: str) -> Any:
    if architecture in ("vit", "dinov2"):
        return transformers.AutoModel
    if architecture == "t5":
        return transformers.AutoModelForSeq2SeqLM
    if "vl" in architecture or architecture == "llava":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForMaskedLM if architecture in ENCODERS else transformers.AutoModelForCausalLM


def coverage(folder: Path, network: torch.nn.Module) -> tuple[str, dict[str, str]]:
    """The line of the table, and the sentence for each kind that is refused."""
    refusals: dict[str, str] = {}
    equal: set[str] = set()
    model: LanguageModel | None = None
    for layer in (1, 0, 2, 3):
        names = {kind if kind in (EMBED, FINAL_NORM) else f"blocks.{layer}.{kind}": kind for kind in KINDS}
        names = {name: kind for name, kind in names.items() if kind not in equal}
        if not names:
            break
        try:
            load(folder, *names)
        except ModelError as error:
            lines = re.findall(r"model\.hooks = '([^\n]*?)': (.*)", str(error))
            if not lines:
                return "." * len(KINDS) + "..", {"all": str(error)}
            for name, sentence in lines:
                refusals.setdefault(names.pop(name), sentence)
        if not names:
            continue
        try:
            model = load(folder, *names, whole=True)
        except ModelError as error:  # of what is located, some is no activation for each token
            lines = re.findall(r"model\.hooks = '([^\n]*?)': (.*)", str(error))
            for name, sentence in lines:
                refusals.setdefault(names.pop(name), sentence)
            if not names:
                continue
            model = load(folder, *names, whole=True)
        check(model, load(folder, *names), network)
        equal |= set(names.values())
    if model is None:
        return "." * len(KINDS) + "..", refusals
    line = "".join("=" if kind in equal else "." for kind in KINDS)
    has_lens = False
    if model.predicts:
        has_lens = model.unembedding().W_U.shape[0] >= 60
    return line + ("=" if model.predicts else ".") + ("=" if has_lens else "."), {
        kind: sentence for kind, sentence in refusals.items() if kind not in equal
    }


def check(whole: LanguageModel, cut: LanguageModel, network: torch.nn.Module) -> None:
    """Activations are those of plain transformers, bit for bit, and putting them back changes nothing."""
    tokens = windows()
    expected = plain_activations(network, cut.hooks, tokens)
    for hook, x, y in zip(cut.hooks, cut.activations(tokens), expected, strict=True):
        assert torch.equal(x, y.reshape(x.shape)), hook
    assert cut.self_check.max_difference == 0
    if network.get_output_embeddings() is not None:
        clean = whole.logits(tokens)
        with torch.no_grad():
            assert torch.equal(clean, network(input_ids=tokens).logits)
        for hook in whole.hooks:
            assert torch.equal(clean, whole.logits(tokens, {hook.name: torch.clone})), hook


@torch.no_grad()
def plain_activations(network: torch.nn.Module, hooks: tuple[HookPoint, ...], tokens: torch.Tensor) -> list:
    """The tensors at the places that hooks name, by forward hooks on the model of transformers."""
    seen: dict[int, torch.Tensor] = {}
    handles = []
    for index, hook in enumerate(hooks):

        def before(module: Any, args: tuple, kwargs: dict, index: int = index) -> None:
            seen[index] = module_input(args, kwargs).clone()

        def after(module: Any, args: tuple, output: Any, index: int = index) -> None:
            seen[index] = module_output(output).clone()

        module = network.get_submodule(hook.module)
        if hook.side == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    network(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return [hook.channels.select(seen[i]) if hook.channels else seen[i] for i, hook in enumerate(hooks)]


def line_of(architecture: str, folder: Path) -> tuple[str, dict[str, str]]:
    save(architecture, folder)
    network = auto_class(architecture).from_pretrained(folder, dtype=torch.float32).eval()
    return coverage(folder, network)


@pytest.mark.parametrize("architecture", QUICK)
def test_some_architectures_have_the_hooks_of_the_table(architecture: str, tmp_path: Path) -> None:
    """What the table says, and a sentence for each kind that is refused."""
    line, refusals = line_of(architecture, tmp_path)
    assert line == TABLE[architecture].replace("-", ".")
    assert all(len(sentence) > 40 for sentence in refusals.values())


@pytest.mark.proof
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one not in QUICK])
def test_every_architecture_has_the_hooks_of_the_table(architecture: str, tmp_path: Path) -> None:
    """What the table says, and a sentence for each kind that is refused."""
    test_some_architectures_have_the_hooks_of_the_table(architecture, tmp_path)


def main() -> None:
    """Prints the table, or with names of architectures their lines and sentences."""
    import tempfile

    for architecture in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                line, refusals = line_of(architecture, Path(folder))
            except Exception as error:
                line, refusals = f"{type(error).__name__}: {str(error)[:300]!r}", {}
        print(f'    "{architecture}": "{line}",', flush=True)
        if sys.argv[1:]:
            for kind, sentence in refusals.items():
                print(f"        {kind}: {sentence[:300]}")


if __name__ == "__main__":
    main()
