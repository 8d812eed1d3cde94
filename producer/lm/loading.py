"""load_language_model: the stages of loading, one after the other.

Later blocks and the head are removed before anything moves to the GPU, and the cut model is compared with the whole
one before it is handed out.
"""

from __future__ import annotations

from typing import Any

import torch

from producer.lm.blocks import cut_after, find_blocks
from producer.lm.errors import ModelError
from producer.lm.hooks import HookLocation
from producer.lm.limits import find_context_limit, probe_ids
from producer.lm.locations import locate_hooks
from producer.lm.model import LanguageModel
from producer.lm.network import HookedNetwork
from producer.lm.precision import fastest_dtype
from producer.lm.pretrained import (
    check_tokenizer,
    check_weights,
    fingerprint,
    load_pretrained,
    quiet_transformers,
    replace_unknown_padding,
)
from producer.lm.self_check import compare, hook_points, masks_padding, sees_ahead, survey
from producer.settings import ModelSettings


def load_language_model(settings: ModelSettings, *, whole: bool = False, tokenizer: Any = None) -> LanguageModel:
    """The model that `settings` name, checked against itself, on its device, ready to run.

    By default everything after the last hooked layer is dropped before the model moves to its device. With `whole`
    nothing is dropped, and `logits` works. A checkpoint of a training run takes the `tokenizer` of the model that is
    trained. Raises ModelError for whatever an operator can mend.
    """
    device = _device(settings.device)
    with quiet_transformers(), torch.inference_mode():
        pretrained = load_pretrained(settings, _dtype(settings.dtype, device), tokenizer)
        chain = find_blocks(pretrained)
        context_limit = find_context_limit(pretrained.network, chain.decoder, chain.blocks)
        model_fingerprint = fingerprint(pretrained)
        check_tokenizer(pretrained)
        replace_unknown_padding(pretrained.tokenizer, pretrained.vocabulary)
        check_weights(pretrained, chain.blocks, whole)

        probe = probe_ids(pretrained.network)
        locations = locate_hooks(pretrained, chain, probe)
        all_locations = locations + [HookLocation(block, "") for block in chain.blocks]
        all_observations = survey(pretrained.network, chain, all_locations, probe)
        observations = all_observations[: len(locations)]
        hooks = hook_points(pretrained, chain, locations, observations, probe)
        causal = pretrained.has_causal_head and not sees_ahead(
            pretrained, chain, all_locations, all_observations, probe
        )

        if not whole:
            layers_needed = max(observation.depths[0] for observation in observations)
            cut_after(pretrained.network, chain, layers_needed, locations)
        module = pretrained.network if whole else chain.decoder
        network = HookedNetwork(settings.name, module, chain.blocks, locations, pretrained.dtype)
        self_check = compare(hooks, network.activations(probe), observations, pretrained.dtype)
        can_mask_padding = causal or masks_padding(network, probe)
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
            fingerprint=model_fingerprint,
            network=network,
        )
    network.move(device)
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"model.device = {name!r}: no such device; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device = {name!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto, or install "
            "a torch built for this GPU"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return fastest_dtype(1024, 512, 2048, device)
    return getattr(torch, name)
