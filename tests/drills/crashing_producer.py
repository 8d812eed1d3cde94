"""A producer under a supervisor that starts it again and again: each one is welcomed, is given a shard, and dies.

DEATHS=30 python tests/drills/crashing_producer.py RUN.toml [section.key=value …]

Imports and the corpus are made ready once; each life is a fork, so that many take little time.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from producer.link import Link
from tests.drills.named_producer import main

enter = Link.__enter__


def live_and_die(link: Link) -> None:
    """One life after the other, each with a name and a connection of its own."""
    for _ in range(int(os.environ["DEATHS"])):
        if (child := os.fork()) == 0:
            thread = link._socket_thread
            hello = thread.hello.model_copy(update={"producer": uuid.uuid4().hex})
            enter(Link(thread.settings, hello)).next_lease()
            os._exit(1)
        os.waitpid(child, 0)
    os._exit(0)


if __name__ == "__main__":
    Link.__enter__ = live_and_die  # type: ignore[assignment, method-assign]
    sys.exit(main(sys.argv[1:]))
