"""Curves: what was appended is added, what a resumed trainer takes back goes, and there are never too many points."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from monitor.evaluation.results import Evaluation
from monitor.history import History, append_evaluation


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path


def add_report(run: Path, tokens: int, time: float = 0.0, **saes: float) -> None:
    """Appends one line to metrics.jsonl; `saes` are FVU by name."""
    line: dict[str, Any] = {"tokens": tokens, "time": time, "tokens_per_second": 5.0}
    line["saes"] = [{"name": name, "fvu": fvu, "l0": 32.0} for name, fvu in saes.items()]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def add_evaluation(run: Path, sae: str, tokens: int, time: float = 0.0, **values: float) -> None:
    """Appends one line to evaluations.jsonl."""
    append_evaluation(run, sae, Evaluation(snapshot_tokens=tokens, values=values), time)


def test_a_run_that_does_not_exist_has_no_points(run: Path):
    """And no error."""
    columns = History(run / "nowhere").columns()
    assert columns["tokens"] == [] and columns["saes"] == {} and columns["next"] == 0


def test_filling_the_buffer_is_no_point(run: Path):
    """Nothing is trained yet: the curves begin with the first step."""
    history = History(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"tokens": 0, "time": 1.0, "state": "filling", "buffer_rows": 5, "saes": []}\n')
    add_report(run, 10, a=0.5)
    assert history.columns()["tokens"] == [10]


def test_only_what_is_new_is_told(run: Path):
    """To who has seen the points before it; everything to others."""
    history = History(run)
    add_report(run, 10, a=0.5)
    first = history.columns()
    assert first["tokens"] == [10] and first["saes"]["a"]["fvu"] == [0.5]
    add_report(run, 20, a=0.4)
    news = history.columns(first["generation"], first["next"])
    assert (news["since"], news["tokens"], news["saes"]["a"]["fvu"]) == (1, [20], [0.4])
    assert history.columns(-1, 1)["tokens"] == [10, 20]


def test_a_line_that_is_half_written_waits(run: Path):
    """Until it has its end; one that is damaged is passed over."""
    history = History(run)
    with open(run / "metrics.jsonl", "w") as file:
        file.write('{"tokens": 1, "saes": []}\n{"tok\n{"tokens": 2, "sa')
    assert history.columns()["tokens"] == [1]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('es": []}\n')
    assert history.columns()["tokens"] == [1, 2]


def test_what_a_resumed_trainer_takes_back_is_gone(run: Path):
    """It reports 15 after 30: points from 15 on were of a lineage that the crash ended, and everyone is told anew."""
    history = History(run)
    for tokens in (10, 20, 30):
        add_report(run, tokens, a=tokens / 100)
    columns = history.columns()
    add_report(run, 15, a=0.99)
    news = history.columns(columns["generation"], columns["next"])
    assert news["generation"] != columns["generation"] and news["since"] == 0
    assert news["tokens"] == [10, 15] and news["saes"]["a"]["fvu"] == [0.1, 0.99]


def test_a_lost_point_at_which_the_new_lineage_reports_is_gone_too(run: Path):
    """It reports 20 after 30, where the lost lineage had reported 20 as well: one point for 20, the new one."""
    history = History(run)
    for time, tokens in enumerate((10, 20, 30)):
        add_report(run, tokens, time=time)
    history.columns()
    add_report(run, 20, time=9)
    columns = history.columns()
    assert (columns["tokens"], columns["time"]) == ([10, 20], [0, 9])


def test_saes_that_come_later_have_nothing_before(run: Path):
    """None, so that all columns are as long as the tokens; not a number is null in JSON too."""
    history = History(run)
    add_report(run, 10, a=0.5)
    add_report(run, 20, a=0.4, b=float("nan"))
    columns = history.columns()
    assert columns["saes"]["b"]["fvu"] == [None, None] and columns["saes"]["b"]["l0"] == [None, 32.0]


def test_many_points_are_thinned(run: Path):
    """Every other one goes when there are too many, evenly over the whole run, and who had them is told anew."""
    history = History(run, max_points=8)
    generations = set()
    for tokens in range(1, 101):
        add_report(run, tokens, a=0.5)
        generations.add(history.columns()["generation"])
    tokens = history.columns()["tokens"]
    assert 4 <= len(tokens) < 8 and len(generations) > 3
    steps = {later - earlier for earlier, later in pairwise(tokens)}
    assert steps == {16}


def test_another_run_in_the_same_place_begins_anew(run: Path):
    """Its file may be longer than the old one had been read."""
    history = History(run)
    add_report(run, 10, a=0.5)
    assert history.columns()["tokens"] == [10]
    (run / "metrics.jsonl").rename(run / "old")
    for tokens in (3, 6, 9):
        add_report(run, tokens, b=0.5)
    columns = history.columns()
    assert columns["tokens"] == [3, 6, 9] and list(columns["saes"]) == ["b"]


def test_density_is_that_of_the_newest_report(run: Path):
    """It is a picture of one moment, not a curve."""
    history = History(run)
    for counts in ([5, 0], [3, 2]):
        line = {"tokens": counts[1], "saes": [{"name": "a", "density": counts}]}
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    assert history.columns()["density"] == {"a": [3, 2]}


def test_evaluations_outlive_their_snapshots(run: Path):
    """They stand in a file of their own; a snapshot that is measured again counts as it was measured last."""
    history = History(run)
    for tokens, delta in ((100, 0.3), (200, 0.25), (200, 0.2)):
        add_evaluation(run, "a", tokens, ce_delta=delta)
    add_evaluation(run, "b", 300, ce_delta=0.5)
    (run / "evaluations.jsonl").open("a").write('{"ce_delta": 1.0}\n')
    evaluations = history.columns()["evaluations"]
    assert (evaluations["a"]["tokens"], evaluations["a"]["ce_delta"]) == ([100, 200], [0.3, 0.2])
    assert evaluations["b"]["tokens"] == [300] and evaluations["b"]["kl"] == [None]


@pytest.mark.parametrize("at_once", [True, False])
def test_evaluations_of_a_lineage_that_is_gone_are_no_points(run: Path, at_once: bool):
    """The trainer went back from 300 to 150: what was measured beyond it was of weights that nothing came from."""
    history = History(run)
    for step, (tokens, snapshot) in enumerate([(100, 100), (300, 250), (150, None), (280, 260)]):
        add_report(run, tokens, time=float(step), a=0.5)
        if snapshot is not None:
            add_evaluation(run, "a", snapshot, time=step + 0.5)
        if not at_once:
            history.columns()
    assert history.columns()["evaluations"]["a"]["tokens"] == [100, 260]


def test_evaluations_are_told_once(run: Path):
    """Who has them is told so; a new one, and a trainer that goes back, tell them anew."""
    history = History(run)
    add_report(run, 100)
    add_evaluation(run, "a", 100)
    first = history.columns()
    again = history.columns(evaluated=first["evaluated"])
    assert first["evaluations"]["a"]["tokens"] == [100] and again["evaluations"] is None
    add_evaluation(run, "a", 200)
    news = history.columns(evaluated=again["evaluated"])
    assert news["evaluations"]["a"]["tokens"] == [100, 200]
    add_report(run, 50, time=1e12)
    assert history.columns(evaluated=news["evaluated"])["evaluations"] == {}


def test_many_evaluations_are_thinned(run: Path):
    """Evenly, and the newest is always shown."""
    for tokens in range(1, 11):
        add_evaluation(run, "a", tokens)
    assert History(run, max_points=4).columns()["evaluations"]["a"]["tokens"] == [1, 4, 7, 10]
