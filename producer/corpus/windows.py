"""A shard's documents → windows of token ids, and which of their positions become activations of the stream.

    windows = windows_of(corpus.documents(shard), tokenizer, settings.corpus)
    windows.ids, windows.kept                                                   # [windows, context]

A pure function: exactly-once training rests on it, so the same documents give the same windows however often, in
whatever order and by whichever producer they are read. Packing restarts with each call, that is, with each shard.

    documents  "ab"  "cdefg"       context 4, BOS ^, separator $, padding _
    stream     a b $ c d e f g
    windows    ^ab$  ^cde  ^fg_
    kept       .xx.  .xxx  .xx.

Ids are never tested for truth: 0 is a real id, and Pythia's BOS. Where BOS and separator are the same token, a window
whose text happens to begin with a separator starts with it twice; cutting there would make each window depend on all
the ones before. A text that begins with BOS ("<s>Once upon") loses it where windows get their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from producer.common.parsing import parse_object
from producer.corpus.base import CorpusError
from producer.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1_000_000
"""Documents are tokenized together up to these limits: fast tokenizers use all cores only for several at a time."""


@dataclass(frozen=True)
class Windows:
    """The windows of one shard."""

    ids: np.ndarray
    """Token ids, int64 [windows, context]."""
    kept: np.ndarray
    """Positions whose activations are streamed, bool [windows, context]; outliers among them are dropped later."""
    padded: np.ndarray
    """Positions behind the shard's last token, bool [windows, context]; never kept."""

    def __len__(self) -> int:
        return len(self.ids)


def windows_of(
    documents: Iterable[str | np.ndarray], tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings
) -> Windows:
    """Cuts all windows of one shard, in order; without text there are none. A window may be without kept positions.

    Holds the text of one batch of documents at a time, and the ids of the whole shard.
    Raises CorpusError if there is no room beside BOS, or if a token file holds ids that the tokenizer lacks.
    """
    packing = _packing(tokenizer, settings)
    parts = list(_stream(documents, tokenizer, packing))
    return _cut(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64), packing)


