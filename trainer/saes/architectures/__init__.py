"""What does each architecture compute?

    topk batchtopk jumprelu relu p_anneal tied gated matching_pursuit repair
            one architecture each: equations, settings, gradients, export
    auxk    a loss that revives dead latents, which several of them have

A module is found by its line in `trainer.saes.registry`; nobody else imports it.
"""
