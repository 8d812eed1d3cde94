"""What may an operator ask of a running trainer?

    ctl           `python -m trainer ctl`: the client
    requests      the trainer's socket, and the inbox of requests
    commands      the effect of each request on the run

Imported by training/ (the inbox of requests), app and `__main__`.
"""
