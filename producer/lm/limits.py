"""The limits of a model: how many token ids it has, and how long a window may be.

The longest window is the smallest of what the configuration says, under any of its usual names, and of the tables
that are looked up by position. The probe is the small batch of windows, within those limits, that every experiment on
a model runs.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from producer.lm.errors import ModelError
from producer.lm.hooks import StopForward
from producer.settings import ModelSettings

PROBE_WINDOWS, PROBE_CONTEXT = 2, 8
CONTEXT_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
"""Names under which configurations say how many positions the model has; the first that is there counts."""


def vocabulary_size(settings: ModelSettings, network: Any) -> int:
    """Rows of the table in which token ids are looked up. Raises ModelError for a model without one."""
    try:
        size = network.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        size = None
    if not isinstance(size, int):
        raise ModelError(
            f"model.name = {settings.name!r}: {type(network).__name__} has no embedding of token ids, so it reads no "
            "text; corpora are texts, and there is none of images: use a language model"
        )
    return size


def probe_ids(network: Any, device: torch.device) -> Tensor:
    """Random token ids [windows, context]: two windows, so that what windows share is not taken for activations."""
    shape = (PROBE_WINDOWS, _probe_context(network))
    vocabulary = network.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)


def find_context_limit(network: Any, decoder: Any, blocks: nn.ModuleList, device: torch.device) -> int | None:
    """Positions the model has: as its configuration says, or fewer where a table is smaller or begins later."""
    limits = [_configured_limit(network.config.get_text_config()), _configured_limit(decoder.config)]
    limits += _position_table_sizes(network, blocks, device)
    return min((limit for limit in limits if limit is not None), default=None)


def _probe_context(network: Any) -> int:
    return min(PROBE_CONTEXT, _configured_limit(network.config.get_text_config()) or PROBE_CONTEXT)


def _configured_limit(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in CONTEXT_LIMITS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


class _EmbeddingLookups(TorchFunctionMode):
    """Records (indices, rows of the table) of each lookup in an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            arguments = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            self.records.append((arguments["input"], len(arguments["weight"])))
        return func(*args, **(kwargs or {}))


def _position_table_sizes(network: Any, blocks: nn.ModuleList, device: torch.device) -> list[int]:
    """Number of positions of each table that is looked up by position; OPT's and RoBERTa's begin at row 2.

    For windows that repeat one token, the indices into such a table still count upwards, the same in every window.
    """
    token = int(getattr(network.get_input_embeddings(), "padding_idx", None) == 0)  # padding may have no position
    context = _probe_context(network)

    def stop(*_: Any) -> None:
        raise StopForward

    handle = blocks[0].register_forward_hook(stop)
    try:
        with _EmbeddingLookups() as lookups, suppress(StopForward):
            network(input_ids=torch.full((PROBE_WINDOWS, context), token, device=device))
    finally:
        handle.remove()
    sizes = []
    for indices, rows in lookups.records:
        if context > 1 and indices.shape[-1:] == (context,):
            first = int(indices.flatten()[0])
            if torch.equal(indices, torch.arange(first, first + context).expand_as(indices).to(indices)):
                sizes.append(rows - first)
    return sizes
