"""A model and its tokenizer, loaded from a folder or the hub: the whole, or what hooks need of it.

Whatever transformers and the hub raise becomes one line with the setting, its value and what to do. A checkpoint that
lacks weights and a tokenizer of another model are refused.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors
from torch import nn

from producer.common.addresses import model_directory
from producer.lm.errors import ModelError, NoBlocksError
from producer.lm.gguf import SUFFIX, drop_quantization, gguf_options
from producer.lm.limits import vocabulary_size
from producer.lm.weights.fingerprint import all_samples, fingerprint, loaded_samples
from producer.lm.weights.layout import ModelLayout, Parts, needed_parts, read_layout
from producer.lm.weights.partial import all_but, free, is_within, partial_class, pass_through
from producer.lm.weights.placement import gpu_count, input_device, is_offloaded, move, placement_options, weight_bytes
from producer.lm.weights.quantization import quantization_method, quantization_options
from producer.lm.weights.stored import open_stored
from producer.settings import ModelSettings


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A model in memory with its tokenizer: the whole, or all of it but some parts."""

    settings: ModelSettings
    tokenizer: Any
    dtype: torch.dtype
    network: Any
    """A transformers model, of the class users know it by."""
    layout: ModelLayout | None
    """The structure of the whole model; None where it was not needed or is not known."""
    parts: Parts | None
    """What is loaded; None where it is the whole model."""
    has_causal_head: bool
    """The model was loaded as a causal language model, which its attention may yet contradict."""
    has_head: bool
    """The checkpoint holds a head that gives logits."""
    own_prefix: str
    """What paths of modules begin with here and not in the class that the checkpoint names; mostly empty."""
    vocabulary: int
    """Token ids the model has: 0 to vocabulary − 1."""
    revision: str | None
    """The hub's commit, when the model came from there."""
    random_parameters: tuple[str, ...]
    """Parameters that the checkpoint does not hold, so that transformers filled them with random numbers."""
    fingerprint: str
    """Tells apart models of the same name: a hash of the configuration and of a sample of all weights."""
    device: torch.device
    """Where token ids go."""
    stages: int
    """GPUs that a pass goes through, one after the other."""
    is_offloaded: bool
    """Some weights are brought to their device for each pass, so that one pass runs at a time."""
    loaded_bytes: int
    """Bytes of the weights in memory."""
    whole_bytes: int
    """Bytes of the weights of the whole model."""


class PartialLoadError(Exception):
    """A model does not work without its later parts. It may work as a whole."""


def load_pretrained(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device, tokenizer: Any = None, *, whole: bool
) -> PretrainedModel:
    """The model that `settings` name, in `dtype`, on its devices, ready for passes without cache and gradients.

    Without a `tokenizer` its own is loaded. Unless `whole`, what lies after the last hook is left out, where the
    structure of the model is known. Raises PartialLoadError if that fails, and ModelError for what an operator can
    mend.
    """
    source, gguf = _source(settings.name)
    options = gguf | {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    setting = f"model.name = {settings.name!r}"
    with _explain_errors(settings), torch.inference_mode(False):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        _check_config(settings, config)
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        auto_class = _auto_class(config)
        quantization = quantization_options(setting, settings.load, quantization_method(config), dtype, device)
        layout = None if gguf or quantization else _read_layout(settings, auto_class, config, dtype)
    parts = None if layout is None or whole else needed_parts(layout, settings.hooks)
    placement = quantization or placement_options(settings, layout, parts, device)

    def load(kind: Any, **more: Any) -> tuple[Any, set[str]]:
        network, report = kind.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **options, **more
        )
        if gguf:
            drop_quantization(network)
        return network.eval().requires_grad_(False), set(report["missing_keys"])

    def load_part(path: str) -> Any:
        assert layout is not None
        return load(partial_class(type(layout.network), all_but(layout.network, path)))[0]

    with explain_part() if parts else _explain_errors(settings), torch.inference_mode(False):
        kind = auto_class if layout is None or parts is None else partial_class(type(layout.network), parts.omitted)
        network, missing_names = load(kind, **placement)
        if not placement:
            move(network, device, setting)
        samples, whole_bytes = loaded_samples(network), weight_bytes(network)
        if layout is not None and any(name not in samples for name, _ in layout.network.named_parameters()):
            is_mixed = _has_mixed_dtypes(type(layout.network), dtype)
            stored = None if is_mixed else open_stored(source, settings.revision, layout.network)
            samples, whole_bytes = all_samples(samples, layout, stored, load_part), weight_bytes(layout.network)
            omitted = parts.omitted if parts else ()
            names = (name for name, _ in layout.network.named_parameters() if is_within(name, omitted))
            missing_names |= {name for name in names if name not in samples}
    if layout is not None:
        free(layout.network)
    vocabulary = vocabulary_size(settings, network)
    has_causal_head = auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    is_headless = _is_headless(network)
    random_parameters = tuple(sorted(missing_names))
    for part in (network.config, network.config.get_text_config()):
        part.use_cache = False
        if has_causal_head:
            part.pad_token_id = None  # else GPT-2's kind looks for padding in each pass, and the GPU waits for that
    return PretrainedModel(
        settings=settings,
        tokenizer=tokenizer,
        dtype=dtype,
        network=network,
        layout=layout,
        parts=parts,
        has_causal_head=has_causal_head,
        has_head=network.get_output_embeddings() is not None and not (is_headless and random_parameters),
        own_prefix=f"{network.base_model_prefix}." if is_headless and network.base_model is not network else "",
        vocabulary=vocabulary,
        revision=getattr(config, "_commit_hash", None),
        random_parameters=random_parameters,
        fingerprint=fingerprint(network.config, samples, random_parameters),
        device=input_device(settings, device),
        stages=max(1, gpu_count(placement)),
        is_offloaded=is_offloaded(settings, placement),
        loaded_bytes=weight_bytes(network),
        whole_bytes=whole_bytes,
    )


