"""How do activations come in, each exactly once?

    ledger        which shard is leased to whom, and which activations are trained: a state machine without I/O
    intake        the trainer's end of the stream: one thread, one socket
    connections   bounds on what a connection may hold
    buffer        the shuffling buffer

Imported by training/ and `__main__`.
"""
