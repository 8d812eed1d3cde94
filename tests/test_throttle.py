"""The service's share of CPU time: a flood waits in a queue, a reader does not notice."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import anyio.to_thread
import pytest
from starlette.types import Message, Receive, Scope, Send

from monitor.http.throttle import CpuBudget, CpuThrottle, ServiceClock, cpu_clock_of

REQUEST: Scope = {"type": "http"}


def burn(seconds: float) -> None:
    """Uses so much CPU time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def ask(app: CpuThrottle, scope: Scope = REQUEST) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


def throttled(work: float, budget: CpuBudget, in_thread: bool = False, chunks: int = 1) -> CpuThrottle:
    """An application that uses `work` CPU seconds for each chunk of its response."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        for chunk in range(chunks):
            await (anyio.to_thread.run_sync(burn, work) if in_thread else _burning(work))
            await send({"type": "http.response.body", "body": b"", "more_body": chunk < chunks - 1})

    return CpuThrottle(application, lambda: True, budget)


async def _burning(seconds: float) -> None:
    burn(seconds)


@pytest.mark.parametrize(("in_thread", "clients", "chunks"), [(False, 10, 1), (True, 10, 1), (False, 2, 5)])
def test_a_flood_keeps_to_its_share(in_thread: bool, clients: int, chunks: int):
    """In the loop's thread or in a worker's, in short responses or long ones: in the long run the rate is kept."""
    work, cores, burst = 0.05, 0.5, 0.1

    async def flood() -> float:
        app = throttled(work, CpuBudget(cores, burst), in_thread, chunks)
        start = time.monotonic()
        await asyncio.gather(*(ask(app) for _ in range(clients)))
        return time.monotonic() - start

    total = clients * chunks * work
    # The last chunk begins as soon as those before it are paid for.
    assert asyncio.run(flood()) >= (total - work - burst) / cores


class Costly:
    """An application whose requests use 100 CPU seconds each, by the clock that it gives the throttle."""

    def __init__(self, budget: CpuBudget, is_training: bool = True) -> None:
        self.cpu_seconds = 0.0
        self.starts: list[float] = []
        self.throttle = CpuThrottle(self, lambda: is_training, budget, cpu_seconds=lambda: self.cpu_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.starts.append(time.monotonic())
        self.cpu_seconds += 100.0


def seconds_between(requests: int, app: Costly) -> float:
    """Time from the end of the first request to the start of the last one."""

    async def visit() -> float:
        await ask(app.throttle)
        end = time.monotonic()
        for _ in range(requests - 1):
            await ask(app.throttle)
        return app.starts[-1] - end

    return asyncio.run(visit())


def test_a_rare_request_does_not_wait():
    """What was saved up while nobody asked is enough for a page, however small the share is."""
    app = Costly(CpuBudget(0.1, burst_seconds=150.0, longest_wait_seconds=1000.0))
    assert seconds_between(2, app) < 60.0  # and not the 1000 seconds in which 100 are earned


def test_after_a_costly_request_the_next_one_waits_briefly():
    """A part of what a search has used before it was earned is forgiven."""
    app = Costly(CpuBudget(0.1, burst_seconds=0.01, longest_wait_seconds=0.2))
    assert 0.2 <= seconds_between(2, app) < 60.0  # and not the 1000 seconds in which 100 are earned


def test_waiting_that_uses_what_it_earns_ends():
    """On a busy machine a look at the clocks may cost as much CPU time as was earned since the one before."""
    looks = itertools.count()
    budget = CpuBudget(0.1, burst_seconds=0.01, longest_wait_seconds=0.2)
    app = Costly(budget)
    app.throttle = CpuThrottle(app, lambda: True, budget, cpu_seconds=lambda: app.cpu_seconds + 0.1 * next(looks))
    assert seconds_between(2, app) < 60.0


def test_a_request_that_waits_for_a_snapshot_holds_up_no_other():
    """It uses no CPU time while it sleeps."""

    async def serve() -> None:
        answered = asyncio.Event()

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/wait":
                await answered.wait()
            else:
                answered.set()

        app = CpuThrottle(application, is_training=lambda: True)
        await asyncio.gather(ask(app, REQUEST | {"path": "/wait"}), ask(app, REQUEST | {"path": "/"}))

    asyncio.run(asyncio.wait_for(serve(), 60))


def test_the_clock_of_an_ended_thread_is_an_error():
    """And no crash; the CPU time that the thread has used stays counted."""
    clock = ServiceClock()
    thread = threading.Thread(target=burn, args=(0.05,), name="AnyIO worker thread")
    thread.start()
    before = clock.read()
    while thread.is_alive():
        before = clock.read()
    thread.join()
    assert thread.native_id is not None
    with pytest.raises(OSError):
        while True:  # the kernel's thread ends a moment after Python's
            time.clock_gettime(cpu_clock_of(thread.native_id))
    assert clock.read() >= before


def test_without_training_nothing_waits():
    """A finished run is looked at as fast as the machine can."""
    app = Costly(CpuBudget(0.1, burst_seconds=0.01, longest_wait_seconds=1000.0), is_training=False)
    assert seconds_between(10, app) < 60.0  # and not the 1000 seconds in which one request is earned


def test_a_budget_is_bounded_on_both_sides():
    """A tenth of a core: an hour of silence saves up one second, and five at once cost a wait of two, no longer."""
    budget = CpuBudget(0.1, burst_seconds=1.0, longest_wait_seconds=2.0)
    budget.update(now=0.0, used=0.0)
    assert budget.update(now=3600.0, used=0.0) == pytest.approx(1.0)
    assert budget.update(now=3600.0, used=5.0) == pytest.approx(-0.1 * 2.0)
    assert budget.update(now=3601.0, used=5.0) == pytest.approx(-0.1 * (2.0 - 1.0))
