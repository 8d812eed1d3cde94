"""What is on disk, and does it survive a crash?

    durable           files and folders that are whole or absent
    tensor_file       one file of tensors that several processes write
    format            contents of a checkpoint as typed parts, and their keys
    migrations        its version, and what brings older documents to it
    checkpoint        checkpoints as files
    audit             whether the contents of a checkpoint agree
    run_directory     the run directory of a trainer at work: locked and watched
    check             `python -m trainer check`
    inspection        its findings and faults

Imported by training/, control/, `app` and `__main__`; `format` by stream/ too, `durable` by the monitor.
"""
