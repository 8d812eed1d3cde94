"""What is an SAE: its equations, its gradients, and its published form?

    settings      [[sae]]: keys that every architecture has
    annealing     numbers of active latents that change over tokens
    patterns      one table for an SAE of each layer
    grid          one table for SAEs of several sizes and sparsities
    registry      which architectures there are
    hooks         which hooks of the language model an SAE reads and writes
    gradients     the results of a forward and a backward pass over one batch
    encoder       the encoder's product, in blocks
    initial       the values that parameters begin with
    parameters    the parameters of an SAE
    base          products and gradients that all SAEs share
    architectures one module each: topk, batchtopk, jumprelu, …
    folding       input scales and whitening folded into published weights
    published     published weights, and how their latents are computed
    inference     raw activations → latents → reconstruction
    partwise      the same with some latents in memory at a time, on all ranks that share an SAE
    selftest      what a published SAE must compute, and whether it does
    writing       the files of an SAE in a snapshot, written by all ranks that share it
    formats       the formats of other libraries
    description   an SAE in words: its equations
    export        `python -m trainer export`
    start         training that starts from published weights

Four types stand for an SAE here. `SaeSettings` is its table in the run file. `Sae` is the SAE in training: parameters
in float32, one row per latent, for scaled activations. `SaeWeights` is a published SAE to convert: weights of the same
layout, for raw activations, with the cfg.json of whatever library wrote it. `InferenceSae` is a published SAE to run,
with weights as a snapshot has them on disk; the monitor evaluates it. Elsewhere, a `training.SaeTrainer` adds optimizer
and statistics to an `Sae`, and a `training.Member` is its entry in a run.

Imported by training/ and planning/; `settings` by `trainer.settings`; `hooks`, `inference` and `description` by the
monitor.
"""
