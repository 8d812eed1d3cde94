"""From a lease to chunks: which windows are run, which tokens are sent, and what is said about the others."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
import zmq
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.lm.errors import ModelError
from producer.lm.passes import in_stream
from producer.packing import MAX_CHUNK_ROWS, chunk_slices, chunk_windows, pack_activations
from producer.produce import TextPrefetcher
from producer.report import ProducerReport
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings
from producer.sources.base import Source, fingerprint
from producer.sources.language_model import CALIBRATION_SECONDS, LanguageModelSource
from producer.sources.norms import describe_norms, norm_bounds
from producer.wire import (
    MAX_CHUNK_POSITIONS,
    TARGET_CHUNK_BYTES,
    Chunk,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Hook,
    Lease,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    decode,
    encode,
    pack_bits,
    unpack_bits,
)
from tests.small_stream import Producing, hello_of, named_source, stream_settings, trainer
from trainer.stream.payload import TORCH_DTYPE

CONTEXT = 4


@dataclass
class Tensors:
    """A source whose activations are there already: x[hook] is [windows, context, width], the same in each shard."""

    x: list[Tensor]
    kept: np.ndarray
    batch_windows: int = 2
    shards: int = 3
    forwarded: list[list[int]] = field(default_factory=list)
    """The windows of each forward pass."""
    device: ClassVar[torch.device] = torch.device("cpu")
    concurrent_passes: ClassVar[int] = 1
    passes_under_way: ClassVar[int] = 1
    layers: ClassVar[tuple[int, int]] = (1, 2)
    measurements: ClassVar[dict[str, Any]] = {}
    facts: ClassVar[dict[str, Any]] = {"corpus": "tensors"}
    revision_bounds: ClassVar[None] = None

    def use_revision(self, name: str) -> None:
        assert not name

    @property
    def context(self) -> int:
        return self.kept.shape[1]

    @property
    def hooks(self) -> list[Hook]:
        return [Hook(name=f"hook {n}", module=f"{n}", width=x.shape[-1]) for n, x in enumerate(self.x)]

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        return Windows(np.zeros(self.kept.shape, np.int64), self.kept, np.zeros(self.kept.shape, bool))

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        self.forwarded.append(indices.tolist())
        return [x[torch.from_numpy(indices)] for x in self.x]


def tensors(windows: int, widths: tuple[int, ...] = (3, 5), context: int = CONTEXT, **options: Any) -> Tensors:
    """Random activations of norm below 10; the first position of each window is not kept, as a BOS would not be."""
    torch.manual_seed(0)
    mask = np.ones((windows, context), bool)
    mask[:, 0] = False
    return Tensors([torch.rand(windows, context, width) for width in widths], mask, **options)


@dataclass
class LeaseResult:
    """Messages that came for one lease."""

    chunks: list[Chunk]
    payloads: list[bytes]
    end: Message

    def positions(self, context: int, field: str = "kept") -> list[int]:
        """Positions in the shard whose bit is set, chunk after chunk."""
        positions: list[int] = []
        for chunk in self.chunks:
            bits = unpack_bits(getattr(chunk, field), chunk.windows * context)
            positions += (chunk.first_window * context + np.flatnonzero(bits)).tolist()
        return positions

    def rows(self, source: Tensors, dtype: str) -> list[Tensor]:
        """The activations of all chunks, per hook."""
        parts = []
        for chunk, payload in zip(self.chunks, self.payloads, strict=True):
            numbers = torch.frombuffer(bytearray(payload), dtype=TORCH_DTYPE[dtype]) if payload else torch.zeros(0)
            blocks = numbers.split([chunk.rows * hook.width for hook in source.hooks])
            parts.append([b.view(chunk.rows, h.width) for b, h in zip(blocks, source.hooks, strict=True) if chunk.rows])
        return [torch.cat(hook) for hook in zip(*[part for part in parts if part], strict=True)]


class Trainer:
    """A trainer whose every message the test decides; it collects what the producer sends."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(endpoint)
        self._route = b""
        self._attempt = 0

    def close(self) -> None:
        self._context.destroy(linger=200)

    def send(self, message: Message, payload: bytes | None = None) -> None:
        self._socket.send_multipart([self._route, encode(message), *([] if payload is None else [payload])])

    def receive(self) -> tuple[Message, bytes]:
        while self._socket.poll(10_000):
            self._route, header, *payload = self._socket.recv_multipart()
            message = decode(header)
            if isinstance(message, Heartbeat):
                self.send(Heartbeat(progress=0))
            else:
                return message, payload[0] if payload else b""
        raise AssertionError("the producer says nothing")

    def welcome(self, norm_bounds: list[float] | None = None) -> None:
        """Lets the producer in, with all the credit in the world."""
        hello, _ = self.receive()
        assert isinstance(hello, Hello)
        self.send(
            Welcome(
                session=hello.session, run="run", incarnation="first", endpoints=["here"], heartbeat_seconds=0.1,
                dead_seconds=5.0, max_chunk_bytes=2**20, norm_bounds=norm_bounds,
            )
        )  # fmt: skip
        self.send(Credit(number=1000))

    def lease(self, shard: int = 0, had: np.ndarray | None = None) -> LeaseResult:
        """Leases a shard and returns everything that the producer sends for it."""
        self._attempt += 1
        self.send(Lease(shard=shard, epoch=0, attempt=self._attempt), b"" if had is None else pack_bits(had))
        sent = LeaseResult([], [], Drain(finished=False))
        while not isinstance(sent.end, ShardEnd | ShardFail):
            message, payload = self.receive()
            if isinstance(message, Chunk):
                assert (message.shard, message.attempt) == (shard, self._attempt)
                sent.chunks.append(message)
                sent.payloads.append(payload)
            sent.end = message
        return sent


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