def tokens_fingerprint(tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> str:
    """Hashes what decides how documents become windows, the tokenizer and the settings of packing: sha256, hex.

    Truncation, padding and post-processing are left out of the tokenizer: we do not use them, and calling a
    tokenizer changes them. Raises CorpusError if there is no room beside BOS.
    """
    packing = _packing(tokenizer, settings)
    decisive = [
        _vocabulary(tokenizer),
        getattr(tokenizer, "split_special_tokens", False),
        [packing.bos, packing.separator, packing.pad, sorted(packing.dropped)],
        [settings.context, settings.prepend_bos, settings.exclude_special],
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_packing(tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings, vocabulary: int) -> None:
    """Raises CorpusError when packing itself would put an id into windows that a model of `vocabulary` ids lacks.

    Other tokens that the model lacks do no harm until a text contains one.
    """
    packing = _packing(tokenizer, settings)
    documents = None if settings.kind == "tokens" else packing.separator
    for role, number, advice in (
        ("BOS, which begins each window", packing.bos, "set corpus.prepend_bos = false, or "),
        ("EOS (or BOS), which separates documents", documents, ""),
        ("padding, which fills the last window of a shard", packing.pad, ""),
    ):
        if number is not None and number >= vocabulary:
            raise CorpusError(
                f"the tokenizer's {tokenizer.convert_ids_to_tokens(number)!r} (id {number}) serves as {role}, and the "
                f"model's embedding has ids 0 to {vocabulary - 1}; {advice}give that role to a token that the model "
                "has, in the tokenizer's files, or use a model whose embedding was resized for this tokenizer"
            )


@dataclass(frozen=True)
class _Packing:
    """The facts about a tokenizer and the settings that packing needs."""

    context: int
    text: int
    """Tokens of the stream in one window: context, less one if there is a BOS."""
    bos: int | None
    separator: int | None
    pad: int
    dropped: frozenset[int]
    """Ids whose positions are not kept."""
    vocabulary: int
    adds_bos: bool
    adds_eos: bool


def _packing(tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> _Packing:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    front = bos if settings.prepend_bos else None
    text = settings.context - (front is not None)
    if text < 1:
        raise CorpusError(
            f"corpus.context = {settings.context} leaves no room beside BOS; "
            "raise it, or set corpus.prepend_bos = false"
        )
    probe = _tokenize(tokenizer, ["a"])[0]
    return _Packing(
        context=settings.context,
        text=text,
        bos=front,
        separator=_first(eos, bos),
        pad=_first(pad, eos, 0) or 0,
        dropped=_special_ids(tokenizer) if settings.exclude_special else frozenset(),
        vocabulary=len(tokenizer),
        adds_bos=len(probe) > 1 and probe[0] == bos,
        adds_eos=len(probe) > 1 and probe[-1] == eos,
    )


def _first(*ids: int | None) -> int | None:
    """Returns the first id that is not None; `or` would pass over 0."""
    return next((number for number in ids if number is not None), None)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the named special tokens, and those only marked as special, such as Llama 3's reserved ones."""
    flagged_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | flagged_ids


def _stream(
    documents: Iterable[str | np.ndarray], tokenizer: PreTrainedTokenizerBase, packing: _Packing
) -> Iterator[np.ndarray]:
    """Yields the token ids of the documents with separators between them, int64; empty documents leave no trace.

    A document that ends with the separator, as those of token files often do, gets no second one.
    """
    last: int | None = None
    for ids in _document_ids(documents, tokenizer, packing):
        if not len(ids):
            continue
        if last is not None and packing.separator not in (None, last):
            yield np.array([packing.separator], dtype=np.int64)
        yield ids
        last = int(ids[-1])


def _document_ids(
    documents: Iterable[str | np.ndarray], tokenizer: PreTrainedTokenizerBase, packing: _Packing
) -> Iterator[np.ndarray]:
    """Yields the token ids of each document, in order; texts are tokenized in batches."""
    texts: list[str] = []
    characters = 0
    for document in documents:
        if not isinstance(document, str):
            yield _check_ids(document, packing)
            continue
        texts.append(document)
        characters += len(document)
        if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield from _text_ids(texts, tokenizer, packing)
            texts, characters = [], 0
    yield from _text_ids(texts, tokenizer, packing)


def _text_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, packing: _Packing) -> Iterator[np.ndarray]:
    """Yields the token ids of each text, without the BOS and EOS that are not part of it."""
    for text, ids in zip(texts, _tokenize(tokenizer, texts) if texts else [], strict=True):
        # Some tokenizers add their BOS or EOS although add_special_tokens is False.
        front = int(packing.adds_bos and len(ids) > 0)
        back = packing.adds_eos and len(ids) > front
        front += _own_bos(text, ids[front:], tokenizer, packing)
        yield np.array(ids[front : len(ids) - back], dtype=np.int64)


def _own_bos(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, packing: _Packing) -> int:
    """Counts the BOS tokens that a text begins with where windows get their own; text with the same id stays."""
    if packing.bos is None or not ids or ids[0] != packing.bos:
        return 0
    bos_text = str(tokenizer.bos_token)
    count = 0
    while text.startswith(bos_text, count * len(bos_text)) and ids[count : count + 1] == [packing.bos]:
        count += 1
    return count


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _check_ids(ids: np.ndarray, packing: _Packing) -> np.ndarray:
    """Returns the ids of a token file as int64. Raises CorpusError for an id that the tokenizer lacks.

    An embedding without that id would end a GPU process without saying why.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < packing.vocabulary:
        wrong_id = int(ids.max() if ids.max() >= packing.vocabulary else ids.min())
        raise CorpusError(
            f"a token file holds id {wrong_id}, but the tokenizer has {packing.vocabulary} ids, from 0; "
            "name the model whose tokenizer wrote the file, or correct corpus.token_dtype where the file has no header"
        )
    return ids.astype(np.int64, copy=False)


def _cut(stream: np.ndarray, packing: _Packing) -> Windows:
    """Cuts the token stream of a shard into windows, each with BOS in front, and pads the last on the right."""
    missing = -len(stream) % packing.text
    ids = np.pad(stream, (0, missing), constant_values=packing.pad).reshape(-1, packing.text)
    padded = np.zeros((len(ids), packing.context), dtype=bool)
    padded[-1:, packing.context - missing :] = True
    if packing.bos is not None:
        ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=packing.bos)
    dropped = np.isin(ids, np.fromiter(packing.dropped, dtype=np.int64))
    return Windows(ids=ids, kept=~padded & ~dropped, padded=padded)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> object:
    """Returns the tokenizer's rules as JSON data: the fast backend's serialisation, or its class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    rules = parse_object(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("truncation", "padding", "post_processor")}
