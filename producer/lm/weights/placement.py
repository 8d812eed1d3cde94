"""Which device holds which part of a model: blocks in order over several devices.

GPUs come first and share the blocks evenly; what they cannot hold goes to `cpu` and then to `disk`, from where it is
brought for each pass. accelerate moves activations from one device to the next (extra `large`).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from producer.common.formatting import format_bytes
from producer.common.memory import free_memory
from producer.lm.errors import ModelError
from producer.lm.weights.layout import ModelLayout, Parts
from producer.lm.weights.partial import all_but
from producer.settings import ModelSettings

OFFLOAD = ("cpu", "disk")
USABLE = 0.9
"""Share of a device's free memory that weights may take; passes need the rest."""

_FOLDERS: list[tempfile.TemporaryDirectory] = []
"""Folders of weights that transformers converted and a model reads from disk, until the process ends."""


def free_bytes(device: str) -> float:
    """Bytes that weights may take on `cpu`, `cuda:N` or `disk`."""
    if device == "disk":
        return float("inf")
    if device.startswith("cuda"):
        return USABLE * torch.cuda.mem_get_info(torch.device(device))[0]
    return USABLE * free_memory()


def place_blocks(sizes: Sequence[int], rest: int, devices: Sequence[str], free: Sequence[float]) -> list[str] | None:
    """The device of each block of `sizes` bytes, in order; `rest` bytes are on the first. None where they do not fit.

    The GPUs share them evenly, as far as each has room. `free` are the bytes of each of the `devices`.
    """
    gpus = sum(device.startswith("cuda") for device in devices)
    share = (rest + sum(sizes)) / gpus if gpus else float("inf")
    placed, current, held = [], 0, float(rest)
    for size in sizes:
        # A block is where most of it belongs.
        while held + size > free[current] or (current + 1 < gpus and held + size / 2 > share):
            current, held = current + 1, 0.0
            if current == len(devices):
                return None
        placed.append(devices[current])
        held += size
    return placed


def device_map(layout: ModelLayout, parts: Parts | None, devices: Sequence[str], setting: str) -> dict[str, str]:
    """The device of each part of a model, as `from_pretrained` takes it. Raises ModelError, naming `setting`."""
    network = layout.network
    layers = parts.layers if parts else layout.layers
    blocks = network.get_submodule(layout.blocks_path)[:layers]
    sizes = [weight_bytes(block) for block in blocks]
    others = all_but(network, layout.blocks_path)
    rest = _loaded_bytes(layout, parts) - sum(sizes)
    free = [free_bytes(device) for device in devices]
    placed = place_blocks(sizes, rest, devices, free)
    if placed is None:
        raise ModelError(
            f"{setting}: the {format_bytes(rest + sum(sizes))} of weights do not fit into the memory that is free on "
            f"{', '.join(f'{one} ({format_bytes(size)})' for one, size in zip(devices, free, strict=True))}; add "
            'devices, or "cpu" and "disk" at the end, or hook an earlier layer'
        )
    names = [name for name, _ in network.named_parameters() if not name.startswith(tuple(f"{one}." for one in others))]
    outside = [name for name in names if not name.startswith(f"{layout.blocks_path}.")]
    omitted = [f"{layout.blocks_path}.{layer}" for layer in range(layers, layout.layers)]
    first = dict.fromkeys([*others, *outside, *omitted], devices[0])
    return first | {f"{layout.blocks_path}.{layer}": device for layer, device in enumerate(placed)}


def placement_options(
    settings: ModelSettings, layout: ModelLayout | None, parts: Parts | None, device: torch.device
) -> dict[str, Any]:
    """Options of `from_pretrained` that put a model where `settings` say; none where it is moved there afterwards.

    Raises ModelError where it does not fit.
    """
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if not settings.devices:
        if layout is not None:
            _check_memory(settings.name, layout, parts, device)
        # Straight to the GPU, and not through the memory of this process.
        return {"device_map": {"": device}} if has_accelerate and device.type != "cpu" else {}
    setting = f"model.devices = {settings.devices!r}"
    if not has_accelerate:
        raise ModelError(f'{setting} needs the package accelerate; pip install "sluice-sae[large]"')
    if layout is None:
        raise ModelError(
            f"{setting}: the blocks of {settings.name} are not known before it is loaded; use model.device"
        )
    devices = device_map(layout, parts, settings.devices, setting)
    options: dict[str, Any] = {"device_map": devices}
    if "disk" in devices.values():
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="sluice-weights-"))
        options["offload_folder"] = _FOLDERS[-1].name
    return options


def move(network: Any, device: torch.device, setting: str) -> None:
    """Moves a model, in place. Raises ModelError when it does not fit."""
    try:
        network.to(device)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{setting}: {format_bytes(weight_bytes(network))} of weights do not fit on {device}; free it, use another "
            "device or model.devices, or hook an earlier layer"
        ) from None


def input_device(settings: ModelSettings, device: torch.device) -> torch.device:
    """Where token ids go: `device`, or the first of several."""
    return torch.device(settings.devices[0]) if settings.devices else device


def gpu_count(placement: dict[str, Any]) -> int:
    """GPUs of a placement."""
    return len({str(device) for device in placement.get("device_map", {}).values() if str(device).startswith("cuda")})


def is_offloaded(settings: ModelSettings, placement: dict[str, Any]) -> bool:
    """Whether some weights are elsewhere than where they are computed with."""
    return any(
        device in settings.devices[1:] for device in placement.get("device_map", {}).values() if device in OFFLOAD
    )


def _check_memory(name: str, layout: ModelLayout, parts: Parts | None, device: torch.device) -> None:
    """Raises ModelError where weights are more than the free memory of one device."""
    needed, free = _loaded_bytes(layout, parts), free_bytes(str(device)) / USABLE
    if needed <= free:
        return
    what = "the whole model, which evaluation needs, has" if parts is None else "its layers up to the last hook have"
    advice = "leave it out with monitor.evaluate = false" if parts is None else "hook an earlier layer"
    raise ModelError(
        f"model.name = {name!r}: {what} {format_bytes(needed)} of weights, and {format_bytes(free)} are free on "
        f'{device}; spread it with model.devices, such as ["cuda:0", "cuda:1"] or ["{device}", "disk"], quantise it '
        f'with model.load = "4bit", or {advice}'
    )


def _loaded_bytes(layout: ModelLayout, parts: Parts | None) -> int:
    omitted = (layout.network.get_submodule(path) for path in (parts.omitted if parts else ()))
    return weight_bytes(layout.network) - sum(map(weight_bytes, omitted))


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all weights of a model or a part of it."""
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())
