"""The sending end of the wire section, in a process of its own: the same chunk for ever, as fast as it is taken.

    python -m tests.benchmarks.sending link ENDPOINT KEYS WIDTH     through the real producer's link
    python -m tests.benchmarks.sending bare ENDPOINT KEYS WIDTH     through a bare DEALER socket, in frames of that size

KEYS is a folder of CURVE keys, or "-".
"""

from __future__ import annotations

import sys
import uuid

import numpy as np
import torch
import zmq

from producer.keys import connect_encrypted
from producer.link import Link, PackedChunk, SessionLost
from producer.settings import StreamSettings
from producer.wire import TARGET_CHUNK_BYTES, Chunk, Hello, Hook, ShardEnd, encode, pack_bits

CONTEXT = 256
SHARDS, SHARD_CHUNKS = 64, 64


def chunk_rows(width: int) -> int:
    """Rows of a chunk of bfloat16 as the producer would cut it."""
    return CONTEXT * max(1, TARGET_CHUNK_BYTES // (2 * width * CONTEXT))


def hello(width: int) -> Hello:
    return Hello(
        producer=uuid.uuid4().hex, session="-", name="bench", fingerprint="bench", shards=SHARDS, held_out=0.0,
        context=CONTEXT, hooks=[Hook(name="bench", module="bench", width=width)], dtype="bfloat16",
        chunk_rows=chunk_rows(width), norm_bounds=None, provenance={},
    )  # fmt: skip


def payload_of(width: int) -> memoryview:
    rows = torch.randn(chunk_rows(width), width, generator=torch.Generator().manual_seed(0))
    return rows.to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1).data


def chunk_of(width: int, number: int, payload: memoryview) -> PackedChunk:
    """The `number`-th chunk of a shard."""
    rows = chunk_rows(width)
    windows = rows // CONTEXT
    mask = pack_bits(np.ones(rows, bool))
    return PackedChunk(number * windows, windows, rows, mask, outlier_bits=b"", outlier_count=0, payload=payload)


def through_link(endpoint: str, keys: str | None, width: int) -> None:
    payload = payload_of(width)
    with Link(StreamSettings(endpoint=endpoint, keys=keys), hello(width)) as link:
        while True:
            lease, _, _ = link.next_lease()
            try:
                for number in range(SHARD_CHUNKS):
                    link.send_chunk(lease, chunk_of(width, number, payload))
                end = ShardEnd(
                    shard=lease.shard,
                    epoch=lease.epoch,
                    attempt=lease.attempt,
                    rows=SHARD_CHUNKS * chunk_rows(width),
                )
                link.end_shard(lease, end)
            except SessionLost:
                continue


def bare(endpoint: str, keys: str | None, width: int) -> None:
    payload = payload_of(width)
    chunk = chunk_of(width, 0, payload)
    message = Chunk(
        number=1, incarnation="i", shard=0, epoch=0, attempt=1, first_window=chunk.first_window,
        windows=chunk.windows, rows=chunk.rows, kept=chunk.kept_bits, outliers=chunk.outlier_bits,
    )  # fmt: skip
    header = encode(message)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.sndhwm = 8
    if keys is not None:
        connect_encrypted(socket, keys)
    socket.connect(endpoint)
    while True:
        socket.send_multipart([header, payload], copy=False)


if __name__ == "__main__":
    how, endpoint, keys, width = sys.argv[1:]
    {"link": through_link, "bare": bare}[how](endpoint, None if keys == "-" else keys, int(width))
