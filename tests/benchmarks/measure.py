"""What every section shares: options, contenders that take turns, results and their figures, the peers' process."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console

console = Console()
THEIRS = Path(__file__).with_name("theirs.py")
WITHOUT_PEERS = "peers skipped: SLUICE_PEERS_PYTHON names no Python with the peers in it (`make bench` sets one up)"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    rounds: int
    quick: bool
    device: str
    peers: str | None
    """Python of the peers' environment; None where there is none."""


@dataclass(frozen=True)
class Figure:
    """What the measurements say, and what they should say."""

    what: str
    value: float | None
    """None when it could not be measured."""
    goal: float | None = None
    """None for figures that only inform."""
    at_least: bool = False
    """The goal is a lower bound."""
    unit: str = "×"

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        if self.value is None:
            return "skipped"
        return "met" if (self.value >= self.goal if self.at_least else self.value <= self.goal) else "not met"


@dataclass
class Result:
    """One table: what was measured, in one unit, round by round, and the figures that follow from it."""

    title: str
    unit: str
    measured: dict[str, list[float]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take_turns(self, rounds: int, contenders: Mapping[str, Callable[[], float]]) -> Result:
        """Measures every contender once in each round. One that fails is left out, and the notes say why."""
        failed: set[str] = set()
        for number in range(1, rounds + 1):
            for name, measure in contenders.items():
                if name in failed:
                    continue
                with console.status(f"{self.title}: {name} (round {number} of {rounds})"):
                    try:
                        self.measured.setdefault(name, []).append(measure())
                    except Exception as error:
                        failed.add(name)
                        self.measured.pop(name, None)
                        self.notes.append(f"{name} failed: {type(error).__name__}: {error}")
        return self

    def middle(self, name: str) -> float:
        return median(self.measured[name])

    def ratio(self, above: str, below: str) -> float | None:
        """The median over rounds of above / below in the same round, so that a machine's drift cancels."""
        if above not in self.measured or below not in self.measured:
            return None
        return median(a / b for a, b in zip(self.measured[above], self.measured[below], strict=True))

    def least(self, names: Iterable[str], default: str) -> str:
        """Which of `names` has the smallest median; `default` when none was measured."""
        return min((name for name in names if name in self.measured), key=self.middle, default=default)

    def most(self, names: Iterable[str], default: str) -> str:
        """Which of `names` has the largest median; `default` when none was measured."""
        return max((name for name in names if name in self.measured), key=self.middle, default=default)


def seconds_of(act: Callable[[], object], device: str, at_least: float) -> float:
    """Median seconds of one call, of as many as fit into `at_least` seconds."""
    times: list[float] = []
    while sum(times) < at_least:
        times.append(seconds_once(act, device))
    return median(times)


def seconds_once(act: Callable[[], object], device: str = "cpu") -> float:
    synchronise(device)
    began = time.perf_counter()
    act()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(act: Callable[[], object], device: str = "cpu", at_least: float = 0.4) -> Callable[[], float]:
    """A contender: the median milliseconds of one call, of as many as fit into `at_least` seconds."""
    return lambda: 1e3 * seconds_of(act, device, at_least)


def copying(size: int, device: str) -> Callable[[], object]:
    """Moves `size` bytes through memory: half of them are read, half are written."""
    source, sink = (torch.ones(size // 8, device=device) for _ in range(2))
    return lambda: sink.copy_(source)


class Others:
    """How much of the machine other processes use, so that figures taken beside them are not believed."""

    def __init__(self) -> None:
        self._began, self._busy, self._ours = time.monotonic(), *self._seconds()

    def share(self) -> float:
        """The mean fraction of all cores, since this was made, that was busy with what is not ours."""
        busy, ours = self._seconds()
        elapsed = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, (busy - self._busy) - (ours - self._ours)) / elapsed

    def _seconds(self) -> tuple[float, float]:
        """(the machine's busy time, that of this process and of those it has waited for)"""
        machine, own = psutil.cpu_times(), psutil.Process()
        children = sum(sum(child.cpu_times()[:2]) for child in own.children(recursive=True))
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        busy = sum(machine[:8]) - idle if hasattr(machine, "iowait") else sum(machine) - idle
        return busy, sum(own.cpu_times()[:4]) + children


class PeerError(RuntimeError):
    """The peers' process could not do what it was asked for."""


class Peers:
    """The peers' own code in their own environment: one process that answers a line of JSON with another.

    It lives as long as a section, so that what it has set up waits for its turn in every round.
    """

    def __init__(self, python: str) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment.pop("OMP_WAIT_POLICY", None)  # ours, not theirs
        self._process = subprocess.Popen(
            [python, "-P", str(THEIRS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
