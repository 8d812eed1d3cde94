"""Corpora: every line in exactly one shard, the same on each reading, and faults told at the start."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import tempfile
import tracemalloc
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.corpus import Corpus, CorpusError, open_corpus
from producer.corpus.registry import KINDS
from producer.corpus.sources.stdlib import StdlibCorpus
from producer.corpus.synthetic import SyntheticActivations
from producer.settings import CorpusSettings, SyntheticSettings
from tests.drills.named_producer import NamedActivations

LINES = st.lists(st.text(st.sampled_from("aä€😀\r "), max_size=9), max_size=12)
ENDS = st.sampled_from(["\n", "\r\n"])


def corpus_of(*paths: Path | str, kind: Any = "text", **others: Any) -> Corpus:
    return open_corpus(CorpusSettings(kind=kind, paths=[str(path) for path in paths], **others))


def shards_of(corpus: Corpus) -> list[list[Any]]:
    return [list(corpus.documents(shard)) for shard in range(corpus.shards)]


def texts_of(corpus: Corpus) -> list[str]:
    return [text for documents in shards_of(corpus) for text in documents]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def records(path: Path, texts: Iterable[Any]) -> Path:
    return write(path, "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def refusal(*paths: Path | str, **others: Any) -> str:
    with pytest.raises(CorpusError) as error:
        corpus_of(*paths, **others)
    return str(error.value)


# The standard library


@pytest.fixture(scope="module")
def stdlib() -> StdlibCorpus:
    corpus = open_corpus(CorpusSettings())
    assert isinstance(corpus, StdlibCorpus)
    return corpus


def test_stdlib_is_the_mapping_that_the_embedded_model_was_trained_on(stdlib: StdlibCorpus) -> None:
    """A file's shard is the hash of its path; files are in order of their paths; what is not UTF-8 is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    expected: list[list[str]] = [[] for _ in range(64)]
    skipped = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            continue
        shard = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8], "big") % 64
        try:
            expected[shard].append(path.read_text("utf-8"))
        except UnicodeDecodeError:
            skipped += 1
    assert shards_of(stdlib) == expected
    assert stdlib.skipped == skipped


def test_stdlib_holds_out_what_the_embedded_model_has_never_seen(stdlib: StdlibCorpus) -> None:
    """These four shards were kept from the embedded model; holding out others would measure on its training text."""
    assert stdlib.held_out_shards == [0, 13, 33, 46]


def test_description_says_what_it_is_in_one_line(stdlib: StdlibCorpus) -> None:
    """The line for logs names kind, size, what was left out, and how many shards are held out."""
    assert stdlib.description.startswith("standard library of Python 3.")
    assert stdlib.description.endswith(f"({stdlib.skipped} skipped: not UTF-8); 64 shards, 4 held out")


# Shards


def test_held_out_and_training_shards_are_a_partition(tmp_path: Path) -> None:
    """Each shard is either trained on or held out, and the asked fraction is held out."""
    corpus = corpus_of(write(tmp_path / "a.txt", "line\n" * 400), shard_bytes=100, held_out=0.25)
    assert corpus.shards == 20
    assert len(corpus.held_out_shards) == 5
    assert sorted(corpus.held_out_shards + corpus.training_shards) == list(range(20))


def test_single_shard_cannot_be_held_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One shard is trained on; the operator learns why the evaluation has no text and what to set."""
    corpus = corpus_of(write(tmp_path / "a.txt", "line\n"))
    assert (corpus.training_shards, corpus.held_out_shards) == ([0], [])
    assert "Lower corpus.shard_bytes = 1000000" in caplog.text


def test_few_shards_hold_out_more_than_asked_for_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 1 MB in two shards half is never trained on; sixteen shards hold out one, as asked."""
    path = write(tmp_path / "a.txt", "line\n" * 400)
    corpus_of(path, shard_bytes=1000, held_out=0.0625)
    assert "1 of 2 shards are held out, 50% of the text instead of 6%. Lower corpus.shard_bytes = 1000." in caplog.text
    caplog.clear()
    corpus_of(path, shard_bytes=125, held_out=0.0625)
    assert caplog.text == ""


@pytest.mark.parametrize("shard", [-1, 1])
def test_shard_that_does_not_exist_is_refused(tmp_path: Path, shard: int) -> None:
    """A wrong number, from wherever it comes, is an error and not another shard."""
    corpus = corpus_of(write(tmp_path / "a.txt", "line\n"), held_out=0.0)
    with pytest.raises(IndexError, match="not one of the corpus' 1"):
        corpus.documents(shard)


def test_importing_is_light() -> None:
    """No heavy library is imported before a kind needs it."""
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'}"
    code = f"import sys, producer.corpus, producer.corpus.rendering.windows; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Text


