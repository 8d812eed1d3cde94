"""Published SAEs in the formats of other libraries: read without running code, written as their own loaders expect.

    saelens               cfg.json, sae_weights.safetensors    the format of each folder of a snapshot
    jumprelu              the same, SAEs that select by a threshold at inference as a JumpReLU
    sparsify              cfg.json, sae.safetensors            top-k SAEs and transcoders
    dictionary_learning   config.json, ae.pt                   autoencoders, and transcoders without a skip

The first three are read too. Here weights have one row per latent: W_enc [d_sae, d_in], W_dec [d_sae, d_out].

dictionary_learning's `ae.pt` is a state dict by torch.save: it is written here, with tensors only, which load with
`weights_only`; it is never read.

With θ = b_mag − exp(r_mag) b_gate a gated SAE is exactly a JumpReLU of W_enc exp(r_mag), b_mag and max(θ, 0), since

    π_gate > 0  ⟺  exp(r_mag) u + b_mag > θ            (arXiv 2404.16014, appendix E)

and a ReLU is one with threshold zero. Formats differ in whether the encoder reads x or x − b_dec: `recentre`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from producer.common.parsing import ParseError, read_object
from trainer.saes import registry
from trainer.saes.folding import fold_norms, has_unit_rows
from trainer.saes.published import (
    TRANSCODER,
    Activation,
    FormatError,
    SaeWeights,
    activation_of,
    published_architectures,
    transcoder_name,
)
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.snapshot import SAELENS_LAYOUT, SnapshotError

Files = dict[str, dict[str, Any]]
"""Contents by the name of the file: a JSON document, or tensors."""
Shapes = Mapping[str, tuple[int, ...]]
"""By the name of the weight, with one row per latent."""
SPARSIFY_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
"""Names of weights in sparsify's files, and ours."""


# Reading


def read_published(folder: Path) -> SaeWeights:
    """The SAE in one folder of a snapshot, of SAELens or of sparsify. Raises SnapshotError."""
    published = PublishedSae(folder)
    sae = published.read(range(published.d_sae))
    if published.may_need_folding and not has_unit_rows(sae.weights["W_dec"]):
        return replace(sae, weights=fold_norms(sae.weights))  # as SAELens does when it loads them
    return sae


class PublishedSae:
    """An SAE in one folder of a snapshot, of SAELens or of sparsify; weights are read for some latents at a time."""

    def __init__(self, folder: Path) -> None:
        """Reads the configuration and the shapes. Raises SnapshotError."""
        if (folder / "ae.pt").is_file():
            raise SnapshotError("its ae.pt is a pickle, which may run code when it is read, and stays unread")
        if not (folder / "cfg.json").is_file():
            raise SnapshotError(
                "it holds no cfg.json; name the folder of one SAE, such as …/snapshots/000001000000/NAME"
            )
        try:
            config = read_object(folder / "cfg.json")
        except (OSError, ParseError) as error:
            raise SnapshotError(f"its cfg.json cannot be read: {error}") from None
        self._is_sparsify = (folder / "sae.safetensors").is_file()
        self._path = folder / ("sae.safetensors" if self._is_sparsify else "sae_weights.safetensors")
        shapes = self._read_shapes()
        self.cfg = _cfg_of_sparsify(config, shapes) if self._is_sparsify else _cfg_of_saelens(config, shapes)
        if (activation := activation_of(str(self.cfg["architecture"]))) is None:
            raise AssertionError("the configuration was checked")
        self.activation = activation
        if activation.is_tied and "W_dec" in shapes:
            shapes = {**shapes, "W_enc": shapes["W_dec"]}
        self.d_sae, self.d_in, self.d_out = _sizes(self.cfg, activation, shapes)
        self.has_skip = "W_skip" in shapes

    @property
    def may_need_folding(self) -> bool:
        """SAELens folds the norms of its decoder rows into its latents when it loads it; unit rows stay as they are."""
        return bool(self.cfg.get("rescale_acts_by_decoder_norm"))

    @property
    def architecture(self) -> str:
        return str(self.cfg["architecture"])

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith(TRANSCODER)

    def read(self, latents: range) -> SaeWeights:
        """Reads the weights of some latents, and those that belong to no latent. Raises SnapshotError."""
        rows = slice(latents.start, latents.stop)
        weights: dict[str, Tensor] = {}
        with self._opened() as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                ours = SPARSIFY_NAMES.get(name, name) if self._is_sparsify else name
                part, is_column = file.get_slice(name), ours == "W_enc" and not self._is_sparsify
                if ours in SHARED_PARAMETERS:
                    weights[ours] = part[:].float()
                else:
                    weights[ours] = (part[:, rows].T.contiguous() if is_column else part[rows]).float()
        if self.activation.is_tied:
            weights["W_enc"] = weights["W_dec"]
        for name, value in weights.items():
            if not value.isfinite().all():
                raise SnapshotError(f"its {name} holds numbers that are not finite")
        return SaeWeights(self.cfg, weights)

    def _read_shapes(self) -> Shapes:
        """The shapes of all weights by name, with one row per latent."""
        shapes: dict[str, tuple[int, ...]] = {}
        with self._opened() as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                shape = tuple(file.get_slice(name).get_shape())
                if self._is_sparsify:
                    shapes[SPARSIFY_NAMES.get(name, name)] = shape
                else:
                    shapes[name] = shape[::-1] if name == "W_enc" else shape
        return shapes

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, "pt") as file:
                yield file
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(f"its {self._path.name} cannot be read: {error}") from None


