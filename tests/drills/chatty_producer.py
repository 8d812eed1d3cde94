"""The real producer, which sends small chunks, so that a million of them are soon sent.

CHUNK_WINDOWS=1 python tests/drills/chatty_producer.py RUN.toml [section.key=value …]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import producer.app
from producer.produce import Producer
from tests.drills.named_producer import main

if __name__ == "__main__":
    windows = int(os.environ["CHUNK_WINDOWS"])
    producer.app.Producer = lambda source, link, dtype, _, on_report: Producer(source, link, dtype, windows, on_report)
    sys.exit(main(sys.argv[1:]))
