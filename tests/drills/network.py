"""A bad network: a proxy between producers and trainer that swallows, breaks, delays, narrows and spoils what passes.

The stream is encrypted, as it must be off loopback: that is also what notices a flipped bit.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from producer.keys import write_keys
from tests.drills.scene import Outcome, Scene
from trainer.state.checkpoint import load_newest

BACK_SECONDS = 10.0
"""After the network is well again rows are trained within this time; producers look for a trainer every 2 s at most."""


class Proxy:
    """TCP connections to `port`, through faults that can be switched on and off while they live."""

    def __init__(self, port: int) -> None:
        self.latency = 0.0
        """Seconds that each piece is held back."""
        self.bytes_per_second: float | None = None
        """In each direction of each connection."""
        self.swallowing = False
        """Everything is read, and nothing passed on."""
        self.flip_every: int | None = None
        """One bit of the producers' bytes is turned in so many."""
        self.flipped = 0
        self._port = port
        self._dice = random.Random(0)
        self._ends: list[tuple[socket.socket, socket.socket]] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.reset()

    def reset(self) -> None:
        """RST to both sides of every connection."""
        for pair in self._ends:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()
        self._ends.clear()

    def half_close(self) -> None:
        """The producers' ends are gone; the trainer's stay open, and nothing more comes."""
        for producer, _ in self._ends:
            with suppress(OSError):
                producer.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                producer = self._door.accept()[0]
                try:
                    trainer = socket.create_connection(("127.0.0.1", self._port))
                except OSError:
                    producer.close()
                    continue
                self._ends.append((producer, trainer))
                threading.Thread(target=self._pump, args=(producer, trainer, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(trainer, producer, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while data := bytearray(source.recv(16384)):
                if self.latency:
                    time.sleep(self.latency)
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                if upwards and self.flip_every and self._dice.random() < len(data) / self.flip_every:
                    data[self._dice.randrange(len(data))] ^= 1 << self._dice.randrange(8)
                    self.flipped += 1
                if not self.swallowing:
                    sink.sendall(data)


def blackhole(folder: Path, quick: bool) -> Outcome:
    """Nothing passes for longer than dead_seconds, and nothing breaks either."""

    def harm(proxy: Proxy) -> None:
        proxy.swallowing = True
        time.sleep(5.0)
        proxy.swallowing = False
        proxy.reset()  # what was swallowed is missing from the connections, as after a real outage

    return _under(folder, harm, rounds=1 if quick else 4)


def reset(folder: Path, quick: bool) -> Outcome:
    """Every connection is reset, again and again."""
    return _under(folder, Proxy.reset, rounds=2 if quick else 15)


def half_open(folder: Path, quick: bool) -> Outcome:
    """The producers' connections are gone, and the trainer is not told."""
    return _under(folder, Proxy.half_close, rounds=1 if quick else 6)


def latency(folder: Path, quick: bool) -> Outcome:
    """A fifth of a second in each direction: slower, and nobody is taken for dead."""

    def harm(proxy: Proxy) -> None:
        proxy.latency = 0.2
        time.sleep(5.0 if quick else 20.0)
        proxy.latency = 0.0

    return _under(folder, harm, rounds=1, nobody_dies=True)


def narrow(folder: Path, quick: bool) -> Outcome:
    """1 MB/s and chunks of two megabytes, with the usual dead_seconds: slower, and nobody is taken for dead."""

    def harm(proxy: Proxy) -> None:
        proxy.bytes_per_second = 1e6
        time.sleep(6.0 if quick else 30.0)
        proxy.bytes_per_second = None

    wide = ["corpus.synthetic.d_in=256", "stream.dead_seconds=10.0"]
    return _under(folder, harm, rounds=1, nobody_dies=True, overrides=wide)


def flipped_bits(folder: Path, quick: bool) -> Outcome:
    """A bit is turned now and then: the message's seal is broken, and the connection begins anew."""
    proxies: list[Proxy] = []

    def harm(proxy: Proxy) -> None:
        proxies.append(proxy)
        proxy.flip_every = 500_000
        time.sleep(5.0 if quick else 20.0)
        proxy.flip_every = None

    outcome = _under(folder, harm, rounds=1)
    assert proxies[0].flipped, "not one bit was turned"
    outcome.rounds, outcome.note = proxies[0].flipped, "bits turned"
    return outcome


def _under(
    folder: Path,
    harm: Callable[[Proxy], None],
    rounds: int,
    nobody_dies: bool = False,
    overrides: list[str] | None = None,
) -> Outcome:
    """Two producers behind a proxy that does `harm` so many times; after each, tokens come again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    write_keys(folder / "keys")
    proxy, epochs = Proxy(port), 3 if rounds == 1 else 6
    keyed = [f'stream.keys="{folder / "keys"}"', f"corpus.epochs={epochs}", *(overrides or [])]
    with Scene(folder, *keyed) as scene:
        trainer = scene.trainer(f"stream.endpoint=tcp://127.0.0.1:{port}", SECONDS_PER_STEP=0.03)
        for _ in range(2):
            scene.producer(f"stream.endpoint={proxy.endpoint}")
        scene.wait_for_rows(1)
        for _ in range(rounds):
            time.sleep(1.0)
            assert trainer.poll() is None, "the run ended before it could be harmed"
            harm(proxy)
            before = scene.trained_rows
            scene.wait(
                lambda before=before: scene.trained_rows > before, BACK_SECONDS, "for rows after the network's return"
            )
        assert trainer.wait(300) == 0
        proxy.close()
        saved = load_newest(scene.run)
        assert saved is not None
        lost_sessions = saved.document.ledger.sessions_lost
        assert not (nobody_dies and lost_sessions), f"{lost_sessions} sessions were taken for dead"
        return scene.outcome(rounds, epochs, note=f"{lost_sessions} sessions lost")
