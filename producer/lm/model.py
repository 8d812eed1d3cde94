"""LanguageModel: a language model whose activations can be read and replaced at its hooks.

Token ids are compared with the embedding before each pass: beyond it an embedding on a GPU spoils the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from producer.lm.errors import ModelError
from producer.lm.hooks import HookPoint, hook_names, replacing_function
from producer.lm.network import HookedNetwork
from producer.lm.self_check import TOLERANCE, SelfCheck
from producer.lm.unembedding import Unembedding, find_unembedding
from producer.settings import ModelSettings

MIN_SHARED = 4
"""Tokens of the shortest window that documents can share."""
TEXT_AROUND = 8
"""Tokens shown on either side of one that the model does not know."""


@dataclass(eq=False, repr=False)
class LanguageModel:
    """A language model whose activations can be read at `hooks`. Made by `load_language_model`."""

    settings: ModelSettings
    tokenizer: Any
    hooks: tuple[HookPoint, ...]
    self_check: SelfCheck
    causal: bool
    """False for encoders, whatever their class is called: their positions see each other in both directions."""
    predicts: bool
    """`logits` predict the next token: the model is whole and causal, and its head comes from its checkpoint."""
    masks_padding: bool
    """An encoder's attention mask keeps padding from its activations; otherwise windows are cut to their text."""
    whole: bool
    """True when nothing was cut, so that `logits` works."""
    layers_total: int
    """Blocks of the model on disk."""
    vocabulary: int
    """Token ids the model knows: 0 to vocabulary − 1."""
    context_limit: int | None
    """Most tokens in one window; None when the model sets no limit."""
    revision: str | None
    """The hub's commit, when the model came from there."""
    fingerprint: str
    """Tells apart models of the same name: a hash of the configuration and of a sample of all weights, uncut."""
    network: HookedNetwork
    stages: int
    """GPUs that a pass goes through, one after the other: as many passes can be under way."""
    is_offloaded: bool
    """Some weights are brought to their device for each pass, so that one pass may run at a time."""

    @property
    def device(self) -> torch.device:
        """The device of passes and activations."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of passes and activations."""
        return self.network.dtype

    @property
    def layers_run(self) -> int:
        """Blocks that executed in the last pass, counted."""
        return self.network.layers_run

    @property
    def unknown_tokens(self) -> dict[int, str]:
        """Tokens of the tokenizer, by id, that the embedding does not have: a text must not contain them."""
        added_tokens = self.tokenizer.added_tokens_decoder
        return {number: str(token) for number, token in sorted(added_tokens.items()) if number >= self.vocabulary}

    def activations(
        self, tokens: Tensor, padding: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Tensor]:
        """One `[windows, context, width]` per hook, in the order of the settings, on `device`, in `dtype`.

        `tokens` are ids, int64 `[windows, context]`. `padding` is bool of the same shape, True where a position holds
        no text. Causal models need none for padding on the right: nothing before it can see it. `positions`, int64 of
        the same shape, is for windows that documents share, after `check_shared_windows`. What comes back are
        inference tensors: autograd takes only a clone of them. Several threads may call this at the same time.
        """
        if self.causal or padding is None or not padding.any():
            padding = None
        elif not self.masks_padding:
            return self._activations_of_text(tokens, padding)
        self._check_window(tokens)
        return self.network.activations(tokens, padding, positions)

    def logits(
        self,
        tokens: Tensor,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        gradients: bool = False,
    ) -> Tensor:
        """Logits `[windows, context, vocabulary]` of the whole model, with activations replaced under way.

        Each function of `replace` is given the activation at the hook it is named for, `[windows, context, width]`,
        and returns what takes its place. With `gradients`, logits can be differentiated by what was returned; without,
        they are inference tensors. Raises ModelError for a model that was cut or has no head, for names that are not
        hooks, and for a replacement of another shape.
        """
        replace = replace or {}
        if unknown_names := sorted(set(replace) - {hook.name for hook in self.hooks}):
            raise ModelError(
                f"cannot replace {', '.join(unknown_names)}: the hooks of this model are {hook_names(self.hooks)}"
            )
        if not self.whole:
            raise ModelError("logits need the whole model: load it with whole=True")
        self._check_window(tokens)
        return self.network.logits(
            tokens,
            [
                (location, replacing_function(hook.name, replace[hook.name], tokens.shape, self.device))
                for hook, location in zip(self.hooks, self.network.locations, strict=True)
                if hook.name in replace
            ],
            gradients,
        )

    def unembedding(self) -> Unembedding:
        """The map from the last residual stream to logits. Raises ModelError for a model without a head."""
        unembedding = find_unembedding(self.network) if self.predicts else None
        if unembedding is None:
            raise ModelError(f"model.name = {self.settings.name!r} has no unembedding; use a whole, causal model")
        return unembedding

    def check_ids(self, ids: Tensor, where: str = "window") -> None:
        """Raises ModelError where token ids [windows, context] lie beyond the embedding, with the text around one."""
        if not ids.numel():
            return
        least, most = (int(extreme) for extreme in ids.aminmax())
        if least >= 0 and most < self.vocabulary:
            return
        window, position = ((ids < 0) | (ids >= self.vocabulary)).nonzero()[0].tolist()
        unknown_id = int(ids[window, position])
        token = _token_name(self.tokenizer, unknown_id)
        context = ids[window, max(0, position - TEXT_AROUND) :][: 2 * TEXT_AROUND].tolist()
        text = self.tokenizer.decode([number for number in context if 0 <= number < len(self.tokenizer)])
        raise ModelError(
            f"{where} {window}, position {position}: token id {unknown_id} ({token}) is unknown to "
            f"{self.settings.name}, whose embedding has ids 0 to {self.vocabulary - 1}; the text there is {text!r}: "
            "take it out of the text, take that token out of the tokenizer's files, or use a model whose embedding "
            "was resized for this tokenizer"
        )

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

    def check_shared_windows(self, context: int) -> float:
        """Finds how documents that share a window are kept apart. Returns the largest difference from windows alone.

        Raises ModelError, naming corpus.packing, for a model in which neither way gives the same activations.
        """
        name, difference = self.settings.name, float("inf")
        if self.causal and context >= MIN_SHARED:
            for way in ("positions", "mask"):
                self.network.packed_attention = way
                with suppress(
                    TypeError, ValueError, RuntimeError, IndexError
                ):  # it takes no positions, or no such mask
                    difference, largest = self._shared_difference(context)
                    if difference <= TOLERANCE[self.dtype]:
                        return largest
        self.network.packed_attention = None
        reason = (
            f"differ by {difference:.2g} of their rms from those of documents alone"
            if difference < float("inf")
            else "cannot be kept apart: it attends to later tokens, takes no positions, or the context is too short"
        )
        raise ModelError(
            f'corpus.packing = "separate_masked": the activations of documents that share a window of {name} {reason}; '
            'set corpus.packing = "separate", which gives the same activations in windows of their own'
        )

    def _shared_difference(self, context: int) -> tuple[float, float]:
        """The difference between three documents in one window and each alone, both in rms: its rms and the largest."""
        lengths = (context // 2, 1, context - context // 2 - 1)
        ids = torch.randint(self.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        alone = zip(*(self.activations(part) for part in ids.split(lengths, 1)), strict=True)
        differences, largest = [0.0], [0.0]
        for x, parts in zip(self.activations(ids, positions=positions), alone, strict=True):
            y = torch.cat(parts, 1).float()
            relative = (x.float() - y) / y.square().mean().sqrt()
            differences.append(relative.square().mean().sqrt().item())
            largest.append(relative.abs().max().item())
        return max(differences), max(largest)

    def _check_window(self, tokens: Tensor) -> None:
        context = tokens.shape[1]
        if self.context_limit is not None and context > self.context_limit:
            raise ModelError(
                f"a window of {context} tokens is longer than the {self.context_limit} that {self.settings.name} "
                f"can read; set corpus.context to {self.context_limit} or less"
            )
        self.check_ids(tokens)

    def _activations_of_text(self, tokens: Tensor, padding: Tensor) -> list[Tensor]:
        """Like `activations`, but each window alone and without the padding at its end, where activations are 0."""
        shape = [*tokens.shape]
        activations = [torch.zeros(*shape, hook.width, device=self.device, dtype=self.dtype) for hook in self.hooks]
        for window, length in enumerate((~padding).sum(1).tolist()):
            if length:
                parts = self.activations(tokens[window : window + 1, :length])
                for x, part in zip(activations, parts, strict=True):
                    x[window, :length] = part[0]
        return activations


def _token_name(tokenizer: Any, number: int) -> str:
    """The name of a token, quoted; "no token" for ids that the tokenizer has no name for."""
    name = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
    return "no token" if name is None else repr(name)
