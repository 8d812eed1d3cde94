"""Weight matrices in the type of products."""

from __future__ import annotations

from torch import Tensor, dtype
from torch.utils.weak import WeakIdKeyDictionary


class Operands:
    """Cache of weight matrices in a narrower type, valid until the weights change.

    Torch counts operations that change a tensor in place (`_version`), and a copy of an older version is replaced. Our
    own kernels change weights without being counted: the optimizer's writes the copy along with the weights.
    """

    def __init__(self) -> None:
        self._copies = WeakIdKeyDictionary()
        """(version, copy) by matrix"""

    def of(self, W: Tensor, dtype: dtype) -> Tensor:
        """`W` in `dtype`: itself, or a copy from the cache."""
        if W.dtype == dtype:
            return W
        if (copy := self.writable(W)) is None or copy.dtype != dtype:
            copy = W.to(dtype)
            self._copies[W] = W._version, copy
        return copy

    def writable(self, W: Tensor) -> Tensor | None:
        """The valid copy of W, which a kernel that changes W has to change too; None without one."""
        version, copy = self._copies.get(W, (None, None))
        return copy if version == W._version else None
