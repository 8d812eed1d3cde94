"""The loop: lease → windows → activations → chunks.

    for each lease:   wanted rows = the shard's rows that the trainer does not have yet
        for each forward pass:   activations, then per chunk: drop outliers, pack the rows, send

The language model is all that should take time. The text of the next lease is tokenized in a thread meanwhile. On a CPU
several passes run side by side, each in a thread that also packs its rows, copied once, from the activations into the
message; on a GPU the pass of the next windows is started before the rows of the last ones are packed, so that it never
waits for a copy. The socket's thread sends all the while.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from producer.corpus import CorpusError
from producer.corpus.windows import Windows
from producer.link import Finished, Link, SessionLost
from producer.lm.errors import ModelError
from producer.report import ProducerReport
from producer.source import Source, batches, open_pass_threads
from producer.wire import (
    DTYPE_BYTES,
    MAX_CHUNK_POSITIONS,
    TARGET_CHUNK_BYTES,
    Lease,
    ShardEnd,
    ShardFail,
    pack_bits,
    unpack_bits,
)

log = logging.getLogger("sluice.producer")

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHUNK_ROWS = 4096
"""Most rows in a chunk, however narrow they are: a small buffer holds several chunks, whatever the forward pass."""
NEAR = 0.98
"""A norm up to this share of its bound is within it, even if computed in bfloat16's three digits."""


