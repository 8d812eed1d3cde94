"""The state that the loop's thread and the socket's thread share, changed only under the lock `changed`."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque

from producer.link.session import Payload, ProducerSession
from producer.wire import Hello, Message


class SharedState:
    """The current session, the messages that wait for the socket, and how the link ends."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Notified whenever a thread that waits may go on."""
        self.session = ProducerSession("", time.monotonic())
        self.outbox: deque[tuple[Message, Payload | None]] = deque()
        """Messages that the socket has not taken yet, each with its payload."""
        self.ending: Exception | None = None
        """The exception that `next_lease` raises once no leases are left; None while the link goes on."""
        self.is_closing = False
        """The process leaves: send BYE and stop."""
        self.progress = 0
        """Chunks, shards and forward passes so far: what heartbeats tell the trainer."""
        self.revision = ("", 0)
        """Name and number of the newest checkpoint of the language model."""
        self.sessions = 0
        """Sessions that a trainer has accepted."""

    def open_session(self, hello: Hello) -> ProducerSession:
        """Begins a session with its HELLO in the outbox; what waited there was for the last session."""
        with self.changed:
            self.session = session = ProducerSession(uuid.uuid4().hex, time.monotonic())
            self.outbox.clear()
            update: dict[str, object] = {"session": session.name}
            if self.revision[0]:
                update |= {"revision": self.revision[0], "revision_number": self.revision[1]}
            self.outbox.append((hello.model_copy(update=update), None))
            self.changed.notify_all()
        return session

    def drop_session(self) -> None:
        """Ends the current session: its leases are lost."""
        with self.changed:
            self.session = ProducerSession("", time.monotonic())
            self.changed.notify_all()

    def end(self, reason: Exception) -> None:
        """Ends the link; the first reason counts."""
        with self.changed:
            self.ending = self.ending or reason
            self.changed.notify_all()

    def is_current(self, session: ProducerSession) -> bool:
        return self.ending is None and self.session is session
