"""What may a person ask of a running trainer?

    ctl           `python -m trainer ctl`: the client, and the socket it speaks to
    commands      what each request does to the run

Imported by training/ (the inbox of requests) and `__main__`.
"""
