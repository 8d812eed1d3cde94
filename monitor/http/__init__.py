"""How does the monitor answer over HTTP?

    service         routes of snapshots and their files
    routes          routes of pages, and of the JSON behind them
    latent_routes   routes of single latents and of notes
    requests        what a request asks for
    errors          errors as JSON and as a page
    openapi         the JSON API described
    access          the token
    responses       responses that a client may have cached
    throttle        the share of CPU time that the service may use
    explorer_handle the explorer of latents, as the evaluating thread hands it to the service
    live_page       the page of a run
    suite_table     its SAEs as layers × sites
    scaling_page    the page of a scaling law
    latent_pages    the pages of latents
    html            templates and their filters
    templates/      Jinja templates
    static/         scripts and the style sheet

Imported by `monitor.app`.
"""
