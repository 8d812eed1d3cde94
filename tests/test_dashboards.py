"""The dashboards' JSON. That their queries return data from a real run: test_watch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitor.grafana.generate import DASHBOARDS, FOLDER, main
from monitor.grafana.panels import COLUMNS
from monitor.metrics import all_metrics
from monitor.settings import MonitorTable
from trainer.metrics import MILESTONES, RANK, RANKS, SAE, STEP

register_default_plugins()

ONE_SCREEN = 24
"""Height, in Grafana's units of 38 pixels, that a screen of 1080 lines leaves under browser and header."""
OF_OTHERS = {"up", "scrape_duration_seconds", "ALERTS"} | {
    f"process_{name}"
    for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds", "start_time_seconds")
}
"""Metrics of Prometheus itself and of prometheus_client."""
OF_THE_DATA_SOURCE = {
    f".annotations.list[0].{name}" for name in ("useValueForTime", "step", "titleFormat", "textFormat")
}
"""Fields that Grafana leaves to its Prometheus plugin: its schema does not know them."""


@pytest.fixture(params=DASHBOARDS)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def expressions(board: dict[str, Any]) -> list[str]:
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return queries + [one["expr"] for one in board["annotations"]["list"]]


def test_committed_dashboards_are_what_the_script_writes(tmp_path: Path) -> None:
    """Who edits one edits monitor/grafana/generate.py, and runs it."""
    main(tmp_path / "dashboards")

    generated, committed = ({path.name: path.read_text() for path in folder.iterdir()}
                          for folder in (tmp_path / "dashboards", FOLDER))  # fmt: skip
    assert generated == committed
    assert committed.keys() == {f"{name}.json" for name in DASHBOARDS}


def test_panels_fill_one_screen_and_do_not_overlap(board: dict[str, Any]) -> None:
    """Every cell of the grid belongs to one panel, down to the lower edge."""
    places = [panel["gridPos"] for panel in board["panels"]]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    height = max(place["y"] + place["h"] for place in places)
    assert height <= ONE_SCREEN
    assert sum(place["w"] * place["h"] for place in places) == COLUMNS * height
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_say_what_they_show(board: dict[str, Any]) -> None:
    """A title each, and help for whatever is not Prometheus' own."""
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) >= len(titles) - 2, "a number and its curve may share a title, others not"
    for panel in board["panels"]:
        if any("sluice_" in target["expr"] for target in panel["targets"]):
            assert panel["description"], panel["title"]


def test_queries_name_only_metrics_that_exist(board: dict[str, Any]) -> None:
    """And choose by runs, so that other runs in one Prometheus do not mix in."""
    parts = ("", "_sum", "_count", "_bucket")
    existing_names = OF_OTHERS | {f"{metric.name}{part}" for metric in all_metrics() for part in parts}
    for expr in expressions(board):
        names = set(re.findall(r"\b(?:sluice|process|scrape)_\w+|\bup\b|ALERTS", expr))
        assert names and names <= existing_names, names - existing_names
        assert expr.count('run=~"$run"') == len(re.findall(r"\{", expr)) > 0


def test_what_the_trainer_says_is_shown() -> None:
    """All of it, but for what is named here: a new metric is put on a dashboard, or here."""
    elsewhere = {
        "sluice_run_info": "the variable `run`",
        "sluice_snapshot_tokens": "the monitor's is shown, beside what is evaluated",
        "sluice_report_timestamp_seconds": "the alert SluiceTrainerWedged",
        "sluice_steps_total": "tokens are shown",
        "sluice_sae_group": "to join with metrics by rank; `ctl status` tells it too",
    }
    queries = " ".join(expr for name in DASHBOARDS for expr in expressions(read(name)))
    hidden = {
        metric.name for metric in MILESTONES + STEP + RANKS + RANK + SAE if not re.search(rf"\b{metric.name}", queries)
    }
    assert hidden == set(elsewhere)


def test_grafanas_schema_knows_every_field(board: dict[str, Any]) -> None:
    """Read and written by Grafana's own library, nothing is lost but the fields of its Prometheus plugin.

    The library checks names, not types; a field that Grafana 11.6 does not know would be missing in what it writes.
    """
    encoded = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert set(differences(board, encoded)) == OF_THE_DATA_SOURCE


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Where `ours` holds something that `theirs` does not, as paths; what only `theirs` holds is a default."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from differences(value, theirs.get(key, ...), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif ours != theirs:
        yield path


def test_every_bottleneck_has_a_word() -> None:
    """From -1, producers wait all the time, to 1, the trainer does."""
    panel = next(panel for panel in read("stream")["panels"] if panel["title"] == "Bottleneck")

    def word(value: float) -> str:
        """The text of the first range that holds the value, as in Grafana, which takes a bound of null for 0."""
        mappings = panel["fieldConfig"]["defaults"]["mappings"]
        ranges = [mapping["options"] for mapping in mappings if mapping["type"] == "range"]
        return next(one["result"]["text"] for one in ranges if (one["from"] or 0) <= value <= (one["to"] or 0))

    assert [word(value) for value in (-1, -0.995, -0.06)] == ["the trainer"] * 3
    assert [word(value) for value in (-0.04, 0, 0.04)] == ["nobody"] * 3
    assert [word(value) for value in (0.06, 0.9, 1)] == ["the producers"] * 3


