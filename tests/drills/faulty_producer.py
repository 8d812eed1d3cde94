"""The real producer, on a corpus with shards that raise, or whose activations are not finite.

RAISE=[3] NAN=[5] INFINITE=[7] python tests/drills/faulty_producer.py RUN.toml [section.key=value …]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from producer.sources.synthetic import SyntheticSource
from tests.drills.named_producer import main

RAISE, NAN, INFINITE = (set(json.loads(os.environ[name])) for name in ("RAISE", "NAN", "INFINITE"))


def faulty(self: SyntheticSource, shard: int, *arguments: Any) -> list[torch.Tensor]:
    if shard in RAISE:
        raise OSError("this shard cannot be read")
    x = [part.clone() for part in whole(self, shard, *arguments)]
    if shard in NAN | INFINITE:
        x[0][..., -1] = float("nan") if shard in NAN else float("-inf")
    return x


if __name__ == "__main__":
    whole = SyntheticSource.activations
    SyntheticSource.activations = faulty  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
