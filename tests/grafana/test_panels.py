"""What Grafana's own library makes of the dashboards and of answers that a real Prometheus gave.

recorded.json.gz holds two runs of the demo, one after the other: `demo`, paused for a minute, stopped and started
again, and `sparse`, with half its L0. After a change of queries, write it anew (README.md). How they look: test_watch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitor.grafana.generate import DASHBOARDS, FOLDER
from tests.grafana.drawing import Panel, describe, faults, missing_packages
from tests.grafana.recording import RECORDED, is_recorded, questions, read, write

needs_packages = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))

Shown = Callable[..., dict[str, Panel]]


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return read(RECORDED)


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Panel]]:
    """The panels of each committed dashboard, from the recorded answers."""
    return {name: describe(FOLDER / f"{name}.json", RECORDED) for name in DASHBOARDS}


@pytest.fixture
def shown(tmp_path: Path, recording: dict[str, Any]) -> Shown:
    """The panels of a dashboard by title, of two the first, with some answers replaced; or of a changed dashboard."""

    def show(name: str, answers: dict[str, Any], dashboard: dict[str, Any] | None = None) -> dict[str, Panel]:
        write(recording | {"answers": recording["answers"] | answers}, tmp_path / "recording.json.gz")
        (tmp_path / "dashboard.json").write_text(json.dumps(dashboard or board(name)))
        panels = describe(tmp_path / "dashboard.json", tmp_path / "recording.json.gz")
        return {panel.title: panel for panel in reversed(panels)}

    return show


def board(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def definition_of(dashboard: dict[str, Any], title: str) -> dict[str, Any]:
    return next(panel for panel in dashboard["panels"] if panel["title"] == title)


def key_of(name: str, title: str) -> str:
    """Where a recording holds the answer to the panel's first query."""
    target = definition_of(board(name), title)["targets"][0]
    return f"{'now ' * bool(target.get('instant'))}{target['expr']}"


def series(*values: float, **labels: str) -> dict[str, Any]:
    """A series as Prometheus answers with it, from the beginning of 2026 on, every 15 seconds."""
    return {"metric": labels, "values": [[1767225600 + 15 * at, str(value)] for at, value in enumerate(values)]}


def test_most_queries_are_recorded(recording: dict[str, Any]) -> None:
    """A few new ones wait for the next recording (README.md), which is due when they are many."""
    keys = {question.key for question in questions()}
    assert len(keys - recording["answers"].keys()) < len(keys) / 4


@needs_packages
@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_draws(name: str, recorded: dict[str, list[Panel]], recording: dict[str, Any]) -> None:
    """Two runs over each other: no panel is empty, and no number is without its word."""
    problems = {
        panel.title: list(faults(panel, definition))
        for panel, definition in zip(recorded[name], board(name)["panels"], strict=True)
        if is_recorded(definition, recording)
    }
    assert {title: found for title, found in problems.items() if found} == {}


@needs_packages
def test_an_sae_has_one_colour_in_every_panel(recorded: dict[str, list[Panel]]) -> None:
    """Those of both runs, by tokens and by time, though they have other curves beside them."""
    colors: dict[str, set[str]] = {}
    for panel in recorded["training"]:
        for curve in panel.curves:
            name = curve.name.removesuffix(" reconstruction")  # a part of the loss
            colors.setdefault(name, set()).add(curve.color)
    saes = ["demo jumprelu", "demo topk", "sparse jumprelu", "sparse topk"]
    assert [len(colors[name]) for name in saes] == [1, 1, 1, 1]
    assert len(set.union(*(colors[name] for name in saes))) == 4


@needs_packages
def test_curves_by_tokens_of_runs_that_trained_at_other_times(recorded: dict[str, list[Panel]]) -> None:
    """One curve each, of as many points as it had numbers of tokens."""
    by_tokens = [panel for panel in recorded["training"] if panel.type == "trend"]
    assert len(by_tokens) == 3
    for panel in by_tokens:
        assert [one.name for one in panel.curves] == ["demo jumprelu", "demo topk", "sparse jumprelu", "sparse topk"]
    assert min(curve.points for curve in by_tokens[0].curves) > 20


@needs_packages
def test_curves_by_tokens_hold_still_and_go_back_with_the_trainer(shown: Shown) -> None:
    """Grafana draws none whose x does not rise. Tokens: 100, 200, a pause, a crash, and 100 and 300 after it."""
    tokens = [100, 200, 200, 200, 100, 300]
    fvu = [0.9, 0.5, 0.5, 0.5, 0.8, 0.4]
    x, y = definition_of(board("training"), "FVU by tokens")["targets"]
    labels = {"curve": "demo topk", "run": "demo", "sae": "topk"}
    panels = shown("training", {x["expr"]: [series(*tokens, **labels)], y["expr"]: [series(*fvu, **labels)]})
    panel = panels["FVU by tokens"]
    assert (panel.message, [(one.name, one.points) for one in panel.curves]) == (None, [("demo topk", 3)])


