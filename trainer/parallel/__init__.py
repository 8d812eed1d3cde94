"""How do several ranks train one set of SAEs, and get what one process would get?

    environment  what torchrun tells a process: its rank
    placement    whether the ranks that were started can share the SAEs of a run
    grouping     which placement group trains which SAE
    ranks        the process group: collectives, counted by purpose, and the latents that each rank holds; messages
    commands     what rank 0 tells the other ranks to do
    blocks       over which latents sums are formed before they are exchanged
    products     products with the latents of a rank, and of all ranks
    selection    top-k and batch-top-k over latents that are spread over ranks, exact

Only `ranks` imports torch.distributed. Imported by saes/, training/, control/, `app` and `__main__`.
"""
