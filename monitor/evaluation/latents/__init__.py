"""What do the latents of an SAE do, one by one?

    activations     all activations of a snapshot's latents on held-out text, stored by latent
    explanation     the n-gram that best predicts where a latent fires
    texts           token ids as text
    explorer        latents for a person to read

Imported by the evaluation, http/ and the tests.
"""
