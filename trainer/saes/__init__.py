"""What is an SAE: its equations, its gradients, and its published form?

    settings      [[sae]]: keys that every architecture has
    registry      which architectures there are
    hooks         which hooks of the language model an SAE reads and writes
    base          parameters, initialisation, the products that all gradients share
    topk batchtopk jumprelu relu tied gated repair      one architecture each
    folding       scales and whitening folded into published weights
    published     a published SAE, and how its latents are computed
    inference     raw activations → latents → reconstruction; writing with a self-test
    formats       the formats of other libraries
    export        `python -m trainer export`
    start         weights that training starts from

Imported by training/ and planning/; `settings` by `trainer.settings`; `hooks` and `inference` by the monitor.
"""
