"""The shuffling buffer: every token once, in an order that mixes, in memory that does not grow."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.state.format import BufferState
from trainer.stream.buffer import Batch, ShuffleBuffer, same_context_mates


def rows(serial: int, position: np.ndarray, width: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, width] whose first two columns say which row it is: 16 positions of 16 shards are exact in bf16."""
    x = torch.zeros(len(position), width, dtype=dtype)
    x[:, 0], x[:, 1] = serial, torch.from_numpy(position)
    return x


def insert(buffer: ShuffleBuffer, serial: int, position: np.ndarray, width: int = 2) -> None:
    buffer.insert([rows(serial, position, width)], serial, position)


def names(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.serial.tolist(), batch.position.tolist(), strict=True))


def filled(capacity: int, seed: int = 0) -> ShuffleBuffer:
    buffer = ShuffleBuffer(capacity, [2], torch.float32, seed)
    insert(buffer, 7, np.arange(capacity))
    return buffer


# Exactly once


def test_every_row_comes_out_once_and_unchanged() -> None:
    """12 tokens in, three batches of 4 out: the same 12 names, each with its own activations."""
    buffer = ShuffleBuffer(12, [2], torch.float32, seed=0)
    insert(buffer, 1, np.array([0, 2, 4, 6, 8]))
    insert(buffer, 2, np.arange(7))
    batches = [buffer.draw(4) for _ in range(3)]
    drawn_names = [name for batch in batches for name in names(batch)]
    assert sorted(drawn_names) == [(1, 0), (1, 2), (1, 4), (1, 6), (1, 8), *((2, at) for at in range(7))]
    for batch in batches:
        assert batch.x[0].tolist() == [list(name) for name in names(batch)]
    assert buffer.rows == 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(moves=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), seed=st.integers(0, 9))
def test_no_order_of_filling_and_drawing_loses_or_repeats_a_row(moves: list[tuple[bool, int]], seed: int) -> None:
    """Against a plain set of names, in a buffer so small that slots are reused all the time."""
    buffer = ShuffleBuffer(13, [2], torch.float32, seed)
    inside: set[tuple[int, int]] = set()
    for serial, (filling, count) in enumerate(moves):
        if filling:
            count = min(count, buffer.capacity - buffer.rows)
            insert(buffer, serial, np.arange(count))
            inside |= {(serial, at) for at in range(count)}
        else:
            batch = buffer.draw(min(count, buffer.rows))
            assert batch.x[0].tolist() == [list(name) for name in names(batch)]
            assert len(set(names(batch))) == len(names(batch)) and set(names(batch)) <= inside
            inside -= set(names(batch))
        assert buffer.rows == len(inside)
    assert set(names(buffer.draw(buffer.rows))) == inside


def test_hooks_stay_aligned() -> None:
    """One draw gives the same tokens for every hook, whatever their widths."""
    buffer = ShuffleBuffer(16, [2, 5, 3], torch.float32, seed=3)
    position = np.arange(16)
    buffer.insert([rows(4, position, width) for width in (2, 5, 3)], 4, position)
    buffer.draw(5)
    buffer.insert([rows(5, position[:5], width) for width in (2, 5, 3)], 5, position[:5])
    batch = buffer.draw(16)
    assert [x.shape for x in batch.x] == [(16, 2), (16, 5), (16, 3)]
    for x in batch.x:
        assert x[:, :2].tolist() == [list(name) for name in names(batch)]


def test_a_forgotten_hook_gives_its_memory_back() -> None:
    """Bytes of a hook that nobody reads are free at once; the others, and what comes without it, stay whole."""
    buffer = ShuffleBuffer(16, [2, 500, 3], torch.float32, seed=3)
    before, position = buffer.nbytes, np.arange(8)
    buffer.insert([rows(4, position, width) for width in (2, 500, 3)], 4, position)
    buffer.forget(1)
    buffer.insert([rows(5, position, 2), None, rows(5, position, 3)], 5, position)

    assert buffer.nbytes == before - 16 * 500 * 4
    batch = buffer.draw(16)
    assert [x.shape for x in batch.x] == [(16, 2), (16, 0), (16, 3)]
    for x in (batch.x[0], batch.x[2]):
        assert x[:, :2].tolist() == [list(name) for name in names(batch)]


