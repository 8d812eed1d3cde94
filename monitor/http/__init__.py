"""How does the monitor answer over HTTP?

    service         routes of snapshots and their files
    routes          routes of pages, and of the JSON behind them
    access          the token
    answers         conditional answers
    pace            the share of the machine that answers may use
    explorer_handle the explorer of latents, as the evaluating thread hands it to the service
    live_page       the page of a run
    latent_pages    the pages of latents
    html            templates and filters
    static/         what browsers load

Imported by `__main__`.
"""
