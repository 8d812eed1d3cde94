"""How do SAEs train: step by step, side by side, from beginning to end?

    loop          take a batch, step, report, publish, save, handle a request
    meter         rates between two reports
    run           the SAEs of a run, and what they share
    device        the device that they train on, and the threads of a CPU
    resuming      a run as a checkpoint holds it
    rank_meter    how long the steps of a rank take, and its exchanges
    leader        the run of rank 0, which announces its changes to the other ranks
    follower      a rank that does what rank 0 announces
    remote        an SAE that another placement group of ranks trains
    sae_trainer   one SAE with optimizer, schedule and statistics
    revival       new weights for dead latents
    optimizers/   how a gradient changes the weights
    schedule      learning rates and phases, in tokens
    averaging     the mean of recent weights
    statistics    L0, MSE, FVU, firing rates, dead latents
    roster        which SAEs belong to a run
    publishing    snapshots, manifest, summary

Imported by control/ and `__main__`.
"""
