"""Loading a language model: the cut, the self-check, the fingerprint, and what is refused with which sentence."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.settings import ModelSettings
from tests.small_language_models import (
    LAYERS,
    SIZES,
    WIDTH,
    change_config,
    copy_of,
    load,
    model_with_code,
    observe,
    refusal,
    save_tokenizer,
    tiny,
    windows,
)

# The cut -------------------------------------------------------------------------------------------------------------


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
def test_nothing_after_the_last_hook_runs_or_is_held(hook, runs, holds):
    """Later blocks, the final norm and the head are never called; later blocks and the head are not in memory."""
    folder = tiny("llama")
    model = load(folder, hook)
    prefixes = tuple(["model.embed_tokens.", "model.norm.", *holds])
    assert model.network.parameter_count == sum(
        n for name, n in sizes_on_disk(folder).items() if name.startswith(prefixes)
    )

    calls: Counter[str] = Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: calls.update([type(m).__name__]))
    call_counts: Counter[str] = Counter()
    other = nn.modules.module.register_module_forward_pre_hook(lambda m, a: call_counts.update([m._get_name()]))
    model.activations(windows())
    handle.remove(), other.remove()
    assert calls["LlamaMLP"] == runs
    assert calls["LlamaForCausalLM"] == calls["LlamaModel"] == 0
    assert call_counts["LlamaRMSNorm"] == 2 * runs
    assert (model.layers_run, model.layers_total) == (runs, LAYERS)


def test_nothing_of_the_whole_model_stays_behind():
    """Once loaded, the process holds no more tensors of the model than the cut model counts."""

    def parameters():
        return {id(x): x.numel() for x in gc.get_objects() if type(x) is nn.Parameter}

    folder = tiny("qwen3")
    gc.collect()
    before = parameters()
    model = load(folder, "blocks.0.hook_resid_post")
    assert sum(parameters().values()) - sum(before.values()) == model.network.parameter_count


def test_layers_are_counted_anew_in_each_pass():
    """layers_run tells of the last pass: a whole model stops at the hook for activations, and not for logits."""
    model = load(tiny("gpt2"), "blocks.1.hook_resid_post", whole=True)
    model.activations(windows())
    assert model.layers_run == 2
    model.logits(windows())
    assert model.layers_run == LAYERS


# The self-check ------------------------------------------------------------------------------------------------------


def test_self_check_is_recorded():
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
def counting_model(tmp_path, monkeypatch):
    """Folder of a model that brings its own code, and whose early activations depend on its later blocks."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return model_with_code(tmp_path / "counting", "Counting", COUNTING_MODEL)


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


# Facts and refusals --------------------------------------------------------------------------------------------------


def test_loading_is_quiet(capfd):
    """No progress bar and no advice reaches the terminal, from the load to the first pass."""
    folders = [tiny(architecture) for architecture in ("gpt2", "bert", "bert decoder", "mamba")]
    capfd.readouterr()
    for folder in folders:
        load(folder, "blocks.1.hook_resid_post").activations(torch.full((2, 8), 2))
    assert capfd.readouterr() == ("", "")


def test_model_facts_are_told():
    """Vocabulary, context limit, tokenizer, number format and layers are those of the model on disk."""
    model = load(tiny("gpt2"), "blocks.0.hook_resid_post")
    assert (model.vocabulary, model.context_limit, model.layers_total) == (64, 32, LAYERS)
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert (model.dtype, model.device, model.revision) == (torch.float32, torch.device("cpu"), None)


def test_fingerprint_tells_models_apart(tmp_path):
    """Hooks and the cut do not touch it, nor where the model lies; one changed weight or setting does."""
    mine = load(tiny("llama"), "blocks.0.hook_resid_pre").fingerprint
    model_copy = copy_of(tiny("llama"), tmp_path / "moved")
    assert load(model_copy, "blocks.3.hook_resid_post", whole=True).fingerprint == mine
    weights = load_file(model_copy / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, model_copy / "model.safetensors", {"format": "pt"})
    assert load(model_copy, "blocks.0.hook_resid_pre").fingerprint != mine
    model_copy = copy_of(tiny("llama"), tmp_path / "other")
    change_config(model_copy, rms_norm_eps=1e-3)
    assert load(model_copy, "blocks.0.hook_resid_pre").fingerprint != mine


