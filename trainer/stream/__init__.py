"""How do activations come in, each exactly once?

    ledger/       which shard is leased to whom, and which activations are trained: a state machine without I/O
    intake        the trainer's end of the stream, as the training thread sees it
    server        the socket's thread
    handler       what each message does
    ingest        chunks into the buffer
    buffer        the shuffling buffer
    mixing        whether the buffer will mix the shards of the stream
    payload       the bits of a chunk
    wait_times    how long training and producers wait for each other
    router        the socket
    routes        which session is at the other end of which connection
    connections   bounds on what a connection may hold

Imported by training/ and the trainer's app.
"""
