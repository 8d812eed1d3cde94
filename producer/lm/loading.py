"""load_language_model: the stages of loading, one after the other.

What lies after the last hook is not loaded, and the cut model is compared with the uncut one before it is handed out. A
model that does not run without its later parts is loaded as a whole, and cut.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from producer.common.formatting import format_bytes
from producer.lm.blocks import cut_after, find_blocks
from producer.lm.errors import ModelError
from producer.lm.hooks import HookLocation
from producer.lm.limits import find_context_limit, probe_ids
from producer.lm.locations import locate_hooks
from producer.lm.model import LanguageModel
from producer.lm.network import HookedNetwork
from producer.lm.precision import fastest_dtype
from producer.lm.pretrained import (
    PartialLoadError,
    PretrainedModel,
    check_tokenizer,
    check_weights,
    explain_part,
    load_pretrained,
    passes_through,
    quiet_transformers,
    replace_unknown_padding,
)
from producer.lm.self_check import compare, hook_points, masks_padding, sees_ahead, survey
from producer.settings import ModelSettings

log = logging.getLogger("sluice.lm")


def load_language_model(settings: ModelSettings, *, whole: bool = False, tokenizer: Any = None) -> LanguageModel:
    """The model that `settings` name, checked against itself, on its device, ready to run.

    By default nothing after the last hooked layer is loaded. With `whole` nothing is left out, and `logits` works. A
    checkpoint of a training run takes the `tokenizer` of the model that is trained. Raises ModelError for whatever an
    operator can mend.
    """
    device = torch.device(settings.devices[0]) if settings.devices else _device(settings.device)
    for name in settings.devices:
        if name != "disk":
            _device(name, "model.devices")
    dtype = _dtype(settings.dtype, device)
    with quiet_transformers(), torch.inference_mode():
        if not whole:
            try:
                with explain_part():
                    return _load(settings, dtype, device, tokenizer, whole=False, in_part=True)
            except PartialLoadError as error:
                log.info(
                    "%s does not run without its later blocks, and is loaded as a whole (%s)", settings.name, error
                )
        return _load(settings, dtype, device, tokenizer, whole=whole, in_part=False)


def _load(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device, tokenizer: Any, *, whole: bool, in_part: bool
) -> LanguageModel:
    """The hooked and checked model, cut unless `whole`. With `in_part`, only what hooks need is read."""
    began = time.monotonic()
    pretrained = load_pretrained(settings, dtype, device, tokenizer, whole=not in_part)
    loaded = time.monotonic()
    model = _check(pretrained, whole)
    log.info(
        "%s: %s of %s of weights loaded in %.1f s, self-check in %.1f s",
        settings.name, format_bytes(pretrained.loaded_bytes), format_bytes(pretrained.whole_bytes),
        loaded - began, time.monotonic() - loaded,
    )  # fmt: skip
    return model


def _check(pretrained: PretrainedModel, whole: bool) -> LanguageModel:
    """The model with its hooks, cut after the last one unless `whole`, and compared with itself before the cut."""
    network, settings = pretrained.network, pretrained.settings
    with passes_through(pretrained):
        chain = find_blocks(pretrained)
        context_limit = find_context_limit(network, chain.decoder, chain.blocks, pretrained.device)
        check_tokenizer(pretrained)
        replace_unknown_padding(pretrained.tokenizer, pretrained.vocabulary)
        check_weights(pretrained, chain.blocks, whole)

        probe = probe_ids(network, pretrained.device)
        locations = locate_hooks(pretrained, chain, probe)
        all_locations = locations + [HookLocation(block, "") for block in chain.blocks]
        all_observations = survey(network, chain, all_locations, probe)
        observations = all_observations[: len(locations)]
        hooks = hook_points(pretrained, chain, locations, observations, probe)
        causal = pretrained.has_causal_head and not sees_ahead(
            pretrained, chain, all_locations, all_observations, probe
        )

    last = max(observations, key=lambda observation: observation.depths[0])
    if not whole:
        layers_needed = last.depths[0]
        if pretrained.parts is not None and layers_needed > pretrained.parts.layers:
            raise PartialLoadError(f"a hook needs {layers_needed} blocks")
        cut_after(network, chain, layers_needed, locations)
    hooked = HookedNetwork(
        settings.name,
        network if whole else chain.decoder,
        chain.blocks,
        locations,
        pretrained.dtype,
        pretrained.device,
        last.activations[0].device,
    )
    self_check = compare(hooks, hooked.activations(probe), observations, pretrained.dtype)
    can_mask_padding = causal or masks_padding(hooked, probe)
    model = LanguageModel(
        settings=settings,
        tokenizer=pretrained.tokenizer,
        hooks=tuple(hooks),
        self_check=self_check,
        causal=causal,
        predicts=whole and causal and pretrained.has_head,
        masks_padding=can_mask_padding,
        whole=whole,
        layers_total=chain.layers,
        vocabulary=pretrained.vocabulary,
        context_limit=context_limit,
        revision=pretrained.revision,
        fingerprint=pretrained.fingerprint,
        network=hooked,
        stages=pretrained.stages,
        is_offloaded=pretrained.is_offloaded,
    )
    return model


def _device(name: str, setting: str = "model.device") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"{setting} = {name!r}: no such device; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"{setting} = {name!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto, or install "
            "a torch built for this GPU"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return fastest_dtype(1024, 512, 2048, device)
    return getattr(torch, name)
