"""How does the loss of SAEs fall with latents, k and tokens, and what would the next size reach?

    law       L(n, k), fitted to arrays, with uncertainties
    tokens    L(tokens), and whether an SAE is converged
    cells     the SAEs of a grid, as a run directory has them
    report    what was fitted, and the scaling.json that holds it
    fitting   cells → report
    tables    a report in the terminal
    fit       `python -m trainer fit`

Reads what a run has published; no part of training imports it. `report` is for the monitor, whose page draws it.
"""