@given(LINES, ENDS, st.booleans(), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_line_of_text_is_in_exactly_one_shard(
    lines: list[str], end: str, ends_with_newline: bool, shard_bytes: int
) -> None:
    """Whatever the cuts, each shard holds whole lines, and the shards in order give the file back."""
    text = "start" + end + end.join(lines) + end * ends_with_newline
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.txt", text)
        shards = shards_of(corpus_of(path, shard_bytes=shard_bytes, held_out=0.0))
    assert "".join(part for shard in shards for part in shard) == text
    assert all(len(shard) <= 1 for shard in shards)
    parts = [shard[0] for shard in shards if shard]
    assert all(part.endswith("\n") for part in parts[:-1])


@given(LINES, st.integers(1, 60), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_shards_are_the_same_in_any_order_of_reading(lines: list[str], shard_bytes: int, random: Random) -> None:
    """A shard is a function of its number: neither earlier readings nor other corpus objects change it."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.txt", "start\n" + "\n".join(lines))
        corpus = corpus_of(path, shard_bytes=shard_bytes, held_out=0.0)
        again = corpus_of(path, shard_bytes=shard_bytes, held_out=0.0)
        once = shards_of(corpus)
        order = random.choices(range(corpus.shards), k=2 * corpus.shards)
        assert all(list(again.documents(shard)) == once[shard] for shard in order)


def test_shards_of_a_large_file_are_near_the_asked_size(tmp_path: Path) -> None:
    """Pieces are equal and at most a line longer than shard_bytes."""
    corpus = corpus_of(write(tmp_path / "a.txt", "123456789\n" * 1000), shard_bytes=3000)
    assert [sum(map(len, shard)) for shard in shards_of(corpus)] == [2500] * 4


def test_small_files_share_a_shard_and_stay_documents_of_their_own(tmp_path: Path) -> None:
    """Many small files do not become many small shards, and are not glued together."""
    paths = [write(tmp_path / f"{i}.txt", f"file {i}\n") for i in range(7)]  # 7 bytes each
    corpus = corpus_of(*paths, shard_bytes=21)
    assert [len(shard) for shard in shards_of(corpus)] == [3, 3, 1]
    assert texts_of(corpus) == [f"file {i}\n" for i in range(7)]


def test_file_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    """A corpus of one endless line has many shards, and no character is torn apart."""
    text = "a" + "€" * 1_000_000  # 3 MB; characters begin at bytes 1, 4, 7, …
    corpus = corpus_of(write(tmp_path / "a.txt", text), shard_bytes=500_000)
    parts = texts_of(corpus)
    assert "".join(parts) == text
    assert [len(part.encode()) for part in parts[:3]] == [428_572, 428_571, 428_571]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    """A file of an editor that marks UTF-8 begins with its first letter."""
    assert texts_of(corpus_of(write(tmp_path / "a.txt", b"\xef\xbb\xbfword\n"))) == ["word\n"]


def test_gz_file_is_one_document(tmp_path: Path) -> None:
    """A compressed file cannot be entered in the middle: it stays whole whatever the shard size."""
    paths = [write(tmp_path / name, "one\ntwo\n") for name in ("a.gz", "b.txt.gz")]
    assert shards_of(corpus_of(*paths, shard_bytes=2)) == [["one\ntwo\n"], ["one\ntwo\n"]]


def test_small_gz_files_share_a_shard_by_the_text_that_is_in_them(tmp_path: Path) -> None:
    """About three times their size on disk: of files of 25 bytes, taken for 75 of text, two fit into 175."""
    paths = [write(tmp_path / f"{i}.gz", "word\n") for i in range(5)]
    assert {path.stat().st_size for path in paths} == {25}
    corpus = corpus_of(*paths, shard_bytes=175)
    assert [len(shard) for shard in shards_of(corpus)] == [2, 2, 1]


# Finding files


def test_folder_is_read_at_any_depth_by_name_without_hidden_files(tmp_path: Path) -> None:
    """A folder gives its files in the order of their paths, at any depth."""
    for name in ("b.txt", "a/z.txt", ".hidden/x.txt", ".y.txt"):
        write(tmp_path / name, name)
    assert texts_of(corpus_of(tmp_path)) == ["a/z.txt", "b.txt"]


def test_glob_matches_at_any_depth_and_each_file_counts_once(tmp_path: Path) -> None:
    """`**` descends; a file that two entries name is read once, where the first one names it."""
    for name in ("b.txt", "a/z.txt", "a/z.md"):
        write(tmp_path / name, name)
    assert texts_of(corpus_of(tmp_path / "b.txt", tmp_path / "**" / "*.txt")) == ["b.txt", "a/z.txt"]


def test_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    """A file that exists under exactly that name is meant."""
    assert texts_of(corpus_of(write(tmp_path / "[a].txt", "text"))) == ["text"]


def test_folder_of_jsonl_ignores_other_files(tmp_path: Path) -> None:
    """A README beside the data does not stop a run."""
    write(tmp_path / "README.md", "no data")
    records(tmp_path / "a.jsonl", ["one"])
    records(tmp_path / "b.jsonl.gz", ["two"])
    assert texts_of(corpus_of(tmp_path, kind="jsonl")) == ["one", "two"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_linked_folders_are_read(tmp_path: Path, pattern: str) -> None:
    """Caches and data lakes are made of links; a link that leads back adds nothing."""
    write(tmp_path / "lake" / "deep" / "x.txt", "linked")
    write(tmp_path / "data" / "own" / "a.txt", "own")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "lake")
    (tmp_path / "data" / "own" / "back").symlink_to(tmp_path / "data")
    for name in "123":  # with three ways back, no search by names alone would end
        (tmp_path / "lake" / name).symlink_to(tmp_path / "lake")
    assert texts_of(corpus_of(tmp_path / "data" / pattern)) == ["linked", "own"]


@pytest.mark.parametrize(
    "pattern", ["**", "**/*.txt", "x/**", "*/**/h.txt", "**/x/**/*.txt", "x**/*.txt", "**/[[]q]/*", ".h/*", "./**/b.*"]
)
def test_patterns_match_what_glob_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """But for ways that lead back, `**` is the standard library's: through links, not into hidden folders."""
    for name in ("a.txt", "x/b.txt", ".h/d.txt", "x/.z/e.txt", "x/[q]/f.txt", "xx/g.md", "x/y/x/h.txt"):
        write(tmp_path / name, name)
    (tmp_path / "x" / "link").symlink_to(tmp_path / "xx")
    monkeypatch.chdir(tmp_path)
    expected = {Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file()}
    assert sorted(texts_of(corpus_of(pattern, held_out=0.0))) == sorted(path.read_text() for path in expected)


def test_a_folder_that_two_names_lead_to_is_read_once(tmp_path: Path) -> None:
    """Under its own name, whatever comes first in the alphabet."""
    write(tmp_path / "2024" / "x.txt", "text")
    (tmp_path / "0-newest").symlink_to("2024")
    corpus = corpus_of(tmp_path)
    assert texts_of(corpus) == ["text"]
    assert "2024/x.txt" in corpus.description


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link whose file is gone, as in a cache that was cleaned."""
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "blob")
    assert texts_of(corpus_of(tmp_path)) == ["text"]
    assert f"b.txt is left out of the corpus: it is a link to {tmp_path}/blob, which does not exist" in caplog.text


# Fingerprints


def test_fingerprint_does_not_depend_on_where_the_data_is_mounted(tmp_path: Path) -> None:
    """Two machines with the same files in different folders stream the same corpus; times do not count."""
    prints: list[str] = []
    for place in ("here", "there/deeper"):
        path = write(tmp_path / place / "data" / "a.txt", "text\n")
        os.utime(path, (len(prints), len(prints)))
        prints += [corpus_of(path.parent).fingerprint, corpus_of(path.parent / "*").fingerprint]
    assert len(set(prints)) == 1


@pytest.mark.parametrize("change", [{"column": "title"}, {"shard_bytes": 50}, {"held_out": 0.5}])
def test_fingerprint_changes_with_what_decides_the_documents(tmp_path: Path, change: dict[str, Any]) -> None:
    """The column and the shard size do; which shards are held out does not."""
    path = write(tmp_path / "a.jsonl", '{"text": "one", "title": "two"}\n')
    changed = corpus_of(path, kind="jsonl", **change).fingerprint != corpus_of(path, kind="jsonl").fingerprint
    assert changed == ("held_out" not in change)


@pytest.mark.parametrize("change", ["first byte", "last byte", "size", "name"])
def test_fingerprint_changes_with_the_files(tmp_path: Path, change: str) -> None:
    """Both ends of a file, its size and its name count."""
    data = bytearray(b"x" * 200_000)
    before = corpus_of(write(tmp_path / "a.txt", bytes(data))).fingerprint
    if change == "size":
        data[100_000:100_000] = b"x"
    elif change != "name":
        data[0 if change == "first byte" else -1] = ord("y")
    after = corpus_of(write(tmp_path / ("b.txt" if change == "name" else "a.txt"), bytes(data))).fingerprint
    assert after != before


# What is wrong with files


def test_all_missing_paths_are_told_in_one_go(tmp_path: Path) -> None:
    """Each path that leads nowhere is named with what to do."""
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "gone.txt", tmp_path / "*.csv", tmp_path / "empty")
    first, second, third = message.splitlines()
    assert first.startswith(f"corpus.paths holds '{tmp_path}/gone.txt', which does not exist; correct the path")
    assert f"(relative paths start at {Path.cwd()})" in first
    assert "*.csv', which matches no file; correct the pattern" in second
    assert "empty', a folder without files; name another folder, or files" in third


def test_folder_without_files_of_the_kind_says_which_endings_count(tmp_path: Path) -> None:
    """A folder of text is no folder of parquet."""
    pytest.importorskip("pyarrow")
    write(tmp_path / "a.txt", "text")
    assert "a folder without files that end in .parquet" in refusal(tmp_path, kind="parquet")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_empty_corpus_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    """Files without a single byte are no corpus."""
    assert refusal(write(tmp_path / name, ""), kind=kind).endswith("the files hold nothing; name files with text")


def test_blank_lines_are_no_corpus_of_jsonl(tmp_path: Path) -> None:
    """A jsonl file without records is empty."""
    assert "the files hold nothing" in refusal(write(tmp_path / "a.jsonl", "\n \r\n"), kind="jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Grüße\n".encode("latin-1"), "not UTF-8 at byte 2 (0xfc: invalid start byte); convert it (iconv -t UTF-8)"),
        (b"word \xe2\x82", "not UTF-8 at byte 5 (0xe2: unexpected end of data)"),
        ("word".encode("utf-16"), "not UTF-8 at byte 0 (0xff: invalid start byte)"),
        ("word".encode("utf-16-le"), "a zero byte at byte 1, so this is UTF-16 or no text; convert it to UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_wrong_encoding_is_told_at_the_start(tmp_path: Path, kind: str, data: bytes, message: str) -> None:
    """Each file's beginning is checked; the message names file, byte and remedy."""
    path = write(tmp_path / "a.txt", data)
    assert refusal(path, kind=kind).startswith(f"{path}: {message}")


def test_character_across_the_end_of_the_checked_part_is_no_fault(tmp_path: Path) -> None:
    """The check of the first 64 KiB does not mistake its own cut for a broken character."""
    text = "€" * 50_000  # 65,536 bytes are not a multiple of three
    assert texts_of(corpus_of(write(tmp_path / "a.txt", text))) == [text]


def test_wrong_encoding_further_in_names_the_byte_when_it_is_read(tmp_path: Path) -> None:
    """What the check at the start cannot see fails the one shard it is in, with file and byte."""
    path = write(tmp_path / "a.txt", b"0123456789\n" * 20_000 + b"\xff\n")
    corpus = corpus_of(path, shard_bytes=100_000)
    assert list(corpus.documents(0))
    with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 at byte 220,000 \(0xff"):
        list(corpus.documents(corpus.shards - 1))


def test_many_faults_are_counted_rather_than_listed(tmp_path: Path) -> None:
    """Ten faults are enough to see what is wrong."""
    for i in range(12):
        write(tmp_path / f"{i}.txt", b"\xff")
    lines = refusal(tmp_path).splitlines()
    assert (len(lines), lines[-1]) == (11, "and 2 more")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"text", mtime=0), "gzip data; end its name with .gz"),
        (b"\x28\xb5\x2f\xfd\x04\x58" + b"\xff" * 99, "zstd data; end its name with .zst"),
        (bz2.compress(b"text"), "bzip2 data, which is not read; unpack it (bunzip2)"),
        (lzma.compress(b"text"), "xz data, which is not read; unpack it (xz -d), or pack it with gzip"),
        (b"PK\x03\x04" + b"\0" * 60, "a zip archive, such as .npz files and those of torch.save; unpack it"),
        (b"PAR1" + b"\0" * 60, 'a parquet file; set corpus.kind = "parquet"'),
        (pickle.dumps(list(range(99))), "a pickle, which is never read; write plain text or numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl", "tokens"])
