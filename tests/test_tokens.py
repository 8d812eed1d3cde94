"""Packing: no token lost, BOS once, padding and special tokens never kept, the same windows on each reading."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from producer.corpus import CorpusError
from producer.corpus.rendering.tokenizing import BATCH_DOCUMENTS
from producer.corpus.rendering.windows import Windows, check_packing, tokens_fingerprint, windows_of
from producer.settings import CorpusSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOCUMENTS = st.lists(st.text(st.sampled_from("abcdefg"), max_size=9), max_size=9)


def letters(
    *special: str,
    vocabulary: str = LETTERS,
    unknown: str | None = None,
    normalizer: Any = None,
    processor: Any = None,
    **roles: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per letter, after the special tokens, which have the first ids."""
    ids = {token: number for number, token in enumerate([*special, *vocabulary])}
    rules = Tokenizer(models.WordLevel(ids, unk_token=unknown or vocabulary[0]))
    rules.add_special_tokens([AddedToken(token, special=True) for token in special])
    rules.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if normalizer is not None:
        rules.normalizer = normalizer
    if processor is not None:
        rules.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=rules, **roles)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """BOS 0, EOS 1, padding 2, a 3, b 4, …"""
    return letters("^", "$", "_", bos_token="^", eos_token="$", pad_token="_")


PYTHIA = letters("^", bos_token="^", eos_token="^", unk_token="^")
"""One special token for everything, with id 0; a 1, b 2, …"""


def packing(context: int = 4, **others: Any) -> CorpusSettings:
    return CorpusSettings(context=context, **others)


def words_of(windows: Windows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in windows.ids]


def marks(mask: np.ndarray) -> list[str]:
    return ["".join(".x"[int(bit)] for bit in row) for row in mask]


# Packing


def test_documents_are_joined_by_eos_and_cut_into_windows_that_begin_with_bos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The example of the module's docstring."""
    windows = windows_of(["ab", "cdefg"], tokenizer, packing())
    assert words_of(windows, tokenizer) == ["^ab$", "^cde", "^fg_"]
    assert marks(windows.kept) == [".xx.", ".xxx", ".xx."]
    assert marks(windows.padded) == ["....", "....", "...x"]
    assert (windows.ids.dtype, windows.kept.dtype, windows.padded.dtype) == (np.int64, bool, bool)


@given(DOCUMENTS, st.integers(2, 7), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_loses_no_token(documents: list[str], context: int, prepend_bos: bool, exclude_special: bool) -> None:
    """Without padding and each window's BOS, the windows in order are the documents with separators between."""
    options = packing(context, prepend_bos=prepend_bos, exclude_special=exclude_special)
    windows = windows_of(documents, PYTHIA, options)
    text = windows.ids[:, prepend_bos:][~windows.padded[:, prepend_bos:]]
    assert "".join(PYTHIA.convert_ids_to_tokens(text.tolist())) == "^".join(filter(None, documents))
    special = windows.ids == 0
    assert np.array_equal(windows.kept, ~windows.padded & ~(special & exclude_special))
    if len(windows):
        assert not windows.padded[:-1].any()
        assert not windows.padded[-1, 0]
        assert np.all(np.diff(windows.padded[-1].astype(int)) >= 0), "padding is on the right"


@given(DOCUMENTS, st.integers(2, 7))
@settings(max_examples=25, deadline=None)
def test_windows_are_the_same_on_each_reading(documents: list[str], context: int) -> None:
    """A second reading, after other texts, gives the same windows."""
    first = windows_of(documents, PYTHIA, packing(context))
    windows_of(["something", "else"], PYTHIA, packing(context))
    again = windows_of(iter(documents), PYTHIA, packing(context))
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.kept, again.kept)


def test_batches_of_documents_leave_no_trace(tokenizer: PreTrainedTokenizerFast) -> None:
    """More documents than are tokenized together, one of them far longer than a batch, keep their order."""
    documents = ["ab"] * BATCH_DOCUMENTS + ["cdefg" * 250_000] + ["hi"] * 3
    windows = windows_of(documents, tokenizer, packing(1000, prepend_bos=False))
    text = tokenizer.convert_ids_to_tokens(windows.ids[~windows.padded].tolist())
    assert "".join(text) == "$".join(documents)


