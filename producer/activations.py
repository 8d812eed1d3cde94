"""The language model, cut after the last hooked layer, and its hooks.

Any Hugging Face decoder or encoder, found by rule rather than by name. Notable:

- The blocks are the first `nn.ModuleList` of the decoder that is as long as the model has layers and of which each
  is given what the one before handed on.
- `resid_pre` and `resid_post` are what a block is given and what it hands on. `resid_mid` and `mlp_out` are found by
  experiment: a probe runs through the block, and those submodules are taken for which resid_pre + attention is
  resid_mid and resid_mid + mlp_out is resid_post, the latter also when resid_mid is changed under way. That covers
  OPT's fc2, Gemma's norm after the MLP and Bloom's MLP that adds the residual itself. A block that runs attention and
  MLP in parallel (Pythia) has an mlp_out and no resid_mid; one that normalises after the addition (BERT) has neither.
  Both say so.
- Nothing after the last hook runs or is held: the last hook ends the pass with an exception, later blocks and the
  head are deleted before anything moves to the GPU, and the blocks that run are counted in every pass.
- `hidden_states[-1]` of transformers is *after* the final norm; it is never used for the last block. `hidden_states`
  serve only to check, at the start, that the cut model gives what the whole one gives.
- Full windows run without an attention mask, so that SDPA may use its causal kernel.
- Whether a model is causal is seen, not read off its class or configuration: the first half of a window must not
  change with the tokens of the second.
- The longest window is the smallest of what the configuration says, under any of its usual names, and of the tables
  that are looked up by position.
- Token ids are compared with the embedding before each pass: beyond it an embedding on a GPU spoils the process.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from producer.precision import fastest_dtype
from producer.settings import ModelSettings

PROBE_WINDOWS, PROBE_CONTEXT = 2, 8
KINDS = ("resid_pre", "resid_mid", "resid_post", "mlp_out")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Self-check: how far an activation may lie from the whole model's, in its own size plus the rms. Usually it is 0."""
CONTEXT_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
"""Names under which configurations say how many positions the model has; the first that is there counts."""
TEXT_AROUND = 8
"""Tokens shown on either side of one that the model does not know."""


class ModelError(ValueError):
    """The language model cannot be used as asked. `str(error)` is the whole message for the operator."""


@dataclass(frozen=True)
class HookPoint:
    """One place where activations are read."""

    name: str
    """As the user wrote it: `blocks.2.hook_resid_post`, or a module path."""
    module: str
    """Path of the module in the loaded, whole Hugging Face model: `model.layers.2`, `transformer.h.2`."""
    layer: int
    """Index of the block it belongs to (0 for what lies before the blocks, such as the embedding)."""
    width: int
    """Length of one activation."""
    side: Literal["input", "output"] = "output"
    """Whether `module` is given this activation (resid_pre, resid_mid) or gives it."""


@dataclass(frozen=True)
class SelfCheck:
    """The hooked, cut model against the whole model's own activations, on one window."""

    max_difference: float
    """Largest absolute difference over all hooks."""
    scale: float
    """Root mean square of the activations compared."""
    compared: tuple[str, ...]
    """Names of the hooks compared."""
    passed: bool


@dataclass(frozen=True)
class Unembedding:
    """The final norm and the head, without the norm's division by the size of the stream: one factor for all tokens."""

    W_U: Tensor
    """[vocabulary, width]"""
    gain: Tensor
    """[width], of the norm."""
    centres: bool
    """The norm takes the mean off, as LayerNorm does and RMSNorm does not."""

    def logits(self, x: Tensor) -> Tensor:
        """What x [width], added to the last residual stream, adds to the logits [vocabulary], up to that factor."""
        x = x - x.mean() if self.centres else x
        # In float32, a part of the vocabulary at a time: the model's own type would round neighbours to ties.
        return torch.cat([rows.float() @ (self.gain * x) for rows in self.W_U.split(1 << 14)])


