"""The hooked network: runs passes and collects the activations at its locations.

The last hook ends the pass with an exception, so that nothing after it runs, and the blocks that run are counted in
every pass. Full windows run without an attention mask, so that SDPA may use its causal kernel. Several threads may run
passes at the same time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from producer.lm.errors import ModelError
from producer.lm.hooks import HookFunction, HookLocation, StopForward, attach, register


class HookedNetwork:
    """A network with a hook at each location, on one device or on several that passes go through."""

    def __init__(
        self,
        name: str,
        module: Any,
        blocks: nn.ModuleList,
        locations: Sequence[HookLocation],
        dtype: torch.dtype,
        input_device: torch.device,
        device: torch.device,
    ) -> None:
        self.name = name
        """model.name, for messages."""
        self.module = module
        """A transformers model, whole or cut."""
        self.locations = tuple(locations)
        self.dtype = dtype
        self.input_device = input_device
        """Where token ids go."""
        self.device = device
        """Where activations come from and logits go: of a network on several devices, where the last hook is."""
        self.parameter_count = sum(parameter.numel() for parameter in module.parameters())
        """Numbers in memory."""
        self.layers_run = 0
        """Blocks that executed in the last pass, counted."""
        self.packed_attention: Literal["positions", "mask"] | None = None
        """How documents that share a window are kept apart: by positions that begin anew, or by a mask as well."""
        self._pass = threading.local()
        """State of each thread's pass: the activations so far, and the number of blocks that ran."""
        for block in blocks:
            block.register_forward_pre_hook(self._count_block)
        for index, location in enumerate(self.locations):
            register(location, partial(self._collect, index))

    def release(self) -> None:
        """Frees the weights, before others are loaded in their place; no pass can run any more."""
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            tensor.data = tensor.data.new_empty(0)

    def activations(self, ids: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> list[Tensor]:
        """One `[windows, context, width]` per location, on `device`, in `dtype`, for token ids `[windows, context]`.

        With `padding`, bool of the same shape, an attention mask hides those positions. With `positions`, int64 of the
        same shape, a token attends only to those of its document, which begins where they are 0.
        """
        activations: dict[int, Tensor] = {}
        self._pass.activations = activations
        try:
            with torch.inference_mode(), suppress(StopForward):
                self._run(ids, padding, positions)
        finally:
            self._pass.activations = None
        return [
            activations[index].reshape(*ids.shape, -1).to(self.device, self.dtype)
            for index in range(len(self.locations))
        ]

    def logits(
        self, ids: Tensor, functions: Iterable[tuple[HookLocation, HookFunction]] = (), gradients: bool = False
    ) -> Tensor:
        """Logits `[windows, context, vocabulary]` of a pass with `functions` attached to their locations.

        With `gradients`, autograd follows what the functions return from there to the logits; of nothing else is there
        a graph, for the parameters require no gradient. Raises ModelError for a network without a head.
        """
        with torch.inference_mode(not gradients), torch.set_grad_enabled(gradients), ExitStack() as handles:
            for location, function in functions:
                handles.enter_context(attach(location, function))
            output = self._run(ids)
        if getattr(output, "logits", None) is None:
            raise ModelError(f"model.name = {self.name!r} has no head that gives logits; use a causal model")
        return output.logits.to(self.device)

    def _run(self, ids: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Any:
        options: dict[str, Tensor] = {}
        if padding is not None:
            options["attention_mask"] = (~padding).to(self.input_device, torch.int64)
        if positions is not None:
            options["position_ids"] = positions.to(self.input_device)
            if self.packed_attention == "mask":
                options["attention_mask"] = self._block_diagonal(options["position_ids"])
        self._pass.layers = 0
        try:
            return self.module(input_ids=ids.to(self.input_device, non_blocking=True), **options)
        finally:
            self.layers_run = self._pass.layers

    def _block_diagonal(self, positions: Tensor) -> Tensor:
        """The causal mask within each document, [windows, 1, context, context]: 0, or as low as numbers go."""
        document = (positions == 0).cumsum(1)
        visible = (document[:, :, None] == document[:, None, :]).tril()
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.input_device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]

    def _count_block(self, *_: Any) -> None:
        self._pass.layers = getattr(self._pass, "layers", 0) + 1

    def _collect(self, index: int, x: Tensor) -> None:
        activations = getattr(self._pass, "activations", None)
        if activations is None:
            return
        is_last = len(activations) + 1 == len(self.locations)
        # Models may write into a tensor after the hook has run (Falcon does), so only the last needs no copy.
        activations[index] = x if is_last else x.clone()
        if is_last:
            raise StopForward
