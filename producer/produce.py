"""The loop: lease → windows → activations → chunks.

    for each lease:   missing = the shard's activations that the trainer does not have yet
        for each forward pass:   activations, then chunks of them (producer.packing), then send

The language model is all that should take time. The text of the next lease is tokenized in a thread meanwhile. On a CPU
several passes run side by side, each in a thread that also packs its activations; on a GPU the pass of the next windows
is started before the activations of the last ones are packed, so that it never waits for a copy. The socket's thread
sends all the while.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from producer.corpus import CorpusError
from producer.corpus.rendering.windows import Windows
from producer.link import Finished, Link, PackedChunk, SessionLost
from producer.lm.errors import ModelError
from producer.packing import TORCH_DTYPE, LeasedShard, Packer
from producer.report import ProducerReport
from producer.sources.base import Source, batches, open_pass_threads
from producer.wire import Lease, ShardEnd, ShardFail, unpack_bits

log = logging.getLogger("sluice.producer")

T = TypeVar("T")


class Producer:
    """Serves leases until the run is over; `run` returns then."""

    def __init__(
        self,
        source: Source,
        link: Link,
        dtype: str,
        chunk_windows: int,
        on_report: Callable[[ProducerReport], None],
    ) -> None:
        """`dtype` is the stream's; no chunk has more than `chunk_windows`; `on_report` is called after each pass."""
        self._source = source
        self._link = link
        self._on_report = on_report
        self._is_deterministic = bool(source.facts.get("deterministic"))
        """The last bits of an activation may depend on the windows beside it: each pass takes the same ones always."""
        self._on_gpu = source.device.type == "cuda"
        self._packer = Packer(source.context, chunk_windows, TORCH_DTYPE[dtype], source.device)
        self._tokens = self._chunks = self._shards = self._forwards = 0
        self._forward_seconds = self._text_seconds = 0.0
        self._dropped: Counter[str] = Counter()
        self._text = TextPrefetcher(source.windows)
        self._threads = open_pass_threads(source.concurrent_passes)

    def run(self) -> None:
        """Raises RefusedByTrainer or NoTrainer when there is no run to serve."""
        try:
            self._serve_leases()
        finally:
            self._text.close()
            self._threads.shutdown(cancel_futures=True)

    def _serve_leases(self) -> None:
        while True:
            try:
                lease, mask, welcome = self._link.next_lease()
            except Finished:
                return
            try:
                self._serve(lease, mask, welcome.norm_bounds)
            except SessionLost:
                log.info("shard %d: its lease was lost with the session; continuing with the next lease", lease.shard)

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

    def _serve(self, lease: Lease, mask: bytes, norm_bounds: list[float] | None) -> None:
        """Sends all that the trainer lacks of one shard. A shard that cannot be read or run is reported, not fatal."""
        try:
            began = time.monotonic()
            windows = self._text.windows(lease.shard, lease.epoch)
            self._text_seconds += time.monotonic() - began
            received = unpack_bits(mask, windows.kept.size).reshape(windows.kept.shape)
            self._source.use_revision(lease.revision)
            bounds = self._source.revision_bounds
            leased = LeasedShard(
                lease.shard, windows, windows.kept & ~received, bounds or norm_bounds, tuple(lease.hooks)
            )
            windows_counted = 0
            for chunks in self._run_on_gpu(leased) if self._on_gpu else self._run_on_cpu(leased):
                for chunk in chunks:
                    # With the chunk, and not with the lease: else the ratio of a slow producer is that of one shard.
                    end = chunk.first_window + chunk.windows
                    self._dropped.update(windows.exclusions(windows_counted, end))
                    windows_counted = end
                self._send(lease, chunks)
            self._dropped.update(windows.exclusions(windows_counted, len(windows)))
            if not self._shards:
                _log_exclusions(lease.shard, windows)
        except SessionLost:
            raise
        except Exception as error:
            is_expected = isinstance(error, CorpusError | ModelError)
            log.error("shard %d failed: %s", lease.shard, error, exc_info=not is_expected)
            message = f"{type(error).__name__}: {error}"[:1024]
            self._link.end_shard(
                lease,
                ShardFail(shard=lease.shard, epoch=lease.epoch, attempt=lease.attempt, error=message, retry=True),
            )
            return
        tokens = int(windows.kept.sum())
        shard_end = ShardEnd(
            shard=lease.shard, epoch=lease.epoch, attempt=lease.attempt, rows=tokens, norm_bounds=bounds
        )
        self._link.end_shard(lease, shard_end)
        self._shards += 1
        self._on_report(self.report())

    def _passes(self, leased: LeasedShard) -> Iterator[np.ndarray]:
        """Yields the window indices of each forward pass."""
        positions = leased.windows.kept if self._is_deterministic else leased.missing
        for indices in batches(leased.windows, positions, self._source.batch_windows):
            if not leased.missing[indices].any():
                continue
            if (lease := self._link.following_lease) is not None:
                self._text.prefetch(lease.shard, lease.epoch)
            yield indices

    def _run_on_cpu(self, leased: LeasedShard) -> Iterator[list[PackedChunk]]:
        """The chunks of each pass, in order; passes run in all threads, and one more is ready when a thread is free."""
        pending: deque[Future[tuple[list[PackedChunk], float]]] = deque()

        def run_pass(indices: np.ndarray) -> tuple[list[PackedChunk], float]:
            began = time.monotonic()
            activations = self._source.activations(leased.shard, leased.windows, indices)
            seconds = time.monotonic() - began
            return self._packer.pack(leased, indices, activations, None), seconds

        def next_chunks() -> list[PackedChunk]:
            chunks, seconds = pending.popleft().result()
            self._count_pass(seconds)
            return chunks

        try:
            for indices in self._passes(leased):
                pending.append(self._threads.submit(run_pass, indices))
                if len(pending) > self._source.concurrent_passes:
                    yield next_chunks()
            while pending:
                yield next_chunks()
        finally:
            for future in pending:
                future.cancel()

    def _run_on_gpu(self, leased: LeasedShard) -> Iterator[list[PackedChunk]]:
        """The chunks of each pass, in order; when they are packed, one pass for each GPU of the model is under way."""

        def start_pass(indices: np.ndarray) -> Callable[[], list[PackedChunk]]:
            stream = torch.cuda.current_stream(self._source.device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            activations = self._source.activations(leased.shard, leased.windows, indices)
            end.record(stream)

            def pack() -> list[PackedChunk]:
                chunks = self._packer.pack(leased, indices, activations, end)
                end.synchronize()  # it is over, but for a pass of which nothing is sent
                self._count_pass(begin.elapsed_time(end) / 1e3)
                return chunks

            return pack

        yield from run_ahead((start_pass(indices) for indices in self._passes(leased)), self._source.passes_under_way)

    def _count_pass(self, seconds: float) -> None:
        self._forward_seconds += seconds
        self._forwards += 1
        self._link.report_progress()

    def _send(self, lease: Lease, chunks: list[PackedChunk]) -> None:
        for chunk in chunks:
            self._link.send_chunk(lease, chunk)
            self._tokens += chunk.rows
            self._chunks += 1
            self._dropped["outlier"] += chunk.outlier_count
        self._on_report(self.report())


def _log_exclusions(shard: int, windows: Windows) -> None:
    """Says of a shard which of its positions are streamed, and why the others are not."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in windows.exclusions(0, len(windows)).items() if count)
    log.info(
        "shard %d: %s of %s positions are streamed; not: %s (outliers are counted in the metrics)",
        shard, f"{int(windows.kept.sum()):,}", f"{windows.kept.size:,}", reasons or "none",
    )  # fmt: skip


def run_ahead(passes: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """The results of `passes`, in order, each taken when `count` later ones have been started by the iteration."""
    started: deque[Callable[[], T]] = deque()
    for one in passes:
        started.append(one)
        if len(started) > count:
            yield started.popleft()()
    while started:
        yield started.popleft()()


class TextPrefetcher:
    """Reads shards with `read`, the next one while the loop works on the present one.

    All shards are read in one thread: a tokenizer is not thread-safe.
    """

    def __init__(self, read: Callable[[int, int], Windows]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._next: tuple[tuple[int, int], Future[Windows]] | None = None

    def prefetch(self, shard: int, epoch: int) -> None:
        """Begins to read this shard, for which `windows` will probably be called next."""
        name = shard, epoch
        if self._next is None or self._next[0] != name:
            self._cancel()
            self._next = name, self._thread.submit(self._read, shard, epoch)

    def windows(self, shard: int, epoch: int) -> Windows:
        """Returns the windows of this shard in this epoch; raises what reading it raises."""
        self.prefetch(shard, epoch)
        assert self._next is not None
        future, self._next = self._next[1], None
        return future.result()

    def close(self) -> None:
        self._cancel()
        self._thread.shutdown(wait=False)

    def _cancel(self) -> None:
        if self._next is not None:
            self._next[1].cancel()
            self._next = None