class LanguageModel:
    """A language model whose activations can be read at `hooks`. Made by `load_language_model`."""

    settings: ModelSettings
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    hooks: tuple[HookPoint, ...]
    self_check: SelfCheck
    causal: bool
    """False for encoders, whatever their class is called: their positions see each other in both directions."""
    whole: bool
    """True when nothing was cut, so that `logits` works."""
    layers_run: int
    """Blocks that executed in the last pass, counted."""
    layers_total: int
    """Blocks of the model on disk."""
    vocabulary: int
    """Token ids the model knows: 0 to vocabulary − 1."""
    context_limit: int | None
    """Most tokens in one window; None when the model sets no limit."""
    parameters_held: int
    """Numbers in memory, after the cut."""
    revision: str | None
    """The hub's commit, when the model came from there."""
    fingerprint: str
    """Tells apart models of the same name: a hash of the configuration and of a sample of all weights, uncut."""

    def __init__(self, loaded: _Loaded, places: Sequence[_Place], hooks: Sequence[HookPoint], whole: bool) -> None:
        self.settings = loaded.settings
        self.tokenizer = loaded.tokenizer
        self.device = torch.device("cpu")
        self.dtype = loaded.dtype
        self.hooks = tuple(hooks)
        self.causal = loaded.causal
        self.whole = whole
        self._masks_padding = True
        """An encoder whose attention mask keeps padding from its activations; else windows are cut to their text."""
        self.layers_run = 0
        self.layers_total = loaded.layers
        self.vocabulary = loaded.vocabulary
        self.context_limit = loaded.context_limit
        self.revision = loaded.revision
        self.fingerprint = loaded.fingerprint
        self._places = tuple(places)
        self._network = loaded.full if whole else loaded.decoder
        self.parameters_held = sum(parameter.numel() for parameter in self._network.parameters())
        self._mine = threading.local()
        """Of the pass that a thread is in: what its hooks have kept, and the blocks it has run."""
        for block in loaded.blocks:
            block.register_forward_pre_hook(self._count)
        for index, place in enumerate(places):
            _hook(place, partial(self._keep, index))

    def activations(self, tokens: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """One `[windows, context, width]` per hook, in the order of the settings, on `device`, in `dtype`.

        `tokens` are ids, int64 `[windows, context]`. `padding` is bool of the same shape, True where a position holds
        no text. Causal models need none for padding on the right: nothing before it can see it. What comes back are
        inference tensors: autograd takes only a clone of them. Several threads may call this at the same time.
        """
        if not self._masks_padding and padding is not None and padding.any():
            return self._cut_to_text(tokens, padding)
        kept: dict[int, Tensor] = {}
        self._mine.kept = kept
        try:
            with torch.inference_mode(), suppress(_Stop):
                self._run(tokens, padding)
        finally:
            self._mine.kept = None
        return [kept[index].reshape(*tokens.shape, -1).to(self.dtype) for index in range(len(self._places))]

    def _cut_to_text(self, tokens: Tensor, padding: Tensor) -> list[Tensor]:
        """As `activations`, each window alone and without the padding at its end, where activations are 0."""
        shape = [*tokens.shape]
        found = [torch.zeros(*shape, hook.width, device=self.device, dtype=self.dtype) for hook in self.hooks]
        for window, length in enumerate((~padding).sum(1).tolist()):
            if length:
                for x, part in zip(found, self.activations(tokens[window : window + 1, :length]), strict=True):
                    x[window, :length] = part[0]
        return found

    def check_ids(self, ids: Tensor, where: str = "window") -> None:
        """Raises ModelError where token ids [windows, context] lie beyond the embedding, with the text around one."""
        if not ids.numel():
            return
        least, most = (int(one) for one in ids.aminmax())
        if least >= 0 and most < self.vocabulary:
            return
        window, position = ((ids < 0) | (ids >= self.vocabulary)).nonzero()[0].tolist()
        wrong, around = int(ids[window, position]), ids[window, max(0, position - TEXT_AROUND) :][: 2 * TEXT_AROUND]
        text = self.tokenizer.decode([one for one in around.tolist() if 0 <= one < len(self.tokenizer)])
        raise ModelError(
            f"{where} {window}, position {position}: token id {wrong} ({_token(self.tokenizer, wrong)}) is unknown to "
            f"{self.settings.name}, whose embedding has ids 0 to {self.vocabulary - 1}; the text there is {text!r}: "
            "take it out of the text, take that token out of the tokenizer's files, or use a model whose embedding "
            "was resized for this tokenizer"
        )

    @property
    def unknown_tokens(self) -> dict[int, str]:
        """Tokens of the tokenizer, by id, that the embedding does not have: a text must not contain them."""
        added = self.tokenizer.added_tokens_decoder
        return {number: str(token) for number, token in sorted(added.items()) if number >= self.vocabulary}

    def check_context(self, context: int) -> None:
        """Reads one window of `context` tokens. Raises ModelError, naming corpus.context, when the model cannot."""
        name = self.settings.name
        if self.context_limit is not None and context > self.context_limit:
            raise ModelError(
                f"corpus.context = {context} is longer than the {self.context_limit} tokens that {name} can read; "
                "lower corpus.context"
            )
        try:
            self.activations(torch.zeros(1, context, dtype=torch.int64))
        except torch.OutOfMemoryError:
            raise ModelError(
                f"corpus.context = {context}: one window of {name} does not fit into the memory of {self.device}; "
                "lower corpus.context, or use another model.device"
            ) from None
        except (RuntimeError, IndexError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ModelError(
                f"corpus.context = {context}: {name} cannot read a window of so many tokens "
                f"({type(error).__name__}: {text[:200]}); lower corpus.context"
            ) from error

    def logits(self, tokens: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Logits `[windows, context, vocabulary]` of the whole model, with activations replaced under way.

        Each function of `replace` is given the activation at the hook it is named for, `[windows, context, width]`,
        and returns what takes its place. Raises ModelError for a model that was cut or has no head, for names that
        are not hooks, and for a replacement of another shape.
        """
        replace = replace or {}
        if unknown := sorted(set(replace) - {hook.name for hook in self.hooks}):
            raise ModelError(f"cannot replace {', '.join(unknown)}: the hooks of this model are {_names(self.hooks)}")
        if not self.whole:
            raise ModelError("logits need the whole model: load it with whole=True")
        with torch.inference_mode(), ExitStack() as attached:
            for hook, place in zip(self.hooks, self._places, strict=True):
                if hook.name in replace:
                    attached.enter_context(_attach(place, _replacing(hook.name, replace[hook.name], tokens.shape)))
            output = self._run(tokens, None)
        if getattr(output, "logits", None) is None:
            raise ModelError(f"model.name = {self.settings.name!r} has no head that gives logits; use a causal model")
        return output.logits

    def unembedding(self) -> Unembedding:
        """How the model turns its last residual stream into logits, to first order.

        What the final norm does is seen in what it gives, not in its parameters: some models keep gain − 1. Raises
        ModelError for a model without a head.
        """
        head = self._network.get_output_embeddings() if self.whole else None
        if head is None or getattr(head, "weight", None) is None:
            raise ModelError(f"model.name = {self.settings.name!r} has no unembedding; use a whole, causal model")
        gain, centres = torch.ones(head.weight.shape[1], device=self.device), False
        norm = self._final_norm(head)
        if norm is not None:
            # Mean 0 and mean square 1, so that normalising changes nothing; the bias is the same on both sides.
            x = torch.ones(1, 1, len(gain), device=self.device, dtype=self.dtype)
            x[..., ::2] = -1
            with torch.inference_mode():
                gain = ((norm(x) - norm(-x)) / 2 * x).flatten().float()
                centres = bool((norm(x + 3) - norm(x)).abs().max() < 0.05 * gain.abs().max())
        return Unembedding(head.weight, gain, centres)

    def _final_norm(self, head: nn.Module) -> nn.Module | None:
        """The module with one gain per channel that gives what the head reads; None when there is none."""
        given: dict[nn.Module, Tensor] = {}
        read: list[Tensor] = []
        width = head.get_parameter("weight").shape[1]
        with ExitStack() as attached:
            for module in self._network.modules():
                gain = getattr(module, "weight", None)
                if isinstance(gain, Tensor) and gain.shape == (width,):
                    attached.enter_context(_attach(_Place(module, ""), partial(given.__setitem__, module)))
            attached.enter_context(_attach(_Place(head, "", "input"), read.append))
            self.logits(torch.zeros(1, 1, dtype=torch.int64))
        # Some models hand the head a slice, which is another tensor over the same numbers.
        return next((module for module, y in given.items() if y.data_ptr() == read[0].data_ptr()), None)

    def _move(self, device: torch.device) -> LanguageModel:
        """Moves the model, in place; raises ModelError when it does not fit."""
        try:
            self._network.to(device)
        except torch.OutOfMemoryError:
            size = self.parameters_held * self.dtype.itemsize / 2**30
            raise ModelError(
                f"model.name = {self.settings.name!r}: the {self.parameters_held:,} parameters that are needed "
                f"({size:.1f} GiB) do not fit on {device}; free it, use another device, or hook an earlier layer"
            ) from None
        self.device = device
        return self

    def _run(self, tokens: Tensor, padding: Tensor | None) -> Any:
        context = tokens.shape[1]
        if self.context_limit is not None and context > self.context_limit:
            raise ModelError(
                f"a window of {context} tokens is longer than the {self.context_limit} that {self.settings.name} "
                f"can read; set corpus.context to {self.context_limit} or less"
            )
        self.check_ids(tokens)
        extra = {}
        if not self.causal and padding is not None and padding.any():
            extra["attention_mask"] = (~padding).to(self.device, torch.int64)
        self._mine.layers = 0
        try:
            return self._network(input_ids=tokens.to(self.device, non_blocking=True), **extra)
        finally:
            self.layers_run = self._mine.layers

    def _count(self, *_: Any) -> None:
        self._mine.layers = getattr(self._mine, "layers", 0) + 1

    def _keep(self, index: int, x: Tensor) -> None:
        kept = getattr(self._mine, "kept", None)
        if kept is None:
            return
        last = len(kept) + 1 == len(self._places)
        # Models may write into a tensor after the hook has seen it (Falcon does), so only the last needs no copy.
        kept[index] = x if last else x.clone()
        if last:
            raise _Stop


def load_language_model(settings: ModelSettings, *, whole: bool = False) -> LanguageModel:
    """The model that `settings` name, checked against itself, on its device, ready to run.

    By default everything after the last hooked layer is dropped before the model moves to its device. With `whole`
    nothing is dropped, and `logits` works. Raises ModelError for whatever an operator can mend.
    """
    device = _device(settings.device)
    with _quiet(), torch.inference_mode():
        loaded = _load(settings, _dtype(settings.dtype, device))
        _refuse_random_weights(loaded, whole)
        probe = _probe_tokens(loaded.full)
        places = _find_places(loaded, probe)
        everywhere = places + [_Place(block, "") for block in loaded.blocks]
        seen = _survey(loaded, everywhere, probe)
        survey = seen[: len(places)]
        hooks = _hook_points(loaded, places, survey, probe)
        _refuse_overflow(loaded, hooks, survey)
        loaded.causal = loaded.causal and not _sees_ahead(loaded, everywhere, probe, seen)
        if not whole:
            _cut(loaded, places, survey)
        model = LanguageModel(loaded, places, hooks, whole)
        model.self_check = _check(hooks, model.activations(probe), survey, loaded.dtype)
        if not model.causal:
            model._masks_padding = _masks_padding(model, probe)
    return model._move(device)


# Hooks ------------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """All hooks have fired; the rest of the pass is of no use."""


@dataclass(frozen=True)
class _Place:
    """Where a hook sits: the input or the output of one module of the model."""

    module: nn.Module
    path: str
    side: Literal["input", "output"] = "output"
    shared: bool = False
    """The input is also the residual stream that goes around the module (resid_mid): replacing it must reach both."""


Act = Callable[[Tensor], Tensor | None]
"""Is shown an activation in the shape the model uses; what it returns, if anything, takes its place."""


@contextmanager
def _attach(place: _Place, act: Act) -> Iterator[RemovableHandle]:
    handle = _hook(place, act)
    try:
        yield handle
    finally:
        handle.remove()


def _hook(place: _Place, act: Act) -> RemovableHandle:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = _input(args, kwargs)
        new = act(x)
        if new is None:
            return None
        if place.shared:
            x.copy_(new)
            return None
        return _with_input(args, kwargs, new)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        new = act(_first(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if place.side == "input":
        # Ahead of the counter of blocks: a pass that ends here has not run this block.
        return place.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    return place.module.register_forward_hook(after)


def _replacing(name: str, function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Act:
    """In the passes of this thread alone: another one may read the model's activations at the same time."""
    mine = threading.get_ident()

    def act(x: Tensor) -> Tensor | None:
        if threading.get_ident() != mine:
            return None
        activation = x.reshape(*shape, -1)
        new = function(activation)
        if new.shape != activation.shape:
            raise ModelError(f"the replacement for {name} has shape {list(new.shape)}, not {list(activation.shape)}")
        return new.to(x).reshape(x.shape)

    return act


def _input(args: tuple, kwargs: dict) -> Any:
    """The hidden states a module is called with: the first tensor by position, else the one of that name, else any."""
    values = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor)), None)


