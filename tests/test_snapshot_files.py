"""The files of an SAE in a snapshot: written by any number of ranks, a few latents at a time, and tested."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.small_ranks import SIZES, SmallRanks
from tests.small_run import small_checkpoint
from tests.small_saes import D_IN, FAMILY, UNSCALED, hook_widths, rows_of
from trainer.parallel.ranks import Ranks
from trainer.saes import selftest
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import load_sae
from trainer.saes.selftest import check
from trainer.saes.settings import SaeSettings
from trainer.saes.writing import SIZE_LIMITS, SaeFiles, SizeLimits
from trainer.settings import OptimizerSettings
from trainer.snapshot import SPARSITY, WEIGHTS, SnapshotError, new_snapshot, read_manifest, verify
from trainer.state.format import LatentRange
from trainer.state.tensor_file import PAGE_BYTES, TensorFile, TensorFileError, create
from trainer.training.sae_trainer import SaeTrainer

D_SAE, BLOCKS = 37, 8
KINDS = ["topk", "topk abs", "batchtopk", "jumprelu", "topk skip transcoder", "topk crosscoder", "gated"]


@pytest.fixture(scope="module")
def small_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRanks]:
    with SmallRanks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


# The file


def test_parts_written_in_any_order_are_one_file(tmp_path: Path) -> None:
    """Rows and columns of two writers at once; any reader of safetensors finds the two matrices, data on a page."""
    path = tmp_path / "file"
    create(path, {"rows": (4, 3), "columns": (2, 5)})
    rows, columns = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(10, dtype=np.float32).reshape(2, 5)
    with TensorFile(path, "write") as one, TensorFile(path, "write") as other:
        one.write_rows("rows", 2, rows[2:])
        other.write_columns("columns", 3, columns[:, 3:])
        other.write_rows("rows", 0, rows[:2])
        one.write_columns("columns", 0, columns[:, :3])

    assert path.stat().st_size == PAGE_BYTES + 4 * (12 + 10)
    content = load_file(path)
    np.testing.assert_array_equal(content["rows"], rows)
    np.testing.assert_array_equal(content["columns"], columns)
    with TensorFile(path) as file:
        np.testing.assert_array_equal(file.read_columns("columns", 1, 4), columns[:, 1:4])
        np.testing.assert_array_equal(file.read_rows("rows", 1, 3), rows[1:3])


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff" * 64)
    with pytest.raises(TensorFileError, match="no safetensors file"):
        TensorFile(tmp_path / "file")


# Many ranks


def write(
    ranks: Ranks, kind: str, folder: str, fault: str | None = None, limits: SizeLimits = SIZE_LIMITS
) -> str | None:
    """Writes an SAE that has trained for two steps; returns the error, if there was one."""
    settings = SaeSettings.of(name="s", **(FAMILY[kind] | {"d_sae": D_SAE, "whitening": kind == "batchtopk"}))
    hooks = SaeHooks.from_settings(settings, ["a"])
    widths = hook_widths(settings)
    optimizer = OptimizerSettings(warmup_tokens=0, matmul="float32", learning_rate=1e-2)
    cpu = torch.device("cpu")
    sae_trainer = SaeTrainer(settings, optimizer, hooks, widths, cpu, torch.float32, ranks=ranks)
    sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED)
    for step in range(2):
        sae_trainer.step(rows_of(settings, 64, 1 + step))
    rows = rows_of(settings, 128, 7)
    sae_trainer.calibrate(sae_trainer.sae, rows)
    transform, rate = sae_trainer.input_transform(UNSCALED), sae_trainer.statistics.firing_rate()
    x, _ = sae_trainer.inputs_and_targets(rows)
    files = SaeFiles(sae_trainer.sae, transform, rate, {}, limits=limits)
    try:
        if fault == "disk full" and ranks.rank == 1:
            with patch.object(TensorFile, "write_columns", side_effect=OSError("No space left on device")):
                files.write(Path(folder), x)
        elif fault == "rows lost" and ranks.rank == 1:
            with patch.object(TensorFile, "write_columns"):
                files.write(Path(folder), x)
        else:
            files.write(Path(folder), x)
    except (OSError, SnapshotError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_writes_the_file_of_one(kind: str, small_ranks: SmallRanks, tmp_path: Path) -> None:
    """Byte for byte with `blocks = 8`, weights, firing rates and cfg.json; each passes its self-test by itself."""
    torch.set_num_threads(1)
    assert write(Ranks(0, 1, None, BLOCKS, latents_per_unit=1), kind, str(tmp_path / "1")) is None
    for size in SIZES:
        answers = small_ranks.run(write, size, kind, str(tmp_path / str(size)), blocks=BLOCKS)
        assert answers == [None] * size
        for name in (WEIGHTS, SPARSITY, "cfg.json"):
            assert (tmp_path / str(size) / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
        check(tmp_path / str(size))
    alone, shared = (load_file(tmp_path / size / "selftest.safetensors") for size in ("1", "4"))
    for name, expected in alone.items():
        np.testing.assert_allclose(shared[name], expected, rtol=1e-6, atol=1e-6)


def test_a_full_disk_of_one_rank_is_told_on_all(small_ranks: SmallRanks, tmp_path: Path) -> None:
    """Nobody waits for a rank that has given up, and the next snapshot is written."""
    answers = small_ranks.run(write, 2, "topk", str(tmp_path / "full"), "disk full")
    assert answers == ["OSError: rank 1: No space left on device"] * 2
    assert small_ranks.run(write, 2, "topk", str(tmp_path / "next")) == [None, None]


def test_latents_that_are_lost_on_the_way_fail_the_self_test(small_ranks: SmallRanks, tmp_path: Path) -> None:
    """All ranks find out: the reconstruction from disk is not that of the weights in training."""
    answers = small_ranks.run(write, 2, "topk", str(tmp_path / "lost"), "rows lost")
    assert all("self-test of folded reconstruction differs" in answer for answer in answers)


# Large ones


def test_latents_of_a_large_sae_are_tested_without_a_matrix_of_all(tmp_path: Path) -> None:
    """Beyond 2¹⁸ latents selftest.safetensors has the active ones alone; the check is the same."""
    alone = Ranks(0, 1, None, latents_per_unit=1)
    write(alone, "topk", str(tmp_path / "dense"))
    write(alone, "topk", str(tmp_path / "sparse"), limits=SizeLimits(selftest_matrix_latents=10))

    with safe_open(tmp_path / "sparse" / "selftest.safetensors", "np") as file:
        assert set(file.keys()) == {"x", "x_hat", "latents.row", "latents.index", "latents.value"}
    dense, sparse = (
        selftest.expected_latents({name: torch.from_numpy(value) for name, value in load_file(path).items()})
        for path in (tmp_path / "dense" / "selftest.safetensors", tmp_path / "sparse" / "selftest.safetensors")
    )
    assert selftest.distance(dense, sparse) == 0.0 and len(sparse.value) > 16
    check(tmp_path / "sparse")


def test_units_and_slabs_change_no_byte(tmp_path: Path) -> None:
    """Five latents at a time in slabs of ten, and all at once."""
    alone = Ranks(0, 1, None, latents_per_unit=1)
    write(alone, "jumprelu", str(tmp_path / "whole"))
    write(alone, "jumprelu", str(tmp_path / "cut"), limits=SizeLimits(slab_latents=10, unit_latents=5))

    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert load_sae(tmp_path / "cut").W_enc.shape == (D_IN, D_SAE)


def write_parts(ranks: Ranks, folder: str, part_bytes: int) -> Any:
    settings = SaeSettings.of(name="s", **(FAMILY["topk"] | {"d_sae": D_SAE}))
    cpu, hooks = torch.device("cpu"), SaeHooks(("a",), ("a",))
    one = SaeTrainer(settings, OptimizerSettings(), hooks, {"a": D_IN}, cpu, torch.float32, ranks=ranks)
    rows = rows_of(settings, 64, 7)
    one.initialise(rows, UNSCALED)
    limits = SizeLimits(large_bytes=1, part_bytes=part_bytes)
    transform, rate = one.input_transform(UNSCALED), one.statistics.firing_rate()
    return SaeFiles(one.sae, transform, rate, {}, limits=limits).write(Path(folder), rows["a"])


def test_ranks_share_out_the_hashes_of_a_large_file(small_ranks: SmallRanks, tmp_path: Path) -> None:
    """Every rank knows all of them; the manifest has them, and one byte that changes is found."""
    part_bytes = 1500
    alone = Ranks(0, 1, None, latents_per_unit=1)
    with new_snapshot(tmp_path, 1000, {}) as draft:
        parts = write_parts(alone, str(draft.folder / "s"), part_bytes)
        draft.add("s", {}, parts)
    for answer in small_ranks.run(write_parts, 2, str(tmp_path / "two"), part_bytes):
        assert answer == parts
    folder = tmp_path / "snapshots" / "000000001000"
    path = folder / "s" / WEIGHTS
    assert len(parts.sha256) == -(-path.stat().st_size // part_bytes) > 4

    (file,) = (file for file in read_manifest(folder).files if file.path == f"s/{WEIGHTS}")
    assert file.parts == parts and file.sha256 == parts.digest
    verify(folder)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match="differs from the manifest"):
        verify(folder)


def test_a_checkpoint_tells_how_many_ranks_wrote_it() -> None:
    """`check` names them; the one file of one rank is no shard."""
    one = small_checkpoint().document
    halves = [LatentRange("state.safetensors", 0, 4), LatentRange("latents-00001-of-00002.safetensors", 4, 8)]
    assert (one.ranks, replace(one, latents={"small": halves}).ranks) == (1, 2)