@contextmanager
def explain_part() -> Iterator[None]:
    """Turns what a model without some of its parts raises into PartialLoadError, but for errors that name a setting."""
    try:
        yield
    except (PartialLoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except ModelError as error:
        if isinstance(error, NoBlocksError):
            raise PartialLoadError(str(error)) from error
        raise
    except Exception as error:
        raise PartialLoadError(f"{type(error).__name__}: {error}") from error


@contextmanager
def passes_through(pretrained: PretrainedModel) -> Iterator[None]:
    """Lets passes of the whole network go on through the parts that were left out."""
    network, layout, parts = pretrained.network, pretrained.layout, pretrained.parts
    if layout is None or parts is None:
        yield
        return
    blocks = network.get_submodule(layout.blocks_path)
    is_headless = layout.head_path is not None and layout.head_path in parts.omitted
    head = network.get_submodule(layout.head_path) if is_headless else None
    with pass_through(blocks[: parts.layers], blocks[parts.layers :], head, pretrained.dtype):
        yield


def check_tokenizer(pretrained: PretrainedModel) -> None:
    """Raises ModelError when the tokenizer is absent or belongs to another model."""
    tokenizer, name = pretrained.tokenizer, pretrained.settings.name
    # Without any file of a tokenizer, transformers makes an empty one and says nothing.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(
            f"model.name = {name!r}: no tokenizer found beside the model; put its files there, as "
            "tokenizer.save_pretrained writes them"
        )
    # Added tokens are not counted: Gemma 3 has one for images that its text models lack.
    words = tokenizer.vocab_size
    if words > pretrained.vocabulary:
        raise ModelError(
            f"model.name = {name!r}: the tokenizer has {words} tokens and the model knows "
            f"{pretrained.vocabulary}; it belongs to another model: put the right one there"
        )


def replace_unknown_padding(tokenizer: Any, vocabulary: int) -> None:
    """Unsets a padding token that the model has no id for, as after adding [PAD] without resizing the embedding.

    Activations at padding are never kept and no text depends on them, so any id of the model serves as padding.
    """
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= vocabulary:
        tokenizer.pad_token = None


