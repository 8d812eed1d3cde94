"""Which shard is leased to whom, and which activations are trained? A pure state machine.

    ledger       the machine: events go in, messages to send come out
    phase        how much is still to come
    identity     which stream the run has, and whether a producer's is the same
    sessions     one producer's conversation with this trainer
    admission    which producers are turned away
    shards       the queue of shards, and the states that a shard goes through
    revisions    which checkpoint of a language model under training a shard is leased with
    failures     when a shard is tried again, and when it is quarantined
    credit       who is leased which shard and may send how much: fairly, or in the corpus' order
    invariants   what must hold, checked while the trainer runs
    resume       what a checkpoint keeps
    totals       the numbers of reports

From outside it is one machine, `ledger.Ledger`. It has no sockets, threads or torch, and the clock is an argument.
Imported by the modules beside this folder, training/ and the trainer's app.
"""