@pytest.fixture
def manual_trainer(endpoint: str) -> Iterator[Trainer]:
    manual_trainer = Trainer(endpoint)
    yield manual_trainer
    manual_trainer.close()


def start(endpoint: str, source: Source, dtype: str = "float32") -> Producing:
    return Producing(stream_settings(endpoint, dtype=dtype), source, hello_of(source, dtype))


def finish(manual_trainer: Trainer, producer: Producing) -> None:
    manual_trainer.send(Drain(finished=True))
    assert producer.wait_for_end() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kept_row_is_sent_and_no_other(manual_trainer: Trainer, endpoint: str, dtype: str) -> None:
    """Each kept position once, in order, with its activations of every hook in the stream's number format."""
    source = tensors(5)
    producer = start(endpoint, source, dtype)
    manual_trainer.welcome()
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert sent.positions(CONTEXT) == np.flatnonzero(source.kept).tolist()
    assert sent.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=15)
    for rows, x in zip(sent.rows(source, dtype), source.x, strict=True):
        assert torch.equal(rows, x[torch.from_numpy(source.kept)].to(TORCH_DTYPE[dtype]))


def test_what_the_trainer_has_is_neither_run_nor_sent(manual_trainer: Trainer, endpoint: str) -> None:
    """A window whose tokens are all there does not go through the model; SHARD_END counts all tokens nevertheless."""
    source = tensors(6)
    had = np.zeros((6, CONTEXT), bool)
    had[[0, 2, 3]] = True
    had[4, 2] = True
    producer = start(endpoint, source)
    manual_trainer.welcome()
    sent = manual_trainer.lease(had=had)
    finish(manual_trainer, producer)

    assert source.forwarded == [[1, 4], [5]]
    assert sent.positions(CONTEXT) == np.flatnonzero(source.kept & ~had).tolist()
    assert sent.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=18)
    assert torch.equal(sent.rows(source, "float32")[1], source.x[1][torch.from_numpy(source.kept & ~had)])


