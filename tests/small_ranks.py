"""Several ranks on this machine, for tests: processes that are started once and run functions over gloo."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT = timedelta(seconds=60)
SIZES = (2, 4)


class SmallRanks(AbstractContextManager["SmallRanks"]):
    """Four processes with one thread each, which act as 2 or as 4 ranks; `run` gives a function to all of them.

    Latents are cut at any place, not only at multiples of 1,024.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], size: int, *args: Any, blocks: int = 1) -> list[Any]:
        """function(ranks, *args) on each of `size` ranks; returns what each returned. An exception is raised here."""
        for pipe in self._pipes[:size]:
            pipe.send((function, size, blocks, args))
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(LIMIT.total_seconds()):
                raise TimeoutError(f"rank {rank} of {size} has not answered within {LIMIT}")
            answers.append(pipe.recv())
        failures = [failure for _, failure in answers if failure]
        assert not failures, "\n".join(failures)
        return [answer for answer, _ in answers]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from trainer.parallel.ranks import Ranks

    torch.set_num_threads(1)
    size = max(SIZES)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=LIMIT)
    groups = {each: dist.new_group(list(range(each)), timeout=LIMIT) for each in SIZES}
    while True:
        try:
            function, ranks_used, blocks, args = pipe.recv()
        except EOFError:
            return
        try:
            ranks = Ranks(rank, ranks_used, groups[ranks_used], blocks, latents_per_unit=1)
            pipe.send((function(ranks, *args), None))
        except Exception:
            pipe.send((None, f"rank {rank} of {ranks_used}:\n{traceback.format_exc()}"))
