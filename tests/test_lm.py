"""The language model and its hooks, on tiny random models of many architectures, in fp32 on the CPU.

What a hook gives is compared, bit for bit, with the whole model as transformers runs it: with its `hidden_states`
and with forward hooks that these tests set themselves, at module paths written down here by hand.
"""

from __future__ import annotations

import gc
import json
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig

from producer.lm.errors import ModelError
from producer.lm.hooks import HookPoint
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings, ModelSettings
from producer.tokens import windows_of

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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are far too small for two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("llama"): folder of a random Llama and its tokenizer, the same at every call."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture.replace(" ", "_"))
            save_model(architecture, made[architecture])
            save_tokenizer(made[architecture])
        return made[architecture]

    return make


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
    """The model as transformers alone would have it."""
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
    """What modules are given (`inputs`) and give (`outputs`) in a pass of the whole model, by path; and its result."""
    seen: dict[str, Tensor] = {}

    def given(path: str, module: nn.Module, args: tuple) -> None:
        seen[path] = args[0].clone()

    def gave(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        seen[path] = (output[0] if isinstance(output, tuple) else output).clone()

    find = network.get_submodule
    handles = [find(path).register_forward_pre_hook(partial(given, path)) for path in inputs]
    handles += [find(path).register_forward_hook(partial(gave, path)) for path in outputs]
    result = network(input_ids=tokens, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return seen, result


def refusal(folder: Path | str, *hooks: str, whole: bool = False, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, *(hooks or ("blocks.0.hook_resid_post",)), whole=whole, **settings)
    return str(caught.value)


# What hooks give --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", BLOCKS)
def test_block_hooks_of_the_cut_model_equal_the_whole_model(tiny, architecture):
    """resid_pre and resid_post of early, middle and last blocks are the whole model's activations, bit for bit."""
    folder, path, tokens = tiny(architecture), BLOCKS[architecture], windows()
    pre, post = [f"blocks.{n}.hook_resid_pre" for n in (0, 2, 3)], [f"blocks.{n}.hook_resid_post" for n in (0, 1, 3)]
    model = load(folder, *pre, *post)
    found = dict(zip(pre + post, model.activations(tokens), strict=True))

    blocks = tuple(f"{path}.{n}" for n in range(LAYERS))
    seen, result = observe(whole_model(architecture, folder), tokens, outputs=blocks)
    for n in (0, 1, 3):
        assert torch.equal(found[f"blocks.{n}.hook_resid_post"], seen[f"{path}.{n}"])
    for n in (2, 3):
        assert torch.equal(found[f"blocks.{n}.hook_resid_pre"], seen[f"{path}.{n - 1}"])
    if architecture != "mamba":  # whose hidden_states begin with the first block's output
        for n in (0, 2, 3):
            assert torch.equal(found[f"blocks.{n}.hook_resid_pre"], result.hidden_states[n])
        for n in (0, 1):
            assert torch.equal(found[f"blocks.{n}.hook_resid_post"], result.hidden_states[n + 1])
    assert [hook.module for hook in model.hooks] == [f"{path}.{n}" for n in (0, 2, 3, 0, 1, 3)]
    assert [hook.layer for hook in model.hooks] == [0, 2, 3, 0, 1, 3]
    assert {hook.width for hook in model.hooks} == {WIDTH}
    assert model.self_check.max_difference == 0


@pytest.mark.parametrize(
    "architecture, final_norm",
    [
        ("gpt2", "transformer.ln_f"),
        ("llama", "model.norm"),
        ("gpt_neox", "gpt_neox.final_layer_norm"),
        ("gemma3_text", "model.norm"),
        ("opt", "model.decoder.final_layer_norm"),
    ],
)
def test_last_block_is_hooked_before_the_final_norm(tiny, architecture, final_norm):
    """hidden_states[-1] is not what the hook gives: only after the final norm are they equal."""
    folder, tokens = tiny(architecture), windows()
    (last,) = load(folder, f"blocks.{LAYERS - 1}.hook_resid_post").activations(tokens)
    network = whole_model(architecture, folder)
    _, result = observe(network, tokens)
    assert not torch.allclose(last, result.hidden_states[-1], atol=0.1)
    with torch.inference_mode():
        assert torch.equal(network.get_submodule(final_norm)(last), result.hidden_states[-1])


@pytest.mark.parametrize("architecture", MIDDLES)
def test_middle_and_mlp_add_up_to_the_block(tiny, architecture):
    """resid_mid + mlp_out is resid_post to the last bit, and both are where the architecture's authors have them."""
    folder, tokens = tiny(architecture), windows()
    names = [f"blocks.2.hook_{kind}" for kind in ("resid_pre", "resid_mid", "mlp_out", "resid_post")]
    model = load(folder, *names)
    pre, mid, mlp_out, post = model.activations(tokens)
    assert torch.equal(mid + mlp_out, post)
    assert not torch.allclose(mid, pre, atol=1e-3)

    before, after = (f"{BLOCKS[architecture]}.2.{module}" for module in MIDDLES[architecture])
    seen, _ = observe(whole_model(architecture, folder), tokens, inputs=(before,), outputs=(after,))
    assert torch.equal(mid, seen[before].reshape(mid.shape))
    assert torch.equal(mlp_out, seen[after].reshape(mid.shape))
    assert (model.hooks[1].module, model.hooks[1].side) == (before, "input")
    assert model.hooks[2] == HookPoint(names[2], after, 2, WIDTH)


@pytest.mark.parametrize("architecture", ["gpt_neox", "falcon"])
def test_parallel_block_has_an_mlp_but_no_middle(tiny, architecture):
    """mlp_out is found, and survives that Falcon adds the attention into the same tensor; resid_mid is refused."""
    folder, tokens = tiny(architecture), windows()
    mlp_out, _ = load(folder, "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post").activations(tokens)
    path = f"{BLOCKS[architecture]}.1.mlp"
    seen, _ = observe(whole_model(architecture, folder), tokens, outputs=(path,))
    assert torch.equal(mlp_out, seen[path])
    assert "in parallel on the same input" in refusal(folder, "blocks.1.hook_resid_mid")


@pytest.mark.parametrize("architecture, block", [("bert", "BertLayer"), ("opt post-norm", "OPTDecoderLayer")])
@pytest.mark.parametrize("kind", ["resid_mid", "mlp_out"])
def test_block_that_normalises_after_adding_has_no_middle(tiny, architecture, block, kind):
    """Where the sum is normed before it is handed on, resid_mid and mlp_out are refused, and module paths offered."""
    message = refusal(tiny(architecture), f"blocks.1.hook_{kind}")
    assert f"{block} does not return resid_mid + mlp_out" in message
    assert "use hook_resid_pre, hook_resid_post or a module path: " in message


def test_many_hooks_come_in_the_order_of_the_settings(tiny):
    """One pass serves all hooks, and each lies where the settings named it, not where the model came upon it."""
    folder, tokens = tiny("llama"), windows()
    names = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.1.hook_resid_mid"]
    together = load(folder, *names).activations(tokens)
    for name, x in zip(names, together, strict=True):
        assert torch.equal(load(folder, name).activations(tokens)[0], x)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "falcon", "bert"])