def test_outliers_are_dropped_by_name(manual_trainer: Trainer, endpoint: str) -> None:
    """An activation beyond the bound of any hook is named, not sent; positions that are not kept are not even named."""
    source = tensors(4)
    source.x[0][0, 2] = 100.0
    source.x[1][3, 1] = 100.0
    source.x[1][3, 0] = 100.0
    producer = start(endpoint, source)
    manual_trainer.welcome(norm_bounds=[10.0, 10.0])
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    outliers = [2, 13]
    assert sent.positions(CONTEXT, "outliers") == outliers
    assert sent.positions(CONTEXT) == [p for p in np.flatnonzero(source.kept).tolist() if p not in outliers]
    assert max(float(rows.norm(dim=1).max()) for rows in sent.rows(source, "float32")) < 10
    assert producer.producer.report().rows_dropped == {"excluded": 4, "outlier": 2}


def test_what_is_excluded_is_counted_with_its_chunk(manual_trainer: Trainer, endpoint: str) -> None:
    """Of a shard that is half sent, half of the excluded positions count: the ratio is not that of the whole shard."""
    source = tensors(4)
    ratios: list[tuple[int, int]] = []

    def count(report: ProducerReport) -> None:
        ratios.append((report.tokens, report.rows_dropped.get("excluded", 0)))

    producer = Producing(stream_settings(endpoint, dtype="float32"), source, hello_of(source, "float32"), count)
    manual_trainer.welcome()
    manual_trainer.lease()
    finish(manual_trainer, producer)

    excluded = (~source.kept).sum(1)
    kept = source.kept.sum(1)
    expected = {(int(kept[:n].sum()), int(excluded[:n].sum())) for n in range(len(kept) + 1)}
    assert len(set(ratios)) > 1 and set(ratios) <= expected


def test_a_chunk_may_hold_outliers_only(manual_trainer: Trainer, endpoint: str) -> None:
    """It names them and carries nothing."""
    source = tensors(1)
    source.x[0][:] = 100.0
    producer = start(endpoint, source)
    manual_trainer.welcome(norm_bounds=[10.0, 10.0])
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert [(chunk.rows, payload) for chunk, payload in zip(sent.chunks, sent.payloads, strict=True)] == [(0, b"")]
    assert sent.positions(CONTEXT, "outliers") == [1, 2, 3]
    assert sent.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=3)


def test_a_norm_near_its_bound_is_not_judged_in_bfloat16(manual_trainer: Trainer, endpoint: str) -> None:
    """√(10² + 0.5²) = 10.01 and √(9.9375² + 0.875²) = 9.976 are both 10 in bfloat16: each across its bound."""
    source = tensors(1, widths=(2,))
    source.x[0] = torch.tensor([[[1, 1], [10, 0.5], [9.9375, 0.875], [1, 1]]], dtype=torch.bfloat16)
    assert torch.linalg.vector_norm(source.x[0][0, 1:3], dim=-1).tolist() == [10.0, 10.0]
    producer = start(endpoint, source, "bfloat16")
    manual_trainer.welcome(norm_bounds=[10.0])
    outliers = manual_trainer.lease().positions(CONTEXT, "outliers")
    finish(manual_trainer, producer)
    assert outliers == [1]

    source.x[0][0, 1] = 1
    bound = 9.98  # above the true norm of the third, below its rounded one
    mask, _ = pack_activations(source.x, source.kept, [bound], torch.bfloat16)
    assert mask.tolist() == [[False, True, True, True]]


def test_a_report_counts_each_thing_under_its_name(manual_trainer: Trainer, endpoint: str) -> None:
    """Six windows, two in a pass, of which three positions are kept: three chunks of one shard; block 1 of 2 runs."""
    producer = start(endpoint, tensors(6))
    manual_trainer.welcome()
    manual_trainer.lease()
    finish(manual_trainer, producer)
    report = producer.producer.report()
    assert (report.chunks, report.forwards, report.shards, report.tokens) == (3, 3, 1, 18)
    assert (report.layers_run, report.layers_total, report.sessions) == (1, 2, 1)


