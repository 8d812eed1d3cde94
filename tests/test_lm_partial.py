"""Loading what hooks need of a model: what is held, what is read, and that it is the same model as the whole."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.pretrained import load_pretrained
from producer.settings import ModelSettings
from tests.small_language_models import LAYERS, copy_of, load, model_with_code, save_tokenizer, tiny, windows

ROOT = Path(__file__).parent.parent
MODEL_BYTES = 150_000_000

LOAD = """
import json, sys
from producer.lm.loading import load_language_model
from producer.settings import ModelSettings
import torch, transformers
from transformers import LlamaForCausalLM

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
before = status("VmRSS")
model = load_language_model(ModelSettings(name=sys.argv[1], hooks=[sys.argv[2]], device="cpu", dtype="float32"))
held = 4 * sum(weight.numel() for weight in model.network.module.parameters())
print(json.dumps({"held": held, "peak": status("VmHWM") - before}))
"""


def settings_of(folder: Path, *hooks: str) -> ModelSettings:
    return ModelSettings(name=str(folder), hooks=list(hooks), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 160 MB: 18 blocks of 8.4 MB, an embedding and a head of 4 MB each."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=682, num_hidden_layers=18, num_attention_heads=8
    )
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(folder, max_shard_size="50MB")
    save_tokenizer(folder)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_what_is_kept(large: Path) -> None:
    """From its start to the loaded model, a process holds the blocks before the hook and little more."""
    command = [sys.executable, "-c", LOAD, str(large), "blocks.2.hook_resid_post"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    memory = json.loads(process.stdout)
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > MODEL_BYTES
    assert memory["held"] < 0.2 * MODEL_BYTES
    assert memory["peak"] < memory["held"] + 0.3 * MODEL_BYTES


@pytest.mark.parametrize(
    "hook, layers",
    [
        ("hook_embed", 1),
        ("blocks.0.hook_resid_pre", 1),
        ("blocks.2.hook_resid_pre", 2),
        ("blocks.2.hook_mlp_out", 3),
        ("blocks.1.attn.hook_z[1]", 2),
        ("model.layers.1.mlp", 2),
        ("layers.2:input", 2),
        ("model.norm", LAYERS),
        ("ln_final.hook_normalized", LAYERS),
    ],
)
def test_blocks_up_to_the_hook_are_loaded(hook: str, layers: int) -> None:
    """The head and later blocks have no weights; a pass goes through them to the end all the same."""
    pretrained = load_pretrained(settings_of(tiny("llama"), hook), torch.float32, torch.device("cpu"), whole=False)
    held = {name.split(".")[2] for name, _ in pretrained.network.named_parameters() if ".layers." in name}
    assert held == {str(layer) for layer in range(layers)}
    assert not list(pretrained.network.lm_head.parameters())
    assert load(tiny("llama"), hook).self_check.max_difference == 0


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral", "mamba", "bert", "opt"])
def test_model_in_part_is_the_whole_model(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    """Activations, fingerprint and causality are those of the whole model, cut after it was loaded."""
    hooks = ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    with caplog.at_level(logging.INFO, "sluice.lm"):
        part = load(tiny(architecture), *hooks)
    assert "does not run without its later blocks" not in caplog.text
    whole = load(tiny(architecture), *hooks, whole=True)
    assert part.fingerprint == whole.fingerprint
    assert (part.causal, part.hooks, part.layers_total) == (whole.causal, whole.hooks, whole.layers_total)
    for x, y in zip(part.activations(windows()), whole.activations(windows()), strict=True):
        assert torch.equal(x, y)


def test_weights_of_another_format_are_loaded_part_by_part(tmp_path: Path) -> None:
    """PyTorch's own files have the same fingerprint, which takes a look at each part."""
    folder = copy_of(tiny("llama"), tmp_path / "bin")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hook = "blocks.0.hook_resid_post"
    assert load(folder, hook).fingerprint == load(tiny("llama"), hook).fingerprint


def test_cost_of_loading_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes read of those of the whole model, and seconds of loading and of the self-check."""
    with caplog.at_level(logging.INFO, "sluice.lm"):
        load(tiny("llama"), "blocks.0.hook_resid_post")
    # Embedding (64 × 32), one block (7,744 numbers) and the last norm (32); of four blocks and a head (32 × 64).
    assert "39.3 kB of 140 kB of weights loaded in " in caplog.text
    assert "self-check in " in caplog.text


LOOKING_AHEAD = '''
from transformers import LlamaConfig, LlamaForCausalLM

class AheadConfig(LlamaConfig):
    model_type = "ahead"

class AheadForCausalLM(LlamaForCausalLM):
    """A Llama that reads a weight of its last block at the end of each pass."""

    config_class = AheadConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.model.layers[-1].mlp.up_proj.weight.sum()
        return output
'''


def test_model_that_needs_its_later_blocks_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, and the model is cut as before."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model_with_code(tmp_path / "ahead", "Ahead", LOOKING_AHEAD)
    hook = "blocks.0.hook_resid_post"
    with caplog.at_level(logging.INFO, "sluice.lm"):
        model = load(folder, hook, trust_remote_code=True)
    assert "does not run without its later blocks, and is loaded as a whole" in caplog.text
    assert model.layers_total == LAYERS
    assert torch.equal(model.activations(windows())[0], load(tiny("llama"), hook).activations(windows())[0])


def test_unknown_hook_is_refused_before_all_is_loaded(large: Path) -> None:
    """A name that fits no module needs no more than one block to be refused."""
    names = ["blocks.99.hook_resid_post", "model.layer.17.mlp"]
    pretrained = load_pretrained(settings_of(large, *names), torch.float32, torch.device("cpu"), whole=False)
    assert pretrained.parts is not None and pretrained.parts.layers == 1
    with pytest.raises(ModelError, match=r"model\.layer\.17\.mlp"):
        load_language_model(settings_of(large, *names))
