"""Hooks inside attention and MLP, embedding and final norm by TransformerLens' names, against plain transformers.

What a name gives is compared, bit for bit, with forward hooks at module paths and channels written down here by hand,
and what is put in its place with a forward hook that does the same by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.small_language_models import (
    BLOCKS,
    LAYERS,
    WIDTH,
    load,
    observe,
    refusal,
    tiny,
    whole_class,
    whole_model,
    windows,
)

HEADS, SIZE = 2, 16


@dataclass(frozen=True)
class Place:
    """A tensor of the whole model: a module's output, or its input, and some of its channels."""

    module: str
    is_input: bool = False
    channels: Callable[[Tensor], Tensor] = lambda x: x
    """A view of the channels, which lie head after head."""


def interleaved(part: int, x: Tensor) -> Tensor:
    """Queries (0), keys (1) or values (2) of a projection that gives (q, k, v) for each head."""
    return x.view(*x.shape[:-1], HEADS, 3, SIZE)[..., part, :]


def joined(start: int, stop: int, x: Tensor) -> Tensor:
    """Heads `start` to `stop` of all heads of q, then of k, then of v."""
    return x.view(*x.shape[:-1], -1, SIZE)[..., start:stop, :]


def fused(module: str, *channels: Callable[[Tensor], Tensor]) -> dict[str, Place]:
    return {f"attn.hook_{name}": Place(module, channels=one) for name, one in zip("qkv", channels, strict=True)}


def separate(path: str) -> dict[str, Place]:
    return {f"attn.hook_{name}": Place(f"{path}.{name}_proj") for name in "qkv"}


def heads_of(output: str) -> dict[str, Place]:
    return {
        "attn.hook_z": Place(output, True),
        "attn.hook_z[1]": Place(output, True, partial(joined, 1, 2)),
    }


