"""The trainer's end of `ctl`: a socket file in the run directory, from which requests reach the training loop.

The file is `RUN_DIR/ctl`, mode 0600. A connection carries one line each way, JSON:

    {"command": "detach", "name": "wide", "now": false}
    {"ok": true, "said": "…", …}       or       {"ok": false, "error": "…", "code": 2}

A thread reads the lines, knows nothing else, and puts each request into an `Inbox`, which the training loop empties
between two steps. Light, as the client imports it: no torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingMixIn, UnixStreamServer
from typing import Any

from producer.common.parsing import ParseError, parse_object

log = logging.getLogger("sluice.trainer")

MAX_REQUEST_BYTES = 1 << 16
REQUEST_SECONDS = 10.0
"""How long the trainer waits for a client's line."""
MAX_ADDRESS_BYTES = 100
"""The longest path of a socket; the system's limit is 104 or 108, a terminating zero included."""

Answer = dict[str, Any]


class Request:
    """A command from a client; `answer` is called once."""

    def __init__(self, command: str, arguments: dict[str, Any]) -> None:
        self.command = command
        self.arguments = arguments
        self._answer: Future[Answer] = Future()

    def answer(self, answer: Answer) -> None:
        self._answer.set_result(answer)

    def wait(self) -> Answer:
        return self._answer.result()


def refusal(error: str, code: int = 2) -> Answer:
    """The answer to a request that was not carried out; `code` is the client's exit code."""
    return {"ok": False, "error": error, "code": code}


class Inbox:
    """Requests on their way to the training loop. It is set, as an event is, while a request or the stop waits."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._changed = threading.Condition()
        self._requests: deque[Request] = deque()
        self._closed = False

    @property
    def is_stopping(self) -> bool:
        """The trainer was asked to leave."""
        return self._stop.is_set()

    def is_set(self) -> bool:
        return self.is_stopping or bool(self._requests)

    def put(self, request: Request) -> None:
        with self._changed:
            if self._closed:
                request.answer(refusal("the trainer is leaving", code=1))
                return
            self._requests.append(request)
            self._changed.notify_all()

    def next(self) -> Request | None:
        with self._changed:
            return self._requests.popleft() if self._requests else None

    def wait(self, seconds: float) -> None:
        """Waits for a request or the stop, up to `seconds`."""
        with self._changed:
            if not self.is_set():
                self._changed.wait(seconds)

    def close(self) -> None:
        """Refuses the requests that wait, and all later ones: the loop has ended."""
        with self._changed:
            self._closed = True
            while self._requests:
                self._requests.popleft().answer(refusal("the trainer is leaving", code=1))


@contextmanager
def serve_requests(directory: Path, inbox: Inbox) -> Iterator[None]:
    """Puts the requests of clients into `inbox`. Where no socket can be made, training goes on without one."""
    try:
        server = _Server(directory, inbox)
    except OSError as error:
        log.warning("%s cannot be opened, so there is no `ctl` for this run: %s", directory / "ctl", error)
        yield
        return
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="ctl", daemon=True)
    thread.start()
    try:
        yield
    finally:
        inbox.close()
        server.shutdown()
        server.server_close()
        thread.join()
        with suppress(OSError):
            (directory / "ctl").unlink()


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, directory: Path, inbox: Inbox) -> None:
        self.inbox = inbox
        # Left by a trainer that was killed: we hold the run directory's lock, so it is dead.
        (directory / "ctl").unlink(missing_ok=True)
        with socket_address(directory) as address:
            super().__init__(address, _Handler)

    def server_bind(self) -> None:
        super().server_bind()
        os.chmod(str(self.server_address), 0o600)  # nobody gets in before `listen`, which comes next

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what is a fault of ours; a client that hangs up is not."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(StreamRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS

    def handle(self) -> None:
        line = self.rfile.readline(MAX_REQUEST_BYTES + 1)
        if line:
            answer = self._answer(line)
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> Answer:
        if len(line) > MAX_REQUEST_BYTES:
            return refusal(f"a request has at most {MAX_REQUEST_BYTES} bytes")
        try:
            arguments = parse_object(line)
        except ParseError:
            arguments = {}
        if not isinstance(command := arguments.pop("command", None), str):
            return refusal('a request is one line of JSON, such as {"command": "status"}')
        request = Request(command, arguments)
        self.server.inbox.put(request)
        return request.wait()


@contextmanager
def socket_address(directory: Path) -> Iterator[str]:
    """A path of `directory/ctl` that is short enough for a socket; valid within the block."""
    path = directory / "ctl"
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not Path(f"/proc/self/fd/{descriptor}").exists():
            raise OSError(
                f"its path is longer than the {MAX_ADDRESS_BYTES} bytes a socket's may have; use a shorter one"
            )
        yield f"/proc/self/fd/{descriptor}/ctl"
    finally:
        os.close(descriptor)
