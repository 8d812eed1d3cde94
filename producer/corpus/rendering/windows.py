"""A shard's documents → windows of token ids, and which of their positions become activations of the stream.

    windows = windows_of(corpus.documents(shard), tokenizer, settings.corpus)
    windows.ids, windows.kept                                                   # [windows, context]

A pure function: exactly-once training rests on it, so the same documents give the same windows however often, in
whatever order and by whichever producer they are read. Packing restarts with each call, that is, with each shard.

    documents  "ab"  "cdefg"       context 4, BOS ^, separator $, padding _
    stream     a b $ c d e f g
    windows    ^ab$  ^cde  ^fg_
    kept       .xx.  .xxx  .xx.

With corpus.packing = "separate", each document has windows of its own; with "separate_masked" these share windows, and
`positions` says where each document begins, for the attention of the language model:

    separate          ^ab_  ^cde  ^fg_          separate_masked, context 8     ^ab^cde_  ^fg_____

Encoders were trained on windows between [CLS] and [SEP]: these begin and end each window, with corpus.prepend_bos.

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
from producer.corpus.base import CorpusError, Document
from producer.corpus.rendering.tokenizing import DocumentTokenizer, TokenizedDocument, first_id
from producer.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REASONS = ("excluded", "padding", "bos", "special", "role", "position")
"""Why a position is not kept, by the number in `Windows.reasons`; the first where nobody says."""
PADDING, BOS, SPECIAL, ROLE, POSITION = range(1, len(REASONS))
OPEN_WINDOWS = 64
"""Windows with room that a document may still go into."""


@dataclass(frozen=True)
class Windows:
    """The windows of one shard."""

    ids: np.ndarray
    """Token ids, int64 [windows, context]."""
    kept: np.ndarray
    """Positions whose activations are streamed, bool [windows, context]; outliers among them are dropped later."""
    padded: np.ndarray
    """Positions behind a window's last token, bool [windows, context]; never kept."""
    positions: np.ndarray | None = None
    """For windows that several documents share: each token's position in its own document, int64 [windows, context]."""
    reasons: np.ndarray | None = None
    """Why each position is not kept, a number of REASONS where it is not, uint8 [windows, context]."""

    def __len__(self) -> int:
        return len(self.ids)

    def exclusions(self, first: int, end: int) -> dict[str, int]:
        """Counts the positions of these windows that are not kept, by reason."""
        excluded = ~self.kept[first:end]
        if self.reasons is None:
            return {REASONS[0]: int(excluded.sum())}
        counts = np.bincount(self.reasons[first:end][excluded], minlength=len(REASONS))
        return {reason: int(count) for reason, count in zip(REASONS, counts, strict=True) if count}


def select_windows(windows: Windows, which: slice | np.ndarray) -> Windows:
    """Some windows, by a slice or by number, without `positions` and `reasons`: their documents are kept apart."""
    return Windows(windows.ids[which], windows.kept[which], windows.padded[which])


def join_windows(parts: Iterable[Windows]) -> Windows:
    """The windows of all parts in one, as `select_windows` leaves them."""
    arrays = zip(*((part.ids, part.kept, part.padded) for part in parts), strict=True)
    return Windows(*map(np.concatenate, arrays))


