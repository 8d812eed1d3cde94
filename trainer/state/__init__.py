"""What is on disk, and does it survive a crash?

    durable       files and folders that are whole or absent
    checkpoint    what resuming needs
    home          the run directory, held while its trainer works
    check         `python -m trainer check`

Imported by training/, control/ and `__main__`; `durable` by the monitor too.
"""
