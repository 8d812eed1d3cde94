"""Documents → windows of token ids, the same for every kind of corpus.

In reading order:

    chat_template   conversations as text, and which characters each role wrote
    tokenizing      documents → token ids
    windows         token ids → windows
"""
