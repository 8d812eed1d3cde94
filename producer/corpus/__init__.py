"""Text as numbered shards, and shards as windows of token ids: what does a producer read for a shard that it is leased?

    text = open_text(settings.corpus)                        # CorpusError now, not after an hour
    windows = text.windows(shard, epoch, tokenizer)

    corpus = open_corpus(settings.corpus)                    # one of them alone
    windows = windows_of(corpus.documents(shard), tokenizer, settings.corpus)

All of it is a pure function of the settings and the data: a shard can be read alone, in any order and on any machine,
and always reads the same. There is no index file; what a shard holds is arithmetic on names and sizes.

In reading order:

    base            Corpus and CorpusError: what every kind promises
    registry        open_corpus: the kinds, one line for each
    sources/        the kinds: where documents come from, and how data is cut into shards
    rendering/      documents → token ids → windows, the same for every kind
    mixture         open_text: a corpus, or several by weight, as the shards of the stream
    held_out        the text that a run never trains on, for evaluations
    survey          whether shards can be read, and how unlike they are
    synthetic       activations of known ground truth: no text, and so no Corpus

A new kind is one module of `sources`, one line in `registry`, and its name in `producer.settings`. The package imports
settings, parsing and the wire's arithmetic of the producer, and neither torch nor, before a kind needs it, pyarrow or
datasets. The producer's sources import it, and so may the monitor, which evaluates on the text that was held out.

Faults of the data raise CorpusError, and reading again will not help. Anything else that travels out of `documents`,
such as an OSError of the network, may be worth another attempt.
"""

from producer.corpus.base import Corpus, CorpusError
from producer.corpus.mixture import Part, Text, open_text
from producer.corpus.registry import more_shards_advice, open_corpus

__all__ = ["Corpus", "CorpusError", "Part", "Text", "more_shards_advice", "open_corpus", "open_text"]