def _with_input(args: tuple, kwargs: dict, new: Tensor) -> tuple[tuple, dict]:
    old = _input(args, kwargs)
    return (
        tuple(new if value is old else value for value in args),
        {name: new if value is old else value for name, value in kwargs.items()},
    )


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _names(hooks: Sequence[HookPoint]) -> str:
    return ", ".join(hook.name for hook in hooks)


# Finding places by name --------------------------------------------------------------------------------------------


def _find_places(loaded: _Loaded, probe: Tensor) -> list[_Place]:
    """The place of each hook of the settings; all that cannot be found are refused together."""
    places, faults = [], []
    for name in loaded.settings.hooks:
        try:
            places.append(_find_place(loaded, name, probe))
        except ModelError as error:
            faults.append(str(error))
    if faults:
        raise ModelError("\n".join(faults))
    return places


def _find_place(loaded: _Loaded, name: str, probe: Tensor) -> _Place:
    kind, layer = _parse(name)
    if kind is None:
        return _find_module(loaded, name)
    if layer >= loaded.layers:
        raise ModelError(
            f"model.hooks = {name!r}: {loaded.settings.name} has {loaded.layers} blocks; "
            f"expected blocks.0 to blocks.{loaded.layers - 1}"
        )
    block, path = loaded.blocks[layer], f"{loaded.blocks_path}.{layer}"
    if kind in ("resid_pre", "resid_post"):
        return _Place(block, path, "input" if kind == "resid_pre" else "output")
    if layer not in loaded.anatomy:
        call = _record_call(loaded, block, path, probe)
        if not call.again(call.x).isfinite().all():
            raise ModelError(_overflow(loaded, name))
        loaded.anatomy[layer] = _dissect(call)
    found = getattr(loaded.anatomy[layer], kind)
    if found is None:
        raise ModelError(f"model.hooks = {name!r}: {_why_none(loaded.anatomy[layer], block, path)}")
    return found


