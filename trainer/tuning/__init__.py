"""How is a published SAE tuned for what the language model does with it?

    command      `python -m trainer tune`
    options      what a person chose for a tuning, and the error of one that cannot be made
    source       the published SAE, and the settings that it is tuned with
    text         the run's training text, batch by batch
    downstream   the divergence of the spliced model's predictions, and its gradient by the reconstruction
    quality      ΔCE, KL, FVU and L0 on held-out text
    tuner        the SAE in tuning: a step, its state, a snapshot
    saving       the state on disk, from which a stopped tuning goes on
    session      a tuning from beginning to end

A trainer never loads a language model: its activations come from producers, so that both can be on other machines and
stay apart when one is killed. Tuning is another matter. Its gradient comes from the model's output, through all blocks
above the hook, once in each step; over a socket that would be a second stream, backwards. It is a phase of its own,
after the stream: it reads a finished run and writes beside it, in a process of its own. So this package, and no other
of the trainer, imports `producer.lm` beyond its number formats. Imported by `__main__` alone.
"""
