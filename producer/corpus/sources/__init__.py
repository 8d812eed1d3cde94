"""The kinds of corpus: where documents come from, and how their data is cut into shards.

In reading order:

    stdlib          kind `stdlib`: the sources of Python's standard library
    files           which files corpus.paths names, and what identifies them
    reading         opening files: unpacking, encodings, limits, and formats that are refused
    pieces          files cut into byte ranges, and the corpora made of them
    chat            the layouts in which data sets hold conversations, as one
    columns         what corpus.column holds: texts, token ids, messages
    text jsonl token_files      kinds that are made of pieces
    token_layouts   which numbers a file of token ids holds
    parquet huggingface         kinds that a library reads

`producer.corpus.registry` opens them by name; nothing else imports a kind, but `jsonl`, whose records the monitor reads
too.
"""