def _parse(name: str) -> tuple[str | None, int]:
    match = re.fullmatch(rf"blocks\.(\d+)\.hook_({'|'.join(KINDS)})", name)
    return (match[2], int(match[1])) if match else (None, 0)


def _find_module(loaded: _Loaded, name: str) -> _Place:
    """The output of the module at path `name`, counted from the whole model or from its decoder."""
    modules = dict(loaded.full.named_modules())
    inside = f"{loaded.decoder_path}.{name}" if loaded.decoder_path else name
    path = next((path for path in (name, inside) if path and path in modules), None)
    if path is None:
        raise ModelError(_unknown_hook(loaded, name, [path for path in modules if path]))
    if not any(module is modules[path] for module in loaded.decoder.modules()):
        raise ModelError(
            f"model.hooks = {name!r}: this module is not part of {loaded.decoder_path}, which holds the blocks; "
            f"hook a block, such as {loaded.blocks_path}.0, or a module inside one"
        )
    return _Place(modules[path], path)


def _unknown_hook(loaded: _Loaded, name: str, paths: list[str]) -> str:
    known = [f"blocks.{layer}.hook_{kind}" for layer in range(loaded.layers) for kind in KINDS]
    close = difflib.get_close_matches(name, known + paths, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    inside = ", ".join(path for path, _ in loaded.blocks[0].named_children())
    return (
        f"model.hooks = {name!r}: {loaded.settings.name} has no such hook{hint}; expected "
        f"blocks.N.hook_{{{','.join(KINDS)}}} with N from 0 to {loaded.layers - 1}, or a module path such as "
        f"{loaded.blocks_path}.0, inside which there are {inside}"
    )


# Finding resid_mid and mlp_out by experiment -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Anatomy:
    """Where one block holds its middle; None for what it does not have."""

    resid_mid: _Place | None
    mlp_out: _Place | None


@dataclass(frozen=True)
class _BlockCall:
    """One call of one block, to be repeated at will."""

    block: nn.Module
    path: str
    args: tuple
    kwargs: dict

    def place(self, step: _Step, side: Literal["input", "output"], shared: bool = False) -> _Place:
        return _Place(self.block.get_submodule(step.path), f"{self.path}.{step.path}", side, shared)

    @property
    def x(self) -> Tensor:
        return _input(self.args, self.kwargs).clone()

    def again(self, x: Tensor) -> Tensor:
        args, kwargs = _with_input(self.args, self.kwargs, x)
        return _first(self.block(*args, **kwargs)).clone()


@dataclass
class _Step:
    """What one submodule was given and gave, and when: `began` and `ended` number the events of one call."""

    path: str
    began: int
    ended: int = -1
    calls: int = 0
    x: Tensor | None = None
    y: Tensor | None = None


def _dissect(call: _BlockCall) -> _Anatomy:
    """Finds the middle of a block: sequential blocks have resid_mid and mlp_out, parallel ones mlp_out alone."""
    x = call.x
    post, steps = _trace(call, x.clone())
    if pair := _sequential(call, x, post, steps):
        return _Anatomy(*pair)
    return _Anatomy(None, _parallel(call, x, post, steps))


def _sequential(call: _BlockCall, x: Tensor, post: Tensor, steps: list[_Step]) -> tuple[_Place, _Place] | None:
    """(resid_mid, mlp_out): the first input and the first later output whose sum the block returns.

    resid_mid must itself be x plus one submodule's output, or the last of three additions would pass (Gemma 4 adds
    its per-layer embedding after the MLP).
    """
    for before, after in itertools.product(steps, steps):
        if before.began >= after.ended or before.x is None or after.y is None or torch.equal(before.x, x):
            continue
        if _is_sum(post, before.x, after.y) and any(
            _is_sum(before.x, x, attention.y) for attention in steps if attention.y is not None
        ):
            mid, out = call.place(before, "input", shared=True), call.place(after, "output")
            if _holds_when_changed(call, mid, out):
                return mid, out
    return None


def _holds_when_changed(call: _BlockCall, mid: _Place, out: _Place) -> bool:
    """Whether block output = resid_mid + mlp_out still holds with resid_mid negated, so not by coincidence."""
    seen: dict[str, Tensor] = {}

    def negate(x: Tensor) -> Tensor:
        seen["mid"] = -x
        return seen["mid"]

    def look(y: Tensor) -> None:
        seen["out"] = y.clone()

    with _attach(mid, negate), _attach(out, look):
        post = call.again(call.x)
    return _is_sum(post, *(seen[key].reshape(post.shape) for key in ("mid", "out")))


def _parallel(call: _BlockCall, x: Tensor, post: Tensor, steps: list[_Step]) -> _Place | None:
    """mlp_out where block output = x + attention + MLP: the MLP is the one whose positions do not mix."""
    other = x.clone()
    other[:, 0] = -other[:, 0]
    undisturbed = {step.path: step.y for step in steps}
    mixing = {step.path for step in _trace(call, other)[1] if not _same_later(step.y, undisturbed.get(step.path))}
    for attention, mlp in itertools.product(steps, steps):
        if attention.path not in mixing or mlp.path in mixing or attention.y is None or mlp.y is None:
            continue
        if _is_sum(post, x, attention.y, mlp.y):
            return call.place(mlp, "output")
    return None


def _same_later(y: Tensor | None, before: Tensor | None) -> bool:
    """Whether `y` is as before at all positions but the first."""
    return y is not None and before is not None and _is_sum(y[:, 1:], before[:, 1:])


def _trace(call: _BlockCall, x: Tensor) -> tuple[Tensor, list[_Step]]:
    """The block's output, and what each submodule called exactly once did; outer modules first, then by time."""
    clock = itertools.count()
    steps: dict[str, _Step] = {}

    def shaped(value: Any) -> Tensor | None:
        fits = isinstance(value, Tensor) and value.numel() == x.numel() and value.shape[-1:] == x.shape[-1:]
        return value.reshape(x.shape).clone() if fits else None

    def before(path: str, args: tuple, kwargs: dict) -> None:
        step = steps.setdefault(path, _Step(path, next(clock)))
        step.calls, step.x = step.calls + 1, shaped(_input(args, kwargs))

    def after(path: str, output: Any) -> None:
        steps[path].y, steps[path].ended = shaped(_first(output)), next(clock)

    handles = []
    for path, module in call.block.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(lambda _, a, k, path=path: before(path, a, k), with_kwargs=True),
                module.register_forward_hook(lambda _, a, output, path=path: after(path, output)),
            ]
    try:
        post = call.again(x)
    finally:
        for handle in handles:
            handle.remove()
    once = [step for step in steps.values() if step.calls == 1]
    return post, sorted(once, key=lambda step: (step.path.count("."), step.began))