def windows_of(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> Windows:
    """Cuts all windows of one shard, in order; without text there are none. A window may be without kept positions.

    Holds the text of one batch of documents at a time, and the ids of the whole shard.
    Raises CorpusError if there is no room beside BOS, or for a document that cannot be read.
    """
    packing = _packing(tokenizer, settings)
    tokenized = DocumentTokenizer(tokenizer, settings).tokenize(documents)
    if settings.packing == "pack":
        return _kept_where_streamed(_cut(list(_stream(tokenized, packing)), packing), packing)
    parts = [_cut([document], packing) for document in tokenized if len(document.ids)]
    windows = _kept_where_streamed(_joined(parts) if parts else _cut([], packing), packing)
    return share_windows(windows) if settings.packing == "separate_masked" else windows


def separated(settings: CorpusSettings) -> CorpusSettings:
    """Returns settings of the same activations in which documents share no window: for passes without `positions`."""
    return settings.model_copy(update={"packing": "separate"}) if settings.packing == "separate_masked" else settings


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
        *DocumentTokenizer(tokenizer, settings).decisive,
    ]
    if packing.end is not None:
        decisive.append(["end", packing.end])
    if settings.packing != "pack" or settings.positions:
        decisive.append([settings.packing, settings.positions])
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_packing(tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings, vocabulary: int) -> None:
    """Raises CorpusError when packing itself would put an id into windows that a model of `vocabulary` ids lacks.

    Other tokens that the model lacks do no harm until a text contains one.
    """
    packing = _packing(tokenizer, settings)
    documents = None if settings.kind == "tokens" else packing.separator
    for role, number, advice in (
        ("BOS, which begins each window", packing.bos, "set corpus.prepend_bos = false, or "),
        ("[SEP], which ends each window", packing.end, "set corpus.prepend_bos = false, or "),
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
    """Tokens of the stream in one window: context, less one if there is a BOS, and one if there is an end."""
    bos: int | None
    end: int | None
    """Token behind the text of each window: an encoder's [SEP]."""
    separator: int | None
    pad: int
    dropped: frozenset[int]
    """Ids whose positions are not kept."""
    has_roles: bool
    """Only tokens of some roles are kept: neither BOS nor separators."""
    streamed: np.ndarray
    """Positions that corpus.positions names, bool [context]."""


def _packing(tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> _Packing:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    begin, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    is_encoder = begin is not None and sep is not None and bos in (None, begin)
    front = (begin if is_encoder else bos) if settings.prepend_bos else None
    end = sep if is_encoder and settings.prepend_bos else None
    text = settings.context - (front is not None) - (end is not None)
    if text < 1:
        raise CorpusError(
            f"corpus.context = {settings.context} leaves no room beside BOS; "
            "raise it, or set corpus.prepend_bos = false"
        )
    return _Packing(
        context=settings.context,
        text=text,
        bos=front,
        end=end,
        separator=first_id(end, eos, bos),
        pad=first_id(pad, eos, 0) or 0,
        dropped=_special_ids(tokenizer) if settings.exclude_special else frozenset(),
        has_roles=bool(settings.roles),
        streamed=np.array(settings.streamed_positions),
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the named special tokens, and those only marked as special, such as Llama 3's reserved ones."""
    flagged_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | flagged_ids


def _stream(documents: Iterable[TokenizedDocument], packing: _Packing) -> Iterator[TokenizedDocument]:
    """Yields the documents with separators between them; empty documents leave no trace.

    A document that ends with the separator, as those of token files often do, gets no second one. A separator has no
    role.
    """
    is_open = False
    for document in documents:
        if not len(document.ids):
            continue
        if is_open and packing.separator is not None:
            yield TokenizedDocument(
                np.array([packing.separator], dtype=np.int64), np.array([not packing.has_roles]), True
            )
        yield document
        is_open = not document.is_closed


def _cut(documents: list[TokenizedDocument], packing: _Packing) -> Windows:
    """Cuts the tokens of a shard into windows, each from BOS to its end, and pads the last on the right."""
    missing = -sum(len(document.ids) for document in documents) % packing.text
    padding = TokenizedDocument(np.full(missing, packing.pad), np.zeros(missing, dtype=bool), is_closed=True)
    parts = [*documents, padding]
    ids = np.concatenate([part.ids for part in parts]).reshape(-1, packing.text)
    in_roles = np.concatenate([part.in_roles for part in parts]).reshape(-1, packing.text)
    padded = np.zeros((len(ids), packing.context), dtype=bool)
    padded[-1:, packing.context - missing :] = True
    if packing.bos is not None:
        ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=packing.bos)
        in_roles = np.pad(in_roles, ((0, 0), (1, 0)), constant_values=not packing.has_roles)
    if packing.end is not None:
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=packing.end)
        in_roles = np.pad(in_roles, ((0, 0), (0, 1)), constant_values=not packing.has_roles)
        if missing:
            ids[-1, packing.context - 1 - missing :] = [packing.end] + missing * [packing.pad]
    dropped = np.isin(ids, np.fromiter(packing.dropped, dtype=np.int64))
    reasons = np.where(dropped, np.uint8(SPECIAL), np.uint8(ROLE))
    reasons[padded] = PADDING
    if packing.bos is not None:
        reasons[:, 0] = BOS
    return Windows(ids=ids, kept=in_roles & ~padded & ~dropped, padded=padded, reasons=reasons)


def _joined(parts: list[Windows]) -> Windows:
    """Puts the windows of documents one behind the other."""
    return Windows(
        ids=np.concatenate([part.ids for part in parts]),
        kept=np.concatenate([part.kept for part in parts]),
        padded=np.concatenate([part.padded for part in parts]),
        reasons=np.concatenate([part.reasons for part in parts if part.reasons is not None]),
    )


def _kept_where_streamed(windows: Windows, packing: _Packing) -> Windows:
    """Keeps only what corpus.positions names."""
    assert windows.reasons is not None
    reasons = np.where(windows.kept, np.uint8(POSITION), windows.reasons)
    return Windows(windows.ids, windows.kept & packing.streamed, windows.padded, reasons=reasons)


def share_windows(windows: Windows) -> Windows:
    """Puts windows of one document each into as few windows, whole: each into the first that has room for it.

    Only the last OPEN_WINDOWS are looked at, so that a shard of a million short documents is packed as fast.
    """
    context = windows.ids.shape[1]
    lengths = (~windows.padded).sum(1)
    rows = np.zeros(len(windows), dtype=np.int64)
    columns = np.zeros(len(windows), dtype=np.int64)
    filled: list[int] = []
    for index, length in enumerate(lengths.tolist()):
        start = max(0, len(filled) - OPEN_WINDOWS)
        row = next((row for row in range(start, len(filled)) if filled[row] + length <= context), len(filled))
        if row == len(filled):
            filled.append(0)
        rows[index], columns[index] = row, filled[row]
        filled[row] += length
    shape = (len(filled), context)
    ids = np.zeros(shape, dtype=np.int64)
    kept, padded = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    positions = np.zeros(shape, dtype=np.int64)
    source, position = np.nonzero(~windows.padded)
    place = rows[source], columns[source] + position
    ids[place], kept[place] = windows.ids[source, position], windows.kept[source, position]
    padded[place], positions[place] = False, position
    reasons = np.full(shape, PADDING, np.uint8)
    assert windows.reasons is not None
    reasons[place] = windows.reasons[source, position]
    # Padding counts on, as if it were the last document's: nothing attends to it.
    for row, length in enumerate(filled):
        positions[row, length:] = positions[row, length - 1] + 1 + np.arange(context - length)
    return Windows(ids, kept, padded, positions, reasons)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> object:
    """Returns the tokenizer's rules as JSON data: the fast backend's serialisation, or its class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    rules = parse_object(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("truncation", "padding", "post_processor")}
