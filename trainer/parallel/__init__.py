"""How do several ranks train one set of SAEs, and get what one process would get?

    ranks        the process group: collectives, counted by purpose, and the latents that each rank holds
    selection    top-k and batch-top-k over latents that are spread over ranks, exact

Only `ranks` imports torch.distributed. Imported by saes/ and training/.
"""