def panel_of(board: dict[str, Any], title: str, kind: str | None = None) -> dict[str, Any]:
    return next(one for one in board["panels"] if one["title"] == title and kind in (None, one["type"]))


def test_runs_lie_over_each_other(board: dict[str, Any]) -> None:
    """Several can be chosen; every series keeps its run, and its legend says it. Only the heat map adds runs up."""
    assert next(one for one in board["templating"]["list"] if one["name"] == "run")["multi"] is True
    for panel in board["panels"]:
        for target in panel["targets"] if panel["type"] != "heatmap" else ():
            assert target["legendFormat"].startswith("{{run}}"), panel["title"]
            assert all("run" in labels.split(", ") for labels in re.findall(r" by \((.*?)\)", target["expr"]))


def test_a_number_is_green_only_where_it_is_good() -> None:
    """Those with limits are judged; the others have the colour of text."""

    def color(title: str, value: float) -> str:
        steps = panel_of(read("training"), title, "stat")["fieldConfig"]["defaults"]["thresholds"]["steps"]
        return [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]

    assert [color("FVU", value) for value in (0.05, 0.4, 0.8)] == ["green", "orange", "red"]
    assert [color("ΔCE", value) for value in (0.04, 0.5, 3.2)] == ["green", "orange", "red"]
    assert [color("Dead latents", value) for value in (0.02, 0.2, 0.5)] == ["green", "orange", "red"]
    assert [color(title, 1) for title in ("L0", "Tokens trained", "Time left")] == ["text"] * 3


def test_gaps_stay_open(board: dict[str, Any]) -> None:
    """A curve by time bridges scrapes that failed, for a minute, and not hours without a trainer."""
    for panel in board["panels"]:
        if panel["type"] == "timeseries":
            assert panel["fieldConfig"]["defaults"]["custom"]["spanNulls"] == 60_000


def test_every_dashboard_shows_firing_alerts_and_leads_to_the_live_page(board: dict[str, Any]) -> None:
    """The alerts of the chosen runs, by name. The page's address is a variable; it begins as the service's default."""
    (query,) = panel_of(board, "Alerts")["targets"]
    assert 'ALERTS{run=~"$run", alertstate="firing"' in query["expr"] and "{{alertname}}" in query["legendFormat"]
    (link,) = [one for one in board["links"] if one["type"] == "link"]
    assert link["url"] == "${page}"
    address = next(one for one in board["templating"]["list"] if one["name"] == "page")
    service = MonitorTable()
    assert address["query"] == address["current"]["value"] == f"http://{service.host}:{service.service_port}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
def test_curves_by_tokens_have_a_table_of_tokens_and_one_of_values(tmp_path: Path) -> None:
    """By curve, and of the same curves at all times: before a snapshot is evaluated, too, and while tokens stand still.

    What Grafana makes of the tables: tests/grafana.
    """
    series = {
        'sluice_fvu{run="demo", sae="topk", instance="t"}': "0.5 0.4 0.4",
        'sluice_l0{run="demo", sae="topk", instance="t"}': "32x2",
        'sluice_ce_delta{run="demo", sae="topk", instance="m"}': "_ 0.25 0.25",
        'sluice_tokens_trained_total{run="demo", instance="t"}': "256 512 512",
        'sluice_evaluated_snapshot_tokens{run="demo", sae="topk", instance="m"}': "_ 128 128",
    }
    trained = [256, 512, 512]
    tables = {
        "FVU by tokens": (trained, [0.5, 0.4, 0.4]),
        "L0 by tokens": (trained, [32, 32, 32]),
        "ΔCE by tokens": ([0, 128, 128], [None, 0.25, 0.25]),  # NaN, which promtool cannot compare
    }
    labels = '{curve="demo topk", run="demo", sae="topk"}'
    expected = []
    for title, columns in tables.items():
        for target, values in zip(panel_of(read("training"), title)["targets"], columns, strict=True):
            assert target["format"] == "table"
            expr = target["expr"].replace("$run", "demo").replace("$sae", ".*")
            expected += [
                {"expr": expr, "eval_time": f"{10 * at}s", "exp_samples": [{"labels": labels, "value": value}]}
                for at, value in enumerate(values)
                if value is not None
            ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "10s", "input_series": inputs, "promql_expr_test": expected}]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "10s", "tests": tests}))
    process = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_provisioning_names_the_source_and_the_folder() -> None:
    """Grafana finds Prometheus by its default port, and the dashboards where the operator says."""
    provisioning = FOLDER.parent / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "sluice.yml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    provider = yaml.safe_load((provisioning / "dashboards" / "sluice.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == "${SLUICE_DASHBOARDS}"