def test_waits_are_told_by_what_is_waited_for(manual_trainer: Trainer, endpoint: str) -> None:
    """Three tenths of a second without a lease, and never without credit."""
    producer = start(endpoint, tensors(1))
    manual_trainer.welcome()
    time.sleep(0.3)
    manual_trainer.lease()
    finish(manual_trainer, producer)
    assert producer.link.stall_seconds["lease"] >= 0.25 and producer.link.stall_seconds["credit"] == 0


def test_time_spent_on_text_is_told(manual_trainer: Trainer, endpoint: str) -> None:
    """A tokenizer that takes a tenth of a second for a shard is seen among the producer's waits."""

    class Slow(Tensors):
        def windows(self, shard: int, epoch: int = 0) -> Windows:
            time.sleep(0.1)
            return super().windows(shard, epoch)

    source = tensors(1)
    producer = start(endpoint, Slow(source.x, source.kept))
    manual_trainer.welcome()
    manual_trainer.lease()
    finish(manual_trainer, producer)
    assert producer.producer.report().stall_seconds["text"] >= 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_outlier(manual_trainer: Trainer, endpoint: str, value: float) -> None:
    """It is not quietly dropped as if it were an attention sink: the trainer gets to see it, and refuses it."""
    source = tensors(1)
    source.x[0][0, 2, 1] = value
    producer = start(endpoint, source)
    manual_trainer.welcome(norm_bounds=[10.0, 10.0])
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert (sent.positions(CONTEXT), sent.positions(CONTEXT, "outliers")) == ([1, 2, 3], [])


def test_the_first_pass_proposes_the_bounds() -> None:
    """Per hook, the factor times the median norm of kept activations; a BOS as long as a tower moves nothing."""
    source = tensors(2, widths=(1, 4))
    source.x[0] = torch.arange(8.0).view(2, 4, 1)
    source.x[1] = 2 * torch.ones(2, 4, 4)
    for x in source.x:
        x[:, 0] = 1e6

    # kept rows of the first hook: 1 2 3 5 6 7, whose (lower) median is 3
    assert norm_bounds(source, [0, 1], 10.0) == [30.0, 40.0]
    assert norm_bounds(source, [0, 1], 0.0) is None
    assert source.forwarded == [[0, 1]]


def test_the_norms_of_the_first_text_are_described() -> None:
    """One in ten is four times as heavy as the others and has 16 of 25 parts of the squares; a sink is dropped."""
    text = describe_norms(np.array([1.0] * 9 + [4.0, 150.0]), bound=10.0)
    assert text.startswith("norms: median 1, from 1 to 4 in 80%, largest 150; 1 of 11 are beyond the bound 10 and")
    assert "10.00% of the others are over 3 × the median and hold 64% of the sum of squares" in text
    assert "heavy" not in describe_norms(np.ones(4), 10.0) and "dropped" in describe_norms(np.ones(4), 10.0)


def test_a_row_as_long_as_its_bound_is_sent() -> None:
    """The norm of (6, 8) is 10, and only what is longer than the bound is an outlier."""
    x, mask = torch.tensor([[[6.0, 8.0], [6.0, 8.001]]]), np.ones((1, 2), bool)
    assert pack_activations([x], mask, [10.0], torch.float32)[0].tolist() == [[True, False]]
    assert in_stream({"a": x}, torch.from_numpy(mask), {"a": 10.0}).tolist() == [[True, False]]


def test_a_payload_holds_the_hooks_that_are_asked_for() -> None:
    """What is dropped is the same: a bound holds at every hook."""
    x, y, mask = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0], [60.0]]]), np.ones((1, 2), bool)
    for hooks, numbers in (((), [1.0, 2.0, 5.0]), ((0,), [1.0, 2.0]), ((1,), [5.0])):
        packed, payload = pack_activations([x, y], mask, [10.0, 10.0], torch.float32, hooks)
        assert packed.tolist() == [[True, False]] and np.frombuffer(payload, np.float32).tolist() == numbers