@pytest.mark.parametrize("documents", [[], [""], ["", ""], [np.zeros(0, dtype=np.int64)]])
def test_shard_without_text_has_no_windows(tokenizer: PreTrainedTokenizerFast, documents: list[Any]) -> None:
    """Nothing gives no window, and in particular none that holds only BOS."""
    windows = windows_of(documents, tokenizer, packing())
    assert windows.ids.shape == windows.kept.shape == windows.padded.shape == (0, 4)
    assert len(windows) == 0


def test_text_that_fills_its_windows_is_followed_by_no_empty_one(tokenizer: PreTrainedTokenizerFast) -> None:
    """Six tokens are two windows of BOS and three, not three windows."""
    windows = windows_of(["abcdef"], tokenizer, packing())
    assert words_of(windows, tokenizer) == ["^abc", "^def"]
    assert not windows.padded.any()


def test_empty_documents_leave_no_separators(tokenizer: PreTrainedTokenizerFast) -> None:
    """Empty files do not pile up separators."""
    assert words_of(windows_of(["", "a", "", "", "b", ""], tokenizer, packing()), tokenizer) == ["^a$b"]


# BOS, separators, padding


def test_bos_with_id_zero_is_prepended() -> None:
    """Pythia's BOS is 0; taking that for "none" once left whole corpora without BOS."""
    windows = windows_of(["abcdef"], PYTHIA, packing())
    assert windows.ids.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert marks(windows.kept) == [".xxx", ".xxx"]


def test_bos_can_be_left_away(tokenizer: PreTrainedTokenizerFast) -> None:
    """With prepend_bos = false, a window is all text."""
    assert words_of(windows_of(["abcdef"], tokenizer, packing(prepend_bos=False)), tokenizer) == ["abcd", "ef__"]


def test_tokenizer_without_bos_gives_windows_without() -> None:
    """Qwen has no BOS: prepend_bos has nothing to do, and no token is lost to it."""
    qwen = letters("$", eos_token="$")
    assert words_of(windows_of(["ab", "cdef"], qwen, packing()), qwen) == ["ab$c", "def$"]


@pytest.mark.parametrize("bos", [{}, {"bos_token": "^"}])
def test_windows_of_an_encoder_stand_between_cls_and_sep(bos: dict[str, str]) -> None:
    """As it was trained, the last one too, whose padding follows; both are special, and no position is kept there."""
    encoder = letters("^", "$", "_", cls_token="^", sep_token="$", pad_token="_", **bos)
    windows = windows_of(["abc", "defg"], encoder, packing(5))
    assert words_of(windows, encoder) == ["^abc$", "^$de$", "^fg$_"]
    assert marks(windows.kept) == [".xxx.", "..xx.", ".xx.."]
    assert marks(windows.padded) == [".....", ".....", "....x"]
    assert words_of(windows_of(["abcde"], encoder, packing(5, prepend_bos=False)), encoder) == ["abcde"]
    with pytest.raises(CorpusError, match="no room beside BOS"):
        windows_of(["a"], encoder, packing(2))


def test_bos_separates_where_there_is_no_eos() -> None:
    """Documents are kept apart by the one special token there is."""
    only_bos = letters("^", bos_token="^")
    windows = windows_of(["ab", "c"], only_bos, packing(5))
    assert words_of(windows, only_bos) == ["^ab^c"]
    assert marks(windows.kept) == [".xx.x"]


def test_tokenizer_without_special_tokens_joins_plainly() -> None:
    """With neither EOS nor BOS, documents follow each other, and padding is id 0."""
    plain = letters(vocabulary="abc")
    windows = windows_of(["ab", "c"], plain, packing())
    assert windows.ids.tolist() == [[0, 1, 2, 0]]
    assert marks(windows.kept) == ["xxx."]


@pytest.mark.parametrize("way", ["post-processor", "normalizer"])
def test_tokenizer_that_adds_bos_and_eos_itself_does_not_double_them(way: str) -> None:
    """Llama adds BOS by a post-processor; some tokenizers add theirs whatever they are told."""
    roles: dict[str, Any] = {"bos_token": "^", "eos_token": "."}
    if way == "post-processor":
        template = processors.TemplateProcessing(single="^ $A .", special_tokens=[("^", 0), (".", 1)])
        eager = letters("^", ".", processor=template, **roles)
        assert eager("ab")["input_ids"] == [0, 2, 3, 1]
    else:
        both = normalizers.Sequence([normalizers.Prepend("^"), normalizers.Replace(Regex(r"\z"), ".")])
        eager = letters(vocabulary="^." + LETTERS, normalizer=both)
        eager.add_special_tokens(roles)
    windows = windows_of(["ab", "cd"], eager, packing(8))
    assert words_of(windows, eager) == ["^ab.cd.."]
    assert marks(windows.padded) == ["......xx"]