@needs_packages
def test_the_bottleneck_has_a_word(shown: Shown) -> None:
    """Grafana takes the bound null for 0: such a range would leave the number as it is."""
    words = {-1: "the trainer", -0.995: "the trainer", -0.06: "the trainer", 0: "nobody", 0.04: "nobody",
             0.06: "the producers", 0.9: "the producers", 1: "the producers"}  # fmt: skip
    answers = {key_of("stream", "Bottleneck"): [series(value, run=f"run {value}") for value in words]}
    assert [one.text for one in shown("stream", answers)["Bottleneck"].values] == list(words.values())


def test_nobody_is_the_bottleneck_of_a_paused_run() -> None:
    """Producers wait then, but for a person: the difference is multiplied by 0."""
    (target,) = definition_of(board("stream"), "Bottleneck")["targets"]
    assert target["expr"].endswith(' * on (run) (1 - max by (run) (sluice_state{run=~"$run", state="paused"}))')


def test_the_first_snapshot_is_a_point() -> None:
    """One value has no line: evaluations, of which a young run has one, are marked."""
    custom = definition_of(board("training"), "ΔCE by tokens")["fieldConfig"]["defaults"]["custom"]
    assert (custom["showPoints"], custom["pointSize"]) == ("always", 5)


@needs_packages
def test_alerts_are_named_in_their_colours(shown: Shown) -> None:
    """Orange for a warning, red for a critical one, green for none."""
    key = key_of("stream", "Alerts")
    firing = [series(1, alertname="SluiceTrainerStarved", run="demo"), series(2, alertname="SluiceTargetDown", run="b")]
    values = shown("stream", {key: firing})["Alerts"].values
    assert [(one.text, one.color) for one in values] == [
        ("demo SluiceTrainerStarved", "#FF9830"),
        ("b SluiceTargetDown", "#F2495C"),
    ]
    (none,) = shown("stream", {key: [series(0, alertname="none")]})["Alerts"].values
    assert (none.text, none.color) == ("none", "#73BF69")


@needs_packages
def test_ranks_have_a_curve_each(shown: Shown) -> None:
    """Of two ranks; a run of one rank says so in words."""
    key = key_of("resources", "Active latents, by rank")
    panels = shown("resources", {key: [series(30, 31, run="demo", rank="0"), series(34, 33, run="demo", rank="1")]})
    assert [curve.name for curve in panels["Active latents, by rank"].curves] == ["demo rank 0", "demo rank 1"]
    assert panels["Memory, by rank"].message == "One rank alone."


@needs_packages
def test_a_bad_value_is_not_green(shown: Shown) -> None:
    """An FVU of 0.8 and a ΔCE of 3.2 nats are red; what has not been measured is a dash without a colour."""
    answers = {key_of("training", title): [series(value, run="demo", sae="topk")]
               for title, value in (("FVU", 0.8), ("ΔCE", 3.2))}  # fmt: skip
    x, y = (target["expr"] for target in definition_of(board("training"), "ΔCE by tokens")["targets"])
    labels = {"curve": "demo topk", "run": "demo", "sae": "topk"}
    answers |= {key_of("training", "Dead latents"): [], x: [series(0, **labels)], y: [series(float("nan"), **labels)]}
    panels = shown("training", answers)
    assert [panels[title].values[0].color for title in ("FVU", "ΔCE")] == ["#F2495C", "#F2495C"]
    (absent,) = panels["Dead latents"].values
    assert (absent.text, absent.color) == ("–", "rgb(204, 204, 220)")
    assert (panels["ΔCE by tokens"].message, panels["ΔCE by tokens"].curves[0].points) == (None, 0)


@needs_packages
def test_faults_that_the_dashboards_had_are_found(shown: Shown) -> None:
    """Bounds of null, x that does not rise, and a query without an answer."""
    dashboard = board("stream")
    bottleneck = definition_of(dashboard, "Bottleneck")
    bottleneck["fieldConfig"]["defaults"]["mappings"][0]["options"]["from"] = None
    answers = {key_of("stream", "Bottleneck"): [series(-0.995, run="demo")]}
    panels = shown("stream", answers, dashboard)
    assert list(faults(panels["Bottleneck"], bottleneck)) == ["shows '-0.995', not one of its words"]

    dashboard = board("training")
    fvu = definition_of(dashboard, "FVU by tokens")
    del fvu["transformations"][3]  # sorts by tokens
    x, y = (target["expr"] for target in fvu["targets"])
    labels = {"curve": "demo topk", "run": "demo", "sae": "topk"}
    answers = {x: [series(200, 100, **labels)], y: [series(0.5, 0.9, **labels)], key_of("training", "MSE"): []}
    panels = shown("training", answers, dashboard)
    assert next(faults(panels["FVU by tokens"], fvu)) == "says 'must be in ascending order'"
    assert next(faults(panels["MSE"], definition_of(dashboard, "MSE"))) == "says 'No data'"