def test_the_fingerprint_is_of_what_decides_the_rows() -> None:
    """Each fact counts, but for the names of model and corpus, which another machine may have under another path."""
    facts = named_source().facts | {"model": "gpt2", "model_weights": "abc"}
    before = fingerprint(facts)
    assert fingerprint(facts | {"model": "/models/gpt2", "corpus": "elsewhere"}) == before
    decisive = facts.keys() - {"model", "corpus"}
    assert len({fingerprint(facts | {name: "other"}) for name in decisive} | {before}) == len(decisive) + 1
    assert "context" in decisive


@pytest.mark.parametrize("zeros", [6, 4])
def test_a_hook_without_a_usual_norm_is_refused(zeros: int) -> None:
    """A zeroed module, and one that is silent on most tokens, have a median norm of 0: no bound comes of it."""
    source = tensors(2)
    source.x[1].view(8, 5)[[1, 2, 3, 5, 6, 7][:zeros]] = 0
    with pytest.raises(ModelError, match=rf"model.hooks = 'hook 1': {zeros} of the first 6 activations are zero, so"):
        norm_bounds(source, [0], 10.0)
    assert norm_bounds(source, [0], 0.0) is None


@pytest.mark.parametrize(("dtype", "advice"), [("float16", "overflow in model.dtype"), ("bfloat16", '= "float32"')])
def test_overflow_on_the_first_text_is_told(dtype: str, advice: str) -> None:
    """The self-check's random tokens may be harmless where text is not."""
    source = tensors(2)
    source.x[0][1, 1, 0] = float("inf")
    source.facts = {"model": "m", "model_dtype": dtype}
    with pytest.raises(ModelError, match=f"model.hooks = 'hook 0': .*{advice}"):
        norm_bounds(source, [0], 10.0)


def test_the_bound_does_not_depend_on_the_size_of_a_pass() -> None:
    """Passes are as large as is fast on the machine at hand; which tokens are kept must not depend on the machine."""
    few, many = tensors(9, context=1024, batch_windows=2), tensors(9, context=1024, batch_windows=7)

    assert norm_bounds(few, [0], 10.0) == norm_bounds(many, [0], 10.0)
    assert (few.forwarded, many.forwarded) == ([[0, 1], [2, 3]], [[0, 1, 2, 3]])


# Reading ahead


def test_the_next_shard_is_read_while_the_present_one_is_worked_on() -> None:
    """Once, and by one thread alone; what reading it raises is raised when it is asked for."""
    readers: dict[int, str] = {}

    def read(shard: int, epoch: int) -> Windows:
        assert shard not in readers
        readers[shard] = threading.current_thread().name
        if shard == 2:
            raise OSError("gone")
        return tensors(shard + 1).windows(0)

    text = TextPrefetcher(read)
    assert len(text.windows(0, 0)) == 1
    text.prefetch(1, 0)
    text.prefetch(1, 0)
    assert len(text.windows(1, 0)) == 2
    text.prefetch(2, 0)
    with pytest.raises(OSError, match="gone"):
        text.windows(2, 0)
    text.prefetch(3, 0)
    assert len(text.windows(4, 0)) == 5  # the lease went to somebody else
    text.close()

    assert {readers[shard] for shard in (0, 1, 2, 4)} == {"text_0"}


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_passes_side_by_side_send_the_same_in_the_same_order(
    manual_trainer: Trainer, endpoint: str, passes: int
) -> None:
    """Early windows take longest; they come first all the same. A pass that fails fails its shard alone."""

    class Uneven(Tensors):
        def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
            time.sleep(0.03 / (1 + indices[0]))
            if shard == 1 and indices[0] == 2:
                raise RuntimeError("pass broken")
            return super().activations(shard, windows, indices)

    original = tensors(9)
    source = Uneven(original.x, original.kept)
    source.concurrent_passes = passes  # type: ignore[misc]
    producer = start(endpoint, source)
    manual_trainer.welcome()
    whole, broken, again = manual_trainer.lease(), manual_trainer.lease(1), manual_trainer.lease(2)
    finish(manual_trainer, producer)

    assert whole.positions(CONTEXT) == again.positions(CONTEXT) == np.flatnonzero(source.kept).tolist()
    assert whole.payloads == again.payloads
    assert isinstance(broken.end, ShardFail) and "pass broken" in broken.end.error
    assert producer.producer.report().forwards == 5 + 1 + 5


