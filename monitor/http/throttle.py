"""Limits the CPU time of the HTTP service, so that a flood of requests does not slow the training beside it.

The requirement: beside 50 clients that fetch pages and weights in a loop, the 99th percentile of the demo's step is
at most 1.05 times the one without them. `python -m tests.benchmarks --only flood` measures it, docs/benchmarks.md has
the figures.

The service has a budget of CPU seconds, which grows by SHARE of the machine's CPU time. Once it is used up, requests
wait in a queue, one request or one chunk of a file at a time, which spreads the work evenly instead of in bursts. A
reader hardly notices: BURST_SECONDS are saved up while nobody asks, and after a costly request, such as a search, the
next one waits for LONGEST_WAIT_SECONDS at most. While nothing trains, nothing waits.

Why nothing simpler will do:

- Low priority is not enough. Two threads on the two halves of a core, or on one memory bus, slow each other down
  whatever their priorities.
- Requests per second and concurrent requests say little about cost: a request takes from a tenth of a millisecond to
  seconds, and a single download of weights over loopback keeps a core busy.
- The process' CPU time includes that of the evaluation, which runs in the same process and uses far more.
- A stopwatch around the handlers misses most of the cost, which is reading and sending: that runs in the event loop and
  in worker threads that Starlette and AnyIO start. Hence the CPU clocks of these threads are read from outside.
- `time.pthread_getcpuclockid` gives such clocks, but is undefined for a thread that has just ended, as idle workers do.
  The kernel's clock of a thread id raises an error then.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import anyio
import anyio.to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHARE = 0.02
"""Share of the CPU time of all cores together."""
BURST_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 2.0
WORKERS = 8
"""Threads that read files and compute."""
TRAINING_CHECK_SECONDS = 2.0
"""How often the run directory is asked whether a trainer is at work."""
WORKER_POLL_SECONDS = 0.005
"""How often the first request in the queue looks for a free worker."""


class CpuBudget:
    """CPU seconds that may be used: a token bucket, which goes below zero by what is used before it is earned."""

    def __init__(
        self, rate: float, burst_seconds: float = BURST_SECONDS, longest_wait_seconds: float = LONGEST_WAIT_SECONDS
    ) -> None:
        """A budget that earns `rate` CPU seconds per second, up to `burst_seconds`.

        It owes no more than it earns in `longest_wait_seconds`.
        """
        self.rate = rate
        self.burst_seconds = burst_seconds
        self.longest_wait_seconds = longest_wait_seconds
        self._seconds = burst_seconds
        self._previous: tuple[float, float] | None = None

    def update(self, now: float, used: float) -> float:
        """The CPU seconds left, given the time and the CPU seconds used since some moment in the past."""
        if self._previous is not None:
            earned = (now - self._previous[0]) * self.rate
            seconds_left = min(self.burst_seconds, self._seconds + earned) - (used - self._previous[1])
            self._seconds = max(seconds_left, -self.longest_wait_seconds * self.rate)
        self._previous = now, used
        return self._seconds


class CpuThrottle:
    """ASGI: each request, and each further chunk of a response, waits until the budget allows it."""

    def __init__(
        self,
        app: ASGIApp,
        is_training: Callable[[], bool],
        budget: CpuBudget | None = None,
        cpu_seconds: Callable[[], float] | None = None,
    ) -> None:
        """`cpu_seconds` gives the CPU seconds that the service has used; the default reads its threads' clocks."""
        self._app = app
        self._is_training = is_training
        self._training_checked_at = -TRAINING_CHECK_SECONDS
        self._must_wait = True
        self._budget = budget or CpuBudget(SHARE * (os.cpu_count() or 1))
        self._cpu_seconds = cpu_seconds or ServiceClock().read
        self._queue = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        workers = anyio.to_thread.current_default_thread_limiter()
        workers.total_tokens = WORKERS
        await self._wait_for_turn(workers)

        async def send_throttled(message: Message) -> None:
            await send(message)
            if message.get("more_body"):
                await self._wait_for_turn(workers)

        await self._app(scope, receive, send_throttled)

    async def _wait_for_turn(self, workers: anyio.CapacityLimiter) -> None:
        async with self._queue:
            await self._check_training()
            if not self._must_wait:
                return
            # Waiting uses CPU time, too: on a busy machine as much as is earned meanwhile.
            deadline = time.monotonic() + self._budget.longest_wait_seconds
            while (seconds_left := self._seconds_left()) < 0 and time.monotonic() < deadline:
                await asyncio.sleep(-seconds_left / self._budget.rate)
            # The clock does not have what busy workers are about to use: with little left, one works at a time.
            deadline = time.monotonic() + self._budget.longest_wait_seconds
            while workers.borrowed_tokens >= (WORKERS if self._seconds_left() > self._budget.burst_seconds / 2 else 1):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(WORKER_POLL_SECONDS)

    async def _check_training(self) -> None:
        if time.monotonic() - self._training_checked_at >= TRAINING_CHECK_SECONDS:
            self._training_checked_at = time.monotonic()
            self._must_wait = await anyio.to_thread.run_sync(self._is_training)

    def _seconds_left(self) -> float:
        return self._budget.update(time.monotonic(), self._cpu_seconds())


class ServiceClock:
    """CPU seconds of the thread that reads it, which is the event loop's, and of its worker threads."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        """CPU seconds of each worker thread, by native id."""
        self._seconds_of_ended = 0.0

    def read(self) -> float:
        previous, self._seconds = self._seconds, {}
        for thread in threading.enumerate():
            if thread.name == "AnyIO worker thread" and thread.native_id is not None:
                with suppress(OSError):  # it has just ended, or this is not Linux
                    self._seconds[thread.native_id] = time.clock_gettime(cpu_clock_of(thread.native_id))
        self._seconds_of_ended += sum(seconds for thread, seconds in previous.items() if thread not in self._seconds)
        return time.thread_time() + sum(self._seconds.values()) + self._seconds_of_ended


def cpu_clock_of(native_id: int) -> int:
    """The id of a thread's CPU clock: Linux's CPUCLOCK_SCHED with CPUCLOCK_PERTHREAD_MASK.

    Reading the clock raises OSError once the thread has ended.
    """
    return (~native_id << 3) | 6