def test_contents_in_another_form_are_named(tmp_path: Path, kind: str, data: bytes, message: str) -> None:
    """iconv does not help with a packed file."""
    path = write(tmp_path / "a.data", data)
    assert refusal(path, kind=kind).startswith(f"{path}: {message}")


# Sizes


def test_a_line_may_be_as_long_as_the_setting_says_and_not_longer(tmp_path: Path) -> None:
    """The records before it arrive; the shard then fails with file, place, size and setting."""
    lines = [json.dumps({"text": "x" * size}) for size in (9, 86, 87)]  # 12 bytes are not text: 21, 98, 99
    path = write(tmp_path / "a.jsonl", "\r\n".join(lines))
    documents = corpus_of(path, kind="jsonl", max_document_bytes=98).documents(0)
    assert [len(next(documents)), len(next(documents))] == [9, 86]
    place = re.escape(
        f"{path}, line at byte 123: more than 98 bytes in one document, over corpus.max_document_bytes = 98"
    )
    with pytest.raises(CorpusError, match=f"^{place}; leave the line out, or raise the setting"):
        next(documents)
    assert len(texts_of(corpus_of(path, kind="jsonl", max_document_bytes=99))) == 3


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_packed_file_that_would_fill_the_memory(tmp_path: Path, kind: str) -> None:
    """65 kB of .gz hold 64 MB in one line: it is refused at the start, and no more than the limit is ever held."""
    start = {"text": b"", "jsonl": b'{"text": "'}[kind]
    path = write(tmp_path / "a.gz", start + b"x" * 64_000_000)
    tracemalloc.start()
    try:
        message = refusal(path, kind=kind, max_document_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than 1,000,000 bytes in one document, over corpus.max_document_bytes = 1000000" in message
    assert peak < 5_000_000


def test_a_packed_file_that_lies_about_its_size_fails_its_shard(tmp_path: Path) -> None:
    """The size at the end of a .gz file is its last part's only."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"x" * 5000) + gzip.compress(b"x"))
    corpus = corpus_of(path, max_document_bytes=4999)
    with pytest.raises(CorpusError, match=r"a\.gz: more than 4,999 bytes in one document"):
        texts_of(corpus)
    assert texts_of(corpus_of(path, max_document_bytes=5001)) == ["x" * 5001]


def test_a_row_that_is_too_long_fails_its_shard(tmp_path: Path) -> None:
    """Counted in bytes, as everywhere; the rows before it arrive."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["one", "ä" * 50, "ä" * 50 + "x"]}), tmp_path / "a.parquet")
    documents = corpus_of(tmp_path, kind="parquet", max_document_bytes=100).documents(0)
    assert [next(documents), next(documents)] == ["one", "ä" * 50]
    with pytest.raises(CorpusError, match=r"a\.parquet, row group 0, row 2: 101 bytes in one document"):
        next(documents)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_row_of_a_dataset_that_is_too_long_fails_its_shard(tmp_path: Path, cache: None, streaming: bool) -> None:
    """The message names dataset, split, shard and row."""
    records(tmp_path / "data" / "a.jsonl", ["one", "two", "x" * 101])
    folder = str(tmp_path / "data")
    documents = corpus_of(
        kind="huggingface", dataset=folder, streaming=streaming, held_out=0.0, max_document_bytes=100
    ).documents(0)
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(CorpusError, match=r"split 'train', shard 0, row 2: 101 bytes in one document"):
        next(documents)


def test_the_longest_document_decides_no_other(tmp_path: Path) -> None:
    """A run whose shard has failed goes on with a higher limit."""
    path = records(tmp_path / "a.jsonl", ["one"])
    assert len({corpus_of(path, kind="jsonl", max_document_bytes=size).fingerprint for size in (100, 200)}) == 1


def test_file_that_is_no_gzip_file_is_told_at_the_start(tmp_path: Path) -> None:
    """The name says .gz, the contents do not."""
    path = tmp_path / "a.gz"
    path.write_text("text\n")
    assert refusal(path).startswith(f"{path}: damaged gzip file (Not a gzipped file (b'te')); replace it")


def test_gzip_file_cut_short_is_told_when_it_is_read(tmp_path: Path) -> None:
    """Half a download fails its own shard with the file's name."""
    noise = np.random.default_rng(0).integers(97, 123, 300_000, dtype=np.uint8).tobytes()
    path = write(tmp_path / "a.gz", noise)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorpusError, match="damaged gzip file"):
        texts_of(corpus_of(path))


