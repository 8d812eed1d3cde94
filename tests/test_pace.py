"""The service's share of the machine: a flood waits in line, a person does not notice."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import anyio.to_thread
import pytest
from starlette.types import Message, Receive, Scope, Send

import monitor.http.pace
from monitor.http.pace import Pace, _clock_of, _CpuClock

REQUEST: Scope = {"type": "http"}


def burn(seconds: float) -> None:
    """Uses so much CPU time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def ask(app: Pace, scope: Scope = REQUEST) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


def paced(work: float, cores: float, in_thread: bool = False, pieces: int = 1) -> Pace:
    """An application that works so long for each piece of its answer, and may use that many cores."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        for piece in range(pieces):
            await (anyio.to_thread.run_sync(burn, work) if in_thread else _burning(work))
            await send({"type": "http.response.body", "body": b"", "more_body": piece < pieces - 1})

    pace = Pace(application, is_training=lambda: True)
    pace._rate = cores
    return pace


async def _burning(seconds: float) -> None:
    burn(seconds)


@pytest.mark.parametrize(("in_thread", "clients", "pieces"), [(False, 10, 1), (True, 10, 1), (False, 2, 5)])
def test_a_flood_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch, in_thread: bool, clients: int, pieces: int):
    """Work in the loop's thread or in a worker's, in small answers or in long ones: what is used over time is given."""
    work, cores, saved = 0.05, 0.5, 0.1
    monkeypatch.setattr(monitor.http.pace, "BURST_SECONDS", saved)

    async def flood() -> float:
        app = paced(work, cores, in_thread, pieces)
        began = time.monotonic()
        await asyncio.gather(*(ask(app) for _ in range(clients)))
        return time.monotonic() - began

    total = clients * pieces * work
    # The last piece is begun as soon as those before it are paid for.
    assert asyncio.run(flood()) >= (total - work - saved) / cores


def test_one_who_asks_now_and_then_never_waits():
    """What is saved up while nobody asks is enough for a page, however small the share is."""

    async def visit() -> float:
        app = paced(0.05, cores=0.001)
        began = time.monotonic()
        for _ in range(2):
            await ask(app)
        return time.monotonic() - began

    assert asyncio.run(visit()) < 5.0


def test_after_a_costly_request_nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch):
    """What one search has used ahead of time is forgiven in part: the next in line comes soon."""
    monkeypatch.setattr(monitor.http.pace, "BURST_SECONDS", 0.01)
    monkeypatch.setattr(monitor.http.pace, "LONGEST_WAIT_SECONDS", 0.2)

    async def search_twice() -> float:
        app = paced(0.5, cores=0.05)
        await ask(app)
        began = time.monotonic()
        await ask(app)
        return time.monotonic() - began - 0.5

    assert 0.1 <= asyncio.run(search_twice()) < 5.0  # and not the ten seconds that it takes to earn half a one


def test_who_waits_for_a_snapshot_does_not_hold_up_the_line():
    """A request that sleeps uses no time: others are served meanwhile."""

    async def serve() -> None:
        answered = asyncio.Event()

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/wait":
                await answered.wait()
            else:
                answered.set()

        app = Pace(application, is_training=lambda: True)
        await asyncio.gather(ask(app, REQUEST | {"path": "/wait"}), ask(app, REQUEST | {"path": "/"}))

    asyncio.run(asyncio.wait_for(serve(), 10))


def test_a_thread_that_has_ended_has_no_clock():
    """It is an error, not a crash, and what it has used stays counted."""
    clock = _CpuClock()
    thread = threading.Thread(target=burn, args=(0.05,), name="AnyIO worker thread")
    thread.start()
    seen = clock.read()
    while thread.is_alive():
        seen = clock.read()
    thread.join()
    assert thread.native_id is not None
    with pytest.raises(OSError):
        while True:  # the system's thread ends a moment after Python's
            time.clock_gettime(_clock_of(thread.native_id))
    assert clock.read() >= seen


def test_while_nothing_trains_nobody_waits():
    """A finished run is looked at as fast as the machine can; and a run that begins again is noticed."""
    app = paced(work=0.05, cores=0.001)
    app._is_training = lambda: False

    async def visit() -> float:
        began = time.monotonic()
        for _ in range(10):
            await ask(app)
        return time.monotonic() - began

    assert asyncio.run(visit()) < 10


def test_cpu_time_is_saved_and_owed_within_bounds(monkeypatch: pytest.MonkeyPatch):
    """A tenth of a core: an hour of silence saves up one second, and five at once cost a wait of two, no longer."""
    now, used = [0.0], [0.0]
    monkeypatch.setattr(monitor.http.pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace(_nobody, lambda: True)
    pace._rate, pace._clock = 0.1, SimpleNamespace(read=lambda: used[0])  # type: ignore[assignment]
    pace._left()
    now[0] = 3600.0
    assert pace._left() == pytest.approx(monitor.http.pace.BURST_SECONDS)
    used[0] = 5.0
    assert pace._left() == pytest.approx(-0.1 * monitor.http.pace.LONGEST_WAIT_SECONDS)
    now[0] += 1.0
    assert pace._left() == pytest.approx(-0.1 * (monitor.http.pace.LONGEST_WAIT_SECONDS - 1))


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None: ...
