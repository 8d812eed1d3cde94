"""Modules that every process needs: settings, log, HTTP, metrics. Any package may import them.

    process     signals, limits, priorities and exits that all processes treat alike
    parsing     JSON and TOML from outside, every fault as one error
    safetensors_header    the tensors of a safetensors file, and where they are
    run_file    the run file: its tables, overrides, and every fault at once
    command_line    RUN.toml [section.key=value …]
    fields      types of the values in a run file
    hook_ranges ranges of layers in the names of hooks
    addresses   paths, endpoints and ports
    toml        TOML as an operator reads and writes it
    explain     faults of settings in sentences
    shell       commands as the reader's shell takes them
    command_parser  the parser of a command
    completion  what a shell may complete
    version     the version of Sluice
    installation  whether packages of the same names are in the way
    formatting  sizes, counts and durations as people read them
    logs        log lines: escaped, and counted where other processes could flood them
    memory      how the C library treats freed memory
    server      an HTTP server in a thread
    metrics     tables of metrics → Prometheus, and the port that serves them

None imports another package of Sluice.
"""