def _cfg_of_saelens(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    architecture = str(config.get("architecture"))
    if "topk_threshold" in shapes:
        raise SnapshotError("it is a checkpoint of SAELens' training; write it with save_inference_model")
    if (activation := activation_of(architecture)) is None:
        raise SnapshotError(f"its architecture is {architecture!r}; known are {', '.join(published_architectures())}")
    # SAELens before 6 had top-k under another key, and scaled its input.
    if config.get("activation_fn_str", config.get("activation_fn", "relu")) not in ("relu", None, activation.name):
        raise SnapshotError("SAELens before 6 wrote it, with another activation; load and save it with a newer one")
    if config.get("normalize_activations") not in ("none", None, False) or config.get("finetuning_scaling_factor"):
        raise SnapshotError(
            f"it normalises its input ({config.get('normalize_activations')}); fold that into its weights first"
        )
    return config | {
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", not architecture.endswith(TRANSCODER))),
        "metadata": config["metadata"] if isinstance(config.get("metadata"), dict) else {},
    }


def _cfg_of_sparsify(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise SnapshotError(f"its activation is {config.get('activation')!r}, signed or grouped; only topk is known")
    is_transcoder, skip = bool(config.get("transcode")), "W_skip" in shapes
    if skip and not is_transcoder:
        raise SnapshotError("it has a skip connection and is no transcoder, which is not known")
    cfg = {
        "architecture": transcoder_name("topk", skip) if is_transcoder else "topk",
        "k": config.get("k"),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "sparsify": config},
    }
    if (W_enc := shapes.get("W_enc")) is not None and len(W_enc) == 2:
        cfg |= {"d_in": W_enc[1], "d_sae": W_enc[0]}
    return cfg


def _sizes(cfg: dict[str, Any], activation: Activation, shapes: Shapes) -> tuple[int, int, int]:
    """(d_sae, d_in, d_out). Raises SnapshotError unless all weights exist and have their shapes."""
    if missing := {"W_enc", "W_dec", "b_dec", *activation.vectors} - shapes.keys():
        raise SnapshotError(f"its weights lack {', '.join(sorted(missing))}")
    if len(shapes["W_enc"]) != 2 or len(shapes["W_dec"]) != 2:
        raise SnapshotError("its W_enc and W_dec are no matrices")
    (d_sae, d_in), d_out = shapes["W_enc"], shapes["W_dec"][1]
    d_out = d_out if str(cfg["architecture"]).endswith(TRANSCODER) else d_in
    expected: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    expected |= {name: (d_sae,) for name in activation.vectors} | {"W_skip": (d_out, d_in)}
    for name, shape in shapes.items():
        if shape != expected.get(name):
            raise SnapshotError(f"its {name} has shape {list(shape)}; expected is {expected.get(name, 'none')}")
    if fault := activation.fault(cfg, d_sae):
        raise SnapshotError(fault)
    return d_sae, d_in, d_out


# Writing


def to_saelens(sae: SaeWeights) -> Files:
    """For sae_lens.SAE.load_from_disk."""
    sae.activation.require_saelens(sae)
    weights = sae.weights | {"W_enc": sae.weights["W_enc"].T}
    if sae.activation.is_tied:
        del weights["W_enc"]
    return {"cfg.json": sae.cfg, "sae_weights.safetensors": weights}


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
    names = {ours: theirs for theirs, ours in SPARSIFY_NAMES.items()}
    tensors = {names.get(name, name): value for name, value in w.items()}
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
    metadata = sae.metadata
    layer = re.search(r"\.(\d+)(\.|$)", str(metadata.get("hook_name")))
    trainer = {
        "trainer_class": "sluice",
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": metadata.get("model_name"),
        "layer": int(layer[1]) if layer else None,
        "submodule_name": metadata.get("hf_hook_name"),
        "device": "cpu",
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    buffer = {
        "d_submodule": sae.d_in,
        "io": "in_and_out" if sae.is_transcoder else "out",
        "ctx_len": metadata.get("context_size"),
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
    """The files of an SAE in a format. Raises FormatError, naming formats that can express it, when this one cannot."""
    try:
        return FORMATS[format_name](sae)
    except FormatError as error:
        formats = [name for name in FORMATS if _can_express(name, sae)]
        use = f"use --format {' or '.join(formats)}" if formats else "no other format here has either"
        raise FormatError(f"architecture {sae.architecture}: {error}; {use}") from None


def _can_express(format_name: str, sae: SaeWeights) -> bool:
    try:
        FORMATS[format_name](sae)
    except FormatError:
        return False
    return True