# Geometry


class Timed(LanguageModelSource):
    """A source whose passes take as long as the test says, and no time."""

    def __init__(self, seconds: dict[int, float], is_set: bool = False) -> None:
        self.batch_windows, self.context, self._batch_is_set, self._seconds = 16, 256, is_set, seconds
        self.concurrent_passes = 1
        self.passes: list[int] = []

    def _pass_seconds(self, size: int, threads: ThreadPoolExecutor) -> float:
        self.passes.append(size)
        if self._seconds[size] == float("inf"):
            raise torch.OutOfMemoryError
        return self._seconds[size]


FLAT = {1: 0.01, 4: 0.04, 8: 0.08, 16: 0.16, 32: 0.32, 64: 0.64}
"""A second for a hundred windows, whatever the pass."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 16),
        ({32: 0.31}, 16),  # hardly faster
        ({32: 0.2}, 32),
        ({8: 0.05, 32: 0.2}, 8),  # as fast, with less memory
        ({64: float("inf")}, 16),
        ({16: float("inf"), 32: float("inf"), 64: float("inf")}, 4),
        ({1: 1.0}, 16),  # a slow model is left alone
    ],
)
def test_a_pass_is_as_large_as_is_fast(changes: dict[int, float], expected: int) -> None:
    """The usual size unless another is clearly faster; sizes without room in memory or time are left out."""
    source = Timed(FLAT | changes)
    source.choose_batch()

    assert source.batch_windows == expected
    assert sum(FLAT[size] for size in source.passes) <= CALIBRATION_SECONDS + 0.1


def test_the_size_of_a_pass_that_is_set_is_not_measured() -> None:
    source = Timed(FLAT, is_set=True)
    source.choose_batch()

    assert (source.batch_windows, source.passes) == (16, [])


def test_in_deterministic_mode_a_pass_always_takes_the_same_windows(manual_trainer: Trainer, endpoint: str) -> None:
    """Whatever is wanted: the last bits of an activation may depend on the windows beside it. Only that is sent."""
    source = tensors(7, batch_windows=3)
    source.facts = {"corpus": "tensors", "deterministic": True}
    had = np.ones((7, CONTEXT), bool)
    had[[2, 6], 1:] = False
    producer = start(endpoint, source)
    manual_trainer.welcome()
    sent = manual_trainer.lease(had=had)
    finish(manual_trainer, producer)

    assert source.forwarded == [[0, 1, 2], [6]]
    assert sent.positions(CONTEXT) == [2 * CONTEXT + 1, 2 * CONTEXT + 2, 2 * CONTEXT + 3, 25, 26, 27]
    for received, x in zip(sent.rows(source, "float32"), source.x, strict=True):
        assert torch.equal(received, x[[2, 6], 1:].reshape(6, -1))


def test_a_chunk_is_about_two_megabytes_and_at_most_one_pass() -> None:
    """Whole windows, at least one."""
    row_bytes = 768 * 2

    assert chunk_windows(256, row_bytes, batch_windows=128) == TARGET_CHUNK_BYTES // (256 * row_bytes) == 5
    assert chunk_windows(256, row_bytes, batch_windows=3) == 3
    assert chunk_windows(4096, 4096 * 4, batch_windows=1) == 1
    assert chunk_windows(256, 64 * 2, batch_windows=64) == MAX_CHUNK_ROWS // 256 == 16


def test_passes_are_cut_into_chunks(manual_trainer: Trainer, endpoint: str) -> None:
    """Windows of a megabyte, three in a pass, two in a chunk: 2, 1, 2, 1, 1."""
    source = tensors(7, widths=(65536,), batch_windows=3)
    producer = start(endpoint, source)
    manual_trainer.welcome()
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert source.forwarded == [[0, 1, 2], [3, 4, 5], [6]]
    assert [(chunk.number, chunk.first_window, chunk.windows) for chunk in sent.chunks] == [
        (1, 0, 2), (2, 2, 1), (3, 3, 2), (4, 5, 1), (5, 6, 1),
    ]  # fmt: skip
    assert max(chunk.rows for chunk in sent.chunks) <= hello_of(source).chunk_rows == 2 * CONTEXT
    assert torch.equal(sent.rows(source, "float32")[0], source.x[0][torch.from_numpy(source.kept)])


def test_rows_that_lie_far_apart_come_in_chunks_of_their_own(manual_trainer: Trainer, endpoint: str) -> None:
    """The last missing tokens of a long shard, at its two ends: no chunk names more positions than a message may."""
    source = tensors(2000, widths=(1,), context=256)
    had = np.ones((2000, 256), bool)
    had[[0, 1, 1999], 7] = False
    producer = start(endpoint, source)
    manual_trainer.welcome()
    sent = manual_trainer.lease(had=had)
    finish(manual_trainer, producer)

    assert sent.positions(256) == [7, 256 + 7, 1999 * 256 + 7]
    assert isinstance(sent.end, ShardEnd)


@pytest.mark.parametrize("context", [1, 100, 256, MAX_CHUNK_POSITIONS])
def test_parts_cover_a_pass_once_and_never_reach_too_far(context: int) -> None:
    """Every index in one part, in order; each part within the limits."""
    random = np.random.default_rng(0)
    for _ in range(50):
        windows = np.flatnonzero(random.random(5000) < random.choice([0.001, 0.02, 0.5]))
        parts = [windows[part] for part in chunk_slices(windows, 7, context)]

        assert np.concatenate([*parts, np.zeros(0, int)]).tolist() == windows.tolist()
        assert all(1 <= len(part) <= 7 for part in parts)
        assert all((part[-1] - part[0] + 1) * context <= MAX_CHUNK_POSITIONS for part in parts)


def test_credit_never_shrinks(manual_trainer: Trainer, endpoint: str) -> None:
    """A CREDIT that says less than one before it is an old one: what was granted stays granted."""
    source = tensors(8)
    producer = start(endpoint, source)
    manual_trainer.welcome()  # with credit for a thousand chunks
    manual_trainer.send(Credit(number=0))
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert sent.positions(CONTEXT) == np.flatnonzero(source.kept).tolist()


def test_a_shard_without_rows_is_done_at_once(manual_trainer: Trainer, endpoint: str) -> None:
    """No text, or none that is kept: no pass, no chunk, and an end that counts zero tokens."""
    source = tensors(3)
    source.kept[:] = False
    producer = start(endpoint, source)
    manual_trainer.welcome()
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert (sent.chunks, source.forwarded) == ([], [])
    assert sent.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=0)


# What goes wrong


@dataclass
class Torn(Tensors):
    """Shard 1 cannot be read; shard 2 breaks in its second pass."""

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        if shard == 1:
            raise OSError("the disk has a hole")
        return super().windows(shard, epoch)

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        if shard == 2 and 2 in indices:
            raise torch.OutOfMemoryError("no room for window 2")
        return super().activations(shard, windows, indices)


def torn() -> Torn:
    whole = tensors(4)
    return Torn(whole.x, whole.kept)


def test_a_shard_that_fails_is_reported_and_the_next_one_served(manual_trainer: Trainer, endpoint: str) -> None:
    """The error's own words, worth another try; what was sent before it is not taken back."""
    source = torn()
    producer = start(endpoint, source)
    manual_trainer.welcome()
    unread, broken, good = manual_trainer.lease(1), manual_trainer.lease(2), manual_trainer.lease(0)
    finish(manual_trainer, producer)

    assert unread.end == ShardFail(shard=1, epoch=0, attempt=1, error="OSError: the disk has a hole", retry=True)
    assert isinstance(broken.end, ShardFail)
    assert broken.end.error == "OutOfMemoryError: no room for window 2"
    assert broken.positions(CONTEXT) == [1, 2, 3, 5, 6, 7]
    assert good.end == ShardEnd(shard=0, epoch=0, attempt=3, rows=12)
    assert producer.producer.report().shards == 1


