"""What can a person do in a terminal, beside starting a monitor?

    pull            fetch snapshots
    top             a live table
    compare         what changed between two snapshots
    client          HTTP to a monitor
    terminal        tables

Imported by `__main__` and the demo.
"""