@pytest.mark.parametrize(
    "kind, path, causal", [("BertModel", "encoder.layer.1", False), ("MistralModel", "layers.1", True)]
)
def test_checkpoint_without_a_head_is_named_by_its_own_class(tmp_path, kind, path, causal):
    """Paths are that class's, a random head leaves the fingerprint alone, and nothing is predicted."""
    config = AutoConfig.for_model(kind.removesuffix("Model").lower(), **SIZES)
    network = getattr(transformers, kind)(config).eval()
    network.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    whole, cut = (load(tmp_path, "blocks.1.hook_resid_post", path, whole=whole) for whole in (True, False))
    assert [hook.path for hook in whole.hooks] == [path, path]
    assert whole.fingerprint == cut.fingerprint
    assert (whole.causal, whole.predicts) == (causal, False)
    seen, _ = observe(network, windows(), outputs=(path,))
    assert torch.equal(cut.activations(windows())[0], seen[path])
    with pytest.raises(ModelError, match="has no unembedding"):
        whole.unembedding()


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.2.hook_resid_mid", "blocks.3.hook_mlp_out"])
def test_overflow_in_float16_names_the_number_format(tmp_path, hook):
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


def test_weights_that_are_no_numbers_are_told(tmp_path):
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
    assert (
        "ViTModel has no embedding of token ids, so it reads no text; corpora are texts, and there is none of images"
        in refusal(tmp_path)
    )


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


def test_file_instead_of_a_folder_is_named():
    """The weights' own path is a common slip."""
    assert "name the folder that holds the model" in refusal(tiny("gpt2") / "model.safetensors")


def test_name_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    """Without network, a name that is not in the cache says where it was looked for and what to do."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("sluice-test/no-such-model")
    assert "not a folder here, not in the cache" in message and "connect to the network" in message
    assert "\n" not in message


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "llama"])
def test_missing_tokenizer_is_noticed(tmp_path, architecture):
    """Without tokenizer files transformers makes up an empty tokenizer; that is refused."""
    folder = copy_of(tiny(architecture), tmp_path / "model", without="tokenizer")
    assert "tokenizer" in refusal(folder)


def test_tokenizer_of_another_model_is_noticed(tmp_path):
    """A tokenizer with more words than the model has embeddings is refused before it can crash the run."""
    save_tokenizer(copy_of(tiny("gpt2"), tmp_path / "model"), words=65)
    assert "the tokenizer has 65 tokens and the model knows 64" in refusal(tmp_path / "model")


@pytest.mark.parametrize("missing_key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_incomplete_checkpoint_is_noticed(tmp_path, missing_key):
    """Weights that the checkpoint lacks would be random numbers; that is refused, with the name of one."""
    folder = copy_of(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[missing_key]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"the checkpoint lacks 1 parameters, such as {missing_key}" in refusal(folder)


def test_missing_head_matters_only_to_the_whole_model(tmp_path):
    """The producer does without the head; evaluation would measure a random one."""
    folder = copy_of(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load(folder, "blocks.0.hook_resid_post").self_check.passed
    assert "such as lm_head.weight" in refusal(folder, whole=True)


def test_damaged_weights_are_named(tmp_path):
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
def test_model_without_a_chain_of_blocks_is_refused(kind):
    """ALBERT has one block for all layers, XLM keeps attentions and MLPs in separate lists: neither can be cut."""
    assert "holds no chain of 4 blocks to hook" in refusal(tiny(kind))


@pytest.mark.parametrize("device", ["cuda:99", "cuda:7"])
def test_device_that_does_not_exist_is_refused(device):
    """The message names the setting, its value and what would do."""
    settings = ModelSettings(name=str(tiny("gpt2")), hooks=["blocks.0.hook_resid_post"], device=device)
    with pytest.raises(ModelError, match=f"model.device = '{device}'"):
        load_language_model(settings)