LLAMA = {
    "hook_attn_out": Place("self_attn"),
    "hook_mlp_in": Place("post_attention_layernorm"),
    "mlp.hook_post": Place("mlp.down_proj", True),
    "attn.hook_k[0]": Place("self_attn.k_proj"),
    "attn.hook_q[1]": Place("self_attn.q_proj", channels=partial(joined, 1, 2)),
    **separate("self_attn"),
    **heads_of("self_attn.o_proj"),
}
GEMMA = LLAMA | {"hook_attn_out": Place("post_attention_layernorm"), "hook_mlp_in": Place("pre_feedforward_layernorm")}
PLACES: dict[str, dict[str, Place]] = {
    "gpt2": {
        "hook_attn_out": Place("attn"),
        "hook_mlp_in": Place("ln_2"),
        "mlp.hook_post": Place("mlp.c_proj", True),
        "attn.hook_v[1]": Place("attn.c_attn", channels=partial(joined, 5, 6)),
        **fused("attn.c_attn", partial(joined, 0, 2), partial(joined, 2, 4), partial(joined, 4, 6)),
        **heads_of("attn.c_proj"),
    },
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": {
        "hook_attn_out": Place("attention"),
        "hook_mlp_in": Place("mlp", True),
        "mlp.hook_post": Place("mlp.dense_4h_to_h", True),
        "attn.hook_k[1]": Place("attention.query_key_value", channels=partial(joined, 4, 5)),
        **fused("attention.query_key_value", *(partial(interleaved, part) for part in range(3))),
        **heads_of("attention.dense"),
    },
    "falcon": {
        "hook_attn_out": Place("self_attention"),
        "hook_mlp_in": Place("mlp", True),
        "mlp.hook_post": Place("mlp.dense_4h_to_h", True),
        **fused("self_attention.query_key_value", partial(joined, 0, 2), partial(joined, 2, 3), partial(joined, 3, 4)),
        **heads_of("self_attention.dense"),
    },
    "bloom": {
        "hook_attn_out": Place("self_attention.dense"),
        "hook_mlp_in": Place("post_attention_layernorm"),
        "mlp.hook_post": Place("mlp.dense_4h_to_h", True),
        **fused("self_attention.query_key_value", *(partial(interleaved, part) for part in range(3))),
        **heads_of("self_attention.dense"),
    },
    "opt": {
        "hook_attn_out": Place("self_attn"),
        "hook_mlp_in": Place("final_layer_norm"),
        "mlp.hook_post": Place("fc2", True),
        **separate("self_attn"),
        **heads_of("self_attn.out_proj"),
    },
    "bert": {
        **{f"attn.hook_{name[0]}": Place(f"attention.self.{name}") for name in ("query", "key", "value")},
        **heads_of("attention.output.dense"),
    },
}
EMBEDDINGS = {
    "gpt2": ("transformer.wte", "transformer.ln_f"),
    "llama": ("model.embed_tokens", "model.norm"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
    "mamba": ("backbone.embeddings", "backbone.norm_f"),
}


def placed(architecture: str, place: Place, layer: int = 1) -> str:
    return f"{BLOCKS.get(architecture, 'model.layers')}.{layer}.{place.module}"


@pytest.mark.parametrize("architecture", PLACES)
def test_named_hooks_are_where_the_authors_have_them(architecture):
    """Each name gives, bit for bit, the tensor at the module and channels written down above."""
    places, tokens = PLACES[architecture], windows()
    model = load(tiny(architecture), *(f"blocks.1.{name}" for name in places))
    network = whole_model(architecture, tiny(architecture))
    inputs = {placed(architecture, place) for place in places.values() if place.is_input}
    outputs = {placed(architecture, place) for place in places.values() if not place.is_input}
    seen_inputs, _ = observe(network, tokens, inputs=sorted(inputs))
    seen_outputs, _ = observe(network, tokens, outputs=sorted(outputs))
    for hook, x, place in zip(model.hooks, model.activations(tokens), places.values(), strict=True):
        seen = (seen_inputs if place.is_input else seen_outputs)[placed(architecture, place)]
        assert torch.equal(x, place.channels(seen).reshape(x.shape)), hook.name
        assert (hook.module, hook.layer, hook.width) == (placed(architecture, place), 1, x.shape[-1])
        assert hook.side == ("input" if place.is_input else "output")
        assert hook.path.startswith(hook.module + (":input" if place.is_input else ""))
    assert model.layers_run == 2
    assert model.self_check.max_difference == 0


@pytest.mark.parametrize("architecture", PLACES)
def test_replacing_at_a_named_hook_is_replacing_there_by_hand(architecture):
    """Logits with another activation at a name are those of plain transformers with a forward hook at that place."""
    places, tokens = PLACES[architecture], windows()
    names = [f"blocks.1.{name}" for name in places]
    model = load(tiny(architecture), *names, whole=True)
    network = whole_model(architecture, tiny(architecture))
    clean = model.logits(tokens)
    for name, place in zip(names, places.values(), strict=True):
        assert torch.equal(clean, model.logits(tokens, {name: torch.clone})), name
        logits = model.logits(tokens, {name: lambda x: 1 - x})
        by_hand = with_hook(network, placed(architecture, place), place, tokens)
        assert torch.equal(logits, by_hand), name
        assert not torch.allclose(logits, clean, atol=1e-4) or name.endswith(("hook_k", "hook_k[0]")), name


@torch.no_grad()
def with_hook(network: nn.Module, path: str, place: Place, tokens: Tensor) -> Tensor:
    """Logits of plain transformers with 1 − x at a place."""

    def change(x: Tensor) -> Tensor:
        result = x.clone()
        view = place.channels(result)
        view.copy_(1 - view)
        return result

    def before(module: nn.Module, args: tuple) -> tuple:
        return (change(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, output: object) -> object:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module = network.get_submodule(path)
    handle = module.register_forward_pre_hook(before) if place.is_input else module.register_forward_hook(after)
    try:
        return network(input_ids=tokens).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "bloom", "opt", "bert", "gemma3_text", "qwen3"])
