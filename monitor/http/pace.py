"""How much of the machine the HTTP service may use, so that a flood of clients does not slow the training beside it.

Low priority is not enough: two threads on one core's two halves, or on one memory, slow each other down whatever their
priorities. So the service keeps to SHARE of the machine's CPU time in the long run. Who is over it waits in line, one
request or one piece of a file at a time, which spreads the work evenly instead of in bursts. A person hardly notices:
BURST_SECONDS are saved up while nobody asks, and after one costly request, such as a search, nobody waits longer than
LONGEST_WAIT_SECONDS for his turn. While nothing trains, nobody waits.
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
"""Of all cores together."""
BURST_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 2.0
WORKERS = 8
"""Threads for what reads files and computes."""
ASK_SECONDS = 2.0
"""How often it is asked whether there is a training to give way to."""
LOOK_SECONDS = 0.005
"""How often who is next in line looks whether a thread is free."""


class Pace:
    """ASGI: each request, and each further piece of an answer, waits until there is CPU time for it."""

    def __init__(self, app: ASGIApp, is_training: Callable[[], bool], share: float = SHARE) -> None:
        self._app = app
        self._is_training = is_training
        self._asked_at = -ASK_SECONDS
        self._training = True
        self._rate = share * (os.cpu_count() or 1)
        self._clock = _CpuClock()
        self._allowed = BURST_SECONDS
        """CPU seconds that may be used before somebody has to wait; below 0, what has been used ahead of time."""
        self._used: float | None = None
        self._at = 0.0
        self._line = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        workers = anyio.to_thread.current_default_thread_limiter()
        workers.total_tokens = WORKERS
        await self._turn(workers)

        async def paced(message: Message) -> None:
            await send(message)
            if message.get("more_body"):
                await self._turn(workers)

        await self._app(scope, receive, paced)

    async def _turn(self, workers: anyio.CapacityLimiter) -> None:
        async with self._line:
            if not await self._must_wait():
                return
            while (left := self._left()) < 0:
                await asyncio.sleep(-left / self._rate)
            # What threads are about to use is not counted yet: where little is left, one works at a time.
            patience = time.monotonic() + LONGEST_WAIT_SECONDS
            while workers.borrowed_tokens >= (WORKERS if self._left() > BURST_SECONDS / 2 else 1):
                if time.monotonic() > patience:
                    break
                await asyncio.sleep(LOOK_SECONDS)

    async def _must_wait(self) -> bool:
        if time.monotonic() - self._asked_at >= ASK_SECONDS:
            self._asked_at = time.monotonic()
            self._training = await anyio.to_thread.run_sync(self._is_training)
        return self._training

    def _left(self) -> float:
        """CPU seconds that may be used now."""
        used, now = self._clock.read(), time.monotonic()
        earned = (now - self._at) * self._rate
        if self._used is not None:
            left = min(BURST_SECONDS, self._allowed + earned) - (used - self._used)
            self._allowed = max(left, -LONGEST_WAIT_SECONDS * self._rate)
        self._used, self._at = used, now
        return self._allowed


class _CpuClock:
    """CPU seconds of the thread that reads it and of the worker threads that it hands work to."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._gone = 0.0

    def read(self) -> float:
        before, self._seen = self._seen, {}
        for thread in threading.enumerate():
            if thread.name == "AnyIO worker thread" and thread.native_id is not None:
                with suppress(OSError):  # it has just ended, or this is not Linux
                    self._seen[thread.native_id] = time.clock_gettime(_clock_of(thread.native_id))
        self._gone += sum(seconds for thread, seconds in before.items() if thread not in self._seen)
        return time.thread_time() + sum(self._seen.values()) + self._gone


def _clock_of(thread: int) -> int:
    """Linux' clock of a thread's CPU time, as glibc makes it; an error for a thread that has ended."""
    return (~thread << 3) | 6
