"""What every process of Sluice needs: reading of settings, log, HTTP, metrics. Any package may import it.

    process     signals, limits and exits that all processes treat alike
    parsing     JSON and TOML from outside, every fault as one error
    toml        run files: reading and writing
    addresses   paths, endpoints and ports
    explain     faults of settings in words
    shell       commands as the reader's shell takes them
    formatting  sizes, counts and durations as people read them
    logs        logging of what strangers send: escaped, aggregated
    memory      how the C library treats freed memory
    server      an HTTP server in a thread
    metrics     tables of metrics → Prometheus, and the port that serves them

None imports another package of Sluice.
"""
