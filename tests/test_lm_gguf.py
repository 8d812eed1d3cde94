"""GGUF files as models: the numbers that transformers reads from them, directly and through a Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from producer.lm.gguf import save_as_folder
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import ModelSettings
from tests.small_language_models import refusal

WIDTH, LAYERS, HIDDEN, HEADS = 64, 2, 96, 2
TOKENS = ["<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), "Ġ", "th", "the"]
MERGES = ["t h", "th e"]
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two blocks in GGUF, its matrices in blocks of 4 bits (Q4_1)."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weight = random.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", WIDTH)
        for name, shape in (("ffn_gate", (HIDDEN, WIDTH)), ("ffn_up", (HIDDEN, WIDTH)), ("ffn_down", (WIDTH, HIDDEN))):
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(name: Path) -> LanguageModel:
    return load_language_model(ModelSettings(name=str(name), hooks=[HOOK], dtype="float32"))


def test_a_gguf_file_is_a_model(file: Path) -> None:
    """`model.name` is the file: its activations are those of transformers and of the folder made of it, bit for bit."""
    model = load(file)
    ids = torch.tensor([model.tokenizer("the cat").input_ids])
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    with torch.inference_mode():
        expected = reference(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(model.activations(ids)[0], expected)

    save_as_folder(file, file.parent / "folder")
    folder = load(file.parent / "folder")
    assert folder.tokenizer("the cat").input_ids == ids[0].tolist()
    assert torch.equal(folder.activations(ids)[0], expected)


def test_the_folder_holds_the_numbers_of_the_blocks(file: Path, tmp_path: Path) -> None:
    """A Q4_1 block of 32 numbers is 4 bits each, a scale and a minimum: what the folder holds is q·scale + minimum."""
    save_as_folder(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tensor,) = (tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight")
    block = tensor.data.reshape(-1)[:20]
    scale, minimum = block[:4].view(np.float16).astype(np.float32)
    values = np.concatenate([block[4:] & 15, block[4:] >> 4]) * scale + minimum
    torch.testing.assert_close(weights["model.layers.1.mlp.down_proj.weight"][0, :32], torch.from_numpy(values))
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_without_the_extra_a_sentence_names_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert refusal(file, HOOK).endswith('GGUF files need the package gguf; pip install "sluice-sae[gguf]"')
