"""A measure that only this file knows: one declaration, and it stands in every place that shows measures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console, RenderableType
from starlette.testclient import TestClient

from monitor.cli.comparison_tables import show
from monitor.cli.terminal import live, results
from monitor.comparison import compare
from monitor.evaluation.measures import (
    MEASURES,
    Better,
    Chart,
    Curve,
    Measure,
    Stage,
    TableColumn,
    as_markdown,
    measures,
)
from monitor.evaluation.results import Evaluation, write_evaluation
from monitor.grafana.generate import training
from monitor.history import History, append_evaluation
from monitor.http.service import make_app
from monitor.metrics import MonitorMetrics, all_metrics
from monitor.summary import complete_summary
from producer.common.metrics import new_registry
from tests.small_run import finish_run, publish_snapshot, start_run
from trainer.report import SaeReport

ROOT = Path(__file__).parent.parent
GINI = Measure(
    "gini", Stage.HELD_OUT, "Gini coefficient", ".5f", "ratio", "How unequally activations share the latents.",
    Better.HIGHER, metric="sluice_gini", summary_name="held_out_gini", in_history=True, page_heading="Gini",
    chart=Chart("Gini", "of activations"), live_column=TableColumn("gini"), results_column=TableColumn("gini"),
    curves=(Curve("Held out", "Gini"),),
)  # fmt: skip


@pytest.fixture
def registered() -> Iterator[None]:
    MEASURES.append(GINI)
    yield
    MEASURES.remove(GINI)


@pytest.fixture
def run(tmp_path: Path, registered: None) -> Path:
    """Two snapshots, in which the evaluation has measured 0.25 and 0.375."""
    run = start_run(tmp_path / "run")
    for tokens, gini in ((1000, 0.25), (2000, 0.375)):
        folder = publish_snapshot(run, tokens)
        evaluation = Evaluation(snapshot=folder.name, snapshot_tokens=tokens, values={"gini": gini})
        write_evaluation(folder, "small", evaluation)
        append_evaluation(run, "small", evaluation, time=0.0)
    return run


def test_it_is_a_metric(registered: None) -> None:
    """With its unit behind its help text, in the list of all metrics too."""
    registry = CollectorRegistry()
    MonitorMetrics(registry).update("small", Evaluation(values={"gini": 0.375}))
    family = next(family for family in registry.collect() if family.name == "sluice_gini")
    assert family.documentation == "How unequally activations share the latents. [ratio]"
    assert registry.get_sample_value("sluice_gini", {"sae": "small"}) == 0.375
    assert "sluice_gini" in {metric.name for metric in all_metrics()}


def test_it_is_on_the_page(run: Path) -> None:
    """A column of the table, a row of everything that was measured, and a chart."""
    page = TestClient(make_app(run, new_registry())).get("/").text
    assert page.count("0.37500") == 2 and '<th scope="col" class="n">Gini</th>' in page
    assert "<td>Gini coefficient</td>" in page and "How unequally activations share the latents." in page
    assert 'id="chart-held-out-gini"' in page and 'data-measure="gini"' in page


def test_it_has_a_history(run: Path) -> None:
    """By tokens, for the curves."""
    assert History(run).columns()["evaluations"]["small"]["gini"] == [0.25, 0.375]


def test_it_is_in_the_terminal(run: Path) -> None:
    """While the run trains, and of the finished run, by its name in summary.json."""
    report: dict[str, Any] = {
        "tokens": 5, "target_tokens": None, "tokens_per_second": 0.0, "buffer_rows": 3, "buffer_capacity_rows": 7,
        "state": "training", "stream": {"producers": {}}, "saes": [{"name": "small"}],
    }  # fmt: skip
    text = render(live(report, {"small": Evaluation(values={"gini": 0.375})}, None, ""))
    assert "gini" in text and "0.37500" in text
    finish_run(run, 2000)
    complete_summary(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["saes"]["small"]["held_out_gini"] == 0.375
    text = render(results(summary))
    assert "gini" in text and "0.37500" in text


def test_it_is_compared(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the others, and a rise is an improvement."""
    a, b = run / "snapshots/000000001000", run / "snapshots/000000002000"
    monkeypatch.setenv("FORCE_COLOR", "1")
    comparison = compare(a, b)
    assert comparison.saes["small"].numbers["gini"] == (0.25, 0.375)
    show(comparison)
    line = next(line for line in capsys.readouterr().out.splitlines() if "gini" in line.lower())
    assert "+0.125" in line and "\x1b[32mbetter" in line


def test_it_is_in_the_dashboard(registered: None) -> None:
    """In the panel that it names, with its help text."""
    panel = next(panel for panel in training().panels or [] if panel.title == "Held out")
    query = panel.targets[-1]
    assert query.expr.startswith('max by (run, sae) (sluice_gini{run=~"$run", sae=~"$sae"})')
    assert query.legend_format == "{{run}} {{sae}} Gini"
    assert GINI.help in panel.description


def test_it_is_in_the_document(registered: None) -> None:
    """With its unit, direction, metric and key in summary.json."""
    assert "| `gini` | ratio | higher | `sluice_gini` | `held_out_gini` |" in as_markdown()


def test_the_committed_document_lists_all_measures() -> None:
    """Who declares one, or changes a help text of the trainer's metrics, writes docs/measures.md anew."""
    assert (ROOT / "docs/measures.md").read_text() == as_markdown()


def test_measures_of_training_are_those_that_the_trainer_reports() -> None:
    """A measure is a field of the report, of the same name."""
    assert {measure.name for measure in measures(Stage.TRAINING)} <= set(SaeReport.__dataclass_fields__)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: f"{measure.stage.value}-{measure.name}")
def test_declarations_are_whole(measure: Measure) -> None:
    """What a place needs is there: a chart needs a history, a curve a metric, a column of results a key."""
    assert measure.title and measure.unit and measure.help
    assert format(0 if measure.format == "," else 0.5, measure.format)
    assert measure.in_history or not measure.chart
    assert measure.metric or not measure.curves
    assert measure.summary_name or not measure.results_column


def render(picture: RenderableType) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(picture)
    return console.export_text()
