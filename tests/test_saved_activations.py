"""Activations that others saved: safetensors files and folders of `datasets`, row for row as they were written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from producer.corpus import CorpusError
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings
from producer.sources.base import fingerprint
from producer.sources.norms import norm_bounds
from producer.sources.opening import open_source
from producer.sources.saved import SavedSource
from tests.small_stream import Producing, stream_settings, trainer

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CONTEXT = 4


def numbers(*shape: int) -> torch.Tensor:
    """0, 1, 2, … as float32."""
    return torch.arange(float(np.prod(shape))).view(shape)


def source_of(*paths: Path, hooks: list[str] = HOOKS[:1], **corpus: Any) -> SavedSource:
    settings = ProducerSettings(
        model=ModelSettings(name="gpt2", hooks=hooks),
        corpus=CorpusSettings(
            kind="activations", paths=[str(path) for path in paths],
            **({"context": CONTEXT, "held_out": 0.0, "outlier_factor": 0.0} | corpus),
        ),
    )  # fmt: skip
    source = open_source(settings)
    assert isinstance(source, SavedSource)
    return source


def all_rows(source: SavedSource, hook: int = 0) -> torch.Tensor:
    """The streamed activations of every shard, in order."""
    parts = []
    for shard in range(source.shards):
        windows = source.windows(shard)
        x = source.activations(shard, windows, np.arange(len(windows)))[hook]
        parts.append(x[torch.from_numpy(windows.kept)])
    return torch.cat(parts)


def write_dataset(folder: Path, x: dict[str, torch.Tensor], files: int = 2) -> Path:
    """A folder as SAELens' CacheActivationsRunner writes it: Array2D columns and token ids."""
    datasets = pytest.importorskip("datasets")
    first = next(iter(x.values()))
    features = {name: datasets.Array2D(shape=tuple(value.shape[1:]), dtype="float32") for name, value in x.items()}
    features["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=first.shape[1])
    columns: dict[str, Any] = {name: value.numpy() for name, value in x.items()}
    columns["token_ids"] = np.zeros(first.shape[:2], np.int32)
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(str(folder), num_shards=files)
    return folder


# What is read


def test_windows_of_a_file_come_back_as_they_are(tmp_path: Path) -> None:
    """Ten windows in shards of three, two hooks of different width, any windows of a shard."""
    x = {HOOKS[0]: numbers(10, CONTEXT, 3), HOOKS[1]: -numbers(10, CONTEXT, 2).bfloat16()}
    save_file(x, tmp_path / "a.safetensors")
    source = source_of(tmp_path, hooks=HOOKS, shard_bytes=3 * CONTEXT * 4)
    assert (source.shards, [len(source.windows(shard)) for shard in range(4)]) == (4, [3, 3, 3, 1])
    for hook, name in enumerate(HOOKS):
        assert torch.equal(all_rows(source, hook), x[name].float().view(40, -1))
    first, second = source.activations(1, source.windows(1), np.array([0, 2]))
    assert torch.equal(first, x[HOOKS[0]][[3, 5]]) and torch.equal(second, x[HOOKS[1]][[3, 5]].float())


def test_rows_without_windows_are_cut_into_windows(tmp_path: Path) -> None:
    """Ten rows in windows of four: the last one is padded, and its padding never streamed."""
    save_file({HOOKS[0]: numbers(10, 3).half()}, tmp_path / "a.safetensors")
    source = source_of(tmp_path)
    assert source.windows(0).padded.sum() == 2
    assert torch.equal(all_rows(source), numbers(10, 3))
    assert len(all_rows(source_of(tmp_path, positions=["1:"]))) == 7  # without the first of each window


def test_a_dataset_of_saelens_gives_the_same_as_safetensors(tmp_path: Path) -> None:
    """The same windows by both kinds of file, to the bit, in the same shards."""
    x = {name: torch.randn(11, CONTEXT, 3, generator=torch.Generator().manual_seed(0)) for name in HOOKS}
    dataset = source_of(write_dataset(tmp_path / "cached", x, files=1), hooks=HOOKS, shard_bytes=64)
    save_file(x, tmp_path / "a.safetensors")
    tensors = source_of(tmp_path / "a.safetensors", hooks=HOOKS, shard_bytes=64)
    assert dataset.shards == tensors.shards == 3
    for hook in range(2):
        assert torch.equal(all_rows(dataset, hook), all_rows(tensors, hook))
    several = source_of(write_dataset(tmp_path / "several", x, files=3), hooks=HOOKS)
    assert several.shards == 3 and torch.equal(all_rows(several), all_rows(tensors))


def test_outliers_of_saved_activations_are_dropped_by_their_norm(tmp_path: Path) -> None:
    """The bound is that of any source: a factor of the median norm of the first ones."""
    x = torch.ones(10, CONTEXT, 4)
    x[3, 0] *= 100
    save_file({HOOKS[0]: x}, tmp_path / "a.safetensors")
    source = source_of(tmp_path)
    assert norm_bounds(source, range(source.shards), 10.0) == [20.0]


def test_saved_activations_are_streamed_like_any(tmp_path: Path) -> None:
    """Through the real link and intake, each of them once."""
    save_file({HOOKS[0]: numbers(10, CONTEXT, 4)}, tmp_path / "a.safetensors")
    source = source_of(tmp_path, shard_bytes=3 * CONTEXT * 4)
    source.batch_windows = 2
    settings = stream_settings(f"ipc://{tmp_path}/s")
    with trainer(settings) as intake:
        producer = Producing(settings, source)
        received = []
        stop = threading.Event()
        while (batch := intake.take(8, stop)) is not None:
            intake.mark_trained(batch)
            received.append(batch.x[0].clone())
        intake.drain(finished=True)
        assert producer.wait_for_end() is None
    rows = torch.cat(received)
    assert torch.equal(rows[rows[:, 0].argsort()], numbers(40, 4))


@pytest.mark.parametrize("change", ["data", "hooks", "shard_bytes"])
def test_the_fingerprint_is_of_files_and_hooks(tmp_path: Path, change: str) -> None:
    """Producers of other activations are not let in."""
    x = {name: numbers(10, CONTEXT, 3) for name in HOOKS}
    save_file(x, tmp_path / "a.safetensors")
    before = fingerprint(source_of(tmp_path).facts)
    if change == "data":
        save_file({name: value + 1 for name, value in x.items()}, tmp_path / "a.safetensors")
    changes: dict[str, Any] = {"hooks": {"hooks": HOOKS[1:]}, "shard_bytes": {"shard_bytes": 64}}.get(change, {})
    assert fingerprint(source_of(tmp_path, **changes).facts) != before


# What is wrong with files


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.9": numbers(2, 4, 3)}, "model.hooks = 'blocks.0.hook_resid_post' is not there; there are blocks.9"),
        ({HOOKS[0]: numbers(2, 8, 3)}, "has windows of 8; set corpus.context = 8"),
        ({HOOKS[0]: numbers(8)}, r"has the shape \[8\]; expected \[rows, width\] or \[windows, context, width\]"),
        ({HOOKS[0]: numbers(8, 3).long()}, "holds I64; expected F16, BF16, F32, F64"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    """At the start, with its name, what it holds and what to set."""
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CorpusError, match=f"a.safetensors: .*{message}"):
        source_of(tmp_path)


def test_hooks_must_have_the_same_activations(tmp_path: Path) -> None:
    """A token has one activation at each hook."""
    save_file({HOOKS[0]: numbers(8, 3), HOOKS[1]: numbers(7, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(CorpusError, match="different numbers of activations"):
        source_of(tmp_path, hooks=HOOKS)


def test_damaged_files_are_told_at_once(tmp_path: Path) -> None:
    """All of them, each with its kind; and one that is cut short during the run fails its shard."""
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (tmp_path / "b.arrow").write_bytes(b"nonsense")
    with pytest.raises(CorpusError) as error:
        source_of(tmp_path)
    assert "a.safetensors: damaged safetensors file" in str(error.value)
    assert "b.arrow: damaged Arrow file" in str(error.value)
    path = tmp_path / "whole" / "a.safetensors"
    path.parent.mkdir()
    save_file({HOOKS[0]: numbers(8, 3)}, path)
    source = source_of(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorpusError, match=r"bytes, but .* when the corpus was opened; restore it"):
        source.activations(0, source.windows(0), np.array([0]))
