"""Routes: which session is at the other end of which ZeroMQ identity, connection and key."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from trainer.stream.connections import Connection, Connections


@dataclass(frozen=True)
class Peer:
    """The other end of a session."""

    route: bytes
    """ZeroMQ's identity of it."""
    connection: Connection | None = None
    """None for a peer without a session, or when the connection is gone."""
    key: bytes | None = None
    """Its public key, where the stream is encrypted."""


class Routes:
    """The peers by session, and the newest session of each route. A route holds one session."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._peers: dict[str, Peer] = {}
        self._sessions: dict[bytes, str] = {}

    def session_at(self, route: bytes) -> str | None:
        return self._sessions.get(route)

    def peer(self, session: str | None) -> Peer | None:
        return None if session is None else self._peers.get(session)

    def session_keys(self) -> Iterator[tuple[str, bytes]]:
        """(session, key) of every session that came with one."""
        return ((session, peer.key) for session, peer in self._peers.items() if peer.key is not None)

    def add(self, session: str, peer: Peer) -> None:
        """A session begins at a route."""
        earlier = self._peers.get(session)
        if earlier is not None and earlier.route != peer.route:
            self.remove(session)
        self._peers[session], self._sessions[peer.route] = peer, session

    def add_unknown_peer(self, route: bytes) -> str:
        """A name for the peer at a route without a session."""
        session = self._sessions.setdefault(route, f"unknown-{route.hex()}")
        self._peers.setdefault(session, Peer(route))
        return session

    def remove(self, session: str) -> None:
        """A session ends. Its connection, unless it holds another one already, has none any more."""
        peer = self._peers.pop(session, None)
        if peer is None or self._sessions.get(peer.route) != session:
            return
        del self._sessions[peer.route]
        connection = peer.connection
        if connection is not None and all(other.connection is not connection for other in self._peers.values()):
            self._connections.end_session(connection)

    def keep_only(self, sessions: Set[str]) -> None:
        """Removes the sessions that are over; peers that still send on their routes have no session."""
        for session in self._peers.keys() - sessions:
            self.remove(session)