def test_a_shard_with_a_token_that_the_model_lacks_fails_before_any_row_of_it(
    manual_trainer: Trainer, endpoint: str, tmp_path: Path
) -> None:
    """The trainer is told window, token and text, and nothing is skipped in silence; other shards are served."""
    shutil.copytree("producer/demo_lm", tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "lm")
    for number, text in enumerate(["import os\n" * 20, "import os, say <image_soft_token> here\n" * 5]):
        (tmp_path / f"{number}.txt").write_text(text)
    source = LanguageModelSource(
        ProducerSettings(
            model=ModelSettings(
                name=str(tmp_path / "lm"), hooks=["blocks.0.hook_resid_post"], device="cpu", dtype="float32"
            ),
            corpus=CorpusSettings(kind="text", paths=[str(tmp_path / "*.txt")], shard_bytes=200, context=16),
        )
    )
    assert source.shards == 2
    producer = start(endpoint, source)
    manual_trainer.welcome()
    good, bad = manual_trainer.lease(0), manual_trainer.lease(1)
    finish(manual_trainer, producer)

    assert good.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=int(source.windows(0).kept.sum()))
    assert bad.chunks == [] and isinstance(bad.end, ShardFail)
    assert re.match(r"ModelError: window 0, position \d: token id 4096 \('<image_soft_token>'\) is", bad.end.error)
    assert "the text there is '<|endoftext|>import os, say <image_soft_token> here" in bad.end.error


