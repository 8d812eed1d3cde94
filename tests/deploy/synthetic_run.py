"""A run without a language model, for tests that start processes."""

from __future__ import annotations

import socket

RUN_FILE = """\
[run]
directory = "run"
threads = 1
[corpus]
kind = "synthetic"
epochs = 0
context = 64
[corpus.synthetic]
d_in = 32
features = 64
[buffer]
rows = 16_384
[optimizer]
batch = 1024
warmup_tokens = 5_000
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 128
k = 8
[monitor]
trainer_port = 0
producer_port = 0
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