def _is_sum(total: Tensor, *parts: Tensor) -> bool:
    """Whether `total` is the sum of `parts`, element by element, up to the rounding of its own number format."""
    wide = [part.float() for part in parts]
    bound = 4 * torch.finfo(total.dtype).eps * sum(part.abs() for part in wide)
    return bool(((total.float() - sum(wide)).abs() <= bound).all())


def _record_call(loaded: _Loaded, block: nn.Module, path: str, probe: Tensor) -> _BlockCall:
    recorded: list[_BlockCall] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        recorded.append(_BlockCall(block, path, args, kwargs))
        raise _Stop

    handle = block.register_forward_pre_hook(record, with_kwargs=True)
    try:
        loaded.full(input_ids=probe)
    except _Stop:
        pass
    finally:
        handle.remove()
    return recorded[0]


def _why_none(anatomy: _Anatomy, block: nn.Module, path: str) -> str:
    if anatomy.mlp_out is not None:
        return (
            f"{type(block).__name__} runs attention and MLP in parallel on the same input, so there is no residual "
            "stream between them; use hook_resid_pre, hook_resid_post or hook_mlp_out"
        )
    inside = ", ".join(f"{path}.{name}" for name, _ in block.named_children())
    return (
        f"{type(block).__name__} does not return resid_mid + mlp_out (post-norm blocks such as BERT's normalise that "
        f"sum, others scale it), so neither is defined; use hook_resid_pre, hook_resid_post or a module path: {inside}"
    )


# Looking at the whole model, cutting it, checking it ------------------------------------------------------------------


@dataclass(frozen=True)
class _Sight:
    """What the whole model showed at one place: each time it fired, blocks begun by then and the activation."""

    blocks_begun: tuple[int, ...]
    outputs: tuple[Any, ...]
    own: Tensor | None
    """The model's own hidden state for this place, where there is one."""


def _survey(loaded: _Loaded, places: list[_Place], probe: Tensor) -> list[_Sight]:
    """One pass through the whole model, seen at every place, with the model's own hidden states beside it."""
    given: list[Tensor] = []
    seen: list[list[tuple[int, Any]]] = [[] for _ in places]

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.append(_input(args, kwargs).clone())

    def look(index: int, x: Any) -> None:
        seen[index].append((len(given), x.clone() if isinstance(x, Tensor) else x))

    with ExitStack() as attached:
        for block in loaded.blocks:
            attached.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for index, place in enumerate(places):
            attached.enter_context(_attach(place, partial(look, index)))
        output = loaded.full(input_ids=probe, output_hidden_states=True)
    states = getattr(output, "hidden_states", None) or ()
    if not states or not torch.equal(states[0], given[0]):
        states = ()  # Mamba and RWKV number theirs from the first block's output
    return [
        _Sight(tuple(at for at, _ in each), tuple(x for _, x in each), _own_state(loaded, place, states))
        for place, each in zip(places, seen, strict=True)
    ]


def _own_state(loaded: _Loaded, place: _Place, states: Sequence[Tensor]) -> Tensor | None:
    """The entry of `hidden_states` that should equal this place: none after the last block, where it is normed."""
    layer = next((index for index, block in enumerate(loaded.blocks) if block is place.module), None)
    if layer is None or len(states) != loaded.layers + 1:
        return None
    entry = layer if place.side == "input" else layer + 1
    return states[entry] if entry < loaded.layers else None


