"""The activations at hooks of tiny random models of many architectures, in fp32 on the CPU.

What a hook gives is compared, bit for bit, with the whole model as transformers runs it: with its `hidden_states`
and with forward hooks that these tests set themselves, at module paths written down here by hand.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import AutoConfig

from producer.lm.hooks import HookPoint
from producer.lm.loading import load_language_model
from producer.settings import ModelSettings
from tests.small_language_models import (
    BLOCKS,
    CONTEXT,
    LAYERS,
    MIDDLES,
    SIZES,
    WIDTH,
    WORDS,
    load,
    observe,
    refusal,
    save_tokenizer,
    tiny,
    whole_model,
    windows,
)


@pytest.mark.parametrize("architecture", BLOCKS)
def test_block_hooks_of_the_cut_model_equal_the_whole_model(architecture):
    """resid_pre and resid_post of early, middle and last blocks are the whole model's activations, bit for bit."""
    folder, path, tokens = tiny(architecture), BLOCKS[architecture], windows()
    pre, post = [f"blocks.{n}.hook_resid_pre" for n in (0, 2, 3)], [f"blocks.{n}.hook_resid_post" for n in (0, 1, 3)]
    model = load(folder, *pre, *post)
    activations = dict(zip(pre + post, model.activations(tokens), strict=True))

    blocks = tuple(f"{path}.{n}" for n in range(LAYERS))
    tensors, result = observe(whole_model(architecture, folder), tokens, outputs=blocks)
    for n in (0, 1, 3):
        assert torch.equal(activations[f"blocks.{n}.hook_resid_post"], tensors[f"{path}.{n}"])
    for n in (2, 3):
        assert torch.equal(activations[f"blocks.{n}.hook_resid_pre"], tensors[f"{path}.{n - 1}"])
    if architecture != "mamba":  # whose hidden_states begin with the first block's output
        for n in (0, 2, 3):
            assert torch.equal(activations[f"blocks.{n}.hook_resid_pre"], result.hidden_states[n])
        for n in (0, 1):
            assert torch.equal(activations[f"blocks.{n}.hook_resid_post"], result.hidden_states[n + 1])
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
def test_last_block_is_hooked_before_the_final_norm(architecture, final_norm):
    """hidden_states[-1] is not what the hook gives: only after the final norm are they equal."""
    folder, tokens = tiny(architecture), windows()
    (last,) = load(folder, f"blocks.{LAYERS - 1}.hook_resid_post").activations(tokens)
    network = whole_model(architecture, folder)
    _, result = observe(network, tokens)
    assert not torch.allclose(last, result.hidden_states[-1], atol=0.1)
    with torch.inference_mode():
        assert torch.equal(network.get_submodule(final_norm)(last), result.hidden_states[-1])


@pytest.mark.parametrize("architecture", MIDDLES)
def test_middle_and_mlp_add_up_to_the_block(architecture):
    """resid_mid + mlp_out is resid_post to the last bit, and both are where the architecture's authors have them."""
    folder, tokens = tiny(architecture), windows()
    names = [f"blocks.2.hook_{kind}" for kind in ("resid_pre", "resid_mid", "mlp_out", "resid_post")]
    model = load(folder, *names)
    pre, mid, mlp_out, post = model.activations(tokens)
    assert torch.equal(mid + mlp_out, post)
    assert not torch.allclose(mid, pre, atol=1e-3)

    before, after = (f"{BLOCKS[architecture]}.2.{module}" for module in MIDDLES[architecture])
    tensors, _ = observe(whole_model(architecture, folder), tokens, inputs=(before,), outputs=(after,))
    assert torch.equal(mid, tensors[before].reshape(mid.shape))
    assert torch.equal(mlp_out, tensors[after].reshape(mid.shape))
    assert (model.hooks[1].module, model.hooks[1].side) == (before, "input")
    assert model.hooks[2] == HookPoint(names[2], after, 2, WIDTH)


@pytest.mark.parametrize("architecture", ["gpt_neox", "falcon"])
def test_parallel_block_has_an_mlp_but_no_middle(architecture):
    """mlp_out is found, and survives that Falcon adds the attention into the same tensor; resid_mid is refused."""
    folder, tokens = tiny(architecture), windows()
    mlp_out, _ = load(folder, "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post").activations(tokens)
    path = f"{BLOCKS[architecture]}.1.mlp"
    tensors, _ = observe(whole_model(architecture, folder), tokens, outputs=(path,))
    assert torch.equal(mlp_out, tensors[path])
    assert "in parallel on the same input" in refusal(folder, "blocks.1.hook_resid_mid")


@pytest.mark.parametrize("architecture, block", [("bert", "BertLayer"), ("opt post-norm", "OPTDecoderLayer")])
@pytest.mark.parametrize("kind", ["resid_mid", "mlp_out"])
def test_block_that_normalises_after_adding_has_no_middle(architecture, block, kind):
    """Where the sum is normed before it is handed on, resid_mid and mlp_out are refused, and module paths offered."""
    message = refusal(tiny(architecture), f"blocks.1.hook_{kind}")
    assert f"{block} does not return resid_mid + mlp_out" in message
    assert "use hook_resid_pre, hook_resid_post or a module path: " in message


