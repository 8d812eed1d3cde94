"""What will a run cost, before it starts?

    cost          time and bytes of a step, from two numbers of a machine
    exchange      bytes that ranks exchange in a step, by purpose
    sharding      the same with latents sharded over ranks, each with a GPU
    sae_cost      the sizes of an SAE's step, and the placement group that trains it
    machine       the two numbers of this machine, measured; its free memory
    workload      the SAEs and the language model of a run file, as sizes
    starting      ranks, machines, producers and intakes, and the commands that start them
    prediction    the estimate for a run
    tables        an estimate in a terminal
    estimate      `python -m trainer estimate`

Imported by `__main__`; `machine` by `app`, `sae_cost` by `app` and training/, `cost` by stream/.
"""
