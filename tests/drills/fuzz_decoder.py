"""Atheris at producer.wire.decode: a message or a WireError, nothing else, and no memory beyond the limits.

python tests/drills/fuzz_decoder.py FOLDER SECONDS        # exit code 0 when nothing was found
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

with atheris.instrument_imports(include=["producer.wire"]):
    from producer.wire import MAX_HEADER_BYTES, Bye, Drain, Heartbeat, ShardEnd, WireError, decode, encode

MEMORY = 2 << 30
"""Address space of the process; a decoder that allocates what a header claims would meet it."""


def one(frame: bytes) -> None:
    with suppress(WireError):
        decode(frame)


if __name__ == "__main__":
    seeds = Path(sys.argv[1]) / "seeds"
    seeds.mkdir()
    good = (Heartbeat(progress=1), Bye(), Drain(finished=True), ShardEnd(shard=1, epoch=0, attempt=1, rows=1))
    for number, message in enumerate(good):
        (seeds / str(number)).write_bytes(encode(message))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    limits = [f"-max_total_time={sys.argv[2]}", f"-max_len={MAX_HEADER_BYTES + 16}", f"-artifact_prefix={sys.argv[1]}/"]
    atheris.Setup([sys.argv[0], *limits, str(seeds)], one)
    atheris.Fuzz()
