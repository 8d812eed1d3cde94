"""Trainer: leases text to producers, shuffles what they stream, and trains SAEs on it.

    __main__      `python -m trainer RUN.toml`
    app           the trainer as a process
    settings      [buffer] [optimizer] [parallel] [snapshots] [checkpoint] of the run file, and all of it together
    defaults      learning rate, warm-up and revival by the length of a run
    stream/       activations in: ledger, intake, buffer
    saes/         one module per architecture, with its settings, and how SAEs are published
    kernels/      sparse products and selection
    parallel/     many ranks that share the latents of each SAE: collectives, exact selection, commands
    training/     the loop, SAEs with optimizer and statistics, publishing
    state/        checkpoints and the run directory
    control/      requests of a person to a running trainer
    planning/     what a run will cost
    scaling/      what the losses of a grid of SAEs say of larger ones
    tuning/       a published SAE tuned for what the language model does with it
    snapshot      a published SAE on disk
    reporting     where reports go: metrics.jsonl, Prometheus, the log
    report        what the loop reports
    phases        the lifecycles of a run and of an SAE
    metrics       its Prometheus metrics
    health        its answers to /healthz and /readyz

It imports producer/; the monitor imports the modules that tests/test_imports.py lists as contracts.
"""
