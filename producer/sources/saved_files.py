"""Files of activations that others saved, read a few windows at a time.

    *.safetensors    one tensor per hook, by its name: [windows, context, width], or [rows, width] in any order
    *.arrow          a folder of `datasets`, as SAELens caches activations: one column per hook, a window in each row

Nothing is loaded as a whole: both kinds are mapped into memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from producer.corpus.base import CorpusError, import_library
from producer.corpus.sources.files import DataFile
from producer.settings import CorpusSettings

SUFFIXES = (".safetensors", ".arrow")
NUMBERS = ("F16", "BF16", "F32", "F64")
"""Number formats of safetensors that are read."""


class ActivationFile(ABC):
    """One file; its hooks have the same windows."""

    rows: int
    """Activations of each hook, the padding of the last window left out."""
    widths: list[int]
    """One for each hook."""

    @abstractmethod
    def read(self, hook: int, first: int, end: int) -> Tensor:
        """Reads activations [end - first, width] of a hook, counted over all windows. Raises CorpusError."""


class SafetensorsFile(ActivationFile):
    """Tensors by the names of hooks."""

    def __init__(self, file: DataFile, hooks: Sequence[str], context: int) -> None:
        """Raises CorpusError for a file that lacks a hook, or has it in another shape."""
        self._file, self._hooks = file, list(hooks)
        with self._open() as tensors:
            names = set(tensors.keys())
            if missing := [hook for hook in hooks if hook not in names]:
                raise CorpusError(_hook_missing(file, missing[0], sorted(names)))
            slices = [tensors.get_slice(hook) for hook in hooks]
            for hook, part in zip(hooks, slices, strict=True):
                if part.get_dtype() not in NUMBERS:
                    raise CorpusError(f"{file.path}: {hook} holds {part.get_dtype()}; expected {', '.join(NUMBERS)}")
            shapes = [list(part.get_shape()) for part in slices]
        self.rows = _rows(file, hooks, shapes, context)
        self.widths = [shape[-1] for shape in shapes]
        self._context = context if len(shapes[0]) == 3 else None

    def read(self, hook: int, first: int, end: int) -> Tensor:
        name = self._hooks[hook]
        with self._open() as tensors:
            part = tensors.get_slice(name)
            if self._context is None:
                return part[first:end]
            start = first // self._context
            windows = part[start : -(-end // self._context)].reshape(-1, self.widths[hook])
            return windows[first - start * self._context : end - start * self._context]

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        _check_size(self._file)
        try:
            return safe_open(self._file.path, "pt")
        except (SafetensorError, OSError) as error:
            raise CorpusError(f"{self._file.path}: damaged safetensors file ({error}); replace it") from None


class ArrowFile(ActivationFile):
    """Columns by the names of hooks, a window in each row, as `datasets` writes Array2D."""

    def __init__(self, file: DataFile, hooks: Sequence[str], context: int, settings: CorpusSettings) -> None:
        """Raises CorpusError for a file that lacks a hook, or has it in another shape."""
        self._arrow = import_library("pyarrow", settings)
        self._file, self._context = file, context
        _check_size(file)
        try:
            self._table = self._arrow.ipc.open_stream(self._arrow.memory_map(str(file.path))).read_all()
        except (self._arrow.ArrowException, OSError) as error:
            raise CorpusError(f"{file.path}: damaged Arrow file ({error}); replace it") from None
        if missing := [hook for hook in hooks if hook not in self._table.column_names]:
            raise CorpusError(_hook_missing(file, missing[0], self._table.column_names))
        self._columns = [self._table.column(hook) for hook in hooks]
        if not self._table.num_rows:
            raise CorpusError(f"{file.path}: holds no rows; leave it out")
        shapes = [
            [self._table.num_rows, *self._shape(hook, column)]
            for hook, column in zip(hooks, self._columns, strict=True)
        ]
        self.rows = _rows(file, hooks, shapes, context)
        self.widths = [shape[-1] for shape in shapes]

    def _shape(self, hook: str, column: Any) -> tuple[int, int]:
        """Returns positions and width of the first window."""
        first = column.chunk(0)
        positions = getattr(first, "storage", first)[0].as_py()
        if not (isinstance(positions, list) and positions and isinstance(positions[0], list)):
            raise CorpusError(
                f"{self._file.path}: {hook} holds {column.type}; expected windows of activations, as Array2D or lists "
                "of lists of numbers"
            )
        return len(positions), len(positions[0])

    def read(self, hook: int, first: int, end: int) -> Tensor:
        context, width = self._context, self.widths[hook]
        start = first // context
        parts = []
        for chunk in self._columns[hook].slice(start, -(-end // context) - start).chunks:
            values = getattr(chunk, "storage", chunk).flatten().flatten()
            if len(values) != len(chunk) * context * width or values.null_count:
                raise CorpusError(f"{self._file.path}: window {start} or one after it is not [{context}, {width}]")
            parts.append(torch.from_numpy(values.to_numpy(zero_copy_only=False).copy()))
        rows = torch.cat(parts).view(-1, width)
        return rows[first - start * context : end - start * context]


def open_file(file: DataFile, hooks: Sequence[str], settings: CorpusSettings) -> ActivationFile:
    """Opens a file by its ending. Raises CorpusError."""
    if file.path.suffix == ".arrow":
        return ArrowFile(file, hooks, settings.context, settings)
    return SafetensorsFile(file, hooks, settings.context)


def _rows(file: DataFile, hooks: Sequence[str], shapes: list[list[int]], context: int) -> int:
    """Counts the activations of a hook. Raises CorpusError where the shapes are no windows of `context`."""
    for hook, shape in zip(hooks, shapes, strict=True):
        if len(shape) not in (2, 3) or 0 in shape:
            raise CorpusError(
                f"{file.path}: {hook} has the shape {shape}; expected [rows, width] or [windows, context, width]"
            )
        if len(shape) == 3 and shape[1] != context:
            raise CorpusError(f"{file.path}: {hook} has windows of {shape[1]}; set corpus.context = {shape[1]}")
    counts = {tuple(shape[:-1]) for shape in shapes}
    if len(counts) > 1:
        raise CorpusError(f"{file.path}: its hooks have different numbers of activations: {sorted(counts)}")
    return int(torch.Size(shapes[0][:-1]).numel())


def _hook_missing(file: DataFile, hook: str, names: Sequence[str]) -> str:
    return f"{file.path}: model.hooks = {hook!r} is not there; there are {', '.join(names)}"


def _check_size(file: DataFile) -> None:
    size = file.path.stat().st_size
    if size != file.size:
        raise CorpusError(f"{file.path}: {size:,} bytes, but {file.size:,} when the corpus was opened; restore it")
