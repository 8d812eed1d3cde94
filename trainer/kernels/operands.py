"""Weight matrices in the type of products."""

from __future__ import annotations

from torch import Tensor, dtype
from torch.utils.weak import WeakIdKeyDictionary


class Operands:
    """Copies of weight matrices in a narrower type, made once and used until the weights change.

    Torch counts the operations that change a tensor in place; a copy that is of an older count is made anew. Kernels of
    ours change weights without being counted: the optimizer's writes the copy along with the weights.
    """

    def __init__(self) -> None:
        self._copies = WeakIdKeyDictionary()
        """(count of changes, copy) of each matrix"""

    def of(self, W: Tensor, dtype: dtype) -> Tensor:
        """`W` in `dtype`: itself, or a copy that is kept."""
        if W.dtype == dtype:
            return W
        if (copy := self.writable(W)) is None or copy.dtype != dtype:
            copy = W.to(dtype)
            self._copies[W] = W._version, copy
        return copy

    def writable(self, W: Tensor) -> Tensor | None:
        """The copy of W that whoever changes W unnoticed has to change with it; None if there is none."""
        count, copy = self._copies.get(W, (None, None))
        return copy if count == W._version else None
