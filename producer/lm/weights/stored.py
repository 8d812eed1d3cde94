"""Single numbers of the tensors of a checkpoint, read from its safetensors files without loading them.

transformers renames tensors, and merges some, on their way from a file to a model. Which parameter a tensor becomes
unchanged is asked of transformers itself; merged ones, and those of other kinds of files, are none of these.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from producer.common.parsing import read_object
from producer.common.safetensors_header import INDEX_FILE, SINGLE_FILE, read_header

SAMPLES = 16
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number formats of safetensors that are read here, by their names there."""


@dataclass(frozen=True)
class StoredTensor:
    """Where the numbers of a tensor lie."""

    file: Path
    offset: int
    dtype: torch.dtype
    count: int

    def sample(self) -> Tensor:
        """Each n-th number, as `sample_of` takes it from a tensor in memory.

        Read, and not mapped: the pages around each number would count as memory of this process.
        """
        size = self.dtype.itemsize
        with self.file.open("rb") as file:
            numbers = [
                os.pread(file.fileno(), size, self.offset + place * size)
                for place in range(0, self.count, max(1, self.count // SAMPLES))
            ]
        return torch.frombuffer(bytearray(b"".join(numbers)), dtype=self.dtype)


@dataclass(frozen=True)
class StoredWeights:
    """The parameters that a checkpoint holds."""

    tensors: dict[str, StoredTensor]
    """Those that a tensor becomes as it is, by the name of the parameter."""
    names: frozenset[str]
    """All, also merged ones."""


def sample_of(weight: Tensor) -> Tensor:
    """Each n-th number of a tensor, 16 to 31 of them where it has so many."""
    return weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)].cpu()


def open_stored(source: str, revision: str | None, network: Any) -> StoredWeights | None:
    """The stored parameters of `network`, on the meta device; None where they are not in safetensors files."""
    tensors = _stored_tensors(source, revision)
    if tensors is None:
        return None
    conversions = get_model_conversion_mapping(network)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    state, prefix = network.state_dict(), network.base_model_prefix
    unchanged: dict[str, StoredTensor] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is not None:
            converter = next(one for one in converters if pattern in one.source_patterns)
            first = converter.target_patterns[0]
            names |= {name.replace(first, target) for target in converter.target_patterns}
        elif name in state:
            names.add(name)
            if tensor is not None:
                unchanged[name] = tensor
    return StoredWeights(unchanged, frozenset(names))


def _stored_tensors(source: str, revision: str | None) -> dict[str, StoredTensor | None] | None:
    """All tensors in the safetensors files of a checkpoint, by name; None for one of a number format not listed."""
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (index := cached_file(source, INDEX_FILE, **options)) is not None:
        names = set(read_object(Path(index))["weight_map"].values())
        files = [str(cached_file(source, name, **options)) for name in sorted(names)]
    elif (file := cached_file(source, SINGLE_FILE, **options)) is not None:
        files = [file]
    else:
        return None
    return {name: tensor for file in files for name, tensor in _tensors_of(Path(file)).items()}


def _tensors_of(path: Path) -> dict[str, StoredTensor | None]:
    """The tensors of one safetensors file."""
    with path.open("rb") as file:
        entries = read_header(file.fileno())
    return {
        name: StoredTensor(path, entry.begin, dtype, math.prod(entry.shape))
        if (dtype := DTYPES.get(entry.dtype))
        else None
        for name, entry in entries.items()
    }