def test_passes_may_run_side_by_side(tiny, architecture):
    """Each thread is given the activations of its own windows, and counts its own blocks."""
    model = load(tiny(architecture), "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    inputs = [(windows(1 + n % 3) + n) % WORDS for n in range(24)]
    alone = [model.activations(tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as lanes:
        together = list(lanes.map(model.activations, inputs))

    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    assert model.layers_run == 3


@pytest.mark.parametrize(
    "name, path, layer, width",
    [
        ("model.layers.2", "model.layers.2", 2, WIDTH),
        ("layers.2", "model.layers.2", 2, WIDTH),
        ("model.layers.1.mlp", "model.layers.1.mlp", 1, WIDTH),
        ("model.layers.1.self_attn", "model.layers.1.self_attn", 1, WIDTH),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", 0, 48),
        ("model.embed_tokens", "model.embed_tokens", 0, WIDTH),
        ("model.norm", "model.norm", 3, WIDTH),
    ],
)
def test_module_path_hooks_that_module(tiny, name, path, layer, width):
    """A path, counted from the model or from its decoder, gives that module's output; of a tuple, the first."""
    folder, tokens = tiny("llama"), windows()
    model = load(folder, name)
    seen, _ = observe(whole_model("llama", folder), tokens, outputs=(path,))
    assert torch.equal(model.activations(tokens)[0], seen[path])
    assert model.hooks == (HookPoint(name, path, layer, width),)


def test_bfloat16_model_gives_bfloat16(tiny):
    """The number format asked for is the one computed in and handed out, and the middle is found in it too."""
    names = ["blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"]
    model = load(tiny("llama"), *names, dtype="bfloat16")
    mid, mlp_out, post = model.activations(windows())
    assert {x.dtype for x in (mid, mlp_out, post)} == {torch.bfloat16}
    assert torch.equal(mid + mlp_out, post)


def test_language_model_inside_a_multimodal_one_is_found(tiny, tmp_path):
    """Gemma 3 from 4B up sees pictures too: its text blocks are hooked, its vision tower is dropped."""
    text = AutoConfig.for_model("gemma3_text", **SIZES)
    sight = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=sight | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load(tmp_path, "blocks.1.hook_resid_post")
    assert model.hooks[0].module == "model.language_model.layers.1"
    assert model.parameters_held == load(tiny("gemma3_text"), "blocks.1.hook_resid_post").parameters_held
    assert load(tmp_path, "blocks.1.hook_resid_post", whole=True).logits(windows()).shape == (3, CONTEXT, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_runs_in_bfloat16_with_sdpa(tiny):
    """With device auto and a GPU: bfloat16, on the GPU, near the CPU's fp32."""
    settings = ModelSettings(name=str(tiny("llama")), hooks=["blocks.2.hook_resid_post"])
    (x,) = load_language_model(settings).activations(windows())
    (exact,) = load(tiny("llama"), "blocks.2.hook_resid_post").activations(windows())
    assert x.device.type == "cuda" and x.dtype == torch.bfloat16
    assert (x.float().cpu() - exact).square().mean() < 1e-3 * exact.square().mean()


# Padding and masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "opt", "qwen3", "bert"])
def test_full_windows_run_without_a_mask(tiny, architecture):
    """No attention module is handed a mask for full windows, so that SDPA may choose its causal kernel."""
    model = load(tiny(architecture), "blocks.2.hook_resid_post")
    masks = []

    def look(module, args, kwargs, output):
        if "attention_mask" in kwargs:
            masks.append(kwargs["attention_mask"])

    handle = nn.modules.module.register_module_forward_hook(look, with_kwargs=True)
    model.activations(windows())
    handle.remove()
    assert masks and all(mask is None for mask in masks)


def test_causal_model_needs_no_padding(tiny):
    """Padding on the right leaves all that comes before it exactly as it was."""
    model, tokens = load(tiny("llama"), "blocks.3.hook_resid_post"), windows()
    padded, padding = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    padded[:, 8:], padding[:, 8:] = 2, True
    (x,), (y,) = model.activations(tokens), model.activations(padded, padding)
    assert model.causal
    assert torch.equal(x[:, :8], y[:, :8])


def test_encoder_is_told_of_padding(tiny):
    """An encoder gives padded text the activations of the same text alone; unaware of padding it would not."""
    model, tokens = load(tiny("bert"), "blocks.3.hook_resid_post"), windows()
    padded, padding = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    padded[:, 8:], padding[:, 8:] = 2, True
    (alone,) = model.activations(tokens[:, :8])
    assert not model.causal
    torch.testing.assert_close(model.activations(padded, padding)[0][:, :8], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.activations(padded)[0][:, :8], alone, atol=1e-2)


BIDIRECTIONAL = {"gemma3_text": {"use_bidirectional_attention": True}, "llama": {"is_causal": False}}


@pytest.mark.parametrize("architecture", BIDIRECTIONAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_that_sees_ahead_is_an_encoder(tiny, tmp_path, architecture, dtype):
    """EmbeddingGemma's kind, by what it does and not by its class: padding leaves its activations alone."""
    folder = copy_of(tiny(architecture), tmp_path / "both_ways")
    assert load(folder, "blocks.0.hook_resid_pre", dtype=dtype).causal
    change_config(folder, **BIDIRECTIONAL[architecture])
    model, tokens = load(folder, "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post", dtype=dtype), windows()
    assert not model.causal
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[:, 8:] = True
    y, alone = model.activations(tokens, padding)[1][:, :8].float(), model.activations(tokens[:, :8])[1].float()
    assert (y - alone).square().mean() < (1e-5 if dtype == "float32" else 3e-2) ** 2 * alone.square().mean()


@pytest.mark.parametrize("architecture", ["fnet", "convbert"])
def test_encoder_that_no_mask_helps_reads_text_alone(tiny, architecture):
    """FNet takes no mask, ConvBERT's convolution does not heed it: windows are read without their padding."""
    model, tokens = load(tiny(architecture), "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"), windows()
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[1, 5:] = padding[2] = True
    assert not model.causal
    for y, whole, alone in zip(
        model.activations(tokens, padding), model.activations(tokens), model.activations(tokens[1:2, :5]), strict=True
    ):
        torch.testing.assert_close(y[0], whole[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y[1, :5], alone[0], rtol=1e-4, atol=1e-5)
        assert not y[1, 5:].any() and not y[2].any()


# Token ids beyond the embedding -----------------------------------------------------------------------------------


@pytest.fixture
def with_image_token(tiny, tmp_path):
    """Folder of a Llama of 64 ids whose tokenizer has <image> as id 64, as Gemma 3's has one."""
    folder = copy_of(tiny("llama"), tmp_path / "image")
    save_tokenizer(folder, words=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_token_that_the_model_does_not_know_is_refused_where_it_is_used(with_image_token):
    """The tokenizer may have it; a window that contains it is refused with place, id, token and text."""
    model = load(with_image_token, "blocks.0.hook_resid_post")
    assert model.unknown_tokens == {64: "<image>"}
    tokens = torch.tensor(model.tokenizer(["w5 w6 w7 w8", "w5 w6 <image> w8"])["input_ids"])
    assert model.activations(tokens[:1])[0].shape == (1, 4, WIDTH)
    for use in (model.activations, model.check_ids):
        with pytest.raises(ModelError) as caught:
            use(tokens)
        assert str(caught.value).startswith("window 1, position 2: token id 64 ('<image>') is unknown to ")
        assert "ids 0 to 63; the text there is 'w5 w6 <image> w8': take it out" in str(caught.value)
    with pytest.raises(ModelError, match=r"held-out window 0, position 1: token id -3 \(no token\)"):
        model.check_ids(torch.tensor([[5, -3, 99]]), "held-out window")


def test_padding_that_the_model_does_not_know_is_replaced(tiny, tmp_path):
    """The recipe that adds [PAD] to Llama's tokenizer and does not resize: EOS stands behind the text instead."""
    folder = copy_of(tiny("llama"), tmp_path / "padded")
    save_tokenizer(folder, words=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 64
    tokenizer.save_pretrained(folder)
    model = load(folder, "blocks.0.hook_resid_post")
    ids = windows_of(["w5 w6"], model.tokenizer, CorpusSettings(context=5)).ids
    assert ids.tolist() == [[0, 5, 6, 1, 1]]
    model.activations(torch.from_numpy(ids))


# The cut --------------------------------------------------------------------------------------------------------------


def sizes_on_disk(folder: Path) -> dict[str, int]:
    return {name: weight.numel() for name, weight in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(
    "hook, runs, holds",
    [
        ("blocks.1.hook_resid_post", 2, ["model.layers.0.", "model.layers.1."]),
        ("blocks.1.hook_mlp_out", 2, ["model.layers.0.", "model.layers.1."]),
        ("blocks.1.hook_resid_pre", 1, ["model.layers.0."]),
        ("blocks.0.hook_resid_pre", 0, []),
        ("blocks.3.hook_resid_post", 4, ["model.layers."]),
    ],
)
def test_nothing_after_the_last_hook_runs_or_is_held(tiny, hook, runs, holds):
    """Later blocks, the final norm and the head are never called; later blocks and the head are not in memory."""
    folder = tiny("llama")
    model = load(folder, hook)
    kept = tuple(["model.embed_tokens.", "model.norm.", *holds])
    assert model.parameters_held == sum(n for name, n in sizes_on_disk(folder).items() if name.startswith(kept))

    calls: Counter[str] = Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: calls.update([type(m).__name__]))
    begun: Counter[str] = Counter()
    other = nn.modules.module.register_module_forward_pre_hook(lambda m, a: begun.update([m._get_name()]))
    model.activations(windows())
    handle.remove(), other.remove()
    assert calls["LlamaMLP"] == runs
    assert calls["LlamaForCausalLM"] == calls["LlamaModel"] == 0
    assert begun["LlamaRMSNorm"] == 2 * runs
    assert (model.layers_run, model.layers_total) == (runs, LAYERS)


def test_nothing_of_the_whole_model_stays_behind(tiny):
    """Once loaded, the process holds no more tensors of the model than the cut model counts."""

    def parameters():
        return {id(x): x.numel() for x in gc.get_objects() if type(x) is nn.Parameter}

    folder = tiny("qwen3")
    gc.collect()
    before = parameters()
    model = load(folder, "blocks.0.hook_resid_post")
    assert sum(parameters().values()) - sum(before.values()) == model.parameters_held


def test_layers_are_counted_anew_in_each_pass(tiny):
    """layers_run tells of the last pass: a whole model stops at the hook for activations, and not for logits."""
    model = load(tiny("gpt2"), "blocks.1.hook_resid_post", whole=True)
    model.activations(windows())
    assert model.layers_run == 2
    model.logits(windows())
    assert model.layers_run == LAYERS


# The self-check -------------------------------------------------------------------------------------------------------


def test_self_check_is_recorded(tiny):
    """The start leaves its numbers, for the log and the hello."""
    names = ["blocks.1.hook_resid_post", "model.layers.2.mlp"]
    check = load(tiny("llama"), *names).self_check
    assert check.passed and check.max_difference == 0 and check.scale > 0.1
    assert check.compared == tuple(names)


COUNTING_MODEL = '''
from transformers import LlamaConfig, LlamaForCausalLM

class CountingConfig(LlamaConfig):
    model_type = "counting"

class CountingForCausalLM(LlamaForCausalLM):
    """A Llama whose embedding is scaled by the number of its blocks: it cannot be cut."""

    config_class = CountingConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda m, args, x: x * len(self.model.layers))
'''


@pytest.fixture
def counting_model(tiny, tmp_path, monkeypatch):
    """Folder of a model that brings its own code, and whose early activations depend on its later blocks."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = copy_of(tiny("llama"), tmp_path / "counting")
    (folder / "counting.py").write_text(COUNTING_MODEL)
    change_config(
        folder,
        model_type="counting",
        architectures=["CountingForCausalLM"],
        auto_map={"AutoConfig": "counting.CountingConfig", "AutoModelForCausalLM": "counting.CountingForCausalLM"},
    )
    return folder


def test_model_that_cannot_be_cut_is_refused_with_both_numbers(counting_model):
    """Where cutting changes the activations, the self-check ends the start and says by how much."""
    message = refusal(counting_model, "blocks.1.hook_resid_post", trust_remote_code=True)
    assert message.startswith("self-check failed: the model cut after its last hook differs from the whole model by")
    assert "where activations have an rms of" in message


def test_model_that_cannot_be_cut_still_serves_whole(counting_model):
    """The self-check finds no fault where nothing is cut."""
    assert load(counting_model, "blocks.1.hook_resid_post", trust_remote_code=True, whole=True).self_check.passed


def test_code_that_comes_with_a_model_is_not_run_unasked(counting_model):
    """A model with its own Python code is refused, with the setting that would allow it."""
    assert "set model.trust_remote_code = true" in refusal(counting_model)


# Logits, with activations replaced ----------------------------------------------------------------------------------


REPLACED = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "opt", "bloom", "gpt_neox sequential"])
def test_logits_with_activations_replaced(tiny, architecture):
    """Without replacement they are the model's own; the identity changes nothing at all; zeros change them."""
    folder, tokens = tiny(architecture), windows()
    model = load(folder, *REPLACED, whole=True)
    clean = model.logits(tokens)
    assert torch.equal(clean, observe(whole_model(architecture, folder), tokens)[1].logits)
    assert torch.equal(clean, model.logits(tokens, {name: lambda x: x.clone() for name in REPLACED}))
    for name in REPLACED:
        assert not torch.allclose(clean, model.logits(tokens, {name: torch.zeros_like}), atol=1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma", "opt", "bloom", "gpt_neox sequential"])
def test_unembedding_is_what_the_model_does_to_its_last_activations(tiny, architecture):
    """On rows that the final norm only scales by its gain, x and −x lie twice that far apart in the logits."""
    config = AutoConfig.from_pretrained(tiny(architecture))
    last = f"blocks.{config.num_hidden_layers - 1}.hook_resid_post"
    model = load(tiny(architecture), last, whole=True)
    unembedding = model.unembedding()
    x = torch.tensor([1.0, -1.0]).repeat(len(unembedding.gain) // 2)
    up, down = (model.logits(windows(), {last: lambda rows, x=x: x.expand_as(rows)}) for x in (x, -x))
    assert unembedding.gain.std() > 0.1
    torch.testing.assert_close((up - down)[0, 0] / 2, unembedding.logits(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_unembedding_of_a_small_change(tiny, architecture):
    """A direction with a mean, added to real activations, moves the logits as told, but for one factor: the norm's."""
    config = AutoConfig.from_pretrained(tiny(architecture))
    last = f"blocks.{config.num_hidden_layers - 1}.hook_resid_post"
    model = load(tiny(architecture), last, whole=True)
    unembedding = model.unembedding()
    assert unembedding.norm_subtracts_mean == (architecture == "gpt2")
    direction = torch.randn(len(unembedding.gain), generator=torch.Generator().manual_seed(1)) + 2
    size = 1e-2
    moved = model.logits(windows(), {last: lambda rows: rows + size * direction})
    change = (moved - model.logits(windows())).flatten(0, 1).mean(0) / size
    told = unembedding.logits(direction)
    # What the norm takes from the direction along the stream itself differs by row, and is not in it.
    assert torch.corrcoef(torch.stack([change - change.mean(), told - told.mean()]))[0, 1] > 0.9


def test_replacing_is_the_threads_own(tiny):
    """While one thread has put zeros at a hook, another one sees the model's own activations there."""
    name, tokens = "blocks.1.hook_resid_post", windows()
    model = load(tiny("llama"), name, whole=True)
    (clean,) = model.activations(tokens)
    seen = []

    def zeros(x):
        other = threading.Thread(target=lambda: seen.append(model.activations(tokens)[0]))
        other.start()
        other.join()
        return torch.zeros_like(x)

    model.logits(tokens, {name: zeros})
    assert torch.equal(seen[0], clean)


def test_replacing_does_not_leak_into_another_threads_pass(tiny):
    """That other pass reads a hook further on, and one in between is replaced meanwhile: it sees none of it."""
    name, later, tokens = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", windows()
    model = load(tiny("llama"), name, later, whole=True)
    clean = model.activations(tokens)
    begun, seen = [], []

    def zeros(x):
        if not begun:  # a leak is to end as a difference, not as threads without end
            begun.append(True)
            other = threading.Thread(target=lambda: seen.extend(model.activations(tokens)))
            other.start()
            other.join()
        return torch.zeros_like(x)

    model.logits(tokens, {name: zeros})
    assert all(map(torch.equal, seen, clean)) and len(seen) == 2


def test_a_middle_that_the_residual_does_not_go_through_is_none(tiny, monkeypatch):
    """A block that hands its norm a copy: the sum holds, until the copy is replaced. Such a middle is refused."""

    def forward(self, hidden_states, **others):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        middle = hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(middle.clone()))

    before = load(tiny("llama"), "blocks.1.hook_resid_post").activations(windows())[0]
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", forward)
    assert torch.equal(load(tiny("llama"), "blocks.1.hook_resid_post").activations(windows())[0], before)
    assert "hook_resid_mid" in refusal(tiny("llama"), "blocks.1.hook_resid_mid")


@pytest.mark.parametrize("architecture", MIDDLES)
def test_replaced_middle_reaches_the_mlp_and_the_residual(tiny, architecture):
    """What is put at resid_mid is what the MLP reads and what goes around it: resid_post is it plus the new mlp_out."""
    model = load(tiny(architecture), *REPLACED, whole=True)
    seen = {}

    def change(x):
        seen["mid"] = 0.5 * x - 1
        return seen["mid"].clone()

    def look(name):
        return lambda x: seen.setdefault(name, x.clone())

    model.logits(windows(), dict(zip(REPLACED[1:], (change, look("mlp_out"), look("post")), strict=True)))
    assert torch.equal(seen["mid"] + seen["mlp_out"], seen["post"])
    assert not torch.equal(seen["mlp_out"], model.activations(windows())[2])


def test_attention_output_can_be_replaced(tiny):
    """A module that returns a tuple gets its first member replaced, the others kept."""
    model = load(tiny("llama"), "model.layers.1.self_attn", whole=True)
    clean = model.logits(windows())
    assert torch.equal(clean, model.logits(windows(), {"model.layers.1.self_attn": lambda x: x}))
    assert not torch.equal(clean, model.logits(windows(), {"model.layers.1.self_attn": torch.zeros_like}))


def test_logits_refuse_what_they_cannot_do(tiny):
    """A cut model, a name that is no hook and a replacement of another shape each get a sentence."""
    hook = "blocks.1.hook_resid_post"
    with pytest.raises(ModelError, match="load it with whole=True"):
        load(tiny("llama"), hook).logits(windows())
    model = load(tiny("llama"), hook, whole=True)
    with pytest.raises(
        ModelError, match=r"cannot replace blocks.9: the hooks of this model are blocks.1.hook_resid_po"
    ):
        model.logits(windows(), {"blocks.9": lambda x: x})
    with pytest.raises(ModelError, match=r"has shape \[3, 12, 31\], not \[3, 12, 32\]"):
        model.logits(windows(), {hook: lambda x: x[..., 1:]})


# What the operator is told ------------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path, without: str = "") -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if not (without and file.name.startswith(without)):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_loading_is_quiet(tiny, capfd):
    """No progress bar and no advice reaches the terminal, from the load to the first pass."""
    folders = [tiny(architecture) for architecture in ("gpt2", "bert", "bert decoder", "mamba")]
    capfd.readouterr()
    for folder in folders:
        load(folder, "blocks.1.hook_resid_post").activations(torch.full((2, 8), 2))
    assert capfd.readouterr() == ("", "")


def test_model_facts_are_told(tiny):
    """Vocabulary, context limit, tokenizer, number format and layers are those of the model on disk."""
    model = load(tiny("gpt2"), "blocks.0.hook_resid_post")
    assert (model.vocabulary, model.context_limit, model.layers_total) == (64, 32, LAYERS)
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert (model.dtype, model.device, model.revision) == (torch.float32, torch.device("cpu"), None)


def test_fingerprint_tells_models_apart(tiny, tmp_path):
    """Hooks and the cut do not touch it, nor where the model lies; one changed weight or setting does."""
    mine = load(tiny("llama"), "blocks.0.hook_resid_pre").fingerprint
    moved = copy_of(tiny("llama"), tmp_path / "moved")
    assert load(moved, "blocks.3.hook_resid_post", whole=True).fingerprint == mine
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert load(moved, "blocks.0.hook_resid_pre").fingerprint != mine
    moved = copy_of(tiny("llama"), tmp_path / "other")
    change_config(moved, rms_norm_eps=1e-3)
    assert load(moved, "blocks.0.hook_resid_pre").fingerprint != mine


def test_bert_made_a_decoder_is_causal(tiny):
    """What decides is the configuration, not the name of the architecture."""
    assert load(tiny("bert decoder"), "blocks.1.hook_resid_post").causal


def test_roberta_spends_positions_on_padding(tiny):
    """Its table of 32 positions serves windows of 29: two before the padding's, and the padding's own."""
    model = load(tiny("roberta"), "blocks.1.hook_resid_post")
    assert model.context_limit == 29
    assert model.activations(windows(1, 29))[0].shape == (1, 29, WIDTH)


def test_window_longer_than_the_model_reads_is_refused(tiny):
    """The message names both lengths and the setting to change."""
    with pytest.raises(ModelError, match=r"33 tokens is longer than the 32 .* set corpus.context to 32 or less"):
        load(tiny("gpt2"), "blocks.0.hook_resid_post").activations(windows(1, 33))


LONGEST = {
    "gpt2": 32,
    "mpt": 32,
    "opt": 32,
    "whisper": 32,
    "xlm-roberta": 29,
    "ctrl": 32,
    "gpt_bigcode": 32,
    "mamba": None,
}


@pytest.mark.parametrize("architecture", LONGEST)
def test_longest_window_is_known_under_any_name(tiny, architecture):
    """Each configuration calls its positions otherwise, and some tables begin at a later row."""
    model = load(tiny(architecture), "blocks.0.hook_resid_post")
    assert model.context_limit == LONGEST[architecture]
    model.check_context(LONGEST[architecture] or 100)
    if model.context_limit is not None:
        with pytest.raises(ModelError, match=r"corpus.context = 33 is longer than the (32|29) tokens that"):
            model.check_context(33)


def test_table_of_positions_counts_more_than_the_configuration(tiny, tmp_path):
    """A table that serves fewer positions than the configuration says is what a window runs into."""
    folder = copy_of(tiny("opt"), tmp_path / "short")
    change_config(folder, max_position_embeddings=30)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed_positions" in name)
    weights[name] = weights[name][:32]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, n_positions=1000)
    assert load(folder, "blocks.0.hook_resid_post").context_limit == 30


def test_window_that_breaks_the_model_is_told_with_the_setting(tiny, monkeypatch):
    """Where neither the configuration nor a table tells, one window is tried at the start."""
    model = load(tiny("mpt"), "blocks.0.hook_resid_post")
    monkeypatch.setattr(model, "context_limit", None)
    with pytest.raises(ModelError, match=r"corpus.context = 40: .* cannot read a window of so many tokens \(Runtime"):
        model.check_context(40)


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.2.hook_resid_mid", "blocks.3.hook_mlp_out"])
def test_overflow_in_float16_names_the_number_format(tiny, tmp_path, hook):
    """Activations beyond 65504 are told as that; in float32 the same model is sound."""
    folder = copy_of(tiny("llama"), tmp_path / "loud")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1e6
    save_file(
        {name: w.half().clamp(-6e4, 6e4) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert load(folder, hook).self_check.passed
    message = refusal(folder, hook, dtype="float16")
    assert message.startswith(f"model.hooks = '{hook}': ") and 'set model.dtype = "bfloat16" or "float32"' in message
    assert load(folder, "blocks.1.hook_resid_post", dtype="float16").self_check.passed, "before the overflow"


def test_weights_that_are_no_numbers_are_told(tiny, tmp_path):
    """Not as an overflow, and not as a cut that went wrong."""
    folder = copy_of(tiny("gpt2"), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "gives NaN or infinity here in float32; use a checkpoint whose weights are sound" in refusal(
        folder, "blocks.1.hook_resid_post"
    )


def test_model_without_token_ids_is_refused(tmp_path):
    """A model of images has no embedding of tokens."""
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert "ViTModel has no embedding of token ids, so it reads no text; use a language model" in refusal(tmp_path)


def test_unknown_hooks_are_refused_together(tiny):
    """Each unknown name gets a line that says what exists, and the nearest name."""
    message = refusal(tiny("llama"), "blocks.1.hook_resid_pots", "blocks.4.hook_resid_post", "blocks.2.attn.hook_z")
    first, second, third = message.split("\n")
    assert first.startswith("model.hooks = 'blocks.1.hook_resid_pots': ")
    assert "has no such hook (did you mean blocks.1.hook_resid_post?)" in first
    assert "blocks.N.hook_{resid_pre,resid_mid,resid_post,mlp_out} with N from 0 to 3" in first
    assert "model.layers.0, inside which there are self_attn, mlp, input_layernorm" in first
    assert "has 4 blocks; expected blocks.0 to blocks.3" in second
    assert "'blocks.2.attn.hook_z'" in third


@pytest.mark.parametrize(
    "hook, reason",
    [
        ("lm_head", "not part of model, which holds the blocks"),
        ("model.layers", "runs 0 times in one pass"),
        ("model.rotary_emb", "not one activation for each token"),
        ("model", "not activations"),
    ],
)
def test_module_without_activations_is_refused(tiny, hook, reason):
    """A path that exists but gives no activation for each token gets the reason."""
    assert reason in refusal(tiny("llama"), hook)


def test_positions_shared_by_all_windows_are_not_activations(tiny):
    """GPT-2's table of positions gives one row for each position, not for each token."""
    assert "not one activation for each token" in refusal(tiny("gpt2"), "transformer.wpe")


def test_missing_folder_is_named(tmp_path):
    """A path that does not exist is told as a path, without a word about the hub."""
    assert refusal(tmp_path / "none").startswith(f"model.name = '{tmp_path}/none': no such folder")


def test_a_slash_at_the_end_names_a_folder_and_never_the_hub():
    """`gpt2/` where there is no such folder must not become a model of the hub, and the sentence says what would."""
    with pytest.raises(ModelError, match=r"'\./no-such-model': no such folder .* on the hub, write \"no-such-model\""):
        load_language_model(ModelSettings(name="no-such-model/", hooks=["blocks.0.hook_resid_post"]))


def test_folder_without_a_model_is_named(tmp_path):
    """A folder without config.json says what is missing."""
    assert "holds no config.json" in refusal(tmp_path)


def test_file_instead_of_a_folder_is_named(tiny):
    """The weights' own path is a common slip."""
    assert "name the folder that holds the model" in refusal(tiny("gpt2") / "model.safetensors")


def test_name_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    """Without network, a name that is not in the cache says where it was looked for and what to do."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("sluice-test/no-such-model")
    assert "not a folder here, not in the cache" in message and "connect to the network" in message
    assert "\n" not in message


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "llama"])
def test_missing_tokenizer_is_noticed(tiny, tmp_path, architecture):
    """Without tokenizer files transformers makes up an empty tokenizer; that is refused."""
    folder = copy_of(tiny(architecture), tmp_path / "model", without="tokenizer")
    assert "tokenizer" in refusal(folder)


def test_tokenizer_of_another_model_is_noticed(tiny, tmp_path):
    """A tokenizer with more words than the model has embeddings is refused before it can crash the run."""
    save_tokenizer(copy_of(tiny("gpt2"), tmp_path / "model"), words=65)
    assert "the tokenizer has 65 tokens and the model knows 64" in refusal(tmp_path / "model")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_incomplete_checkpoint_is_noticed(tiny, tmp_path, lost):
    """Weights that the checkpoint lacks would be random numbers; that is refused, with the name of one."""
    folder = copy_of(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"the checkpoint lacks 1 parameters, such as {lost}" in refusal(folder)


def test_missing_head_matters_only_to_the_whole_model(tiny, tmp_path):
    """The producer does without the head; evaluation would measure a random one."""
    folder = copy_of(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load(folder, "blocks.0.hook_resid_post").self_check.passed
    assert "such as lm_head.weight" in refusal(folder, whole=True)


def test_damaged_weights_are_named(tiny, tmp_path):
    """A file that cannot be read becomes one line with the model's name."""
    folder = copy_of(tiny("llama"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not weights")
    message = refusal(folder)
    assert message.startswith(f"model.name = '{folder}': cannot be loaded") and "\n" not in message


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_is_refused(tmp_path, kind):
    """Models with cross-attention are refused before their weights are read."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert f"({kind}) is an encoder-decoder model or uses cross-attention" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["albert", "xlm"])
def test_model_without_a_chain_of_blocks_is_refused(tiny, kind):
    """ALBERT has one block for all layers, XLM keeps attentions and MLPs in separate lists: neither can be cut."""
    assert "holds no chain of 4 blocks to hook" in refusal(tiny(kind))


@pytest.mark.parametrize("device", ["cuda:99", "cuda:7"])
def test_device_that_does_not_exist_is_refused(tiny, device):
    """The message names the setting, its value and what would do."""
    settings = ModelSettings(name=str(tiny("gpt2")), hooks=["blocks.0.hook_resid_post"], device=device)
    with pytest.raises(ModelError, match=f"model.device = '{device}'"):
        load_language_model(settings)