def _hook_points(loaded: _Loaded, places: list[_Place], survey: list[_Sight], probe: Tensor) -> list[HookPoint]:
    """The public description of each place; refuses those that do not show one activation for each token."""
    hooks, faults = [], []
    for name, place, sight in zip(loaded.settings.hooks, places, survey, strict=True):
        if fault := _not_rows(sight, probe):
            is_block = any(place.module is block for block in loaded.blocks)
            advice = "hook a module inside a block" if is_block else "hook a block"
            faults.append(f"model.hooks = {name!r}: {fault}; {advice}, such as {_example(loaded, is_block)}")
            continue
        layer = sight.blocks_begun[0] - (0 if place.module in list(loaded.blocks) and place.side == "input" else 1)
        width = sight.outputs[0].numel() // probe.numel()
        hooks.append(HookPoint(name, place.path, max(0, layer), width, place.side))
    if faults:
        raise ModelError("\n".join(faults))
    return hooks


def _example(loaded: _Loaded, inside: bool) -> str:
    """Path of the first block, or of the first module inside it."""
    child = next((f".{name}" for name, _ in loaded.blocks[0].named_children()), "") if inside else ""
    return f"{loaded.blocks_path}.0{child}"


def _not_rows(sight: _Sight, probe: Tensor) -> str | None:
    if len(sight.outputs) != 1:
        return f"this module runs {len(sight.outputs)} times in one pass, and a hook needs exactly one"
    x = sight.outputs[0]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return f"this module returns {type(x).__name__}, not activations"
    if tuple(x.shape[:-1]) not in (tuple(probe.shape), (probe.numel(),)):
        return f"this module gives shape {list(x.shape)} for {probe.numel()} tokens, not one activation for each token"
    return None


def _cut(loaded: _Loaded, places: list[_Place], survey: list[_Sight]) -> None:
    """Frees what runs after the last hook and the head, so that none of it is held or moved to the GPU."""
    every = list(loaded.full.modules())
    needed = max(sight.blocks_begun[0] for sight in survey)
    after = loaded.blocks[needed] if needed < loaded.layers else None
    if after is not None and any(place.module is after for place in places):
        after._modules.clear()  # only what this block is given is wanted: an empty one is enough to be given it
        after._parameters.clear()
        needed += 1
    del loaded.blocks[needed:]
    kept = set(loaded.decoder.modules())
    for module in every:
        if module not in kept:
            module._parameters.clear()  # freed at once, and not when the garbage collector comes by


def _refuse_overflow(loaded: _Loaded, hooks: list[HookPoint], survey: list[_Sight]) -> None:
    faults = [
        _overflow(loaded, hook.name)
        for hook, sight in zip(hooks, survey, strict=True)
        if not sight.outputs[0].isfinite().all()
    ]
    if faults:
        raise ModelError("\n".join(faults))


def _overflow(loaded: _Loaded, hook: str) -> str:
    dtype = str(loaded.dtype).removeprefix("torch.")
    return f"model.hooks = {hook!r}: {not_finite(loaded.settings.name, dtype)}"


def not_finite(model: str, dtype: str) -> str:
    """What to tell of activations that are NaN or infinite, when the model ran in `dtype`."""
    if dtype == "float16":
        return (
            f"the activations of {model} overflow in model.dtype = 'float16', whose largest number is 65504; set "
            'model.dtype = "bfloat16" or "float32"'
        )
    advice = "" if dtype == "float32" else ', or set model.dtype = "float32"'
    return f"{model} gives NaN or infinity here in {dtype}; use a checkpoint whose weights are sound{advice}"


def _sees_ahead(loaded: _Loaded, places: list[_Place], probe: Tensor, seen: list[_Sight]) -> bool:
    """Whether one of the places, `seen` with the probe, shows in half a window what tokens stand in the other half.

    The two windows of the probe exchange their second halves. Where experts share a product with other tokens its last
    bits may change; what attention sees is far more than TOLERANCE.
    """
    half = probe.shape[1] // 2
    exchanged = torch.cat([probe[:, :half], probe.flip(0)[:, half:]], 1)
    for before, after in zip(seen, _survey(loaded, places, exchanged), strict=True):
        if _not_rows(before, probe) or _not_rows(after, probe):
            continue
        x, y = (sight.outputs[0].reshape(*probe.shape, -1)[:, :half] for sight in (before, after))
        if _differs(x, y, loaded.dtype):
            return True
    return False


def _masks_padding(model: LanguageModel, probe: Tensor) -> bool:
    """Whether an attention mask keeps padding from the activations of the text before it."""
    half = probe.shape[1] // 2
    padding = torch.zeros_like(probe, dtype=torch.bool)
    padding[:, half:] = True
    try:
        padded = model.activations(probe, padding)
    except (TypeError, ValueError):  # it takes no mask
        return False
    return not any(
        _differs(x, y[:, :half], model.dtype) for x, y in zip(model.activations(probe[:, :half]), padded, strict=True)
    )


