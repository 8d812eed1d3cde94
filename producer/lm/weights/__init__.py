"""Which weights of a checkpoint are loaded, and what is known of the others?

What lies after the last hook is neither held in memory nor read, beyond a few numbers of each tensor for the
fingerprint. In reading order:

    layout       the structure of a model, from its configuration alone; the parts that hooks need
    partial      a model without some of its parts, as from_pretrained loads it; passes through what is left out
    stored       single numbers of tensors in safetensors files
    placement    which device holds which part; whether a model fits
    quantization weights of 4 or 8 bits
    fingerprint  a hash of the configuration and of numbers of all weights, loaded or not

`producer.lm.pretrained` and `producer.lm.loading` import them.
"""
