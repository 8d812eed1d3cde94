"""What is on disk, and does it survive a crash?

    durable       files and folders that are whole or absent
    format        contents of a checkpoint as typed parts: keys, version, migrations
    checkpoint    checkpoints as files
    audit         whether the contents of a checkpoint agree
    home          the run directory, held while its trainer works
    check         `python -m trainer check`
    inspection    what it looks at

Imported by training/, control/, `app` and `__main__`; `format` by stream/ too, `durable` by the monitor.
"""