def test_file_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    """A growing log would move the borders of shards; it is told instead."""
    path = write(tmp_path / "a.txt", "line\n")
    corpus = corpus_of(path)
    write(path, "line\nline\n")
    with pytest.raises(CorpusError, match=r"10 bytes, but 5 when the corpus was opened; .* start a new run"):
        texts_of(corpus)


# jsonl


@given(LINES.filter(any), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans(), st.integers(1, 90))
@settings(max_examples=40, deadline=None)
def test_every_record_of_jsonl_is_in_exactly_one_shard(
    texts: list[str], end: str, ends_with_newline: bool, shard_bytes: int
) -> None:
    """Whatever the cuts, the shards in order give every document once."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", end.join(lines) + end * ends_with_newline)
        assert texts_of(corpus_of(path, kind="jsonl", shard_bytes=shard_bytes, held_out=0.0)) == texts


def test_jsonl_reads_the_named_column(tmp_path: Path) -> None:
    """One object a line, its text in `column`."""
    path = write(tmp_path / "a.jsonl", '{"text": 1, "body": "one"}\n{"body": "two"}')
    assert texts_of(corpus_of(path, kind="jsonl", column="body")) == ["one", "two"]


def test_jsonl_skips_blank_lines_marks_and_nulls(tmp_path: Path) -> None:
    """A byte order mark, blank lines and records without text are neither faults nor documents."""
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": null}\n\n  \r\n{"text": "one"}\n')
    assert texts_of(corpus_of(path, kind="jsonl")) == ["one"]


def test_half_a_character_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    r"""Dumps hold cut emoji such as "\ud83d", which no tokenizer takes; whole ones stay."""
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud83d b\ud83d\ude00"}')
    assert texts_of(corpus_of(path, kind="jsonl")) == ["a\ufffd b😀"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "one"', "line at byte 1: not JSON: Expecting ',' delimiter"),
        ('["one"]', "line at byte 1: a JSON list, expected an object; each line must be one whole JSON object"),
        (
            '{"text": "pi", "digits": ' + "3" * 5000 + "}",
            "line at byte 1: an integer of 5,000 digits at line 1 column 26",
        ),
        ('{"text": "one", "tree": ' + "[" * 5000, "line at byte 1: nested more than 500 deep"),
        ('{"txt": "one", "id": 3}', "corpus.column = 'text' is not there (did you mean txt?); there are txt, id"),
        ('{"text": [["one"]]}', "corpus.column = 'text' holds list; expected text; name another column"),
        ('{"text": [1, "one"]}', "corpus.column = 'text' holds a list of int, str; expected text"),
        ('{"text": [{"role": "user"}]}', 'holds messages; set corpus.kind = "chat", which renders them by the'),
        ('{"a": 1, "msg": [{"from": "human"}]}', 'there are a, msg; msg holds messages: set corpus.kind = "chat"'),
    ],
)
def test_wrong_jsonl_is_told_at_the_start(tmp_path: Path, line: str, expected: str) -> None:
    """Each file's first record is checked; the message says what is there and what is expected."""
    records(tmp_path / "a.jsonl", ["fine"])
    message = refusal(write(tmp_path / "b.jsonl", "\n" + line), tmp_path / "a.jsonl", kind="jsonl")
    assert message.startswith(f"{tmp_path}/b.jsonl, line at byte 1: ")
    assert expected in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_broken_record_further_in_names_file_and_byte(tmp_path: Path, name: str) -> None:
    """The documents before it arrive; then the shard fails with its place."""
    path = write(tmp_path / name, '{"text": "one"}\n{"text": \n')
    documents = corpus_of(path, kind="jsonl").documents(0)
    assert next(documents) == "one"
    with pytest.raises(CorpusError, match=rf"{name}, line at byte 16: not JSON"):
        next(documents)