def test_rows_keep_their_bits() -> None:
    """bfloat16 goes in and comes out as it was, -0.0 and subnormals included."""
    bits = torch.arange(-64, 64, dtype=torch.int16) * 255
    x = bits.view(torch.bfloat16).reshape(64, 2)
    buffer = ShuffleBuffer(64, [2], torch.bfloat16, seed=0)
    buffer.insert([x], 0, np.arange(64))
    batch = buffer.draw(64)
    assert torch.equal(batch.x[0].view(torch.int16), x[torch.from_numpy(batch.position)].view(torch.int16))


def test_batch_is_a_copy() -> None:
    """A step may keep or change its batch while new tokens take the slots."""
    buffer = filled(4)
    batch = buffer.draw(4)
    before = batch.x[0].clone()
    insert(buffer, 9, np.arange(4))
    assert torch.equal(batch.x[0], before)


# Bounds


def test_full_buffer_refuses_and_stays_as_it_was() -> None:
    """Overrunning it would overwrite tokens; credit makes that impossible, and this says so if it ever happens."""
    buffer = filled(8)
    buffer.draw(3)
    with pytest.raises(OverflowError, match="4 activations do not fit: 5 of 8"):
        insert(buffer, 9, np.arange(4))
    assert buffer.rows == 5
    assert all(serial == 7 for serial, _ in names(buffer.draw(5)))


def test_more_than_there_is_cannot_be_drawn() -> None:
    """The caller waits instead."""
    with pytest.raises(ValueError, match="a batch of 9 activations was requested, the buffer holds 8"):
        filled(8).draw(9)


def test_chunk_without_rows_changes_nothing() -> None:
    """A chunk whose tokens are all outliers is empty."""
    buffer = filled(8)
    buffer.draw(8)
    insert(buffer, 9, np.zeros(0, np.int64))
    assert buffer.rows == 0 and names(buffer.draw(0)) == []


def test_peek_takes_nothing_out() -> None:
    """For estimating scale and centre before the first step; distinct tokens, at most those there are."""
    buffer = filled(8)
    (x,) = buffer.peek(5)
    assert len({tuple(row) for row in x.tolist()}) == 5
    assert [len(x) for x in buffer.peek(99)] == [8]
    assert len(set(names(buffer.draw(8)))) == 8


# Memory


def test_memory_is_what_the_docstring_says() -> None:
    """Capacity × bytes of an activation, and 24 bytes of bookkeeping per slot."""
    buffer = ShuffleBuffer(1000, [8, 24], torch.bfloat16, seed=0)
    assert buffer.nbytes == 1000 * (2 * (8 + 24) + 24)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_buffer_is_one_whole_and_given_back() -> None:
    """In huge pages, where there are some: every slot can be written and read, and its memory is free when it goes."""
    process = psutil.Process()
    before = process.memory_info().rss
    buffer = ShuffleBuffer(16_384, [1024], torch.float32, seed=0)
    x, position = torch.arange(16_384.0)[:, None].expand(-1, 1024).contiguous(), np.arange(16_384)
    buffer.insert([x], 0, position)
    batch = buffer.draw(16_384)
    assert torch.equal(batch.x[0], x[torch.from_numpy(batch.position)])
    del batch, x
    held = process.memory_info().rss - before
    buffer.forget(0)
    assert held - (process.memory_info().rss - before) > 0.9 * 16_384 * 1024 * 4


def test_memory_does_not_grow() -> None:
    """200 times round an 8 MB buffer: the process stays as large as after the first few."""
    buffer = ShuffleBuffer(16_000, [128], torch.float32, seed=0)
    chunk = torch.ones(2000, 128)

    def churn(times: int) -> None:
        for serial in range(times):
            while buffer.rows <= buffer.capacity - len(chunk):
                buffer.insert([chunk], serial, np.arange(len(chunk)))
            for _ in range(2):
                buffer.draw(1000)

    churn(20)
    nbytes, resident = buffer.nbytes, resident_bytes()
    tracemalloc.start()
    churn(200)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert buffer.nbytes == nbytes
    assert resident_bytes() - resident < 8 * 2**20
    assert grown < 1024 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Chance


