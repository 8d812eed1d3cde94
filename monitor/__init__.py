"""Monitor: evaluates what the trainer publishes, serves it, and shows it.

    __main__        `python -m monitor RUN.toml`
    app             the monitor as a process
    settings        [monitor] of the run file
    files           JSON and TOML that other processes write
    json_lines      files to which they append
    run_directory   a run directory: state, reports, snapshots
    snapshot_index  the snapshots in it, cached
    summary         summary.json, completed with the evaluation
    suite           SAEs as layers × sites
    comparison      the differences of two snapshots
    notes           labels, notes and bookmarks of latents
    history         the curves of a run
    metrics         Prometheus metrics of the monitor, and the list of all
    evaluation/     SAEs measured with the language model; latents
    http/           the HTTP service and its pages
    runs/           several runs side by side
    interpretation/ latents explained by another language model, where asked for
    export/         metrics and latents in the formats of other programs
    publishing/     snapshots on the Hugging Face hub
    cli/            pull, top, compare, serve, explain, export, publish
    grafana/        dashboards
    prometheus/     alerts

It imports contracts of producer/ and trainer/; nobody imports it.
"""
