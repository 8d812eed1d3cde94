"""What can a person do in a terminal, beside starting a monitor?

    pull            the command that fetches snapshots
    top             the command that shows a run
    compare         the command that compares two snapshots
    evaluate        the command that measures one snapshot with the language model
    serve           the command that serves several runs
    explain         the command that asks another language model about latents
    export          the command that writes a run for other programs
    publish         the command that puts a snapshot on the Hugging Face hub
    arguments       arguments that commands have in common
    client          HTTP to a monitor
    errors          its errors
    download        snapshots over HTTP, checked and resumed
    run_view        a run, polled and drawn
    terminal        tables of a run
    comparison_tables   tables of a comparison
    evaluate_snapshot   an evaluation, and its table
    explain_latents explanations of latents
    export_run      an export
    publish_run     a publication
    progress        bars

Imported by `__main__` and the demo.
"""
