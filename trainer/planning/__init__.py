"""What will a run cost, before it starts?

    cost          time and bytes from two numbers of a machine
    machine       these two numbers, measured
    estimate      `python -m trainer estimate`

Imported by `__main__`.
"""