def test_draw_is_uniform_without_replacement() -> None:
    """Two of six tokens, 6000 times: each of the 15 pairs comes about 400 times, each token about as often first."""
    pairs: Counter[frozenset[int]] = Counter()
    firsts: Counter[int] = Counter()
    buffer = filled(6)
    for _ in range(6000):
        batch = buffer.draw(2)
        pairs[frozenset(batch.position.tolist())] += 1
        firsts[int(batch.position[0])] += 1
        insert(buffer, 7, batch.position)
    assert len(pairs) == 15
    # Five standard deviations of a binomial: 400 ± 97 and 1000 ± 144.
    assert all(abs(count - 400) < 97 for count in pairs.values())
    assert all(abs(count - 1000) < 144 for count in firsts.values())


def test_old_and_new_rows_have_the_same_chance() -> None:
    """40 tokens have waited through many draws, 40 are new: a draw of 20 takes about 10 of each."""
    old_count = 0
    for seed in range(200):
        buffer = ShuffleBuffer(160, [2], torch.float32, seed)
        insert(buffer, 0, np.arange(160))
        for _ in range(12):
            buffer.draw(10)
        insert(buffer, 1, np.arange(40))
        old_count += int((buffer.draw(20).serial == 1).sum())
    # Hypergeometric: variance 20 · ½ · ½ · 60/79 = 3.8 a draw, so 200 draws give 2000 ± 5 · 27.6.
    assert abs(old_count - 2000) < 138


def test_same_seed_draws_the_same_rows() -> None:
    """A run can be repeated; another seed gives another order."""
    first, again, other = (names(filled(64, seed).draw(32)) for seed in (1, 1, 2))
    assert first == again != other


def test_random_state_survives_a_checkpoint() -> None:
    """Through JSON, as the checkpoint keeps it."""
    buffer, successor = filled(64, seed=1), filled(64, seed=2)
    buffer.draw(10)
    successor.draw(10)
    successor.restore(BufferState(json.loads(json.dumps(buffer.state().random))))
    assert successor._random.integers(2**60) == buffer._random.integers(2**60)


# Mixing


def batch_of(*where: tuple[int, int]) -> Batch:
    serial, position = np.array(where, np.int64).T
    return Batch([], serial, position)


def test_same_context_mates_by_hand() -> None:
    """Contexts of 4: three tokens of a window have 2 mates each, two of the next 1 each, one has none: 8 / 6."""
    batch = batch_of((0, 0), (0, 1), (0, 3), (0, 4), (0, 7), (1, 0))
    assert same_context_mates(batch, context=4) == pytest.approx(8 / 6)


def test_windows_of_different_shards_are_different() -> None:
    """The same position in two shards is no mate; a batch of one token has none."""
    assert same_context_mates(batch_of((0, 5), (1, 5), (2, 5)), context=4) == 0
    assert same_context_mates(batch_of((0, 5)), context=4) == 0


def test_rows_in_the_order_of_the_text_are_all_mates() -> None:
    """Without shuffling, a batch of whole contexts of T tokens has T - 1 mates a token."""
    position = np.arange(256)
    assert same_context_mates(Batch([], np.zeros_like(position), position), context=16) == 15


def test_full_buffer_mixes_as_the_formula_says() -> None:
    """B = 128 of M = 1024 tokens in contexts of T = 16: (B - 1)(T - 1) / (M - 1) = 1.86 expected mates."""
    b, t, m = 128, 16, 1024
    buffer = filled(m)
    neighbours = []
    for _ in range(300):
        batch = buffer.draw(b)
        neighbours.append(same_context_mates(batch, context=t))
        insert(buffer, 7, batch.position)
    assert np.mean(neighbours) == pytest.approx((b - 1) * (t - 1) / (m - 1), rel=0.03)


def test_stream_through_a_half_full_buffer_mixes_contexts() -> None:
    """As the trainer draws: contexts arrive one after the other, batches leave while the buffer is at least half full.

    Unmixed contexts would give each token 63 neighbours of its own context. Half a buffer of M = 4096 tokens would give
    (B - 1)(T - 1) / (M/2 - 1) ≈ 3.9 of whole contexts, and gives half of that: older contexts have left in part.
    """
    context, count = 64, 128
    buffer = ShuffleBuffer(4096, [2], torch.float32, seed=0)
    neighbours = []
    for serial in range(400):
        insert(buffer, serial, np.arange(context))
        if buffer.rows >= buffer.capacity // 2 + count:
            neighbours.append(same_context_mates(buffer.draw(count), context))
    assert len(neighbours) > 100
    assert np.mean(neighbours) == pytest.approx((count - 1) * (context - 1) / (buffer.capacity // 2 - 1) / 2, rel=0.05)
