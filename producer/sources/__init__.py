"""Sources of activations: a shard number → windows → activations.

All sources share one shape: a language model that reads a text, activations that others saved, and synthetic vectors of
known ground truth. Everything that decides which activations a shard has is in `facts`; their hash is the stream's
fingerprint, so that two producers either stream the same activations or are not let in together. In reading order:

    base             Source: what each of them offers; the batches and threads of forward passes
    norms            the norm beyond which an activation is dropped
    language_model   a language model that reads a corpus
    saved            activations that others saved
    saved_files      the files that hold them
    synthetic        sparse sums of known directions
    opening          open_source: the one that the run file names

The producer's app and loop import it.
"""