def test_a_session_that_ends_in_mid_shard_starts_over(manual_trainer: Trainer, endpoint: str) -> None:
    """The lease is dropped without a word; under the next session the numbers of chunks begin again."""
    source = tensors(4)
    producer = start(endpoint, source)
    manual_trainer.welcome()
    manual_trainer.send(Lease(shard=0, epoch=0, attempt=1), b"")
    assert isinstance(manual_trainer.receive()[0], Chunk)
    manual_trainer.send(Reject(code="silent", reason="nothing heard", retry=True))
    while not isinstance(message := manual_trainer.receive()[0], Hello):
        assert not isinstance(message, ShardFail)
    manual_trainer.send(
        Welcome(
            session=message.session, run="run", incarnation="second", endpoints=["here"], heartbeat_seconds=0.1,
            dead_seconds=5.0, max_chunk_bytes=2**20, norm_bounds=None,
        )
    )  # fmt: skip
    manual_trainer.send(Credit(number=1000))
    sent = manual_trainer.lease()
    finish(manual_trainer, producer)

    assert [(chunk.number, chunk.incarnation) for chunk in sent.chunks] == [(1, "second"), (2, "second")]
    assert sent.end == ShardEnd(shard=0, epoch=0, attempt=1, rows=12)
    assert producer.link.sessions == 2


def test_shards_that_always_fail_do_not_hold_up_the_run(endpoint: str) -> None:
    """With the real trainer: set aside after three tries and listed, while the outliers of the rest are discarded."""
    source = torn()
    source.x[0][1, 1] = 100.0
    settings = stream_settings(endpoint, dead_seconds=2.0)  # a failed shard is tried again after so long
    with trainer(settings) as intake:
        producer = Producing(settings, source, hello_of(source, norm_bounds=[10.0, 10.0]))
        rows = 0
        while (batch := intake.take(4, threading.Event())) is not None:
            intake.mark_trained(batch)
            rows += len(batch.serial)
        intake.drain(finished=True)
        assert producer.wait_for_end() is None
        ledger = intake.ledger

        assert rows == ledger.tokens_trained == 11 + 5
        assert ledger.tokens_dropped == 2
        assert {entry.shard: entry.reason for entry in ledger.shards.quarantined} == {
            1: "OSError: the disk has a hole",
            2: "OutOfMemoryError: no room for window 2",
        }
