"""Producer: runs a language model and streams the activations of its hooks to the trainer.

    __main__      `python -m producer RUN.toml`
    app           the producer as a process
    settings      [run] [stream] [model] [corpus] of the run file
    produce       the loop: lease → windows → activations → chunks
    packing       activations of a forward pass → chunks
    sources/      where activations come from: a language model on text, saved activations, or synthetic data
    lm/           a language model whose activations can be read
    corpus/       text in shards, and documents → windows of token ids; synthetic data
    link/         the producer's end of the stream
    wire          the messages of the stream
    keys          who may connect
    examples      `python -m producer fetch-example`: small trained language models, by pip
    report        what a producer reports of itself
    metrics       its Prometheus metrics
    health        its answers to /healthz and /readyz
    common/       what every process needs
    demo_lm/      the demo's language model

The trainer and the monitor import the modules that tests/test_imports.py lists as contracts.
"""
