"""How does a gradient change the weights of an SAE?

    registry    the optimizers by name, with what they cost
    base        a step: norm, clipping, decoder rows on the unit sphere, the state that a checkpoint keeps
    adam        the default
    signum      signs of gradients, weights averaged on the way: sparsify's default
    muon        orthogonalised momentum

Imported by `trainer.training`, and the registry by planning/.
"""