def _differs(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether x and y differ by more, in their rms, than products of other sizes round differently in `dtype`."""
    x, y = x.float(), y.float()
    return bool((x - y).square().mean().sqrt() > TOLERANCE[dtype] * x.square().mean().sqrt())


def _check(hooks: list[HookPoint], found: list[Tensor], survey: list[_Sight], dtype: torch.dtype) -> SelfCheck:
    """Compares what the (cut) model gives with the whole model's own activations; raises ModelError if they differ."""
    squares, elements, worst, passed = 0.0, 0, 0.0, True
    for x, sight in zip(found, survey, strict=True):
        own = (sight.outputs[0] if sight.own is None else sight.own).reshape(x.shape).float()
        difference = (x.float() - own).abs()
        squares, elements = squares + own.square().sum().item(), elements + own.numel()
        bound = TOLERANCE[dtype] * (own.abs() + own.square().mean().sqrt())
        worst, passed = max(worst, difference.max().item()), passed and bool((difference <= bound).all())
    check = SelfCheck(worst, (squares / elements) ** 0.5, tuple(hook.name for hook in hooks), passed)
    if not passed:
        raise ModelError(
            f"self-check failed: the model cut after its last hook differs from the whole model by up to {worst:.3g} "
            f"where activations have an rms of {check.scale:.3g} (hooks {_names(hooks)}); its early layers depend on "
            "its later ones, or a hook is not where it seems: hook another place, or report this with the model's name"
        )
    return check


# Loading ------------------------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    """The whole model in memory, on the CPU, and where its parts are."""

    settings: ModelSettings
    tokenizer: Any
    dtype: torch.dtype
    full: Any
    decoder: Any
    decoder_path: str
    blocks: nn.ModuleList
    blocks_path: str
    layers: int
    causal: bool
    """By its class at first; then as it was seen."""
    vocabulary: int
    context_limit: int | None
    revision: str | None
    fingerprint: str
    missing: list[str]
    """Parameters that the checkpoint does not hold."""
    anatomy: dict[int, _Anatomy]


def _load(settings: ModelSettings, dtype: torch.dtype) -> _Loaded:
    source = _source(settings.name)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    with _explained(settings), torch.inference_mode(False):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        _refuse_unfit(settings, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        kind = _auto_class(config)
        full, report = kind.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **options)
    vocabulary = _vocabulary(settings, full)
    causal = kind is transformers.AutoModelForCausalLM
    full.eval().requires_grad_(False)
    for part in (full.config, full.config.get_text_config()):
        part.use_cache = False
        if causal:
            part.pad_token_id = None  # else GPT-2's kind looks for padding in each pass, and the GPU waits for that
    decoder, blocks = _find_blocks(settings, full)
    paths = {module: path for path, module in full.named_modules()}
    loaded = _Loaded(
        settings=settings,
        tokenizer=tokenizer,
        dtype=dtype,
        full=full,
        decoder=decoder,
        decoder_path=paths[decoder],
        blocks=blocks,
        blocks_path=paths[blocks],
        layers=len(blocks),
        causal=causal,
        vocabulary=vocabulary,
        context_limit=_context_limit(full, decoder, blocks),
        revision=getattr(config, "_commit_hash", None),
        fingerprint=_fingerprint(full),
        missing=sorted(report["missing_keys"]),
        anatomy={},
    )
    _refuse_wrong_tokenizer(loaded)
    _choose_padding(loaded)
    return loaded


def _fingerprint(full: Any) -> str:
    """A hash of the configuration and of some numbers of every weight, so that each fine-tuned copy has its own."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "use_cache")
    config = {key: value for key, value in full.config.to_diff_dict().items() if key not in volatile}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in full.named_parameters():
        sample = weight.flatten()[:: max(1, weight.numel() // 16)]
        digest.update(name.encode() + sample.float().numpy().tobytes())
    return digest.hexdigest()


def _source(name: str) -> str:
    """A folder when there is one of that name, else a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.name = {name!r}: this folder holds no config.json; expected a Hugging Face model, as "
                "save_pretrained writes it"
            )
        return str(folder)
    if folder.exists():
        raise ModelError(f"model.name = {name!r}: this is a file; name the folder that holds the model")
    if name.startswith(("/", ".")) or name.count("/") > 1:
        hub = (
            f', or, for the model on the hub, write "{name[2:]}"'
            if re.fullmatch(r"\./[\w.-]+(/[\w.-]+)?", name)
            else ""
        )
        raise ModelError(f"model.name = {name!r}: no such folder (seen from {Path.cwd()}); correct the path{hub}")
    return name


def _refuse_unfit(settings: ModelSettings, config: Any) -> None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"model.name = {settings.name!r} ({config.model_type}) is an encoder-decoder model or uses cross-"
            "attention, which Sluice does not run; use a decoder such as gpt2 or an encoder such as bert-base-uncased"
        )


def _auto_class(config: Any) -> Any:
    """The class users know the model by: with its causal head, else its masked one, else bare."""
    kind, own = type(config), getattr(config, "auto_map", None) or {}
    masked = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if "AutoModelForCausalLM" in own or (kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not masked):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMaskedLM if masked or "AutoModelForMaskedLM" in own else transformers.AutoModel


def _find_blocks(settings: ModelSettings, full: Any) -> tuple[Any, nn.ModuleList]:
    """(what to run, its blocks): a chain of modules as long as the model has layers, in the decoder or the base."""
    layers = full.config.get_text_config().num_hidden_layers
    for network in (full.get_decoder(), full.base_model):
        for module in network.modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers and _is_chain(full, module):
                return network, module
    raise ModelError(
        f"model.name = {settings.name!r}: {type(full).__name__} holds no chain of {layers} blocks to hook (models that "
        "share one block between layers, such as ALBERT, have none); use another model"
    )


