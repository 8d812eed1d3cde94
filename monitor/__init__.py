"""Monitor: evaluates what the trainer publishes, serves it, and shows it.

    __main__        `python -m monitor RUN.toml`
    app             the monitor as a process
    settings        [monitor] of the run file
    files           files that other processes write
    run_directory   what a run directory holds
    snapshot_index  which snapshots it holds, from look to look
    summary         summary.json, completed with the evaluation
    comparison      what differs between two snapshots
    history         the curves of a run
    metrics         its Prometheus metrics, and the list of all there are
    evaluation/     SAEs measured with the language model; latents
    http/           the HTTP service and its pages
    cli/            pull, top, compare
    grafana/        dashboards
    prometheus/     alerts

It imports contracts of producer/ and trainer/; nobody imports it.
"""
