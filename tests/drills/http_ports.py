"""Strangers at the ports that speak HTTP, and a history that has grown long."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from producer.common.parsing import parse_object
from producer.common.server import DEFAULT_LIMITS
from tests.drills.scene import Outcome, Scene
from tests.small_run import publish_snapshot

HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Half: "
PAGE_SECONDS = 2.0
"""No page may take longer while others hold half requests."""
GROWTH = 3.0
"""How much more a page may cost with a long history than with a short one."""
ASKED = 20


def half_requests(folder: Path, quick: bool) -> Outcome:
    """Half requests at every HTTP port of a run at work: pages are served, all are cut off, and training goes on."""
    count = 100 if quick else 1_000
    service, monitor, trainer = _free_ports(3)
    ports = (f"monitor.service_port={service}", f"monitor.port={monitor}", f"monitor.trainer_port={trainer}")
    with Scene(folder, "corpus.epochs=8", *ports) as scene, ExitStack() as opened:
        at_work, _ = scene.trainer(SECONDS_PER_STEP=0.02), scene.producer()
        scene.monitor()
        scene.wait_for_rows(1)
        scene.wait(lambda: _answers(service), what="for the monitor")
        before = scene.samples[-1].descriptors
        slowest, most_held = 0.0, 0
        for port, path in ((service, "/"), (monitor, "/metrics"), (trainer, "/metrics")):
            half = []
            for _ in range(count):
                plain = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
                with suppress(ConnectionError):  # it has had to make room already
                    plain.sendall(HALF)
                half.append(plain)
            for _ in range(ASKED):
                slowest = max(slowest, _seconds(port, path))
            open_requests = sum(map(_is_open, half))
            most_held = max(most_held, open_requests)
            assert open_requests <= DEFAULT_LIMITS.connections, (
                f"{open_requests} half requests are held open at port {port}"
            )
            scene.wait(
                lambda half=half: not any(map(_is_open, half)),
                DEFAULT_LIMITS.head_seconds + 10,
                "for half requests to end",
            )
        assert slowest < PAGE_SECONDS, f"a page took {slowest:.1f} s under half requests"
        scene.wait(lambda: scene.samples[-1].descriptors <= before + 5, what="for the trainer to close its ports")
        assert at_work.wait(300) == 0
        note = (
            f"half requests at three ports; slowest page {slowest:.2f} s; at most {most_held} held at a time, "
            f"none after {DEFAULT_LIMITS.head_seconds:g} s"
        )
        return scene.outcome(3 * count, 8, note=note)


def many_snapshots(folder: Path, quick: bool) -> Outcome:
    """A history of ten thousand snapshots: page and list cost what they did with a hundred, and none is missing."""
    few, many = 100, 500 if quick else 10_000  # an answer lists 100: with fewer it would be shorter
    (port,) = _free_ports(1)
    with Scene(folder, f"monitor.service_port={port}", "monitor.port=0") as scene:
        first = publish_snapshot(scene.run, 1000)
        (scene.run / "settings.toml").write_text(f'[run]\ndirectory = "{scene.run}"\n')
        _link(first, 2, few)
        process = psutil.Process(scene.monitor().pid)
        scene.wait(lambda: _answers(port), what="for the monitor")
        paths = ("/", "/v1/snapshots")
        short = [_cost(process, port, path) for path in paths]
        _link(first, few + 1, many)
        firsts = [_seconds(port, path) for path in paths]
        time.sleep(1.5)  # until the folder's time of change is an old one
        long = [_cost(process, port, path) for path in paths]
        for path, before, after in zip(paths, short, long, strict=True):
            assert after < GROWTH * before, f"{path} costs {after:.3f} s, {before:.3f} s with {few} snapshots"
        assert _crawled(port) == [f"{1000 * number:012d}" for number in range(1, many + 1)]
        newest = publish_snapshot(scene.run, 1000 * (many + 1)).name
        assert _json(port, "/v1/snapshots")["latest"] == newest
        grown = zip(paths, short, long, strict=True)
        times = (f"{path} {1e3 * before:.0f} → {1e3 * after:.0f} ms" for path, before, after in grown)
        note = f"snapshots; CPU time from {few} of them to all: {', '.join(times)}; first page in {max(firsts):.1f} s"
        return Outcome(many, note=note)


def _link(first: Path, begin: int, end: int) -> None:
    """Further snapshots, whose files are the first one's."""
    text = (first / "manifest.json").read_text()
    for number in range(begin, end + 1):
        name = f"{1000 * number:012d}"
        folder = first.parent / name
        shutil.copytree(first, folder, copy_function=os.link, ignore=lambda _, __: ["manifest.json"])
        changed = text.replace(f'"{first.name}"', f'"{name}"').replace('"tokens": 1000,', f'"tokens": {1000 * number},')
        (folder / "manifest.json").write_text(changed)


def _crawled(port: int) -> list[str]:
    """All names, page by page."""
    names: list[str] = []
    address = "/v1/snapshots?limit=1000"
    while address:
        page = _json(port, address)
        names = [entry["name"] for entry in page["snapshots"]] + names
        address = page["next"]
    return names


def _cost(process: psutil.Process, port: int, path: str) -> float:
    """CPU seconds of one answer, which other work on the machine does not change; the first is not counted."""
    _get(port, path)
    before = process.cpu_times()
    for _ in range(ASKED):
        _get(port, path)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / ASKED


def _seconds(port: int, path: str) -> float:
    began = time.monotonic()
    _get(port, path)
    return time.monotonic() - began


def _json(port: int, path: str) -> dict:
    return parse_object(_get(port, path))


def _get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 200, f"{path} answers {answer.status}"
    return body


def _answers(port: int) -> bool:
    with suppress(OSError):
        return bool(_get(port, "/healthz"))
    return False


def _is_open(plain: socket.socket) -> bool:
    plain.setblocking(False)
    try:
        return plain.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in free]