# parquet


def test_parquet_row_group_is_a_shard(tmp_path: Path) -> None:
    """Row groups, file by file, are the shards; empty ones are none, and null is no document."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": range(5), "text": ["one", None, "three", "four", "fünf"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "c.parquet")
    corpus = corpus_of(tmp_path, kind="parquet")
    assert shards_of(corpus) == [["one"], ["three", "four"], ["fünf"], ["one"]]
    assert corpus.fingerprint != corpus_of(tmp_path / "a.parquet", kind="parquet").fingerprint


@pytest.mark.parametrize("make", ["large_string", "dictionary"])
def test_parquet_text_may_be_stored_in_any_way(tmp_path: Path, make: str) -> None:
    """Large strings and dictionary-encoded ones are text too."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.large_string() if make == "large_string" else pa.dictionary(pa.int32(), pa.string())
    pq.write_table(pa.table({"text": pa.array(["one", "two"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
    assert texts_of(corpus_of(tmp_path, kind="parquet")) == ["one", "two"]


def test_wrong_parquet_is_told_at_the_start(tmp_path: Path) -> None:
    """A missing column, a column of numbers, a file that is no parquet file, and one without rows."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"Text": ["one"], "id": [1]}), tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", "PAR1, or is it?")
    first, second = refusal(tmp_path, kind="parquet").splitlines()
    hint = "is not there (did you mean Text?); there are Text, id"
    assert first == f"{tmp_path}/a.parquet: corpus.column = 'text' {hint}"
    assert second.startswith(f"{tmp_path}/b.parquet: not a readable parquet file (")
    message = refusal(tmp_path / "a.parquet", kind="parquet", column="id")
    assert message.endswith("corpus.column = 'id' holds int64; expected text; name another column")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert "the parquet files hold no rows" in refusal(tmp_path / "c.parquet", kind="parquet")


@pytest.mark.parametrize(("kind", "module"), [("parquet", "pyarrow"), ("huggingface", "datasets")])
def test_missing_package_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    """Without the extra, the message is the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(tmp_path, kind=kind, dataset="any")
    assert message.startswith(f"corpus.kind = '{kind}' needs {module}, which cannot be imported")
    assert message.endswith('pip install "sluice-sae[hf]"')


# Token files


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_come_back_in_spans_of_whole_windows(tmp_path: Path, dtype: str) -> None:
    """Spans are multiples of the context near shard_bytes, as int64; files are never joined into one document."""
    first, second = np.arange(100, 130, dtype=dtype), np.array([7, 65_535], dtype=dtype)
    first.tofile(tmp_path / "a.bin")
    second.tofile(tmp_path / "b.bin")
    corpus = corpus_of(
        tmp_path, kind="tokens", token_dtype=dtype, context=4, shard_bytes=15 * first.itemsize, held_out=0.0
    )
    shards = shards_of(corpus)
    assert [[len(ids) for ids in shard] for shard in shards] == [[12], [18], [2]]
    documents = [ids for shard in shards for ids in shard]
    assert {ids.dtype for ids in documents} == {np.dtype(np.int64)}
    assert np.concatenate(documents).tolist() == [*first.tolist(), *second.tolist()]


def test_wrong_token_files_are_told_at_the_start(tmp_path: Path) -> None:
    """Half a number, the wrong width and compression are seen before any model is loaded."""
    write(tmp_path / "a.bin", b"\0\0\0")
    np.arange(64, dtype=np.uint32).tofile(tmp_path / "c.bin")
    write(tmp_path / "d.bin.gz", b"\0\0")
    first, second, third = refusal(tmp_path, kind="tokens").splitlines()
    assert first.endswith("a.bin: 3 bytes are no whole number of uint16; correct corpus.token_dtype")
    assert "c.bin: as uint16 the ids are 0, 0, 1, 0, … up to 63, where every second one is at most 0" in second
    assert second.endswith('as uint32 the ids are 0, 1, 2, 3, … up to 63; set corpus.token_dtype = "uint32"')
    assert third.endswith("d.bin.gz: token files are read in place and cannot be compressed; unpack it")


def test_files_with_headers_are_cut_into_windows_behind_the_header(tmp_path: Path) -> None:
    """Each file in its own format; what a header says beside the settings is part of the fingerprint."""
    ids = np.arange(100, 130)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    plain = corpus_of(tmp_path, kind="tokens", context=4, shard_bytes=30, held_out=0.0)
    prints = {plain.fingerprint}
    for dtype in ("<u2", "<i4", ">i8"):
        with open(tmp_path / "a.bin", "wb") as file:
            np.save(file, ids.astype(dtype).reshape(10, 3))
        corpus = corpus_of(tmp_path, kind="tokens", context=4, shard_bytes=15 * np.dtype(dtype).itemsize, held_out=0.0)
        assert [[len(ids) for ids in shard] for shard in shards_of(corpus)] == [[12], [18]]
        assert np.concatenate([ids for shard in shards_of(corpus) for ids in shard]).tolist() == ids.tolist()
        prints.add(corpus.fingerprint)
    assert len(prints) == 4


def test_runs_on_files_without_headers_can_be_resumed_by_later_versions(tmp_path: Path) -> None:
    """The fingerprint of plain token files is the one that every version has given them."""
    (np.arange(5000, dtype="<u2") % 977).tofile(tmp_path / "a.bin")
    corpus = corpus_of(tmp_path, kind="tokens", context=16, shard_bytes=999)
    assert (corpus.shards, corpus.fingerprint[:16]) == (11, "9d63c8e3c2cab38d")


# Hugging Face


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` leaves nothing in the home of who runs the tests."""
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset(tmp_path: Path, cache: None) -> str:
    """A local dataset of three jsonl files, five documents each."""
    for file in range(3):
        records(tmp_path / "data" / f"{file}.jsonl", [f"document {file} {i}" for i in range(5)])
    return str(tmp_path / "data")


DOCUMENTS = [f"document {file} {i}" for file in range(3) for i in range(5)]


def test_streamed_dataset_has_a_shard_per_file(dataset: str) -> None:
    """Streamed, each file that cannot be divided further is a shard."""
    corpus = corpus_of(kind="huggingface", dataset=dataset, held_out=0.0)
    assert shards_of(corpus) == [DOCUMENTS[:5], DOCUMENTS[5:10], DOCUMENTS[10:]]


def test_streamed_parquet_dataset_has_a_shard_per_row_group(tmp_path: Path, cache: None) -> None:
    """`datasets` that can divide parquet files do."""
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets.IterableDataset, "reshard"):
        pytest.skip("this version of datasets cannot reshard")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=6)
    corpus = corpus_of(kind="huggingface", dataset=str(tmp_path), held_out=0.0)
    assert shards_of(corpus) == [DOCUMENTS[:6], DOCUMENTS[6:12], DOCUMENTS[12:]]


def test_downloaded_dataset_has_shards_of_about_the_asked_size(dataset: str) -> None:
    """Downloaded, shards are runs of rows, and each row is in one."""
    corpus = corpus_of(kind="huggingface", dataset=dataset, streaming=False, shard_bytes=100)
    assert 2 <= corpus.shards <= 5
    assert texts_of(corpus) == DOCUMENTS
    again = corpus_of(kind="huggingface", dataset=dataset, streaming=False, shard_bytes=100)
    assert (again.shards, again.fingerprint) == (corpus.shards, corpus.fingerprint)


def test_fingerprint_of_a_local_dataset_follows_its_files(dataset: str) -> None:
    """Another document in the folder is another corpus."""
    before = corpus_of(kind="huggingface", dataset=dataset).fingerprint
    records(Path(dataset) / "0.jsonl", ["other"] * 5)
    assert corpus_of(kind="huggingface", dataset=dataset).fingerprint != before


@pytest.mark.parametrize("streaming", [True, False])
def test_wrong_dataset_settings_are_told_at_the_start(dataset: str, streaming: bool) -> None:
    """A wrong column, a column of numbers and a split that does not exist."""
    how: dict[str, Any] = {"kind": "huggingface", "dataset": dataset, "streaming": streaming}
    place = f"corpus.dataset = '{dataset}', split 'train': "
    hint = "is not there (did you mean text?); there are id, text"
    assert refusal(**how, column="txt") == f"{place}corpus.column = 'txt' {hint}"
    assert refusal(**how, column="id") == f"{place}corpus.column = 'id' holds int; expected text; name another column"
    message = refusal(**how, split="nowhere")
    assert message.startswith(f"corpus.dataset = '{dataset}', split 'nowhere' cannot be opened: ValueError: ")
    assert "check dataset, subset, split and revision" in message


def test_dataset_that_cannot_be_reached_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the dataset in the cache and without network, the message says what to check."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(kind="huggingface", dataset="sluice-tests/no-such-dataset")
    assert message.startswith("corpus.dataset = 'sluice-tests/no-such-dataset', split 'train' cannot be opened: ")
    assert message.endswith("the network, and HF_TOKEN if access is restricted")


# Synthetic activations


def synthetic_settings(context: int = 8, **truth: Any) -> CorpusSettings:
    truth = {"d_in": 16, "features": 32, "shards": 4, "shard_windows": 5} | truth
    return CorpusSettings(kind="synthetic", context=context, synthetic=SyntheticSettings(**truth))


def synthetic(context: int = 8, **truth: Any) -> SyntheticActivations:
    return SyntheticActivations(synthetic_settings(context, **truth))


def test_synthetic_shard_is_the_same_on_each_reading_and_unlike_others() -> None:
    """A shard's rows are a function of its number and the settings."""
    data = synthetic()
    rows = data.activations(2)
    assert (rows.shape, rows.dtype) == ((40, 16), np.float32)
    data.activations(1)
    assert np.array_equal(data.activations(2), rows)
    assert np.array_equal(synthetic().activations(2), rows)
    assert not np.allclose(data.activations(3), rows)
    assert synthetic().fingerprint == data.fingerprint != synthetic(features=31).fingerprint


def test_synthetic_directions_are_unit_rows() -> None:
    """The truth to be recovered has unit norm, as the rows of a decoder have."""
    directions = synthetic().directions
    assert directions.shape == (32, 16)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)


def test_synthetic_rows_are_sparse_sums_of_the_directions() -> None:
    """With fewer directions than dimensions, coefficients can be solved for: as many, as often, as large as asked."""
    data = synthetic(d_in=24, features=12, active=3.0, decay=0.9, shard_windows=400)
    coefficients = data.activations(0) @ np.linalg.pinv(data.directions)
    np.testing.assert_allclose(coefficients @ data.directions, data.activations(0), atol=1e-5)
    active = coefficients > 1e-4
    expected = 0.9 ** np.arange(12)
    np.testing.assert_allclose(active.mean(0), 3 * expected / expected.sum(), atol=0.04)
    assert abs(active.sum(1).mean() - 3) < 0.1
    assert coefficients.min() > -1e-4
    assert coefficients.max() < 1 + 1e-4
    assert abs(coefficients[active].mean() - 0.5) < 0.02


def test_correlated_features_come_together_and_are_as_many() -> None:
    """How much more often than by chance two features share a row follows the random correlation matrix."""
    data = synthetic(d_in=24, features=12, active=3.0, decay=0.9, shard_windows=8000, correlated=True)
    active = (data.activations(0) @ np.linalg.pinv(data.directions) > 1e-4).astype(float)
    rate = active.mean(0)
    lift = (active.T @ active / len(active) / np.outer(rate, rate))[np.triu_indices(12, 1)]
    assert data.loadings is not None
    expected_correlations = (data.loadings.T @ data.loadings)[np.triu_indices(12, 1)]
    assert np.corrcoef(lift, expected_correlations)[0, 1] > 0.9
    assert abs(active.sum(1).mean() - 3) < 0.1
    assert rate[0] > 2 * rate[-1]


@pytest.mark.parametrize(
    ("truth", "rows", "fingerprint"),
    [
        ({}, "a26fbd1c1691a3b9", "c63ed2f260954b19"),
        ({"decay": 0.9}, "4822643186f411f5", "9e4d7917c33689d7"),
        ({"naming": False}, "a26fbd1c1691a3b9", "c63ed2f260954b19"),
        ({"correlated": True}, "c920ef1de343e4bf", "52443320a1ee4e38"),
    ],
    ids=["equal", "decay", "written with naming", "correlated"],
)
def test_a_synthetic_run_can_be_resumed_by_later_versions(truth: dict[str, Any], rows: str, fingerprint: str) -> None:
    """The rows of a shard, and what a checkpoint compares, are what they were when the kind was written."""
    data = synthetic(**truth)
    assert hashlib.sha256(data.activations(2).tobytes()).hexdigest().startswith(rows)
    assert data.fingerprint.startswith(fingerprint)


def test_rows_without_an_active_feature_are_zero() -> None:
    """Few active features leave some rows empty; those are zero vectors in their own places."""
    data = synthetic(active=0.5)
    empty = (data.activations(0) == 0).all(1)
    assert (empty.sum(), len(empty)) == (27, 40)  # (1 - 0.5 / 32)^32 = 60 % on average


def test_named_activations_say_where_they_stand() -> None:
    """Each is its own name, so that a drill can check what was trained on."""
    settings = synthetic_settings(context=3, d_in=6, shard_windows=2)
    names = NamedActivations(settings).activations(1)
    assert (names.shape, names.dtype) == (SyntheticActivations(settings).activations(1).shape, np.float32)
    assert names.tolist() == [[1, window, position, 1, 0, 0] for window in range(2) for position in range(3)]


def test_synthetic_settings_that_contradict_each_other_are_refused() -> None:
    """What cannot be built is told at the start."""
    with pytest.raises(CorpusError, match=r"corpus.synthetic.active = 5 exceeds features = 4; lower active"):
        synthetic(features=4)
    with pytest.raises(IndexError, match="not one of the corpus' 4"):
        synthetic().activations(4)


def test_synthetic_data_is_no_corpus() -> None:
    """There are no documents to open."""
    with pytest.raises(CorpusError, match=r"corpus.kind = 'synthetic' has no documents; choose one of stdlib, text"):
        open_corpus(synthetic_settings())


def test_every_kind_of_the_settings_is_registered() -> None:
    """A kind that the settings accept can be opened, but for those without text and the one made of others."""
    kinds = get_args(CorpusSettings.model_fields["kind"].annotation)
    assert {*kinds} == {*KINDS, "activations", "synthetic", "mixture"}
