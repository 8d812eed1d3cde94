"""Published SAEs in the formats of other libraries: read without running code, written as their own loaders expect.

    saelens               cfg.json, sae_weights.safetensors    what each folder of a snapshot already is
    jumprelu              the same, with whatever is a threshold at inference written as one
    sparsify              cfg.json, sae.safetensors            top-k SAEs and transcoders
    dictionary_learning   config.json, ae.pt                   autoencoders, and transcoders without a skip

The first three are read too. Here weights have one row per latent: W_enc [d_sae, d_in], W_dec [d_sae, d_out].

dictionary_learning's `ae.pt` is by its own definition a state dict written by torch.save: it is written here, tensors
and nothing else, which loads with `weights_only`; it is never read.

With θ = b_mag − exp(r_mag) b_gate a gated SAE is exactly a JumpReLU of W_enc exp(r_mag), b_mag and max(θ, 0), since

    π_gate > 0  ⟺  exp(r_mag) u + b_mag > θ            (arXiv 2404.16014, appendix E)

and a ReLU is one with threshold zero. Formats differ in whether the encoder reads x or x − b_dec: `recentre`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from producer.common.parsing import ParseError, read_object
from trainer.saes import registry
from trainer.saes.folding import fold_norms, has_unit_rows
from trainer.saes.published import (
    TRANSCODER,
    FormatError,
    SaeWeights,
    activation_of,
    published_architectures,
    transcoder_name,
)
from trainer.snapshot import SAELENS_LAYOUT, SnapshotError

Files = dict[str, dict[str, Any]]
"""Names of files and what is in them: a JSON document, or tensors."""


# Reading


def read_published(folder: Path) -> SaeWeights:
    """The SAE in one folder of a snapshot, of SAELens or of sparsify. Raises SnapshotError saying what is wrong."""
    if (folder / "ae.pt").is_file():
        raise SnapshotError("its ae.pt is a pickle, which may run code when it is read, and stays unread")
    if not (folder / "cfg.json").is_file():
        raise SnapshotError("it holds no cfg.json; name the folder of one SAE, such as …/snapshots/000001000000/NAME")
    try:
        told = read_object(folder / "cfg.json")
    except (OSError, ParseError) as error:
        raise SnapshotError(f"its cfg.json cannot be read: {error}") from None
    sparsify = (folder / "sae.safetensors").is_file()
    tensors = _read_tensors(folder / ("sae.safetensors" if sparsify else "sae_weights.safetensors"))
    sae = _from_sparsify(told, tensors) if sparsify else _from_saelens(told, tensors)
    _require_shapes(sae)
    if sae.cfg.get("rescale_acts_by_decoder_norm") and not has_unit_rows(sae.weights["W_dec"]):
        return replace(sae, weights=fold_norms(sae.weights))  # what SAELens does on the way, whatever the norms
    return sae


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SnapshotError(f"its {path.name} cannot be read: {error}") from None


def _from_saelens(told: dict[str, Any], tensors: dict[str, Tensor]) -> SaeWeights:
    architecture = str(told.get("architecture"))
    if "topk_threshold" in tensors:
        raise SnapshotError("it is a checkpoint of SAELens' training; write it with save_inference_model")
    if (activation := activation_of(architecture)) is None:
        raise SnapshotError(f"its architecture is {architecture!r}; known are {', '.join(published_architectures())}")
    # SAELens before 6 named top-k elsewhere, and scaled on the way.
    if told.get("activation_fn_str", told.get("activation_fn", "relu")) not in ("relu", None, activation.name):
        raise SnapshotError("SAELens before 6 wrote it, with another activation; load and save it with a newer one")
    if told.get("normalize_activations") not in ("none", None, False) or told.get("finetuning_scaling_factor"):
        raise SnapshotError(
            f"it normalises its input ({told.get('normalize_activations')}); fold that into its weights first"
        )
    if "W_enc" in tensors and tensors["W_enc"].dim() == 2:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    cfg = told | {
        "apply_b_dec_to_input": bool(told.get("apply_b_dec_to_input", not architecture.endswith(TRANSCODER))),
        "metadata": told["metadata"] if isinstance(told.get("metadata"), dict) else {},
    }
    return SaeWeights(cfg, tensors)


def _from_sparsify(told: dict[str, Any], tensors: dict[str, Tensor]) -> SaeWeights:
    if told.get("activation", "topk") != "topk" or told.get("signed"):
        raise SnapshotError(f"its activation is {told.get('activation')!r}, signed or grouped; only topk is known")
    ours = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    transcoder, skip = bool(told.get("transcode")), "W_skip" in weights
    if skip and not transcoder:
        raise SnapshotError("it has a skip connection and is no transcoder, which is not known")
    cfg = {
        "architecture": transcoder_name("topk", skip) if transcoder else "topk",
        "k": told.get("k"),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "sparsify": told},
    }
    if (W_enc := weights.get("W_enc")) is not None and W_enc.dim() == 2:
        cfg |= {"d_in": W_enc.shape[1], "d_sae": W_enc.shape[0]}
    return SaeWeights(cfg, weights)


def _require_shapes(sae: SaeWeights) -> None:
    """Raises SnapshotError unless every weight is there, has its shape, and is finite."""
    weights, vectors = sae.weights, sae.activation.vectors
    if missing := {"W_enc", "W_dec", "b_dec", *vectors} - weights.keys():
        raise SnapshotError(f"its weights lack {', '.join(sorted(missing))}")
    if weights["W_enc"].dim() != 2 or weights["W_dec"].dim() != 2:
        raise SnapshotError("its W_enc and W_dec are no matrices")
    d_out = sae.d_out if sae.is_transcoder else sae.d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (sae.d_sae, sae.d_in),
        "W_dec": (sae.d_sae, d_out),
        "b_dec": (d_out,),
    }
    shapes |= {name: (sae.d_sae,) for name in vectors} | {"W_skip": (d_out, sae.d_in)}
    for name, value in weights.items():
        if name not in shapes or tuple(value.shape) != shapes[name]:
            raise SnapshotError(f"its {name} has shape {list(value.shape)}; expected is {shapes.get(name, 'none')}")
        if not value.isfinite().all():
            raise SnapshotError(f"its {name} holds numbers that are not finite")
    if fault := sae.activation.fault(sae.cfg, sae.d_sae):
        raise SnapshotError(fault)


# Writing


def to_saelens(sae: SaeWeights) -> Files:
    """For sae_lens.SAE.load_from_disk."""
    sae.activation.require_saelens(sae)
    return {"cfg.json": sae.cfg, "sae_weights.safetensors": sae.weights | {"W_enc": sae.weights["W_enc"].T}}


def to_jumprelu(sae: SaeWeights) -> Files:
    """For sae_lens.SAE.load_from_disk, as a JumpReLU."""
    return to_saelens(sae.activation.as_jumprelu(sae))


def to_sparsify(sae: SaeWeights) -> Files:
    """For sparsify.SparseCoder.load_from_disk."""
    keys = sae.activation.to_sparsify(sae)
    _require_one_width("sparsify", sae)
    w = sae.recentred(centred=not sae.is_transcoder)
    cfg = keys | {
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": has_unit_rows(w["W_dec"]),
        "num_latents": sae.d_sae,
        "skip_connection": "W_skip" in w,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
    }
    theirs = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {theirs.get(name, name): value for name, value in w.items()}
    return {"cfg.json": cfg, "sae.safetensors": tensors, "provenance.json": sae.cfg}


def to_dictionary_learning(sae: SaeWeights) -> Files:
    """For dictionary_learning.utils.load_dictionary."""
    if "W_skip" in sae.weights:
        raise FormatError("dictionary_learning has no skip connection")
    _require_one_width("dictionary_learning", sae)
    architecture = registry.find((sae.metadata.get("settings") or {}).get("architecture"))
    convert_state = (
        sae.activation.to_dictionary_learning if architecture is None else architecture.to_dictionary_learning
    )
    name, state = convert_state(sae)
    told = sae.metadata
    layer = re.search(r"\.(\d+)(\.|$)", str(told.get("hook_name")))
    trainer = {
        "trainer_class": "sluice",
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": told.get("model_name"),
        "layer": int(layer[1]) if layer else None,
        "submodule_name": told.get("hf_hook_name"),
        "device": "cpu",
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    buffer = {
        "d_submodule": sae.d_in,
        "io": "in_and_out" if sae.is_transcoder else "out",
        "ctx_len": told.get("context_size"),
    }
    return {"config.json": {"trainer": trainer, "buffer": buffer}, "ae.pt": state, "provenance.json": sae.cfg}


def _require_one_width(library: str, sae: SaeWeights) -> None:
    if sae.d_in != sae.d_out:
        raise FormatError(f"{library} has one width for both ends, and here are {sae.d_in} and {sae.d_out}")


def write(folder: Path, files: Files) -> None:
    """Writes a converted SAE into a folder that exists."""
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, indent=1))
            continue
        tensors = {key: value.contiguous() for key, value in content.items()}
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)


FORMATS: dict[str, Callable[[SaeWeights], Files]] = {
    "saelens": to_saelens,
    "jumprelu": to_jumprelu,
    "sparsify": to_sparsify,
    "dictionary_learning": to_dictionary_learning,
}


def convert(sae: SaeWeights, format_name: str) -> Files:
    """The files of an SAE in a format. Raises FormatError when that has no words for it, naming formats that do."""
    try:
        return FORMATS[format_name](sae)
    except FormatError as error:
        able = [name for name in FORMATS if _can(name, sae)]
        use = f"use --format {' or '.join(able)}" if able else "no other format here has either"
        raise FormatError(f"architecture {sae.architecture}: {error}; {use}") from None


def _can(format_name: str, sae: SaeWeights) -> bool:
    try:
        FORMATS[format_name](sae)
    except FormatError:
        return False
    return True
