"""Whether the buffer will mix the shards of the stream, judged by what a producer has measured at its start."""

from __future__ import annotations

from producer.settings import BYTES_PER_TOKEN
from producer.wire import Hello

SHARDS_MIXED = 4
"""Unlike shards of which the buffer should hold so many."""
UNLIKE = 0.4
"""Shards are unlike whose words overlap by so much less than those of two halves of one. Those of the standard
library, a few dozen files each, have 0.29."""


def mixing_advice(hello: Hello, capacity: int) -> str | None:
    """Says that unlike shards will not be mixed in a buffer of `capacity` tokens, and what to set; None where they are.

    Producers of earlier releases have measured nothing.
    """
    tokens, unlikeness = hello.provenance.get("shard_tokens"), hello.provenance.get("shard_unlikeness")
    if not isinstance(tokens, int) or not isinstance(unlikeness, float):
        return None
    if unlikeness < UNLIKE or SHARDS_MIXED * tokens <= capacity:
        return None
    shard_bytes = max(1, BYTES_PER_TOKEN * capacity // SHARDS_MIXED)
    return (
        f"shards are unlike (two of them have {unlikeness:.0%} fewer words in common than two halves of one), and the "
        f"buffer of {capacity:,} tokens holds {capacity / tokens:.2g} of them, of about {tokens:,} tokens each: "
        "batches will be of one or two shards at a time. "
        f"Set corpus.shard_bytes = {shard_bytes}, or write parquet with row groups of about so many bytes, so that "
        f"{SHARDS_MIXED} fit; or raise buffer.rows to {SHARDS_MIXED * tokens}"
    )
