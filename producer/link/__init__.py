"""The producer's end of the stream: how does a chunk reach the trainer, whatever becomes of the connection?

The producer's loop calls `Link` for leases and hands chunks to it. A thread owns the socket, sends what credit allows,
answers heartbeats, and opens a new session whenever one ends. Losing a session loses nothing: a shard that the trainer
did not receive whole is leased again, to this producer or to another.

    connecting ──WELCOME──▶ working ──REJECT (retry) / silence / DRAIN (trainer leaves)──▶ connecting
                               └──DRAIN (finished) / REJECT (final) / patience over──▶ ended

In reading order:

    link            Link: what the loop calls
    session         ProducerSession: terms, leases and credit of one session; PackedChunk
    shared          what the loop's thread and the socket's thread share
    socket_thread   the sessions one after the other: messages, silence, patience
    connection      one socket, and what wakes the thread that waits on it
    handshakes      what failed handshakes mean
    errors          how sessions and runs end

The producer's loop and process import it.
"""

from producer.link.errors import Finished, NoTrainer, RefusedByTrainer, SessionLost
from producer.link.link import Link
from producer.link.session import PackedChunk

__all__ = ["Finished", "Link", "NoTrainer", "PackedChunk", "RefusedByTrainer", "SessionLost"]