def test_z_is_what_the_pattern_gathers_from_v(architecture):
    """For every head, z is the attention pattern that transformers returns times the values of its group."""
    model, tokens = load(tiny(architecture), "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"), windows()
    v, z = (x.unflatten(-1, (-1, SIZE)).transpose(1, 2) for x in model.activations(tokens))
    network = whole_class(architecture).from_pretrained(tiny(architecture), attn_implementation="eager").eval()
    with torch.no_grad():
        pattern = network(input_ids=tokens, output_attentions=True).attentions[1]
    torch.testing.assert_close(z, pattern @ v.repeat_interleave(HEADS // v.shape[1], 1), rtol=1e-4, atol=1e-5)


def test_z_is_softmax_of_q_and_k_over_v():
    """GPT-2's attention computed by hand from hook_q, hook_k and hook_v is hook_z."""
    names = [f"blocks.2.attn.hook_{part}" for part in "qkvz"]
    parts = load(tiny("gpt2"), *names).activations(windows())
    q, k, v, z = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in parts)
    by_hand = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(z, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", EMBEDDINGS)
def test_embedding_and_final_norm(architecture):
    """hook_embed runs no block, ln_final.hook_normalized all of them, and both are those modules' outputs."""
    embedding, norm = EMBEDDINGS[architecture]
    tokens = windows()
    seen, _ = observe(whole_model(architecture, tiny(architecture)), tokens, outputs=(embedding, norm))
    first = load(tiny(architecture), "hook_embed")
    assert torch.equal(first.activations(tokens)[0], seen[embedding]) and first.layers_run == 0
    last = load(tiny(architecture), "ln_final.hook_normalized")
    assert torch.equal(last.activations(tokens)[0], seen[norm]) and last.layers_run == LAYERS
    assert [hook.path for hook in (*first.hooks, *last.hooks)] == [embedding, norm]


def test_module_path_may_name_the_input():
    """PATH:input is what the module is given; a block's is resid_pre, and a pass ends before it runs."""
    tokens, paths = windows(), ("model.layers.1.mlp", "model.layers.2", "model.norm", "model.layers.0.mlp.down_proj")
    seen, _ = observe(whole_model("llama", tiny("llama")), tokens, inputs=[p for p in paths if p != "model.layers.2"])
    for path in paths:
        model = load(tiny("llama"), f"{path}:input")
        (x,) = model.activations(tokens)
        assert model.hooks[0].path == f"{path}:input"
        if path == "model.layers.2":
            assert torch.equal(x, load(tiny("llama"), "blocks.2.hook_resid_pre").activations(tokens)[0])
            assert model.layers_run == 2
        else:
            assert torch.equal(x, seen[path])


def test_module_path_may_name_an_element_of_a_tuple():
    """PATH[0] is the first element, as PATH is; an element that is no activation, or not there, gets the reason."""
    folder, tokens = tiny("llama"), windows()
    first, plain = load(folder, "model.layers.1.self_attn[0]", "model.layers.1.self_attn").activations(tokens)
    assert torch.equal(first, plain)
    assert "returns NoneType, not activations" in refusal(folder, "model.layers.1.self_attn[1]")
    assert "returns NoneType, not activations" in refusal(folder, "model.layers.1.self_attn[7]")


class Twins(nn.Module):
    """Returns two activations."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


def test_second_element_can_be_read_and_replaced(monkeypatch):
    """A module that returns (x, y): y is read at PATH[1], and replaced there with x left alone."""
    from producer.lm.hooks import HookLocation, attach

    twins, x, seen = Twins(), torch.ones(2, 3, 4), []
    location = HookLocation(twins, "twins", element=1)
    with attach(location, lambda y: seen.append(y.clone())):
        twins(x)
    assert torch.equal(seen[0], 2 * x)
    with attach(location, torch.zeros_like):
        first, second = twins(x)
    assert torch.equal(first, x) and not second.any()


@pytest.mark.parametrize(
    "architecture, hook, reason",
    [
        ("llama", "blocks.1.attn.hook_z[2]", "there are 2 heads; expected [0] to [1]"),
        ("llama", "blocks.1.attn.hook_k[1]", "there are 1 heads; expected [0] to [0]"),
        ("mamba", "blocks.1.attn.hook_z", "has no attention whose values leave a projection"),
        ("mamba", "blocks.1.hook_attn_out", "does not return resid_mid + mlp_out"),
        ("bert", "ln_final.hook_normalized", "BertForMaskedLM has no norm after its last block; use blocks.3.hook_res"),
        ("llama", "blocks.1.attn.hook_pattern", "has no such hook; expected blocks.N.hook_{resid_pre,resid_post"),
        ("llama", "blocks.1.hook_atn_out", "(did you mean blocks.1.hook_attn_out?)"),
        ("llama", "blocks.1.attn.hook_zz", "(did you mean blocks.1.attn.hook_z?)"),
    ],
)
def test_what_a_model_does_not_have_is_said(architecture, hook, reason):
    """A model without such a point says why, and names what there is."""
    assert reason in refusal(tiny(architecture), hook)


def test_one_position_beside_a_massive_one_is_compared_by_its_own_size():
    """In bfloat16, noise as large as an activation does not pass because BOS is thousands of times larger."""
    from producer.lm.errors import ModelError
    from producer.lm.hooks import HookPoint
    from producer.lm.self_check import Observation, compare

    x = torch.ones(1, 8, WIDTH)
    x[:, 0] = 10_000
    noisy = x.clone()
    noisy[:, 5] += 0.5
    hook = HookPoint("blocks.0.hook_resid_post", "model.layers.0", 0, WIDTH)
    observation = Observation((1,), (x,), None)
    assert compare([hook], [x.clone()], [observation], torch.bfloat16).passed
    with pytest.raises(ModelError, match="self-check failed"):
        compare([hook], [noisy], [observation], torch.bfloat16)
