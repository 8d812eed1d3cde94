"""Weight matrices in the type of products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Copy:
    of: Tensor
    version: int
    value: Tensor


class Operands:
    """Copies of weight matrices in a narrower type, made once and used until the weights change.

    Torch counts the operations that change a tensor in place; a copy that is of an older count is made anew. Kernels of
    ours change weights without being counted: the optimizer's writes `writable` copies along with the weights.
    """

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}

    def of(self, name: str, W: Tensor, dtype: torch.dtype) -> Tensor:
        """`W` in `dtype`: itself, or the copy kept under `name`."""
        if W.dtype == dtype:
            return W
        if (copy := self._current(name, W)) is None or copy.dtype != dtype:
            copy = W.to(dtype)
            self._copies[name] = _Copy(W, W._version, copy)
        return copy

    def writable(self, name: str, W: Tensor) -> Tensor | None:
        """The copy of W that whoever changes W has to change with it; None if there is none."""
        return self._current(name, W)

    def _current(self, name: str, W: Tensor) -> Tensor | None:
        copy = self._copies.get(name)
        return copy.value if copy is not None and copy.of is W and copy.version == W._version else None
