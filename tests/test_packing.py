"""Packing: each document in windows of its own, documents that share a window unseen by each other, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from producer.corpus.base import Conversation
from producer.corpus.rendering.windows import Windows, tokens_fingerprint, windows_of
from producer.lm.errors import ModelError
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings, SyntheticSettings
from producer.sources.opening import open_source
from producer.sources.synthetic import SyntheticSource
from tests.small_chats import MESSAGES, chat_tokenizer, write_chat_model
from tests.small_language_models import CONTEXT, WORDS, load, tiny
from tests.test_tokens import letters, marks, words_of

SHARING = ("gpt2", "llama", "gpt_neox", "gemma2", "gemma3_text", "qwen2", "qwen3", "opt")
REFUSED = ("mamba", "bert", "bloom")


def packing(packing: str, context: int = 4, **others: Any) -> CorpusSettings:
    return CorpusSettings(packing=packing, context=context, **others)  # type: ignore[arg-type]


TOKENIZER = letters("^", "$", "_", bos_token="^", eos_token="$", pad_token="_")


def test_each_document_has_windows_of_its_own() -> None:
    """Without separators; a long one goes on in the next window, each with BOS, and the last of each is padded."""
    windows = windows_of(["ab", "cdefg", "", "h"], TOKENIZER, packing("separate"))
    assert words_of(windows, TOKENIZER) == ["^ab_", "^cde", "^fg_", "^h__"]
    assert marks(windows.kept) == [".xx.", ".xxx", ".xx.", ".x.."]
    assert marks(windows.padded) == ["...x", "....", "...x", "..xx"]
    assert len(windows_of([""], TOKENIZER, packing("separate"))) == 0


def test_documents_that_share_a_window_stay_whole() -> None:
    """Each goes into the first window with room; positions begin anew with each, and padding counts on."""
    windows = windows_of(["ab", "cdefghi", "jkl", "m"], TOKENIZER, packing("separate_masked", 8))
    assert windows.positions is not None
    texts = [ids[~padded] for ids, padded in zip(windows.ids, windows.padded, strict=True)]
    assert ["".join(TOKENIZER.convert_ids_to_tokens(text)) for text in texts] == ["^ab^jkl", "^cdefghi", "^m"]
    assert windows.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [*range(8)], [*range(8)]]
    assert marks(windows.kept) == [".xx.xxx.", ".xxxxxxx", ".x......"]


def streamed(windows: Windows) -> list[tuple[int, int]]:
    """(id, position in the document) of all that is kept, sorted."""
    positions = (
        np.tile(np.arange(windows.ids.shape[1]), (len(windows), 1)) if windows.positions is None else windows.positions
    )
    return sorted(zip(windows.ids[windows.kept].tolist(), positions[windows.kept].tolist(), strict=True))


@pytest.mark.parametrize("positions", [[], ["2:"], ["not 1:3"], ["-3:"], ["0:8:2", "not :1"]])
def test_shared_windows_stream_what_separate_ones_do(positions: list[str]) -> None:
    """The same tokens at the same positions of their documents."""
    documents = ["abcdefghij"[: 1 + (7 * n) % 10] for n in range(300)]
    alone = windows_of(documents, TOKENIZER, packing("separate", 8, positions=positions))
    shared = windows_of(documents, TOKENIZER, packing("separate_masked", 8, positions=positions))
    assert streamed(alone) == streamed(shared)
    assert len(shared) < 0.8 * len(alone)
    assert (shared.kept & shared.padded).sum() == 0


@pytest.mark.parametrize("architecture", SHARING)
def test_activations_in_shared_windows_are_those_of_separate_windows(architecture: str, record_property: Any) -> None:
    """For each family of models, at all of its blocks, to the rounding of products of another size."""
    model = load(tiny(architecture), *(f"blocks.{layer}.hook_resid_post" for layer in range(3)))
    model.check_shared_windows(CONTEXT)
    random = np.random.default_rng(0)
    documents = [random.integers(4, WORDS, length) for length in (3, 30, 1, 5, 4, 11, 2, 2, 9)]
    alone, shared = (
        windows_of(documents, model.tokenizer, packing(kind, CONTEXT)) for kind in ("separate", "separate_masked")
    )
    assert shared.positions is not None and len(shared) < len(alone)
    ids = torch.from_numpy
    x = model.activations(ids(alone.ids))
    y = model.activations(ids(shared.ids), ids(shared.padded), ids(shared.positions))
    rows, columns = np.nonzero(~shared.padded)
    begins = np.flatnonzero(shared.positions[rows, columns] == 0)
    pieces = [tuple(shared.ids[rows[part], columns[part]]) for part in np.split(np.arange(len(rows)), begins[1:])]
    places = dict(zip(pieces, np.split(np.stack([rows, columns], 1), begins[1:]), strict=True))
    largest = 0.0
    for window in range(len(alone)):
        length = int((~alone.padded[window]).sum())
        row, column = places[tuple(alone.ids[window, :length])][0]
        for one, other in zip(x, y, strict=True):
            difference = (one[window, :length] - other[row, column : column + length]).abs().max()
            largest = max(largest, (difference / one.square().mean().sqrt()).item())
    unaware = model.activations(ids(shared.ids))
    assert max((one - other).abs().max().item() for one, other in zip(y, unaware, strict=True)) > 0.01
    print(f"{architecture}: {model.network.packed_attention}, largest difference {largest:.2g} of the rms")
    assert largest < 1e-4


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_cannot_keep_documents_apart_are_refused(architecture: str) -> None:
    """With the setting that gives the same activations; what a model can is measured, not read from its name."""
    model = load(tiny(architecture), "blocks.1.hook_resid_post")
    with pytest.raises(ModelError, match=r'corpus.packing = "separate_masked": .* set corpus.packing = "separate"'):
        model.check_shared_windows(CONTEXT)


# Positions


@pytest.mark.parametrize(
    ("positions", "streamed"),
    [
        ([], "xxxxxxxx"), (["3:"], "...xxxxx"), ([":-2"], "xxxxxx.."), (["0:8:3"], "x..x..x."),
        (["not 2:4"], "xx..xxxx"), (["0:2", "5:6"], "xx...x.."), (["2:", "not 4:5"], "..xx.xxx"),
    ],
)  # fmt: skip
def test_ranges_of_positions(positions: list[str], streamed: str) -> None:
    """Slices of Python, kept or left out, in order."""
    settings = CorpusSettings(context=8, positions=positions)
    assert "".join(".x"[one] for one in settings.streamed_positions) == streamed
    windows = windows_of(["abcdefgh"], TOKENIZER, CorpusSettings(context=8, positions=positions, prepend_bos=False))
    assert marks(windows.kept) == [streamed]


def test_a_synthetic_corpus_has_positions_too() -> None:
    synthetic = SyntheticSettings(d_in=4, features=8, shards=2, shard_windows=3)
    settings = ProducerSettings(
        corpus=CorpusSettings(kind="synthetic", synthetic=synthetic, context=4, positions=["1:3"])
    )
    source = SyntheticSource(settings)
    assert marks(source.windows(0).kept) == [".xx."] * 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positions": ["9:"], "context": 8}, r'positions = \["9:"\] leaves none of the 8 positions of a window'),
        ({"positions": ["3"]}, 'is no range of positions; expected a slice, such as "8:", "0:64:2" or "not 0:8"'),
        ({"positions": ["-:"]}, "is no range of positions"),
        ({"positions": ["1:2:0"]}, "is no range of positions"),
        ({"packing": "mask"}, "'pack', 'separate' or 'separate_masked'"),
        (
            {"packing": "separate", "kind": "synthetic", "synthetic": SyntheticSettings(d_in=4, features=8)},
            'corpus.packing = "separate" is of documents, and corpus.kind "synthetic" has none',
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CorpusSettings(**settings)


def test_fingerprint_knows_packing_and_positions() -> None:
    """And is what it was where neither is set."""
    kinds = [{}, {"packing": "separate"}, {"packing": "separate_masked"}, {"positions": ["1:"]}, {"positions": ["2:"]}]
    assert len({tokens_fingerprint(TOKENIZER, CorpusSettings(**kind)) for kind in kinds}) == len(kinds)  # type: ignore[arg-type]


def test_a_source_runs_shared_windows(tmp_path: Any) -> None:
    """As a producer opens it; a context of which BOS leaves less than three documents is refused."""
    write_chat_model(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "four"}\n')
    settings = ProducerSettings(
        model=ModelSettings(
            name=str(tmp_path / "model"), hooks=["blocks.0.hook_resid_post"], device="cpu", dtype="float32"
        ),
        corpus=packing("separate_masked", 16, kind="jsonl", paths=[str(tmp_path / "a.jsonl")]),
    )
    source = open_source(settings)
    windows = source.windows(0)
    assert words_of(windows, chat_tokenizer())[0].startswith("<s>one<s>four")
    assert source.activations(0, windows, np.array([0]))[0].shape == (1, 16, 8)


# What is left out, and why


@pytest.mark.parametrize("kind", ["separate", "separate_masked"])
def test_what_is_not_streamed_is_counted_by_reason(kind: str) -> None:
    """Documents apart, with BOS; a document's EOS is special, and positions begin at 2."""
    windows = windows_of(["ab$c", "de"], TOKENIZER, packing(kind, 8, positions=["2:"]))
    text = {"bos": 2, "special": 1, "position": 2}
    padding = {"padding": 8} if kind == "separate" else {}
    assert windows.exclusions(0, len(windows)) == text | padding
    assert sum(windows.exclusions(0, len(windows)).values()) == (~windows.kept).sum()


def test_the_roles_that_are_left_out_are_counted() -> None:
    """Of a chat, what the user says and the markers around it; each window has a BOS."""
    settings = CorpusSettings(kind="chat", dataset="x", context=16, roles=["assistant"])
    windows = windows_of([Conversation("here", MESSAGES)], chat_tokenizer(), settings)
    counts = windows.exclusions(0, len(windows))
    assert counts["bos"] == len(windows) and counts["role"] > counts["special"] > 0
    assert sum(counts.values()) + windows.kept.sum() == windows.kept.size
    assert windows.exclusions(0, 1)["bos"] == 1