def chunk_windows(context: int, row_bytes: int, batch_windows: int) -> int:
    """Windows per chunk: about TARGET_CHUNK_BYTES, at most CHUNK_ROWS and one forward pass."""
    return max(1, min(batch_windows, CHUNK_ROWS // context, TARGET_CHUNK_BYTES // (context * row_bytes)))


def chunk_parts(chosen: np.ndarray, windows: int, context: int) -> Iterator[slice]:
    """Cuts a pass' ascending window indices into chunks of at most `windows`.

    A chunk names all positions between its first and last window. When few rows of a shard are missing these lie far
    apart, and a chunk ends where it would name more than a message may.
    """
    start = 0
    while start < len(chosen):
        reach = chosen[start] + MAX_CHUNK_POSITIONS // context
        end = min(start + windows, int(np.searchsorted(chosen, reach)))
        yield slice(start, end)
        start = end


Packed = tuple[dict[str, Any], memoryview, int]
"""A chunk: the fields of its header, its payload, and how many outliers it names."""


@dataclass(frozen=True)
class Work:
    """One lease: what of its shard is to be run, and which rows are outliers."""

    shard: int
    windows: Windows
    wanted: np.ndarray
    bounds: list[float] | None


class Producer:
    """Serves leases until the run is over; `run` returns then."""

    def __init__(self, source: Source, link: Link, dtype: str, tell: Callable[[ProducerReport], None]) -> None:
        self._source = source
        self._link = link
        self._dtype = TORCH_DTYPE[dtype]
        self._tell = tell
        row_bytes = DTYPE_BYTES[dtype] * sum(hook.width for hook in source.hooks)
        self._chunk_windows = chunk_windows(source.context, row_bytes, source.batch_windows)
        self._fixed_passes = bool(source.facts.get("deterministic"))
        """The last bits of a row may depend on the windows beside it: each pass takes the same ones every time."""
        self._side = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None
        self._tokens = self._chunks = self._shards = self._forwards = 0
        self._forward_seconds = self._text_seconds = 0.0
        self._dropped: Counter[str] = Counter()
        self._text = ReadingAhead(source.windows)
        self._threads = open_pass_threads(source.concurrent_passes)

    def run(self) -> None:
        """Raises RefusedByTrainer or NoTrainer when there is no run to serve."""
        try:
            self._run()
        finally:
            self._text.close()
            self._threads.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while True:
            try:
                lease, mask, welcome = self._link.next_lease()
            except Finished:
                return
            try:
                self._serve(lease, mask, welcome.norm_bounds)
            except SessionLost:
                log.info("shard %d: the lease is gone; going on with the next", lease.shard)

    def report(self) -> ProducerReport:
        return ProducerReport(
            state=self._link.state,
            tokens=self._tokens,
            rows_dropped=dict(self._dropped),
            chunks=self._chunks,
            shards=self._shards,
            forward_seconds=self._forward_seconds,
            forwards=self._forwards,
            stall_seconds=self._link.stall_seconds | {"text": self._text_seconds},
            sessions=self._link.sessions,
            layers_run=self._source.layers[0],
            layers_total=self._source.layers[1],
        )

    def _serve(self, lease: Lease, mask: bytes, bounds: list[float] | None) -> None:
        """Everything of one shard. A shard that cannot be read or run is reported, not fatal."""
        try:
            began = time.monotonic()
            windows = self._text.windows(lease.shard)
            self._text_seconds += time.monotonic() - began
            had = unpack_bits(mask, windows.kept.size).reshape(windows.kept.shape)
            wanted = windows.kept & ~had
            self._dropped["excluded"] += int((~windows.kept).sum())
            work = Work(lease.shard, windows, wanted, bounds)
            for chunks in self._on_gpu(work) if self._side is not None else self._on_cpu(work):
                self._send(lease, chunks)
        except SessionLost:
            raise
        except Exception as error:
            expected = isinstance(error, CorpusError | ModelError)
            log.error("shard %d failed: %s", lease.shard, error, exc_info=not expected)
            message = f"{type(error).__name__}: {error}"[:1024]
            self._link.end_shard(
                lease,
                ShardFail(shard=lease.shard, epoch=lease.epoch, attempt=lease.attempt, error=message, retry=True),
            )
            return
        rows = int(windows.kept.sum())
        self._link.end_shard(lease, ShardEnd(shard=lease.shard, epoch=lease.epoch, attempt=lease.attempt, rows=rows))
        self._shards += 1
        self._tell(self.report())

    def _passes(self, work: Work) -> Iterator[np.ndarray]:
        """The windows of each forward pass."""
        among = work.windows.kept if self._fixed_passes else work.wanted
        for chosen in batches(work.windows, among, self._source.batch_windows):
            if not work.wanted[chosen].any():
                continue
            if (following := self._link.next_shard) is not None:
                self._text.ahead(following)
            yield chosen

    def _on_cpu(self, work: Work) -> Iterator[list[Packed]]:
        """The chunks of each pass, in order; passes run in all threads, and one more is ready when a thread is free."""
        ahead: deque[Future[tuple[list[Packed], float]]] = deque()

        def run(chosen: np.ndarray) -> tuple[list[Packed], float]:
            began = time.monotonic()
            activations = self._source.activations(work.shard, work.windows, chosen)
            seconds = time.monotonic() - began
            return self._cut(work, chosen, activations, None), seconds

        def first() -> list[Packed]:
            chunks, seconds = ahead.popleft().result()
            self._count_pass(seconds)
            return chunks

        try:
            for chosen in self._passes(work):
                ahead.append(self._threads.submit(run, chosen))
                if len(ahead) > self._source.concurrent_passes:
                    yield first()
            while ahead:
                yield first()
        finally:
            for one in ahead:
                one.cancel()

    def _on_gpu(self, work: Work) -> Iterator[list[Packed]]:
        """The chunks of each pass, in order; the next pass is under way when they are cut."""
        ahead: Callable[[], list[Packed]] | None = None
        for chosen in self._passes(work):
            began = time.monotonic()
            activations = self._source.activations(work.shard, work.windows, chosen)
            done = torch.cuda.current_stream(self._source.device).record_event()
            self._count_pass(time.monotonic() - began)
            if ahead is not None:
                yield ahead()
            ahead = partial(self._cut, work, chosen, activations, done)
        if ahead is not None:
            yield ahead()

    def _count_pass(self, seconds: float) -> None:
        self._forward_seconds += seconds
        self._forwards += 1
        self._link.moved()

    def _cut(
        self, work: Work, windows: np.ndarray, activations: list[Tensor], done: torch.cuda.Event | None
    ) -> list[Packed]:
        """Cuts one pass, of the windows with these indices, into chunks."""
        chunks: list[Packed] = []
        for part in chunk_parts(windows, self._chunk_windows, self._source.context):
            chosen = windows[part]
            if not work.wanted[chosen].any():
                continue
            kept, payload = self._pack([x[part] for x in activations], work.wanted[chosen], work.bounds, done)
            # The windows of a chunk are a range; those in between that had nothing wanted hold no bits.
            first, count = int(chosen[0]), int(chosen[-1] - chosen[0]) + 1
            bits, outliers = np.zeros((2, count, self._source.context), bool)
            bits[chosen - first] = kept
            outliers[chosen - first] = work.wanted[chosen] & ~kept
            header = {
                "first_window": first,
                "windows": count,
                "rows": int(kept.sum()),
                "kept": pack_bits(bits),
                "outliers": pack_bits(outliers) if outliers.any() else b"",
            }
            chunks.append((header, payload, int(outliers.sum())))
        return chunks

    def _send(self, lease: Lease, chunks: list[Packed]) -> None:
        for header, payload, outliers in chunks:
            self._link.send_chunk(lease, header, payload)
            self._tokens += header["rows"]
            self._chunks += 1
            self._dropped["outlier"] += outliers
        self._tell(self.report())

    def _pack(
        self, activations: list[Tensor], wanted: np.ndarray, bounds: list[float] | None, done: torch.cuda.Event | None
    ) -> tuple[np.ndarray, memoryview]:
        """(kept [windows, context], payload): the wanted rows within the bounds, hook after hook, as bytes.

        On a GPU this runs on a stream of its own, so that it waits for its own pass and not for the next one.
        """
        if self._side is None or done is None:
            return _pack_rows(activations, wanted, bounds, self._dtype)
        with torch.cuda.stream(self._side):
            self._side.wait_event(done)
            for x in activations:
                x.record_stream(self._side)
            return _pack_rows(activations, wanted, bounds, self._dtype)


class ReadingAhead:
    """Reads shards with `read`, the next one while the present one is worked on.

    Always in the same thread: tokenizers do not bear two.
    """

    def __init__(self, read: Callable[[int], Windows]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._next: tuple[int, Future[Windows]] | None = None

    def ahead(self, shard: int) -> None:
        """`windows` will probably be asked for this shard next."""
        if self._next is None or self._next[0] != shard:
            self._drop()
            self._next = shard, self._thread.submit(self._read, shard)

    def windows(self, shard: int) -> Windows:
        """Of this shard; raises what reading it raises."""
        self.ahead(shard)
        assert self._next is not None
        future, self._next = self._next[1], None
        return future.result()

    def close(self) -> None:
        self._drop()
        self._thread.shutdown(wait=False)

    def _drop(self) -> None:
        if self._next is not None:
            self._next[1].cancel()
            self._next = None


def _pack_rows(
    activations: list[Tensor], wanted: np.ndarray, bounds: list[float] | None, dtype: torch.dtype
) -> tuple[np.ndarray, memoryview]:
    if activations[0].device.type == "cpu":
        return _pack_rows_on_cpu(activations, wanted, bounds, dtype)
    device = activations[0].device
    keep = torch.from_numpy(wanted).to(device)
    if bounds is not None:
        for x, bound in zip(activations, bounds, strict=True):
            keep = keep & ~_is_outlier(x, bound)
    rows = int(keep.sum())
    sizes = [rows * x.shape[-1] for x in activations]
    payload = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
    for block, x in zip(payload.split(sizes), activations, strict=True):
        block.view(rows, x.shape[-1]).copy_(x[keep], non_blocking=True)
    kept = keep.cpu().numpy()
    torch.cuda.current_stream(device).synchronize()
    return kept, payload.view(torch.uint8).numpy().data


def _pack_rows_on_cpu(
    activations: list[Tensor], wanted: np.ndarray, bounds: list[float] | None, dtype: torch.dtype
) -> tuple[np.ndarray, memoryview]:
    """The same in a fifth of the time: the norm is exact only where that matters, and each row is copied once."""
    kept = wanted
    rows_of = [x.reshape(-1, x.shape[-1]) for x in activations]
    for x, bound in zip(rows_of, bounds or [], strict=bounds is not None):
        near = torch.linalg.vector_norm(x, dim=-1)
        doubtful = (~(near <= NEAR * bound)).nonzero().view(-1)
        if len(doubtful):
            outlier = np.zeros(len(x), bool)
            outlier[doubtful.numpy()] = _is_outlier(x[doubtful], bound).numpy()
            kept = kept & ~outlier.reshape(kept.shape)
    index = torch.from_numpy(np.flatnonzero(kept))
    payload = torch.empty(len(index) * sum(x.shape[-1] for x in rows_of), dtype=dtype)
    for block, x in zip(payload.split([len(index) * x.shape[-1] for x in rows_of]), rows_of, strict=True):
        rows = block.view(len(index), x.shape[-1])
        if x.dtype == dtype:
            torch.index_select(x, 0, index, out=rows)
        else:
            rows.copy_(x.index_select(0, index))
    return kept, payload.view(torch.uint8).numpy().data


def _is_outlier(x: Tensor, bound: float) -> Tensor:
    # A row that is not finite is not an outlier: it must reach the trainer, which refuses it aloud.
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return (norm > bound) & norm.isfinite()
