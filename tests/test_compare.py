"""Comparing two snapshots: what is planted in the second is found, and what means nothing is not told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitor.cli.compare import main
from monitor.comparison import EDGES, best_matches, compare
from tests.small_run import Export, identity_sae, publish_snapshot
from trainer.state.durable import replace_text

D_IN, D_SAE = 16, 32
"""Of the SAE below: latents 0 to 15 stand for the positive, 16 to 31 for the negative part of each entry."""


def sae(name: str = "small", dead: tuple[int, ...] = (), **rows: np.ndarray) -> Export:
    """One SAE, with some latents that never fire and some decoder rows replaced (`row3=…`)."""
    export = identity_sae(name, d_in=D_IN)
    rate = export.firing_rate.copy()
    rate[list(dead)] = 0.0
    decoder = export.weights["W_dec"].copy()
    for which, row in rows.items():
        decoder[int(which.removeprefix("row"))] = row
    return replace(export, weights=export.weights | {"W_dec": decoder}, firing_rate=rate)


def unit(*entries: int) -> np.ndarray:
    """The sum of some directions, of length 3: a decoder row need not have unit norm."""
    row = np.zeros(D_IN, np.float32)
    row[list(entries)] = 1.0
    return 3 * row / np.linalg.norm(row)


def latents_of(tmp_path: Path, before: Export, after: Export) -> dict:
    a, b = publish_snapshot(tmp_path, 1000, [before]), publish_snapshot(tmp_path, 2000, [after])
    return compare(a, b).as_json()["saes"]["small"]["latents"]


def test_what_is_the_same_has_not_changed(tmp_path: Path):
    """Nobody is born, dies or turns; all cosines are in the last bin."""
    latents = latents_of(tmp_path, sae(), sae())
    assert latents["live"] == [D_SAE, D_SAE] and latents["rate_changed_twofold"] == 0
    assert latents["born"] == latents["died"] == latents["turned"] == []
    assert latents["cosine"]["same_index"]["counts"][-1] == D_SAE and latents["cosine"]["same_index"]["mean"] == 1.0


def test_the_table_says_what_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In words: a smaller FVU is better, and colours are not everybody's."""
    before, after = sae(), sae()
    after = replace(after, metrics=after.metrics | {"fvu": 0.125, "l0": 5.0})
    a, b = publish_snapshot(tmp_path, 1000, [before]), publish_snapshot(tmp_path, 2000, [after])
    assert main([str(a), str(b)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["FVU", "0.25", "0.125", "-0.125", "better"] in lines and ["L0", "4", "5", "+1", "worse"] in lines


def test_matching_reports_its_progress():
    """Blocks of rows, up to all of them."""
    rows, reported = np.eye(4, dtype=np.float32), []
    best_matches(rows, rows, np.arange(4), block_bytes=32, on_rows=lambda done, total: reported.append((done, total)))
    assert reported == [(2, 4), (4, 4)]


def test_births_and_deaths_are_found_by_firing_rates(tmp_path: Path):
    """Born is who fires in the second alone, died who fires in the first alone; who is silent in both is neither."""
    latents = latents_of(tmp_path, sae(dead=(1, 2)), sae(dead=(2, 3)))
    assert (latents["born"], latents["died"], latents["live"]) == ([1], [3], [D_SAE - 2, D_SAE - 2])


def test_a_latent_that_is_dead_has_not_turned(tmp_path: Path):
    """Where its row points means nothing: neither the silent one nor the one that has died is told of."""
    latents = latents_of(tmp_path, sae(dead=(1,)), sae(dead=(1, 2), row1=unit(4), row2=unit(5), row3=unit(6)))
    assert [row["latent"] for row in latents["turned"]] == [3]


def test_latents_that_turned_are_told_with_their_best_match(tmp_path: Path):
    """One that turned away, one that turned by 30°, and two that changed places: the length of rows means nothing."""
    thirty = np.cos(np.pi / 6) * unit(5) + np.sin(np.pi / 6) * unit(6)
    latents = latents_of(tmp_path, sae(), sae(row0=unit(1, 2, 3), row5=thirty, row8=unit(9), row9=unit(8)))
    turned = {row["latent"]: row for row in latents["turned"]}
    assert set(turned) == {0, 8, 9} and latents["elsewhere"] == 2
    assert (turned[8]["match"], turned[9]["match"]) == (9, 8)
    assert turned[8]["match_cosine"] == pytest.approx(1.0) and turned[0]["match_cosine"] < 0.7
    assert latents["cosine"]["same_index"]["counts"][EDGE_OF_30_DEGREES] == 1
    assert latents["cosine"]["matched"]["mean"] > latents["cosine"]["same_index"]["mean"]


EDGE_OF_30_DEGREES = EDGES.index(0.8)


def test_saes_of_different_width_are_matched_in_both_directions(tmp_path: Path):
    """All of the narrow one is in the wide one, half of the wide one is in the narrow one."""
    wide, narrow = sae(), sae()
    half = {name: array[:D_IN] if name == "W_dec" else array for name, array in narrow.weights.items()}
    latents = latents_of(tmp_path, replace(narrow, weights=half, firing_rate=np.full(D_IN, 0.5)), wide)
    assert latents["latents"] == [D_IN, D_SAE] and "turned" not in latents
    assert latents["cosine"]["a_in_b"]["counts"][-1] == D_IN
    assert latents["cosine"]["b_in_a"]["counts"][-1] == D_IN and latents["cosine"]["b_in_a"]["p10"] == 0.0


def test_different_spaces_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Numbers stand side by side, and a sentence says why no latent is."""
    a = publish_snapshot(tmp_path, 1000, [identity_sae("small", d_in=4)])
    b = publish_snapshot(tmp_path, 2000, [identity_sae("small", d_in=8)])
    assert "4 entries in A and 8 in B" in compare(a, b).as_json()["saes"]["small"]["latents"]["incomparable"]
    assert main([str(a), str(b)]) == 0
    assert "different spaces" in capsys.readouterr().out


def test_memory_is_bounded_by_blocks():
    """A block of one row at a time finds the same as all at once."""
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    at_once = best_matches(rows, rows[::-1].copy(), np.arange(50))
    in_blocks = best_matches(rows, rows[::-1].copy(), np.arange(50), block_bytes=1)
    for whole, part in zip(at_once, in_blocks, strict=True):
        np.testing.assert_allclose(whole, part, rtol=1e-6)
    assert at_once[1].tolist() == list(range(49, -1, -1))


def test_numbers_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of training and of the evaluation, where they share a name as held-out; those that are the same are left out."""
    a, b = publish_snapshot(tmp_path, 1000), publish_snapshot(tmp_path, 2000)
    replace_text(a / "small" / "evaluation.json", '{"fvu": 0.5, "ce_delta": 0.125, "kl": null, "seconds": 3.0}')
    replace_text(b / "small" / "evaluation.json", '{"fvu": 0.375, "ce_delta": 0.0625, "snapshot": "x"}')
    numbers = compare(a, b).as_json()["saes"]["small"]["numbers"]
    assert numbers["fvu"] == [0.25, 0.25] and numbers["held-out fvu"] == [0.5, 0.375]
    assert not {"seconds", "snapshot", "kl"} & set(numbers)
    assert main([str(a), str(b)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ΔCE", "0.125", "0.0625", "-0.0625", "better"] in lines
    assert not [line for line in lines if line[:1] == ["FVU"]]


def test_one_sae_of_each_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By its folder, so that SAEs of different names compare; --json prints what scripts need."""
    a = publish_snapshot(tmp_path, 1000, [sae("topk"), sae("jump")])
    b = publish_snapshot(tmp_path, 2000, [sae("jump"), sae("other")])
    comparison = compare(a, b).as_json()
    assert (list(comparison["saes"]), comparison["only_a"], comparison["only_b"]) == (["jump"], ["topk"], ["other"])
    assert main([str(a / "topk"), str(b / "other"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["saes"]) == ["topk → other"]


def test_what_is_no_snapshot_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A missing folder, an empty one, damaged weights, and two snapshots that share no SAE: 2, and what to name."""
    a = publish_snapshot(tmp_path, 1000, [sae("one"), sae("two")])
    b = publish_snapshot(tmp_path, 2000, [sae("three"), sae("four")])
    for wrong, message in ((tmp_path / "no", "does not exist"), (tmp_path, "neither"), (b, "name one SAE's folder")):
        assert main([str(a), str(wrong)]) == 2
        assert message in capsys.readouterr().err
    (b / "three" / "sae_weights.safetensors").write_bytes(b"no weights")
    assert main([str(a / "one"), str(b / "three")]) == 2
    assert "no readable SAE" in capsys.readouterr().err
