"""The thread that owns the socket: one session after the other, until the run ends or the process leaves."""

from __future__ import annotations

import logging
import threading
import time

import zmq

from producer.common.formatting import format_duration
from producer.common.logs import OutsideLog
from producer.common.shell import shell_command
from producer.link.connection import TrainerConnection, WakeUp
from producer.link.errors import Finished, NoTrainer, RefusedByTrainer
from producer.link.handshakes import HandshakeFailures
from producer.link.session import ProducerSession
from producer.link.shared import SharedState
from producer.settings import StreamSettings
from producer.wire import Credit, Drain, Heartbeat, Hello, Lease, Message, Reject, Welcome, WireError, decode

log = logging.getLogger("sluice.producer")

FIRST_WARNING_SECONDS, WARNING_SECONDS = 3.0, 30.0
"""Time from the start of a search for a trainer to the first warning, and between later ones."""
RETRY_SECONDS = 1.0
"""Before the next HELLO, where the last one was refused or the trainer is about to close its socket."""


class Search:
    """The search for a trainer: when to warn that there is none, and when to give up."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        now = time.monotonic()
        self._warn_at, self._give_up_at = now + FIRST_WARNING_SECONDS, now + settings.patience_seconds

    def check(self, now: float) -> None:
        """Warns from time to time. Raises NoTrainer once the patience is over."""
        if now >= self._give_up_at:
            raise NoTrainer(f"{self._no_answer()}; gave up after {format_duration(self._settings.patience_seconds)}")
        if now >= self._warn_at:
            log.warning("%s; looking for %s more", self._no_answer(), format_duration(self._give_up_at - now))
            self._warn_at = now + WARNING_SECONDS

    def _no_answer(self) -> str:
        command = shell_command("trainer", "RUN.toml")
        return f"no trainer answers at {self._settings.endpoint} (start one with `{command}`)"


class SocketThread:
    """Runs sessions on the socket and keeps `state` up to date. `wake_up` wakes it when there is something to send."""

    def __init__(self, settings: StreamSettings, hello: Hello, state: SharedState, wake_up: WakeUp) -> None:
        self.settings = settings
        self.hello = hello
        """Sent at the start of each session, with that session's name."""
        self._state = state
        self._wake_up = wake_up
        self._handshakes = HandshakeFailures(settings)
        self._outside = OutsideLog(log)
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for the thread, which `state.is_closing` ends."""
        self._thread.join()
        self._context.term()

    def _run(self) -> None:
        state = self._state
        try:
            search = Search(self.settings)
            while state.ending is None and not state.is_closing:
                if self._run_session(search):
                    search = Search(self.settings)
        except Exception as error:
            state.end(error)
        finally:
            self._outside.flush(everything=True)
            state.drop_session()

    def _run_session(self, search: Search) -> bool:
        """One session from HELLO to its end; True when a trainer accepted it."""
        state = self._state
        with TrainerConnection(self._context, self.settings, self._wake_up) as connection:
            session = state.open_session(self.hello)
            while state.is_current(session):
                self._receive(connection, session)
                if not state.is_current(session):
                    break
                self._send(connection, session)
                self._outside.flush()
                if state.is_closing:
                    connection.close_with_bye()
                    break
                self._check_times(session, search, time.monotonic())
        return session.welcome is not None

    def _check_times(self, session: ProducerSession, search: Search, now: float) -> None:
        """Ends a session in which the trainer is silent. Raises NoTrainer where the search takes too long."""
        if session.is_silent(now):
            silence = format_duration(now - session.received_at)
            log.warning("trainer silent for %s; starting a new session", silence)
            self._state.drop_session()
        elif session.welcome is None:
            search.check(now)
            if session.hello_sent_at is not None and now - session.hello_sent_at > self.settings.dead_seconds:
                # The trainer that took our HELLO died before it answered: the next one knows nothing of us.
                self._state.drop_session()

    def _receive(self, connection: TrainerConnection, session: ProducerSession) -> None:
        """Waits for the trainer or for something to send, and handles one message."""
        frames = connection.receive()
        if frames is None:
            for event in connection.failed_handshakes():
                if refusal := self._handshakes.judge(event, welcomed_before=self._state.sessions > 0):
                    self._state.end(refusal)
            return
        try:
            message = decode(frames[0])
        except WireError as error:
            self._outside.warning("message from the trainer dropped: %s", error)
            if error.kind == "version":
                endpoint = self.settings.endpoint
                self._state.end(RefusedByTrainer(f"the trainer at {endpoint} is of another release: {error}"))
            return
        session.received_at = time.monotonic()
        with self._state.changed:
            self._handle(connection, session, message, frames[1] if len(frames) > 1 else b"")
            self._state.changed.notify_all()

    def _handle(
        self, connection: TrainerConnection, session: ProducerSession, message: Message, payload: bytes
    ) -> None:
        """Acts on one message; the lock is held."""
        if isinstance(message, Welcome) and message.session == session.name:
            session.welcome = message
            self._state.sessions += 1
            self._handshakes.reset()
            self._outside.info("welcomed by run %s at %s", message.run, self.settings.endpoint)
        elif isinstance(message, Lease):
            session.leases.append((message, payload))
        elif isinstance(message, Credit):
            session.grant(message.number)
        elif isinstance(message, Reject):
            self._handle_reject(session, message)
        elif isinstance(message, Drain):
            self._handle_drain(connection, message)

    def _handle_reject(self, session: ProducerSession, reject: Reject) -> None:
        if not reject.retry:
            self._state.end(RefusedByTrainer(f"refused by the trainer: {reject.reason}"))
            return
        self._outside.warning("session ended by the trainer (%s): %s", reject.code, reject.reason)
        self._state.drop_session()
        if session.welcome is None:
            self._state.changed.wait(timeout=RETRY_SECONDS)

    def _handle_drain(self, connection: TrainerConnection, drain: Drain) -> None:
        connection.close_with_bye()
        if drain.finished:
            self._state.end(Finished())
            return
        log.info("the trainer leaves; waiting for it to come back")
        self._state.drop_session()
        # It closes its socket in a moment: a new session now would talk to the old process.
        self._state.changed.wait(timeout=RETRY_SECONDS)

    def _send(self, connection: TrainerConnection, session: ProducerSession) -> None:
        """Sends a heartbeat when one is due, and what waits in the outbox while the socket takes it."""
        now = time.monotonic()
        if session.is_heartbeat_due(now):
            session.heartbeat_sent_at = now
            name, number = self._state.revision
            connection.send(Heartbeat(progress=self._state.progress, revision=name, revision_number=number))
        outbox = self._state.outbox
        while outbox:
            message, payload = outbox[0]
            if not connection.send(message, payload):
                return
            if isinstance(message, Hello):
                session.hello_sent_at = now
            with self._state.changed:
                outbox.popleft()
                self._state.changed.notify_all()
