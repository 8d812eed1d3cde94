"""A model over several devices, larger than memory, or quantised: where its parts go, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from producer.lm.model import LanguageModel
from producer.lm.weights import placement
from producer.lm.weights.placement import place_blocks
from producer.produce import run_ahead
from producer.settings import ModelSettings
from tests.small_language_models import WIDTH, change_config, copy_of, load, refusal, tiny, windows

HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
GPUS = ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    "devices, free, expected",
    [
        (["cuda:0"], [100], ["cuda:0"] * 4),
        (GPUS, [100, 100], ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]),
        (GPUS, [15, 100], ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]),
        ([*GPUS, "cpu"], [15, 10, 100], ["cuda:0", "cuda:1", "cpu", "cpu"]),
        (["cpu", "disk"], [25, float("inf")], ["cpu", "cpu", "disk", "disk"]),
        (GPUS, [15, 25], None),
    ],
)
def test_blocks_are_placed_in_order(devices: list[str], free: list[float], expected: list[str] | None) -> None:
    """Four blocks of 10 bytes after 4 bytes of embedding: even on GPUs, then where there is room."""
    assert place_blocks([10, 10, 10, 10], 4, devices, free) == expected


def load_split(monkeypatch: pytest.MonkeyPatch, architecture: str, whole: bool) -> LanguageModel:
    """A tiny model of which half fits into memory; the rest stays on disk."""
    pytest.importorskip("accelerate")
    half = 0.55 * (tiny(architecture) / "model.safetensors").stat().st_size
    monkeypatch.setattr(placement, "free_bytes", {"cpu": half, "disk": float("inf")}.__getitem__)
    return load(tiny(architecture), *HOOKS, whole=whole, device="auto", devices=["cpu", "disk"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_activations_of_a_split_model_are_the_same_bits(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read while the model lies on two devices: activations, logits, fingerprint."""
    one = load(tiny(architecture), *HOOKS, whole=True)
    two = load_split(monkeypatch, architecture, whole=True)
    blocks = [block for block in two.network.module.modules() if type(block).__name__.endswith(("Layer", "Block"))]
    where = {weight.device.type for block in blocks for weight in block.parameters()}
    assert where == {"cpu", "meta"}  # what is on disk is nowhere between passes
    for x, y in zip(one.activations(windows()), two.activations(windows()), strict=True):
        assert torch.equal(x, y)
    replace = {HOOKS[0]: torch.neg}
    assert torch.equal(one.logits(windows(), replace), two.logits(windows(), replace))
    assert torch.equal(one.unembedding().logits(torch.ones(WIDTH)), two.unembedding().logits(torch.ones(WIDTH)))
    assert (two.is_offloaded, two.fingerprint) == (True, one.fingerprint)


def test_cut_model_is_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer's part of a model: three blocks, two in memory."""
    one, two = load(tiny("llama"), *HOOKS), load_split(monkeypatch, "llama", whole=False)
    assert two.self_check.max_difference == 0
    for x, y in zip(one.activations(windows()), two.activations(windows()), strict=True):
        assert torch.equal(x, y)


def test_passes_are_started_ahead() -> None:
    """With two GPUs, two passes are under way while the result of the one before is packed."""
    log: list[str] = []

    def pack(number: int) -> int:
        log.append(f"pack {number}")
        return number

    def start(number: int) -> Callable[[], int]:
        log.append(f"start {number}")
        return partial(pack, number)

    assert list(run_ahead(map(start, range(4)), 2)) == [0, 1, 2, 3]
    assert log == ["start 0", "start 1", "start 2", "pack 0", "start 3", "pack 1", "pack 2", "pack 3"]


@pytest.mark.parametrize("whole", [True, False])
def test_model_larger_than_memory_is_refused(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with the bytes and what to do; evaluation needs the whole model."""
    monkeypatch.setattr(placement, "free_memory", lambda: 50_000.0)
    message = refusal(tiny("llama"), "blocks.1.hook_resid_post", whole=whole)
    needed = "the whole model, which evaluation needs, has 140 kB" if whole else "up to the last hook have 70.3 kB"
    assert needed in message and "50 kB are free on cpu; spread it with model.devices" in message
    assert load(tiny("llama"), "blocks.0.hook_resid_post").self_check.passed


def test_devices_that_do_not_hold_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes that are free on each."""
    pytest.importorskip("accelerate")
    monkeypatch.setattr(placement, "free_bytes", lambda device: 50_000.0)
    message = refusal(tiny("llama"), *HOOKS, device="auto", devices=["cpu"])
    assert message.startswith("model.devices = ['cpu']: the 101 kB of weights do not fit") and "cpu (50 kB)" in message


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"devices": ["gpu"]}, "has 'gpu'; expected GPUs by number"),
        ({"devices": ["cpu", "cuda:0"]}, "is in another order"),
        ({"devices": ["disk"]}, "needs each device once, and one that computes"),
        ({"devices": ["cpu", "disk"], "device": "cpu"}, "leave one of them out"),
        ({"devices": ["cpu"], "load": "4bit"}, "is for one device"),
    ],
)
def test_devices_that_make_no_sense_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ModelSettings(name="gpt2", hooks=["blocks.0.hook_resid_post"], **settings)


@pytest.mark.parametrize("load", ["4bit", "8bit"])
def test_quantising_names_the_absent_package(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the extra that brings it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    message = refusal(tiny("llama"), load=load)
    assert (
        'weights quantised by bitsandbytes need the package bitsandbytes; pip install "sluice-sae[quantized]"'
        in message
    )


@pytest.mark.parametrize(
    "method, packages",
    [("gptq", "optimum and gptqmodel"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed_tensors")],
)
def test_quantised_checkpoint_names_the_absent_package(tmp_path, method: str, packages: str) -> None:
    pytest.importorskip("accelerate")
    folder = copy_of(tiny("llama"), tmp_path / method)
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    message = refusal(folder)
    assert f"weights quantised by {method} need the package {packages}; pip install" in message


def test_quantised_checkpoint_is_not_quantised_again(tmp_path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "is quantised already (bitsandbytes); leave model.load out" in refusal(folder, load="8bit")


@pytest.mark.parametrize("load_as", ["4bit", "8bit"])
def test_quantised_model_runs(load_as: str) -> None:
    """Its activations are near those of the model as it is, and its self-check passes."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    exact = load(tiny("llama"), HOOKS[1]).activations(windows())[0]
    model = load(tiny("llama"), HOOKS[1], load=load_as)
    x = model.activations(windows())[0]
    difference = (x - exact).norm() / exact.norm()
    assert 0 < difference < 0.5