def _is_chain(full: Any, blocks: nn.ModuleList) -> bool:
    """Whether each block is given what the one before handed on; XLM's list of attentions is not such a chain."""
    links: list[tuple[Any, Any]] = []

    def link(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        links.append((_input(args, kwargs), _first(output)))

    with ExitStack() as attached:
        for block in blocks:
            attached.callback(block.register_forward_hook(link, with_kwargs=True).remove)
        full(input_ids=_probe_tokens(full))
    joints = itertools.pairwise(links)
    return len(links) == len(blocks) and all(y is x or _equal(y, x) for (_, y), (x, _) in joints)


def _equal(y: Any, x: Any) -> bool:
    """NaN equals NaN: a model that overflows is told of it, and not that it has no blocks."""
    if not isinstance(y, Tensor) or not isinstance(x, Tensor) or y.shape != x.shape:
        return False
    return torch.allclose(y, x, rtol=0, atol=0, equal_nan=True)


def _vocabulary(settings: ModelSettings, full: Any) -> int:
    """Rows of the table that token ids are looked up in."""
    try:
        rows = full.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        rows = None
    if not isinstance(rows, int):
        raise ModelError(
            f"model.name = {settings.name!r}: {type(full).__name__} has no embedding of token ids, so it reads no "
            "text; use a language model"
        )
    return rows


def _context_limit(full: Any, decoder: Any, blocks: nn.ModuleList) -> int | None:
    """Positions the model has: as its configuration says, or fewer where a table is smaller or begins later."""
    limits = [_limit_of(full.config.get_text_config()), _limit_of(decoder.config)]
    return min((limit for limit in [*limits, *_table_sizes(full, blocks)] if limit is not None), default=None)


def _limit_of(config: Any) -> int | None:
    said = (getattr(config, name, None) for name in CONTEXT_LIMITS)
    return next((limit for limit in said if isinstance(limit, int) and limit > 0), None)


class _Lookups(TorchFunctionMode):
    """Records (indices, rows of the table) of each lookup in an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            self.of.append((given["input"], len(given["weight"])))
        return func(*args, **(kwargs or {}))


def _table_sizes(full: Any, blocks: nn.ModuleList) -> list[int]:
    """Of each table that is looked up by position, how many positions it serves: OPT's and RoBERTa's begin at row 2.

    Such a table is asked, for a window of one token over and over, for one row after the other, whatever the window.
    """
    token = int(getattr(full.get_input_embeddings(), "padding_idx", None) == 0)  # padding may have no position
    context = min(PROBE_CONTEXT, _limit_of(full.config.get_text_config()) or PROBE_CONTEXT)

    def stop(*_: Any) -> None:
        raise _Stop

    handle = blocks[0].register_forward_hook(stop)
    try:
        with _Lookups() as lookups, suppress(_Stop):
            full(input_ids=torch.full((PROBE_WINDOWS, context), token))
    finally:
        handle.remove()
    sizes = []
    for indices, rows in lookups.of:
        if context > 1 and indices.shape[-1:] == (context,):
            first = int(indices.flatten()[0])
            if torch.equal(indices, torch.arange(first, first + context).expand_as(indices).to(indices)):
                sizes.append(rows - first)
    return sizes


def _refuse_wrong_tokenizer(loaded: _Loaded) -> None:
    # Without any file of a tokenizer, transformers makes an empty one and says nothing.
    if len(loaded.tokenizer) <= len(set(loaded.tokenizer.all_special_ids)):
        raise ModelError(
            f"model.name = {loaded.settings.name!r}: no tokenizer found beside the model; put its files there, as "
            "tokenizer.save_pretrained writes them"
        )
    # Added tokens are not counted: Gemma 3 has one for images that its text models do not know.
    words = loaded.tokenizer.vocab_size
    if words > loaded.vocabulary:
        raise ModelError(
            f"model.name = {loaded.settings.name!r}: the tokenizer has {words} tokens and the model knows "
            f"{loaded.vocabulary}; it belongs to another model: put the right one there"
        )


def _choose_padding(loaded: _Loaded) -> None:
    """Lets padding be another token where the model has none for it, as after adding [PAD] without resizing.

    What stands behind a text is never kept and no text sees it, so that any id does that the model knows.
    """
    padding = loaded.tokenizer.pad_token_id
    if padding is not None and padding >= loaded.vocabulary:
        loaded.tokenizer.pad_token = None


def _token(tokenizer: Any, number: int) -> str:
    """The name of a token, quoted; a word for ids that the tokenizer has no name for."""
    name = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
    return "no token" if name is None else repr(name)


def _refuse_random_weights(loaded: _Loaded, whole: bool) -> None:
    """Transformers fills what a checkpoint lacks with random numbers; nothing that is used may be such."""
    used = [loaded.blocks, loaded.full.get_input_embeddings()]
    if whole and loaded.full.get_output_embeddings() is not None:
        used.append(loaded.full.get_output_embeddings())
    prefixes = tuple(f"{path}." for path, module in loaded.full.named_modules() if any(module is one for one in used))
    if lacking := [name for name in loaded.missing if name.startswith(prefixes)]:
        raise ModelError(
            f"model.name = {loaded.settings.name!r}: the checkpoint lacks {len(lacking)} parameters, such as "
            f"{lacking[0]}; they would be random: use a complete checkpoint of a {type(loaded.full).__name__}"
        )


def _probe_tokens(full: Any) -> Tensor:
    """Short windows of random ids: two, so that what windows share is not taken for activations."""
    shape = (PROBE_WINDOWS, min(PROBE_CONTEXT, _limit_of(full.config.get_text_config()) or PROBE_CONTEXT))
    return torch.randint(full.get_input_embeddings().num_embeddings, shape, generator=torch.Generator().manual_seed(0))


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice from stderr; errors still travel."""
    talk = transformers.utils.logging
    verbosity, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talk.set_verbosity(verbosity)
        if bars:
            talk.enable_progress_bar()


@contextmanager
def _explained(settings: ModelSettings) -> Iterator[None]:
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

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(hub_errors.GatedRepoError):
        return f"access is gated; accept its terms at {hub.ENDPOINT}/{settings.name} and set HF_TOKEN"
    if any_is(hub_errors.RevisionNotFoundError):
        return f"model.revision = {settings.revision!r} does not exist there; use a branch, tag or commit of the model"
    if any_is(hub_errors.RepositoryNotFoundError):
        return "neither a folder here nor a model on the hub; correct the name, or set HF_TOKEN if it is private"
    if any_is(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"not a folder here, not in the cache ({hub.HF_HUB_CACHE}), and {hub.ENDPOINT} does not answer; "
            "connect to the network, or name a folder that holds the model"
        )
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not settings.trust_remote_code:
        return "it needs Python code that comes with it; set model.trust_remote_code = true if you trust its author"
    return f"cannot be loaded ({type(error).__name__}): {text[:400]}"
