"""LanguageModel: padding, token ids, longest windows, logits with activations replaced, the unembedding."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from producer.corpus.rendering.windows import windows_of
from producer.lm.errors import ModelError
from producer.settings import CorpusSettings
from tests.small_language_models import (
    MIDDLES,
    WIDTH,
    change_config,
    copy_of,
    load,
    observe,
    save_tokenizer,
    tiny,
    whole_model,
    windows,
)

# Padding and masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "opt", "qwen3", "bert"])
def test_full_windows_run_without_a_mask(architecture):
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


def test_causal_model_needs_no_padding():
    """Padding on the right leaves all that comes before it exactly as it was."""
    model, tokens = load(tiny("llama"), "blocks.3.hook_resid_post"), windows()
    padded, padding = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    padded[:, 8:], padding[:, 8:] = 2, True
    (x,), (y,) = model.activations(tokens), model.activations(padded, padding)
    assert model.causal
    assert torch.equal(x[:, :8], y[:, :8])


def test_encoder_is_told_of_padding():
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
def test_decoder_that_sees_ahead_is_an_encoder(tmp_path, architecture, dtype):
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


def test_bert_made_a_decoder_is_causal():
    """What decides is the configuration, not the name of the architecture."""
    assert load(tiny("bert decoder"), "blocks.1.hook_resid_post").causal


@pytest.mark.parametrize("architecture", ["fnet", "convbert"])
def test_encoder_that_no_mask_helps_reads_text_alone(architecture):
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


# Token ids beyond the embedding --------------------------------------------------------------------------------------


@pytest.fixture
def with_image_token(tmp_path):
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
        with pytest.raises(ModelError) as error:
            use(tokens)
        assert str(error.value).startswith("window 1, position 2: token id 64 ('<image>') is unknown to ")
        assert "ids 0 to 63; the text there is 'w5 w6 <image> w8': take it out" in str(error.value)
    with pytest.raises(ModelError, match=r"held-out window 0, position 1: token id -3 \(no token\)"):
        model.check_ids(torch.tensor([[5, -3, 99]]), "held-out window")


def test_padding_that_the_model_does_not_know_is_replaced(tmp_path):
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


# Logits, with activations replaced -----------------------------------------------------------------------------------


REPLACED = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "opt", "bloom", "gpt_neox sequential"])
def test_logits_with_activations_replaced(architecture):
    """Without replacement they are the model's own; the identity changes nothing at all; zeros change them."""
    folder, tokens = tiny(architecture), windows()
    model = load(folder, *REPLACED, whole=True)
    clean = model.logits(tokens)
    assert torch.equal(clean, observe(whole_model(architecture, folder), tokens)[1].logits)
    assert torch.equal(clean, model.logits(tokens, {name: lambda x: x.clone() for name in REPLACED}))
    for name in REPLACED:
        assert not torch.allclose(clean, model.logits(tokens, {name: torch.zeros_like}), atol=1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma", "opt", "bloom", "gpt_neox sequential"])
def test_unembedding_is_what_the_model_does_to_its_last_activations(architecture):
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
def test_unembedding_of_a_small_change(architecture):
    """A direction with a mean, added to real activations, moves the logits as told, but for one factor: the norm's."""
    config = AutoConfig.from_pretrained(tiny(architecture))
    last = f"blocks.{config.num_hidden_layers - 1}.hook_resid_post"
    model = load(tiny(architecture), last, whole=True)
    unembedding = model.unembedding()
    assert unembedding.norm_subtracts_mean == (architecture == "gpt2")
    direction = torch.randn(len(unembedding.gain), generator=torch.Generator().manual_seed(1)) + 2
    size = 1e-2
    changed_logits = model.logits(windows(), {last: lambda rows: rows + size * direction})
    change = (changed_logits - model.logits(windows())).flatten(0, 1).mean(0) / size
    predicted_change = unembedding.logits(direction)
    # What the norm takes from the direction along the stream itself differs by row, and is not in it.
    assert torch.corrcoef(torch.stack([change - change.mean(), predicted_change - predicted_change.mean()]))[0, 1] > 0.9


def test_replacing_is_the_threads_own():
    """While one thread has put zeros at a hook, another one sees the model's own activations there."""
    name, tokens = "blocks.1.hook_resid_post", windows()
    model = load(tiny("llama"), name, whole=True)
    (clean,) = model.activations(tokens)
    results = []

    def zeros(x):
        other = threading.Thread(target=lambda: results.append(model.activations(tokens)[0]))
        other.start()
        other.join()
        return torch.zeros_like(x)

    model.logits(tokens, {name: zeros})
    assert torch.equal(results[0], clean)


def test_replacing_does_not_leak_into_another_threads_pass():
    """That other pass reads a hook further on, and one in between is replaced meanwhile: it sees none of it."""
    name, later, tokens = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", windows()
    model = load(tiny("llama"), name, later, whole=True)
    clean = model.activations(tokens)
    starts, results = [], []

    def zeros(x):
        if not starts:  # a leak is to end as a difference, not as threads without end
            starts.append(True)
            other = threading.Thread(target=lambda: results.extend(model.activations(tokens)))
            other.start()
            other.join()
        return torch.zeros_like(x)

    model.logits(tokens, {name: zeros})
    assert all(map(torch.equal, results, clean)) and len(results) == 2


@pytest.mark.parametrize("architecture", MIDDLES)
def test_replaced_middle_reaches_the_mlp_and_the_residual(architecture):
    """What is put at resid_mid is what the MLP reads and what goes around it: resid_post is it plus the new mlp_out."""
    model = load(tiny(architecture), *REPLACED, whole=True)
    tensors = {}

    def change(x):
        tensors["mid"] = 0.5 * x - 1
        return tensors["mid"].clone()

    def look(name):
        return lambda x: tensors.setdefault(name, x.clone())

    model.logits(windows(), dict(zip(REPLACED[1:], (change, look("mlp_out"), look("post")), strict=True)))
    assert torch.equal(tensors["mid"] + tensors["mlp_out"], tensors["post"])
    assert not torch.equal(tensors["mlp_out"], model.activations(windows())[2])


def test_attention_output_can_be_replaced():
    """A module that returns a tuple gets its first member replaced, the others kept."""
    model = load(tiny("llama"), "model.layers.1.self_attn", whole=True)
    clean = model.logits(windows())
    assert torch.equal(clean, model.logits(windows(), {"model.layers.1.self_attn": lambda x: x}))
    assert not torch.equal(clean, model.logits(windows(), {"model.layers.1.self_attn": torch.zeros_like}))


def test_logits_refuse_what_they_cannot_do():
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


# The longest window -------------------------------------------------------------------------------------------------


def test_roberta_spends_positions_on_padding():
    """Its table of 32 positions serves windows of 29: two before the padding's, and the padding's own."""
    model = load(tiny("roberta"), "blocks.1.hook_resid_post")
    assert model.context_limit == 29
    assert model.activations(windows(1, 29))[0].shape == (1, 29, WIDTH)


def test_window_longer_than_the_model_reads_is_refused():
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
def test_longest_window_is_known_under_any_name(architecture):
    """Each configuration calls its positions otherwise, and some tables begin at a later row."""
    model = load(tiny(architecture), "blocks.0.hook_resid_post")
    assert model.context_limit == LONGEST[architecture]
    model.check_context(LONGEST[architecture] or 100)
    if model.context_limit is not None:
        with pytest.raises(ModelError, match=r"corpus.context = 33 is longer than the (32|29) tokens that"):
            model.check_context(33)


def test_table_of_positions_counts_more_than_the_configuration(tmp_path):
    """A table that serves fewer positions than the configuration says is what a window runs into."""
    folder = copy_of(tiny("opt"), tmp_path / "short")
    change_config(folder, max_position_embeddings=30)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed_positions" in name)
    weights[name] = weights[name][:32]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, n_positions=1000)
    assert load(folder, "blocks.0.hook_resid_post").context_limit == 30


def test_window_that_breaks_the_model_is_told_with_the_setting(monkeypatch):
    """Where neither the configuration nor a table tells, one window is tried at the start."""
    model = load(tiny("mpt"), "blocks.0.hook_resid_post")
    monkeypatch.setattr(model, "context_limit", None)
    with pytest.raises(ModelError, match=r"corpus.context = 40: .* cannot read a window of so many tokens \(Runtime"):
        model.check_context(40)
