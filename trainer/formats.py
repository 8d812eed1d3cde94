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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from producer.parsing import ParseError, read_object
from trainer.saes.folding import fold_norms, has_unit_rows, recentre
from trainer.saes.inference import ACTIVATION
from trainer.snapshot import SAELENS_LAYOUT, SnapshotError

VECTORS = {
    "relu": ("b_enc",),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Vectors of length d_sae by activation."""
OURS_ALONE = {name for name in ACTIVATION if name.endswith("transcoder") and "topk" in name}
"""Architectures that SAELens has no name for."""


Files = dict[str, dict[str, Any]]
"""Names of files and what is in them: a JSON document, or tensors."""

ROUNDING = 1e-6
"""How far thresholds may be apart to be one: decoder norms were divided out of them."""


class FormatError(ValueError):
    """A format has no words for what this SAE is."""


@dataclass(frozen=True)
class Published:
    """An SAE that takes raw activations, wherever it was published."""

    cfg: dict[str, Any]
    """As SAELens writes it, complete."""
    weights: dict[str, Tensor]
    """float32, one row per latent."""

    @property
    def architecture(self) -> str:
        return str(self.cfg["architecture"])

    @property
    def activation(self) -> str:
        return ACTIVATION[self.architecture]

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith("transcoder")

    @property
    def d_sae(self) -> int:
        return self.weights["W_enc"].shape[0]

    @property
    def d_in(self) -> int:
        return self.weights["W_enc"].shape[1]

    @property
    def d_out(self) -> int:
        return self.weights["W_dec"].shape[1]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.cfg["metadata"]

    def read_as(self, centred: bool) -> dict[str, Tensor]:
        """The weights for an encoder that subtracts b_dec from what it reads, or does not."""
        return recentre(self.weights, self.cfg["apply_b_dec_to_input"], centred)


# Reading


def read_published(folder: Path) -> Published:
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


def _from_saelens(told: dict[str, Any], tensors: dict[str, Tensor]) -> Published:
    architecture = str(told.get("architecture"))
    if "topk_threshold" in tensors:
        raise SnapshotError("it is a checkpoint of SAELens' training; write it with save_inference_model")
    if architecture not in ACTIVATION:
        raise SnapshotError(f"its architecture is {architecture!r}; known are {', '.join(ACTIVATION)}")
    # SAELens before 6 named top-k elsewhere, and scaled on the way.
    if told.get("activation_fn_str", told.get("activation_fn", "relu")) not in ("relu", None, ACTIVATION[architecture]):
        raise SnapshotError("SAELens before 6 wrote it, with another activation; load and save it with a newer one")
    if told.get("normalize_activations") not in ("none", None, False) or told.get("finetuning_scaling_factor"):
        raise SnapshotError(
            f"it normalises its input ({told.get('normalize_activations')}); fold that into its weights first"
        )
    if "W_enc" in tensors and tensors["W_enc"].dim() == 2:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    cfg = told | {
        "apply_b_dec_to_input": bool(told.get("apply_b_dec_to_input", not architecture.endswith("transcoder"))),
        "metadata": told["metadata"] if isinstance(told.get("metadata"), dict) else {},
    }
    return Published(cfg, tensors)


def _from_sparsify(told: dict[str, Any], tensors: dict[str, Tensor]) -> Published:
    if told.get("activation", "topk") != "topk" or told.get("signed"):
        raise SnapshotError(f"its activation is {told.get('activation')!r}, signed or grouped; only topk is known")
    ours = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    transcoder, skip = bool(told.get("transcode")), "W_skip" in weights
    if skip and not transcoder:
        raise SnapshotError("it has a skip connection and is no transcoder, which is not known")
    cfg = {
        "architecture": "topk" if not transcoder else f"topk_{'skip_' if skip else ''}transcoder",
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
    return Published(cfg, weights)


def _require_shapes(sae: Published) -> None:
    """Raises SnapshotError unless every weight is there, has its shape, and is finite."""
    weights, kind = sae.weights, sae.activation
    if missing := {"W_enc", "W_dec", "b_dec", *VECTORS[kind]} - weights.keys():
        raise SnapshotError(f"its weights lack {', '.join(sorted(missing))}")
    if weights["W_enc"].dim() != 2 or weights["W_dec"].dim() != 2:
        raise SnapshotError("its W_enc and W_dec are no matrices")
    d_out = sae.d_out if sae.is_transcoder else sae.d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (sae.d_sae, sae.d_in),
        "W_dec": (sae.d_sae, d_out),
        "b_dec": (d_out,),
    }
    shapes |= {name: (sae.d_sae,) for name in VECTORS[kind]} | {"W_skip": (d_out, sae.d_in)}
    for name, value in weights.items():
        if name not in shapes or tuple(value.shape) != shapes[name]:
            raise SnapshotError(f"its {name} has shape {list(value.shape)}; expected is {shapes.get(name, 'none')}")
        if not value.isfinite().all():
            raise SnapshotError(f"its {name} holds numbers that are not finite")
    if "topk" in kind and not (isinstance(k := sae.cfg.get("k"), int) and 0 < k <= sae.d_sae):
        raise SnapshotError(f"its k is {sae.cfg.get('k')!r}; a number from 1 to {sae.d_sae} is expected")


# Writing


def to_saelens(sae: Published) -> Files:
    """For sae_lens.SAE.load_from_disk."""
    if sae.architecture in OURS_ALONE:
        raise FormatError("SAELens has no top-k transcoders")
    return {"cfg.json": sae.cfg, "sae_weights.safetensors": sae.weights | {"W_enc": sae.weights["W_enc"].T}}


def to_jumprelu(sae: Published) -> Files:
    """For sae_lens.SAE.load_from_disk, as a JumpReLU."""
    return to_saelens(as_jumprelu(sae))


def as_jumprelu(sae: Published) -> Published:
    """The same function with a threshold per latent. Raises FormatError for a top-k."""
    if sae.activation == "jumprelu":
        return sae
    w = dict(sae.weights)
    if sae.activation == "gated":
        r = w.pop("r_mag").exp()
        w["b_enc"] = w.pop("b_mag")
        w["threshold"] = (w["b_enc"] - r * w.pop("b_gate")).clamp_min(0.0)
        w["W_enc"] = w["W_enc"] * r[:, None]
    elif sae.activation == "relu":
        w["threshold"] = torch.zeros_like(w["b_enc"])
    else:
        raise FormatError("a top-k compares latents with each other, which no threshold does")
    name = f"jumprelu_{sae.architecture}" if sae.is_transcoder else "jumprelu"
    return Published(sae.cfg | {"architecture": name}, w)


def to_sparsify(sae: Published) -> Files:
    """For sparsify.SparseCoder.load_from_disk."""
    if sae.activation != "topk":
        raise FormatError("sparsify knows top-k by value only")
    _require_one_width("sparsify", sae)
    w = sae.read_as(centred=not sae.is_transcoder)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": has_unit_rows(w["W_dec"]),
        "num_latents": sae.d_sae,
        "k": sae.cfg["k"],
        "multi_topk": False,
        "skip_connection": "W_skip" in w,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
    }
    theirs = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {theirs.get(name, name): value for name, value in w.items()}
    return {"cfg.json": cfg, "sae.safetensors": tensors, "provenance.json": sae.cfg}


def to_dictionary_learning(sae: Published) -> Files:
    """For dictionary_learning.utils.load_dictionary."""
    if "W_skip" in sae.weights:
        raise FormatError("dictionary_learning has no skip connection")
    _require_one_width("dictionary_learning", sae)
    name, state = _dictionary(sae)
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


def _dictionary(sae: Published) -> tuple[str, dict[str, Tensor]]:
    """(their class, its state dict)."""
    centred, plain = sae.read_as(centred=True), sae.read_as(centred=False)
    if sae.activation == "abstopk":
        raise FormatError("dictionary_learning's top-k does not choose by magnitude")
    if sae.activation == "topk":
        unset = torch.tensor(-1.0)  # their threshold, which stands in for top-k only when asked to
        return "AutoEncoderTopK", _linear(centred) | _scalars(sae.cfg["k"], unset)
    if sae.activation == "jumprelu":
        settings = sae.metadata.get("settings") or {}
        threshold = centred["threshold"]
        one = threshold.mean()
        if settings.get("architecture") != "batchtopk" or ((threshold - one).abs() > ROUNDING * one).any():
            return "JumpReluAutoEncoder", _matrices(plain) | {"threshold": plain["threshold"]}
        scalars = _scalars(settings["k"], one)
        if ends := settings.get("matryoshka"):
            sizes = torch.tensor([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
            return "MatryoshkaBatchTopKSAE", _matrices(centred) | scalars | {"group_sizes": sizes}
        return "BatchTopKSAE", _linear(centred) | scalars
    if sae.activation == "gated":
        return "GatedAutoEncoder", {
            "decoder_bias": centred["b_dec"],
            "encoder.weight": centred["W_enc"],
            "decoder.weight": centred["W_dec"].T,
            "gate_bias": centred["b_gate"],
            "mag_bias": centred["b_mag"],
            "r_mag": centred["r_mag"],
        }
    if sae.cfg["apply_b_dec_to_input"] and has_unit_rows(centred["W_dec"]):
        state = _linear(centred)
        return "AutoEncoder", {**{n: v for n, v in state.items() if n != "b_dec"}, "bias": state["b_dec"]}
    # The other class would divide by the norms of its rows, zero or not.
    state = _linear(plain)
    return "AutoEncoderNew", {**{n: v for n, v in state.items() if n != "b_dec"}, "decoder.bias": state["b_dec"]}


def _linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
    }


def _matrices(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}


def _scalars(k: int, threshold: Tensor) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold.clone()}


def _require_one_width(library: str, sae: Published) -> None:
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


FORMATS: dict[str, Callable[[Published], Files]] = {
    "saelens": to_saelens,
    "jumprelu": to_jumprelu,
    "sparsify": to_sparsify,
    "dictionary_learning": to_dictionary_learning,
}


def convert(sae: Published, format_name: str) -> Files:
    """The files of an SAE in a format. Raises FormatError when that has no words for it, naming formats that do."""
    try:
        return FORMATS[format_name](sae)
    except FormatError as error:
        able = [name for name in FORMATS if _can(name, sae)]
        use = f"use --format {' or '.join(able)}" if able else "no other format here has either"
        raise FormatError(f"architecture {sae.architecture}: {error}; {use}") from None


def _can(format_name: str, sae: Published) -> bool:
    try:
        FORMATS[format_name](sae)
    except FormatError:
        return False
    return True
