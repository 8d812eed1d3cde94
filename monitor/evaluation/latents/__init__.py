"""What do the latents of an SAE do, one by one?

    activations     all activations of a snapshot's latents on held-out text, stored by latent
    explanation     the n-gram that best predicts where a latent fires
    views           latents as a reader sees them: records, and their JSON
    explorer        answers to the questions of readers
    search          latents by text, number and density
    snapshot_saes   SAEs of snapshots, mapped from their files
    text_reader     texts that somebody typed, read with an SAE
    intervention    a latent ablated, and steered with
    coactivation    latents that fire together, and one among all
    examples        firings in their text
    logit_lens      what a latent's direction adds to the logits
    texts           token ids as text

Imported by the evaluation, which gathers activations, and by http/, which renders views.
"""
