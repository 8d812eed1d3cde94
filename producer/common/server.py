"""HTTP for one ASGI app, from a thread of its own: the snapshot service and every metrics port are served by this.

`ServerLimits` bound what unknown clients may take, whatever they send or leave unsent:

- A request must arrive within `head_seconds`, counted from the start of the connection; on a connection that goes on,
  from the first byte after a response. uvicorn alone waits for ever for the rest of a request.
- The kernel cuts off a client that takes nothing of its response for `stall_seconds`.
- At most `most_connections()` are open. One more takes the place of another: of one that has sent no request yet, if
  there is one; among those, of the address that holds the most; among those, of the oldest. So a client that sends its
  request at once is served while others fill the table with half requests, and the process keeps file descriptors for
  its work.
- A server on loopback answers only to loopback's names and `allowed_hosts`: a web page whose name has been pointed to
  127.0.0.1 (DNS rebinding) reads nothing through a visitor's browser. A server that other machines reach answers to
  any name, since whoever reaches it needs no such trick.

Every response forbids browsers to guess its type.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 128
"""Connections that the kernel holds until they are accepted, and that are accepted in one round of the event loop."""


@dataclass(frozen=True)
class ServerLimits:
    """Time and connections that clients may take of a server."""

    head_seconds: float = 10.0
    """Time for a request to arrive whole."""
    stall_seconds: float = 30.0
    """Time in which a client must take at least something of its response."""
    connections: int = 256


DEFAULT_LIMITS = ServerLimits()


def most_connections(limits: ServerLimits) -> int:
    """Connections that a server keeps open: no more than a quarter of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.connections if soft == resource.RLIM_INFINITY else max(1, min(limits.connections, soft // 4))


def listen(host: str, port: int, limits: ServerLimits = DEFAULT_LIMITS) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises OSError."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * limits.stall_seconds))
    return listener


def serve(
    app: ASGIApp,
    listener: socket.socket,
    name: str,
    allowed_hosts: Collection[str] | None = (),
    niceness: int = 0,
    limits: ServerLimits = DEFAULT_LIMITS,
) -> Callable[[], None]:
    """Serves `app` from a thread called `name`; returns what closes it, the listener included.

    `allowed_hosts` are names that a loopback server answers to beside loopback's own; None allows any.
    """
    if allowed_hosts is not None and is_loopback_name(str(listener.getsockname()[0])):
        app = _HostCheck(app, allowed_hosts)
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(_Connection, limits)),
        headers=[("X-Content-Type-Options", "nosniff")],
        log_config=None,
        log_level="error",  # its warnings are about what unknown clients send, as often as they like
        access_log=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=2,  # a client in the middle of a download asks again, and does not hold us up
    )
    server = uvicorn.Server(config)

    def run() -> None:
        if niceness:
            os.nice(niceness)  # on Linux, niceness is the thread's, and threads it starts inherit it
        server.run([listener])

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)

    def close() -> None:
        server.should_exit = True
        thread.join()
        listener.close()

    return close


# --- Connections -----------------------------------------------------------------------------------------------------


class _Connection(H11Protocol):
    """uvicorn's connection, limited in the time that a request may take to arrive, and in number."""

    def __init__(self, limits: ServerLimits, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self.active_at = self.loop.time()
        """When the connection was made, a request or the end of a response came, or sending went on."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()
        _make_room(cast("set[_Connection]", self.connections), self, most_connections(self._limits))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, with the headers of every response; where one is under way, the connection is cut off instead."""
        if self.is_answering:
            self.cycle.disconnected = True
            return self.transport.abort()
        headers = [*self.server_state.default_headers, (b"Content-Type", b"text/plain"), (b"Connection", b"close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=msg.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        self.active_at = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self.active_at = self.loop.time()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_deadline()

    @property
    def is_answering(self) -> bool:
        """Whether a request has come whose response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _update_deadline(self) -> None:
        if self.is_answering:
            self.active_at = self.loop.time()
            self._cancel_deadline()
        else:
            self._start_deadline()

    def _start_deadline(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.head_seconds, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _make_room(connections: set[_Connection], newest: _Connection, limit: int) -> None:
    """Aborts one connection where there are more than `limit`; see the module's docstring for which."""
    if len(connections) <= limit:
        return
    by_peer = Counter(_peer(connection) for connection in connections)
    others = (connection for connection in connections if connection is not newest)
    victim = min(others, key=lambda one: (one.is_answering, -by_peer[_peer(one)], one.active_at))
    connections.discard(victim)  # at once: the event loop reports its end in the next round, and more may come in this
    victim.transport.abort()


def _peer(connection: _Connection) -> str:
    return connection.client[0] if connection.client else ""


# --- Names -----------------------------------------------------------------------------------------------------------


class _HostCheck:
    """ASGI middleware: refuses requests that a browser sends to another name than this server's."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        host = Request(scope).headers.get("host")
        # Programs that speak HTTP/1.0 send no name; browsers always do.
        if host is None or is_loopback_name(name := _name_of(host)) or name in self._allowed:
            return await self._app(scope, receive, send)
        message = (
            f"this server listens on loopback and does not answer to the name {name[:100]!r}: ask for 127.0.0.1 or "
            "localhost, or add the name to monitor.allowed_hosts in the run file"
        )
        await JSONResponse({"error": message}, 421, {"Cache-Control": "no-store"})(scope, receive, send)


def _name_of(host: str) -> str:
    """The name in a Host header, without port, brackets and final dot."""
    return re.sub(r":\d*$", "", host.strip().lower()).strip("[]").removesuffix(".")


def is_loopback_name(name: str) -> bool:
    """127.0.0.0/8, ::1, `localhost` and names below it, which browsers take for loopback without asking anybody."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
