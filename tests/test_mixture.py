"""Mixtures of corpora: exact shares, shards that go on from epoch to epoch, and evaluation corpus by corpus."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.evaluation.evaluator import Baseline, evaluate
from producer.common.run_file import read_run_file, show_settings
from producer.common.toml import SettingsError
from producer.corpus import CorpusError, Text, open_text
from producer.corpus.held_out import held_out_text
from producer.corpus.mixture import shards_in_epoch
from producer.corpus.rendering.windows import windows_of
from producer.lm.loading import load_language_model
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings
from producer.wire import CorpusShare, WireError, decode, encode
from tests.small_chats import chat_tokenizer, write_chat_model
from tests.small_run import identity_sae, ledger_through_json, publish_snapshot
from tests.small_stream import hello_of, named_source, new_ledger, stream_settings
from trainer.saes.inference import load_sae
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.resume import ledger_state, restore_ledger
from trainer.stream.ledger.shards import corpus_of, epoch_order

TOKENIZER = chat_tokenizer()


def write_lines(path: Path, letter: str, lines: int) -> Path:
    """Lines of ten bytes."""
    path.write_text(f"{letter * 9}\n" * lines)
    return path


def tables(folder: Path, *sizes: tuple[str, int, float]) -> list[dict[str, Any]]:
    """[[corpus]] tables of (letter, lines, weight): shards of two lines, 20 bytes."""
    return [
        {
            "name": letter, "kind": "text", "paths": [str(write_lines(folder / f"{letter}.txt", letter, lines))],
            "weight": weight, "shard_bytes": 20, "held_out": 0.0,
        }
        for letter, lines, weight in sizes
    ]  # fmt: skip


def mixture(parts: list[dict[str, Any]], **shared: Any) -> CorpusSettings:
    """Settings as the tables of a run file give them."""
    parts[0] |= {"context": 16} | shared
    return CorpusSettings.model_validate(parts)


def letters_of(text: Text, shard: int, epoch: int) -> str:
    """The first letter of each document of a shard."""
    windows = text.windows(shard, epoch, TOKENIZER)
    return TOKENIZER.decode(windows.ids[0, 1:2])


# Which shard is read


def test_an_epoch_reads_each_corpus_at_least_once_in_the_ratio_of_the_weights(tmp_path: Path) -> None:
    """a has 12 shards and weight 3; b and c, of 4 and 2, have weight 1: 12 shards of a, so 4 of b, and 4 of c."""
    text = open_text(mixture(tables(tmp_path, ("a", 24, 3), ("b", 8, 1), ("c", 4, 1))))
    assert [(share.name, share.shards) for share in text.shares] == [("a", 12), ("b", 4), ("c", 4)]
    read = Counter(letters_of(text, shard, 0) for shard in range(text.shards))
    assert read == {"a": 12, "b": 4, "c": 4}


def test_weights_are_shares_of_text_and_not_of_shards(tmp_path: Path) -> None:
    """Shards of b are half as large: equal weights give it twice as many."""
    parts = tables(tmp_path, ("a", 24, 1), ("b", 8, 1))
    parts[1]["shard_bytes"] = 10
    assert [share.shards for share in open_text(mixture(parts)).shares] == [12, 24]


def test_a_corpus_goes_on_in_the_next_epoch_where_it_was(tmp_path: Path) -> None:
    """Five shards, of which an epoch reads seven: after five epochs each was read seven times, and never two apart."""
    assert shards_in_epoch([8, 5], [8 / 7, 1.0]) == [8, 7]
    text = open_text(mixture(tables(tmp_path, ("a", 16, 8), ("b", 10, 7))))
    read = Counter(text.find(shard, epoch)[1] for epoch in range(5) for shard in range(8, 15))
    assert read == dict.fromkeys(range(5), 7)
    for epochs in range(1, 5):
        counts = Counter(text.find(shard, epoch)[1] for epoch in range(epochs) for shard in range(8, 15))
        assert max(counts.values()) - min(counts[number] for number in range(5)) <= 1


def test_a_shard_is_that_of_the_corpus_alone(tmp_path: Path) -> None:
    """Windows of a mixture are those that each corpus gives alone, with its own settings."""
    parts = tables(tmp_path, ("a", 24, 3), ("b", 8, 1))
    parts[1] |= {"packing": "separate", "prepend_bos": False}
    text = open_text(mixture(parts))
    assert text.common("prepend_bos") is None
    for number in range(text.shards):
        part, shard = text.find(number, 0)
        alone = windows_of(part.corpus.documents(shard), TOKENIZER, part.settings)
        assert np.array_equal(text.windows(number, 0, TOKENIZER).ids, alone.ids)
    with pytest.raises(IndexError, match="not one of the corpus' 16"):
        text.windows(16, 0, TOKENIZER)


def test_what_a_corpus_holds_out_has_no_number(tmp_path: Path) -> None:
    """Each corpus holds out its own fraction, in every epoch."""
    parts = tables(tmp_path, ("a", 24, 1), ("b", 24, 1))
    parts[0]["held_out"], parts[1]["held_out"] = 0.25, 0.5
    text = open_text(mixture(parts))
    assert text.held_out == 0.0
    read = {(part.name, shard) for n in range(text.shards) for e in range(3) for part, shard in [text.find(n, e)]}
    held_out = {(part.name, shard) for part in text.parts for shard in part.corpus.held_out_shards}
    assert (len(held_out), len(read), read & held_out) == (3 + 6, 9 + 6, set())


@pytest.mark.parametrize("change", ["weight", "held_out", "shard_bytes", "name"])
def test_the_fingerprint_is_of_what_decides_the_shards(tmp_path: Path, change: str) -> None:
    """Weights, held-out text and each corpus count; names do not."""
    parts = tables(tmp_path, ("a", 24, 1), ("b", 24, 1))
    before = open_text(mixture([dict(part) for part in parts])).fingerprint
    parts[1][change] = {"weight": 3.0, "held_out": 0.5, "shard_bytes": 40, "name": "other"}[change]
    assert (open_text(mixture(parts)).fingerprint == before) == (change == "name")


# The run file

RUN = """
[model]
name = "gpt2"
hooks = ["blocks.0.hook_resid_post"]
"""


def settings_of(folder: Path, *parts: str, overrides: tuple[str, ...] = ()) -> CorpusSettings:
    path = folder / "run.toml"
    path.write_text(RUN + "".join(f"[[corpus]]\n{part}\n" for part in parts))
    return read_run_file(ProducerSettings, path, list(overrides)).corpus


WEB, CHAT = (
    'kind = "text"\npaths = ["a.txt"]',
    'name = "chat"\nkind = "chat"\npaths = ["b.jsonl"]\nroles = ["assistant"]',
)


def test_tables_of_corpora_are_a_mixture(tmp_path: Path) -> None:
    """What they share is said once, overrides go by name, and resolved settings read back equal."""
    corpus = settings_of(tmp_path, WEB + "\ncontext = 64", CHAT, overrides=("corpus.chat.weight=0.5",))
    assert (corpus.kind, corpus.context, corpus.held_out) == ("mixture", 64, 0.0)
    assert [(part.label, part.weight, part.context) for part in corpus.texts] == [("text", None, 64), ("chat", 0.5, 64)]
    settings = ProducerSettings(model=ModelSettings(name="gpt2", hooks=["a"]), corpus=corpus)
    resolved = tmp_path / "settings.toml"
    resolved.write_text(show_settings(settings))
    assert read_run_file(ProducerSettings, resolved, []).corpus == corpus


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((WEB, WEB), 'two [[corpus]] are named "text"; give each a name of its own'),
        ((WEB + "\nepochs = 2", CHAT + "\nepochs = 3"), "corpus.epochs is 2 in one [[corpus]] and 3 in another"),
        (
            (WEB, 'kind = "synthetic"\nsynthetic = {d_in = 4, features = 4}'),
            'a corpus of a mixture has kind = "synthetic"; each must be a text',
        ),
        ((WEB + "\nweight = 0",), "corpus.mixture.0.weight = 0: expected a number above 0. Share of the text"),
        ((WEB + '\nname = "a b"',), 'corpus.mixture.0.name = "a b" is no name; expected letters, digits'),
        ((WEB, "colunm = 1"), "corpus.mixture.1.colunm = 1: no such key (did you mean column?)"),
    ],
)
def test_faults_of_a_mixture_are_told(tmp_path: Path, parts: tuple[str, ...], message: str) -> None:
    """Name, value and what to do."""
    with pytest.raises(SettingsError) as error:
        settings_of(tmp_path, *parts)
    assert message in str(error.value)


def test_a_fault_names_its_corpus(tmp_path: Path) -> None:
    """Files that are missing, and shards that cannot be read later."""
    parts = tables(tmp_path, ("a", 4, 1), ("b", 4, 1))
    parts[1]["paths"] = ["gone.txt"]
    with pytest.raises(CorpusError, match=r"^\[\[corpus\]\] b: corpus.paths holds 'gone.txt'"):
        open_text(mixture(parts))
    text = open_text(mixture(tables(tmp_path, ("a", 4, 1), ("b", 4, 1))))
    (tmp_path / "b.txt").write_text("shorter")
    with pytest.raises(CorpusError, match=r"^\[\[corpus\]\] b: .*b.txt: 7 bytes, but 40 when the corpus was opened"):
        text.windows(2, 0, TOKENIZER)


# The trainer


def corpora(**counts: int) -> list[CorpusShare]:
    return [CorpusShare(name=name, shards=count) for name, count in counts.items()]


def test_every_part_of_an_epoch_has_the_shares() -> None:
    """Of 60, 30 and 10 shards, each tenth of the epoch has 6, 3 and 1, give or take one; all of them come once."""
    hello = hello_of(named_source(100), corpora=corpora(a=60, b=30, c=10))
    orders = [epoch_order(hello, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(100))
        for part in np.split(order, 10):
            counts = Counter(corpus_of(hello, int(shard)) for shard in part)
            assert all(abs(counts[name] - expected) <= 1 for name, expected in (("a", 6), ("b", 3), ("c", 1)))
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(epoch_order(hello, 0, 1), orders[1])


def test_corpora_must_have_all_shards_of_a_hello() -> None:
    """A HELLO whose corpora do not add up is no message."""
    hello = hello_of(named_source(6), corpora=corpora(a=2, b=4))
    assert decode(encode(hello)) == hello
    wrong = hello.model_copy(update={"shards": 7})
    with pytest.raises(WireError, match="its corpora have 6 shards of 7"):
        decode(encode(wrong))


def test_trained_tokens_are_counted_by_corpus_and_kept_in_the_checkpoint() -> None:
    """One shard of each is open when the run is restored."""
    ledger = new_ledger(stream_settings("ipc://unused"))
    hello = hello_of(named_source(2), corpora=corpora(a=1, b=1))
    ledger.hello(hello, now=0.0)
    shards = [ledger.shards.open_next(), ledger.shards.open_next()]
    for shard in shards:
        assert shard is not None
        bits = np.ones(shard.shard + 1, bool)
        shard.reach(len(bits))
        shard.receive(0, bits, ~bits)
        ledger.tokens_received += len(bits)
        ledger.mark_trained(np.full(len(bits), shard.serial), np.arange(len(bits)))
    assert ledger.shards.tokens_by_corpus == {"a": 1, "b": 2}
    books, bits_by_serial = ledger_state(ledger)
    restored: Ledger = new_ledger(stream_settings("ipc://unused"))
    restore_ledger(restored, ledger_through_json(books), bits_by_serial)
    assert restored.shards.tokens_by_corpus == {"a": 1, "b": 2}
    assert {shard.shard: shard.corpus for shard in restored.shards.open.values()} == {0: "a", 1: "b"}


# The evaluation


def test_each_corpus_is_evaluated_by_itself(tmp_path: Path) -> None:
    """Half of the tokens of each; what is measured of both together is their mean."""
    parts = tables(tmp_path, ("a", 40, 1), ("b", 40, 1))
    for part in parts:
        part["held_out"] = 0.25
    text = open_text(mixture(parts))
    model = load_language_model(
        ModelSettings(name=str(write_chat_model(tmp_path / "model")), hooks=["blocks.0.hook_resid_post"], device="cpu"),
        whole=True,
    )
    held_out = held_out_text(text, model.tokenizer, 40)
    ranges = {name: (part.start, part.stop) for name, part in held_out.corpora.items()}
    assert list(ranges) == ["a", "b"] and ranges["b"] == (ranges["a"][1], len(held_out.windows))
    folder = publish_snapshot(tmp_path, 1, [identity_sae("sae", d_in=8, gain=0.5)])
    (result,) = evaluate(
        model, held_out.windows, [load_sae(folder / "sae")], Baseline(), corpora=held_out.corpora
    ).values()
    whole, l0 = result.values["ce_delta"], result.values["l0"]
    by_corpus: Any = result.values["ce_delta_by_corpus"]
    assert isinstance(whole, float) and set(by_corpus) == {"a", "b"}
    kept = [int(held_out.windows.kept[part].sum()) for part in held_out.corpora.values()]
    assert kept[0] == kept[1]
    assert np.mean(list(by_corpus.values())) == pytest.approx(whole, rel=1e-6)
    assert np.mean(list(result.values["l0_by_corpus"].values())) == pytest.approx(l0)  # type: ignore[union-attr]
    assert all(value > 0 for value in result.values["fvu_by_corpus"].values())  # type: ignore[union-attr]
    assert json.loads(json.dumps(result.as_json()))["fvu_by_corpus"].keys() == {"a", "b"}