def test_letter_that_happens_to_be_unknown_is_not_taken_for_an_added_bos() -> None:
    """GPT-2's one special token stands for unknown text too; the first letter of each document stays."""
    narrow = letters("^", vocabulary="bcd", unknown="^", bos_token="^", eos_token="^", unk_token="^")
    assert words_of(windows_of(["abc", "bd"], narrow, packing(7)), narrow) == ["^^bc^bd"]


def test_padding_is_known_by_place_and_not_by_id() -> None:
    """Where padding is EOS, or an ordinary token, real tokens of that id are told from padding."""
    windows = windows_of(["a"], letters(vocabulary="abc"), packing(3))
    assert windows.ids.tolist() == [[0, 0, 0]]
    assert marks(windows.kept) == ["x.."]


# What is kept


def test_special_tokens_are_kept_when_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    """With exclude_special = false, BOS and EOS are kept; padding still is not."""
    assert marks(windows_of(["a", "b"], tokenizer, packing(5, exclude_special=False)).kept) == ["xxxx."]


def test_special_tokens_without_a_role_are_not_kept() -> None:
    """Llama 3's reserved tokens are merely marked as special in the vocabulary; they are dropped as well."""
    reserved = letters("^", "%", bos_token="^")
    windows = windows_of(["a%b"], reserved, packing())
    assert words_of(windows, reserved) == ["^a%b"]
    assert marks(windows.kept) == [".x.x"]


def test_truncation_and_padding_that_come_with_a_tokenizer_are_not_used() -> None:
    """A tokenizer.json may ask for both; packing decides alone."""
    strict = letters("^", bos_token="^")
    strict.backend_tokenizer.enable_truncation(3)
    strict.backend_tokenizer.enable_padding(length=9)
    assert words_of(windows_of(["abcdef", "g"], strict, packing(9)), strict) == ["^abcdef^g"]


# Token files


def test_token_documents_are_packed_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids from a file need no tokenizing; one that ends with the separator gets no second one."""
    documents = [np.array([3, 4, 1]), np.array([5]), np.array([6])]
    assert words_of(windows_of(documents, tokenizer, packing(7)), tokenizer) == ["^ab$c$d"]


def test_rows_of_a_token_file_come_back_row_for_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """Windows cut by another tool, BOS and all, stay as they were with prepend_bos = false."""
    rows = np.array([[0, 3, 4, 5], [0, 6, 7, 8]])
    windows = windows_of([rows.ravel()], tokenizer, packing(prepend_bos=False))
    assert np.array_equal(windows.ids, rows)
    assert marks(windows.kept) == [".xxx", ".xxx"]


@pytest.mark.parametrize("wrong", [29, -1])
def test_ids_that_the_tokenizer_lacks_are_refused(tokenizer: PreTrainedTokenizerFast, wrong: int) -> None:
    """A wrong token_dtype or model is told before an embedding fails on a GPU."""
    with pytest.raises(CorpusError, match=f"id {wrong}, but the tokenizer has 29 ids, from 0; name the"):
        windows_of([np.array([3, wrong])], tokenizer, packing())


def test_window_without_room_for_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """A context of one token is BOS alone; it is told when the fingerprint is taken, before any shard."""
    for use in (lambda: windows_of(["a"], tokenizer, packing(1)), lambda: tokens_fingerprint(tokenizer, packing(1))):
        with pytest.raises(CorpusError, match=r"corpus.context = 1 leaves no room beside BOS; raise it, or set"):
            use()
    assert len(windows_of(["ab"], tokenizer, packing(1, prepend_bos=False))) == 2


# Fingerprint


def test_fingerprint_does_not_change_when_a_tokenizer_is_used() -> None:
    """Calling a tokenizer sets its truncation and padding; neither they nor post-processing are part of the mapping."""
    tokenizer = letters("^", bos_token="^")
    tokenizer.backend_tokenizer.enable_truncation(3)
    before = tokens_fingerprint(tokenizer, packing())
    windows_of(["abc"], tokenizer, packing())
    tokenizer(["abc", "d"], padding=False, truncation=True, max_length=2)
    assert tokens_fingerprint(tokenizer, packing()) == before
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    assert tokens_fingerprint(tokenizer, packing()) == before
    assert tokens_fingerprint(letters("^", bos_token="^"), packing()) == before


@pytest.mark.parametrize("change", [{"context": 5}, {"prepend_bos": False}, {"exclude_special": False}])
def test_fingerprint_changes_with_the_settings_of_packing(
    tokenizer: PreTrainedTokenizerFast, change: dict[str, Any]
) -> None:
    """Each setting that decides windows or tokens counts; how text is cut into shards is the corpus' own matter."""
    assert tokens_fingerprint(tokenizer, packing(**change)) != tokens_fingerprint(tokenizer, packing())
    assert tokens_fingerprint(tokenizer, packing(shard_bytes=5)) == tokens_fingerprint(tokenizer, packing())


