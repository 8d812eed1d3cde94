"""Failed handshakes: ZeroMQ repeats them for ever in silence; here they become messages and endings."""

from __future__ import annotations

import logging

import zmq

from producer.link.errors import RefusedByTrainer
from producer.settings import StreamSettings

log = logging.getLogger("sluice.producer")

MANY_FAILURES = 3
"""Failures in a row after which a dying trainer is no longer the likely cause."""


class HandshakeFailures:
    """Counts failed handshakes and turns them into one sentence for the operator."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._count = 0

    def reset(self) -> None:
        """A handshake has succeeded."""
        self._count = 0

    def judge(self, event: int, welcomed_before: bool) -> RefusedByTrainer | None:
        """The end that a failed handshake stands for; None where a further attempt may succeed."""
        endpoint = self._settings.endpoint
        self._count += 1
        many = self._count == MANY_FAILURES
        disagreement = (
            f"no agreement on keys with {endpoint}: stream.keys must be set on both sides or on neither, "
            "and server.key here must be the trainer's"
        )
        # Often the other side just hangs up. A trainer that dies during a handshake looks like this once, one with
        # other keys for ever; but so does a tunnel or a proxy that has no trainer behind it yet.
        keys_are_wrong = many and self._settings.keys is not None and not welcomed_before
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            unknown = f"the trainer at {endpoint} does not know this producer's key"
            remedy = "copy clients/client.key of stream.keys into the clients folder of the trainer's keys"
            return RefusedByTrainer(f"{unknown}: {remedy}")
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or keys_are_wrong:
            return RefusedByTrainer(disagreement)
        if many:
            log.warning("%s (or there is a tunnel, and no trainer at its end)", disagreement)
        return None