def check_weights(pretrained: PretrainedModel, blocks: nn.ModuleList, whole: bool) -> None:
    """Raises ModelError when the blocks, the embedding or, if `whole`, the head have random parameters."""
    network = pretrained.network
    parts = [blocks, network.get_input_embeddings()]
    if whole and pretrained.has_head:
        parts.append(network.get_output_embeddings())
    prefixes = tuple(f"{path}." for path, module in network.named_modules() if any(module is part for part in parts))
    if names := [name for name in pretrained.random_parameters if name.startswith(prefixes)]:
        raise ModelError(
            f"model.name = {pretrained.settings.name!r}: the checkpoint lacks {len(names)} parameters, such as "
            f"{names[0]}; they would be random: use a complete checkpoint of a {type(network).__name__}"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' and accelerate's progress bars and advice from stderr; errors still travel."""
    logs, accelerate = transformers.utils.logging, logging.getLogger("accelerate")
    verbosity, level, has_bars = logs.get_verbosity(), accelerate.level, logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    logs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if has_bars:
            logs.enable_progress_bar()


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What to load from, and how: a folder or a GGUF file when there is one of that name, else a name on the hub."""
    folder = model_directory(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.name = {name!r}: this folder holds no config.json; expected a Hugging Face model, as "
                "save_pretrained writes it"
            )
        return str(folder), {}
    if folder.exists():
        if folder.suffix.lower() == SUFFIX:
            return gguf_options(folder)
        raise ModelError(
            f"model.name = {name!r}: this is a file; name the folder that holds the model, or a {SUFFIX} file"
        )
    if name.startswith(("/", ".")) or name.count("/") > 1:
        hub_hint = (
            f', or, for the model on the hub, write "{name[2:]}"'
            if re.fullmatch(r"\./[\w.-]+(/[\w.-]+)?", name)
            else ""
        )
        raise ModelError(f"model.name = {name!r}: no such folder (seen from {Path.cwd()}); correct the path{hub_hint}")
    return name, {}


def _check_config(settings: ModelSettings, config: Any) -> None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"model.name = {settings.name!r} ({config.model_type}) is an encoder-decoder model or uses cross-"
            "attention, which Sluice does not run; use a decoder such as gpt2 or an encoder such as bert-base-uncased"
        )


def _auto_class(config: Any) -> Any:
    """The class users know the model by: with its causal head, its masked one, or one that also reads images."""
    kind, remote_classes = type(config), getattr(config, "auto_map", None) or {}
    is_masked = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if "AutoModelForCausalLM" in remote_classes or (kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not is_masked):
        return transformers.AutoModelForCausalLM
    if is_masked or "AutoModelForMaskedLM" in remote_classes:
        return transformers.AutoModelForMaskedLM
    if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModel


def _read_layout(settings: ModelSettings, auto_class: Any, config: Any, dtype: torch.dtype) -> ModelLayout | None:
    """The structure of the model; None for models that cannot be built without numbers."""
    try:
        return read_layout(auto_class, config, dtype, settings.trust_remote_code)
    except Exception:
        return None


def _has_mixed_dtypes(kind: Any, dtype: torch.dtype) -> bool:
    """Whether some weights of a model stay in float32 whatever `dtype` is asked for."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return dtype != torch.float32 and any(getattr(kind, name, None) for name in names)


def _is_headless(network: Any) -> bool:
    """Whether the checkpoint is of a bare model, as encoders for sentences are, whatever class it was loaded by."""
    architectures = getattr(network.config, "architectures", None) or []
    return type(network.base_model).__name__ in architectures and type(network).__name__ not in architectures


@contextmanager
def _explain_errors(settings: ModelSettings) -> Iterator[None]:
    """Turns what transformers and the hub raise into one line that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model.name = {settings.name!r}: {_reason(settings, error)}") from error


def _reason(settings: ModelSettings, error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)  # type: ignore[arg-type]

    def has_cause(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has_cause(hub_errors.GatedRepoError):
        return f"access is gated; accept its terms at {hub.ENDPOINT}/{settings.name} and set HF_TOKEN"
    if has_cause(hub_errors.RevisionNotFoundError):
        return f"model.revision = {settings.revision!r} does not exist there; use a branch, tag or commit of the model"
    if has_cause(hub_errors.RepositoryNotFoundError):
        return "neither a folder here nor a model on the hub; correct the name, or set HF_TOKEN if it is private"
    if has_cause(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"not a folder here, not in the cache ({hub.HF_HUB_CACHE}), and {hub.ENDPOINT} does not answer; "
            "connect to the network, or name a folder that holds the model"
        )
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not settings.trust_remote_code:
        return "it needs Python code that comes with it; set model.trust_remote_code = true if you trust its author"
    return f"cannot be loaded ({type(error).__name__}): {text[:400]}"