def test_fingerprint_changes_with_each_special_token() -> None:
    """The same vocabulary and the same special tokens: which of them comes first, between and last decides the ids."""
    special, texts = ("^", "$", "_", "%"), ["a", "b"]
    roles = [
        {"bos_token": "^", "eos_token": "$", "pad_token": "_", "sep_token": "%"},
        {"bos_token": "^", "eos_token": "%", "pad_token": "_", "sep_token": "$"},  # another separator
        {"bos_token": "%", "eos_token": "$", "pad_token": "_", "sep_token": "^"},  # another BOS
        {"bos_token": "^", "eos_token": "$", "pad_token": "%", "sep_token": "_"},  # other padding
    ]
    tokenizers = [letters(*special, **each) for each in roles]
    assert len({windows_of(texts, one, packing(6)).ids.tobytes() for one in tokenizers}) == len(roles)
    assert len({tokens_fingerprint(one, packing(6)) for one in tokenizers}) == len(roles)


def test_fingerprint_changes_with_the_tokenizer() -> None:
    """Vocabulary, rules and the roles of special tokens count."""
    tokenizers = [
        letters("^", "$", bos_token="^", eos_token="$"),
        letters("^", "$", bos_token="$", eos_token="^"),
        letters("^", "$", bos_token="^"),
        letters("^", "$", bos_token="^", eos_token="$", vocabulary=LETTERS[::-1]),
        letters("^", "$", bos_token="^", eos_token="$", normalizer=normalizers.Lowercase()),
    ]
    assert len({tokens_fingerprint(one, packing()) for one in tokenizers}) == len(tokenizers)


# What the model knows, and what a text brings


def test_a_text_that_brings_its_own_bos_gets_no_second_one(tokenizer: PreTrainedTokenizerFast) -> None:
    """At the front of each text; in its middle, and where windows get none, it stays as the text has it."""
    texts = ["^ab", "^^c", "d^e", "^"]
    assert words_of(windows_of(texts, tokenizer, packing(9)), tokenizer) == ["^ab$c$d^e"]
    without_bos = windows_of(texts, tokenizer, packing(12, prepend_bos=False))
    assert words_of(without_bos, tokenizer) == ["^ab$^^c$d^e$", "^___________"]
    assert words_of(windows_of(["^ab", "^c"], PYTHIA, packing(5)), PYTHIA) == ["^ab^c"]


def test_packing_that_needs_what_the_model_lacks_is_refused() -> None:
    """Each id that packing inserts, at the start; one that only a text could bring does no harm."""
    late = letters(vocabulary="abc")  # ids 0 to 2
    late.add_special_tokens({"bos_token": "^", "eos_token": "$"})  # 3 and 4
    with pytest.raises(CorpusError, match=r"'\^' \(id 3\) serves as BOS.* ids 0 to 2; set corpus.prepend_bos = false"):
        check_packing(late, packing(), 3)
    with pytest.raises(CorpusError, match=r"'\$' \(id 4\) serves as EOS \(or BOS\), which separates documents"):
        check_packing(late, packing(), 4)
    with pytest.raises(CorpusError, match="serves as padding"):
        check_packing(late, packing(kind="tokens", paths=["x"]), 4)
    check_packing(late, packing(), 5)
    late.add_tokens(["%"], special_tokens=True)  # 5
    check_packing(late, packing(), 5)