def test_many_hooks_come_in_the_order_of_the_settings():
    """One pass serves all hooks, and each lies where the settings named it, not where the model came upon it."""
    folder, tokens = tiny("llama"), windows()
    names = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.1.hook_resid_mid"]
    together = load(folder, *names).activations(tokens)
    for name, x in zip(names, together, strict=True):
        assert torch.equal(load(folder, name).activations(tokens)[0], x)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "falcon", "bert"])
def test_passes_may_run_side_by_side(architecture):
    """Each thread is given the activations of its own windows, and counts its own blocks."""
    model = load(tiny(architecture), "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    inputs = [(windows(1 + n % 3) + n) % WORDS for n in range(24)]
    alone = [model.activations(tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as lanes:
        together = list(lanes.map(model.activations, inputs))

    for expected, actual in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, actual, strict=True))
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
def test_module_path_hooks_that_module(name, path, layer, width):
    """A path, counted from the model or from its decoder, gives that module's output; of a tuple, the first."""
    folder, tokens = tiny("llama"), windows()
    model = load(folder, name)
    tensors, _ = observe(whole_model("llama", folder), tokens, outputs=(path,))
    assert torch.equal(model.activations(tokens)[0], tensors[path])
    assert model.hooks == (HookPoint(name, path, layer, width),)


def test_bfloat16_model_gives_bfloat16():
    """The number format asked for is the one computed in and handed out, and the middle is found in it too."""
    names = ["blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"]
    model = load(tiny("llama"), *names, dtype="bfloat16")
    mid, mlp_out, post = model.activations(windows())
    assert {x.dtype for x in (mid, mlp_out, post)} == {torch.bfloat16}
    assert torch.equal(mid + mlp_out, post)


def test_language_model_inside_a_multimodal_one_is_found(tmp_path):
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
    assert (
        model.network.parameter_count == load(tiny("gemma3_text"), "blocks.1.hook_resid_post").network.parameter_count
    )
    assert load(tmp_path, "blocks.1.hook_resid_post", whole=True).logits(windows()).shape == (3, CONTEXT, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_runs_in_bfloat16_with_sdpa():
    """With device auto and a GPU: bfloat16, on the GPU, near the CPU's fp32."""
    settings = ModelSettings(name=str(tiny("llama")), hooks=["blocks.2.hook_resid_post"])
    (x,) = load_language_model(settings).activations(windows())
    (exact,) = load(tiny("llama"), "blocks.2.hook_resid_post").activations(windows())
    assert x.device.type == "cuda" and x.dtype == torch.bfloat16
    assert (x.float().cpu() - exact).square().mean() < 1e-3 * exact.square().mean()


def test_a_middle_that_the_residual_does_not_go_through_is_none(monkeypatch):
    """A block that hands its norm a copy: the sum holds, until the copy is replaced. Such a middle is refused."""

    def forward(self, hidden_states, **others):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        middle = hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(middle.clone()))

    before = load(tiny("llama"), "blocks.1.hook_resid_post").activations(windows())[0]
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", forward)
    assert torch.equal(load(tiny("llama"), "blocks.1.hook_resid_post").activations(windows())[0], before)
    assert "hook_resid_mid" in refusal(tiny("llama"), "blocks.1.hook_resid_mid")


def test_unknown_hooks_are_refused_together():
    """Each unknown name gets a line that says what exists, and the nearest name."""
    message = refusal(tiny("llama"), "blocks.1.hook_resid_pots", "blocks.4.hook_resid_post", "blocks.2.attn.hook_a")
    first, second, third = message.split("\n")
    assert first.startswith("model.hooks = 'blocks.1.hook_resid_pots': ")
    assert "has no such hook (did you mean blocks.1.hook_resid_post?)" in first
    assert "blocks.N.hook_{resid_pre,resid_post,attn_out,resid_mid,mlp_in,mlp_out}, blocks.N.mlp.hook_post" in first
    assert "model.layers.0, inside which there are self_attn, mlp, input_layernorm" in first
    assert "has 4 blocks; expected blocks.0 to blocks.3" in second
    assert "'blocks.2.attn.hook_a'" in third


@pytest.mark.parametrize(
    "hook, reason",
    [
        ("lm_head", "not part of model, which holds the blocks"),
        ("model.layers", "runs 0 times in one pass"),
        ("model.rotary_emb", "not one activation for each token"),
        ("model", "not activations"),
    ],
)
def test_module_without_activations_is_refused(hook, reason):
    """A path that exists but gives no activation for each token gets the reason."""
    assert reason in refusal(tiny("llama"), hook)


def test_positions_shared_by_all_windows_are_not_activations():
    """GPT-2's table of positions gives one row for each position, not for each token."""
    assert "not one activation for each token" in refusal(tiny("gpt2"), "transformer.wpe")
