"""How good is an SAE, and what do its latents mean?

    measures        the table of all numbers of an SAE, and where each is shown
    results         the contents of evaluation.json
    follow          evaluation of each new snapshot as it appears
    errors          the error of an evaluation that cannot be made
    inputs          the language model and texts that it is evaluated with
    births          since when each latent has its direction
    evaluator       the language model's loss with x_hat for x, and reconstruction on held-out text
    compatibility   the test of whether an SAE fits the language model
    tallies         sums that the measures are computed from
    ablation        the number of logits that a latent changes
    probing         k-sparse probes of labelled texts
    latents/        what each latent of an SAE does, and latents for a person to read

Imported by http/ and `__main__`.
"""
