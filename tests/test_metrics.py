"""Metrics: what a scrape shows is what the last report said, under the promised names."""

from __future__ import annotations

import json
import math
import re
import resource
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from monitor import metrics
from monitor.evaluation.results import Evaluation
from monitor.metrics import MonitorMetrics
from producer import metrics as producer_metrics
from producer.common.metrics import Metric, Verdict, new_registry, start_metrics_server
from producer.metrics import ProducerMetrics
from producer.report import ProducerReport
from trainer import metrics as trainer_metrics
from trainer.metrics import TrainerMetrics
from trainer.phases import RunPhase
from trainer.report import (
    DENSITY_EDGES,
    RankReport,
    RanksReport,
    SaeReport,
    StepReport,
    StreamReport,
    describe_bottleneck,
)
from trainer.reporting import Reporter

PROMISED = re.findall(
    r"\S+",
    """sluice_l0 sluice_mse sluice_fvu sluice_dead_latents sluice_dead_latents_ratio sluice_loss
sluice_feature_density sluice_shrinkage sluice_tokens_trained_total sluice_tokens_received_total sluice_steps_total
sluice_learning_rate sluice_grad_norm sluice_step_seconds sluice_data_wait_seconds_total sluice_buffer_rows
sluice_buffer_capacity_rows sluice_buffer_same_context_mates sluice_credit_rows_outstanding sluice_leases
sluice_producers sluice_rows_rejected_total sluice_protocol_errors_total sluice_auth_failures_total
sluice_checkpoint_last_success_timestamp_seconds sluice_snapshot_tokens sluice_run_info sluice_producer_tokens_total
sluice_producer_forward_seconds sluice_producer_stall_seconds_total sluice_ce_delta sluice_ce_recovered
sluice_kl""",
)
"""Those that architecture.md promises."""

DENSITY = (1, *[0] * (len(DENSITY_EDGES) - 2), 4, 2)
"""One latent at 10⁻⁷ or below, four near 1, two that did not fire."""
SAE = SaeReport(
    name="a",
    l0=32.0,
    mse=0.1,
    fvu=0.2,
    dead_latents=3,
    dead_latents_ratio=0.25,
    shrinkage=0.9,
    loss={"reconstruction": 0.2},
    learning_rate=1e-3,
    grad_norm=2.0,
    density=DENSITY,
    skipped_steps=0,
)
STREAM = StreamReport(
    producers={"working": 2},
    leases={"free": 7, "leased": 1},
    tokens_received=900,
    rows_rejected={"stale_lease": 3},
    protocol_errors={"too_large": 1},
    auth_failures=4,
    credit_rows_outstanding=50,
    breaches={"trained_once": 0},
)
REPORT = StepReport(
    time=1.7e9,
    tokens=1000,
    step=10,
    target_tokens=None,
    tokens_per_second=500.0,
    step_seconds=0.01,
    data_wait_seconds=0.5,
    state="training",
    buffer_rows=60,
    buffer_capacity_rows=100,
    same_context_mates=0.3,
    stream=STREAM,
    saes=(SAE,),
)


def test_every_promised_name_is_in_the_tables():
    """Dashboards rely on these names; none may go missing."""
    assert set(PROMISED) <= {metric.name for metric in metrics.all_metrics()}


@pytest.mark.parametrize("metric", metrics.all_metrics(), ids=lambda metric: metric.name)
def test_every_metric_says_what_it_is_and_in_which_unit(metric: Metric):
    """A sentence and a unit; a name that ends with a base unit means it, and only counters end with _total."""
    assert metric.help.endswith(".") and metric.unit
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    stem = metric.name.removesuffix("_total")
    for suffix, unit in (("_seconds", "seconds"), ("_ratio", "ratio"), ("_per_second", "tokens per second")):
        if stem.endswith(suffix):
            assert metric.unit == unit
    registry = CollectorRegistry()
    TrainerMetrics(registry, {})
    ProducerMetrics(registry, {})
    MonitorMetrics(registry)
    help_texts = {family.name: family.documentation for family in registry.collect()}
    unit_shown = "" if metric.kind == "info" else f" [{metric.unit}]"
    assert help_texts[stem.removesuffix("_info")] == metric.help + unit_shown


def test_trainer_shows_its_last_report():
    """Counters, labelled gauges and per-SAE values appear as the report has them."""
    registry = CollectorRegistry()
    trainer = TrainerMetrics(registry, {"run": "demo", "model": "gpt2"})
    trainer.update(replace(REPORT, tokens=1))
    trainer.update(REPORT)
    assert registry.get_sample_value("sluice_tokens_trained_total") == 1000
    assert registry.get_sample_value("sluice_run_info", {"run": "demo", "model": "gpt2"}) == 1
    assert registry.get_sample_value("sluice_producers", {"state": "working"}) == 2
    assert registry.get_sample_value("sluice_producers", {"state": "idle"}) == 0
    assert registry.get_sample_value("sluice_leases", {"state": "free"}) == 7
    assert registry.get_sample_value("sluice_rows_rejected_total", {"reason": "stale_lease"}) == 3
    assert registry.get_sample_value("sluice_invariant_breaches_total", {"invariant": "trained_once"}) == 0
    assert registry.get_sample_value("sluice_fvu", {"sae": "a"}) == 0.2
    assert registry.get_sample_value("sluice_loss", {"sae": "a", "part": "reconstruction"}) == 0.2
    assert registry.get_sample_value("sluice_state", {"state": "training"}) == 1


NUMBERS = count(1)


def numbered(kind: type, **overrides: Any) -> Any:
    """A report of which no two numbers are the same, so that each tells which one it is."""
    values: dict[str, Any] = {}
    for one in fields(kind):
        number = next(NUMBERS)
        values[one.name] = overrides.get(one.name, {"some": number} if str(one.type).startswith("dict") else number)
    return kind(**values)


STATE = ["sluice_state", "sluice_producer_state"]
ELSEWHERE = {
    "sluice_report_timestamp_seconds": "time",
    "sluice_tokens_trained_total": "tokens",
    "sluice_corpus_tokens_trained_total": "tokens_by_corpus",
    "sluice_steps_total": "step",
    "sluice_buffer_same_context_mates": "same_context_mates",
    "sluice_tokens_discarded_total": "rows_discarded",
    "sluice_invariant_breaches_total": "breaches",
    "sluice_feature_density": "density",
    "sluice_producer_layers": "layers_total",
    "sluice_evaluation_fvu": "fvu",
    "sluice_evaluation_fvu_typical": "fvu_typical",
    "sluice_evaluation_fvu_per_activation": "fvu_per_activation",
    "sluice_evaluation_l0": "l0",
    "sluice_evaluation_cosine": "cosine",
    "sluice_evaluation_shrinkage": "shrinkage",
    "sluice_evaluation_dense_latents": "dense_latents",
    "sluice_evaluation_dead_latents": "dead_latents",
    "sluice_evaluated_snapshot_tokens": "snapshot_tokens",
    "sluice_evaluation_seconds": "seconds",
    "sluice_ranks": "count",
    "sluice_sae_group": "group",
    "sluice_rank_step_seconds": "step_seconds",
    "sluice_rank_exchange_seconds": "exchange_seconds",
    "sluice_rank_memory_bytes": "memory_bytes",
    "sluice_rank_active_latents": "active_latents",
}
"""Metrics whose field is not the name itself."""
MEASURES = {name: next(NUMBERS) for name in (
    "ce_delta", "ce_recovered", "ce_recovered_mean_ablation", "kl", "ce_clean", "ce_sae", "fvu", "fvu_typical",
    "fvu_per_activation", "l0", "cosine", "shrinkage", "dense_latents", "dead_latents", "explanation_f1",
    "ablation_effects_ratio", "snapshot_tokens", "seconds",
)} | {"probe_accuracy": {"some": next(NUMBERS)}}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "reports"),
    [
        (trainer_metrics.STEP, [report := numbered(StepReport, stream=numbered(StreamReport)), report.stream]),
        (trainer_metrics.RANKS, [numbered(RanksReport)]),
        ([one for one in trainer_metrics.RANK if one.name != "sluice_rank_work_seconds"], [numbered(RankReport)]),
        (trainer_metrics.SAE, [numbered(SaeReport)]),
        (producer_metrics.PRODUCER, [numbered(ProducerReport)]),
        (metrics.evaluation_metrics(), [Evaluation.from_json(MEASURES)]),
    ],
    ids=["step", "ranks", "rank", "sae", "producer", "evaluation"],
)
def test_each_metric_shows_the_number_that_it_is_named_for(table: tuple[Metric, ...], reports: list[Any]):
    """No two numbers of the report are the same: which one is shown tells which field was read."""
    expected = {
        name: value
        for one in reversed(reports)
        for name, value in (one.as_json() if isinstance(one, Evaluation) else vars(one)).items()
    }
    for metric in table:
        number = metric.read(reports[0])
        stem = metric.name.removeprefix("sluice_").removesuffix("_total")
        name = ELSEWHERE.get(metric.name, stem if stem in expected else stem.removeprefix("producer_"))
        if metric.name in STATE:
            assert number[expected["state"]] == 1 and sum(number.values()) == 1
        elif metric.name == "sluice_producer_rows_dropped_ratio":
            dropped = expected["rows_dropped"]["some"]
            assert number == dropped / (dropped + expected["tokens"])
        elif metric.kind == "summary":
            assert number == (expected["forwards"], expected["forward_seconds"])
        elif isinstance(expected[name], dict):
            assert expected[name].items() <= number.items()
        else:
            assert number == expected[name], metric.name


RANKS = RanksReport(
    count=3,
    each=(
        RankReport(0, step_seconds=1.0, exchange_seconds=0.5, memory_bytes=10, active_latents=4.0),
        RankReport(1, step_seconds=1.0, exchange_seconds=0.3, memory_bytes=10, active_latents=9.0),
        RankReport(2, step_seconds=1.0, exchange_seconds=0.5, memory_bytes=10, active_latents=4.0),
    ),
)
"""Rank 1 waits for nobody: three tenths of a step are what exchange costs, and its work takes .7 s, not .5."""


def test_each_rank_has_series_of_its_own():
    """Labelled by its number; work is the step without exchanges. A trainer alone has none."""
    registry = CollectorRegistry()
    trainer = TrainerMetrics(registry, {})
    trainer.update(REPORT)
    assert registry.get_sample_value("sluice_rank_step_seconds", {"rank": "0"}) is None
    trainer.update(replace(REPORT, ranks=RANKS))
    assert registry.get_sample_value("sluice_rank_work_seconds", {"rank": "1"}) == pytest.approx(0.7)
    assert registry.get_sample_value("sluice_rank_active_latents", {"rank": "1"}) == 9.0


def test_the_bottleneck_may_be_the_ranks():
    """A slow rank, then costly exchange, are said of a trainer that is not waiting for producers."""
    slow = replace(RANKS.each[1], exchange_seconds=0.05)
    waiting = StreamReport(producers={"working": 1}, data_wait_ratio=0.5)
    busy = StreamReport(producers={"working": 1}, credit_wait_ratio=0.5)
    sentence = "the trainer is the bottleneck: producers wait 50% of the time for room in the buffer"

    assert describe_bottleneck("training", busy, replace(RANKS, each=(RANKS.each[0], slow, RANKS.each[2]))) == (
        f"{sentence}; rank 1 is slow: its work takes 1.9 times that of the median"
    )
    assert describe_bottleneck("training", busy, replace(RANKS, each=(RANKS.each[0], RANKS.each[2]))) == (
        f"{sentence}; exchange between ranks takes 50% of a step: use fewer ranks, or a larger batch"
    )
    assert describe_bottleneck("training", busy, RanksReport()) == sentence
    assert "rank" not in describe_bottleneck("training", waiting, RANKS)


@pytest.mark.parametrize("document", [None, [], {"count": "x"}, {"count": 2, "each": [{"rank": 0}, 3]}])
def test_reports_without_ranks_are_read(document: Any):
    """Those of earlier releases, and what a damaged line may hold."""
    assert RanksReport.from_json(document).each == ()
    assert RanksReport.from_json(asdict(RANKS)) == RANKS
    assert RANKS.facts == ["3 ranks", "exchange 30% of a step", "slowest rank 1, 1.40 × the median"]


def test_unknown_values_are_absent_and_nan_is_shown():
    """None means not known yet, so there is no series; NaN is a fault that an alert must see."""
    registry = CollectorRegistry()
    trainer = TrainerMetrics(registry, {})
    assert registry.get_sample_value("sluice_tokens_trained_total") is None
    trainer.update(replace(REPORT, saes=(replace(SAE, dead_latents=None, fvu=math.nan),)))
    assert registry.get_sample_value("sluice_dead_latents", {"sae": "a"}) is None
    assert registry.get_sample_value("sluice_snapshot_tokens") is None
    assert math.isnan(registry.get_sample_value("sluice_fvu", {"sae": "a"}) or 0)


def test_milestones_are_set_beside_the_reports():
    """Checkpoints and snapshots happen between reports; their values stay when a report comes."""
    registry = CollectorRegistry()
    trainer = TrainerMetrics(registry, {}, checkpoint_interval=300.0)
    trainer.set_checkpoint_time(1.7e9)
    trainer.set_snapshot(5000, 1.6e9)
    trainer.update(REPORT)
    assert registry.get_sample_value("sluice_checkpoint_interval_seconds") == 300
    assert registry.get_sample_value("sluice_checkpoint_last_success_timestamp_seconds") == 1.7e9
    assert registry.get_sample_value("sluice_snapshot_tokens") == 5000
    assert registry.get_sample_value("sluice_snapshot_timestamp_seconds") == 1.6e9


def test_density_is_one_cumulative_histogram():
    """Latents that never fired are below every edge; the last bucket counts all latents."""
    registry = CollectorRegistry()
    TrainerMetrics(registry, {}).update(REPORT)
    buckets = [
        registry.get_sample_value("sluice_feature_density_bucket", {"sae": "a", "le": edge})
        for edge in ("-7.0", "-0.5", "0.0", "+Inf")
    ]
    assert buckets == [3, 3, 7, 7]


def test_producer_shows_its_last_report():
    """Time in the model is a summary, dropped tokens have reasons and a ratio, the cut model shows how deep it runs."""
    registry = CollectorRegistry()
    producer = ProducerMetrics(registry, {"model": "gpt2"})
    assert registry.get_sample_value("sluice_producer_rows_dropped_ratio") is None
    producer.update(
        ProducerReport(
            state="working",
            tokens=90,
            rows_dropped={"excluded": 8, "outlier": 2},
            forwards=4,
            forward_seconds=0.5,
            stall_seconds={"credit": 1.5},
            layers_run=7,
            layers_total=12,
        )
    )
    assert registry.get_sample_value("sluice_producer_tokens_total") == 90
    assert registry.get_sample_value("sluice_producer_rows_dropped_total", {"reason": "outlier"}) == 2
    assert registry.get_sample_value("sluice_producer_rows_dropped_ratio") == 0.1
    assert registry.get_sample_value("sluice_producer_forward_seconds_sum") == 0.5
    assert registry.get_sample_value("sluice_producer_forward_seconds_count") == 4
    assert registry.get_sample_value("sluice_producer_stall_seconds_total", {"cause": "credit"}) == 1.5
    assert registry.get_sample_value("sluice_producer_layers_run") == 7
    assert registry.get_sample_value("sluice_producer_layers") == 12


def test_monitor_shows_each_saes_newest_evaluation():
    """An SAE's numbers are replaced as a whole; one without zero ablation has no ce_recovered."""
    registry = CollectorRegistry()
    monitor = MonitorMetrics(registry)
    monitor.update("a", Evaluation(values={"ce_delta": 0.5, "ce_recovered": 0.9, "kl": 0.4}, snapshot_tokens=1000))
    monitor.update("b", Evaluation(values={"ce_delta": 0.7, "ce_recovered": None}))
    monitor.count_failure()
    monitor.set_run(snapshots=3, newest_tokens=1500, is_finished=True)
    assert registry.get_sample_value("sluice_monitor_newest_snapshot_tokens") == 1500
    assert registry.get_sample_value("sluice_run_finished") == 1
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "a"}) == 0.5
    assert registry.get_sample_value("sluice_evaluated_snapshot_tokens", {"sae": "a"}) == 1000
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "b"}) == 0.7
    assert registry.get_sample_value("sluice_ce_recovered", {"sae": "b"}) is None
    assert registry.get_sample_value("sluice_evaluation_failures_total") == 1


def test_one_registry_takes_all_three_processes():
    """Names do not collide, so a small installation may show everything on one port."""
    registry = new_registry()
    TrainerMetrics(registry, {})
    ProducerMetrics(registry, {})
    MonitorMetrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        TrainerMetrics(registry, {})


def test_a_scrape_over_http_is_valid_openmetrics():
    """What Prometheus asks for by default parses by the strict rules, density and units included."""
    registry = new_registry()
    TrainerMetrics(registry, {"run": "demo"}).update(REPORT)
    ProducerMetrics(registry, {"model": "gpt2"})
    with _served(registry) as port:
        text = _get(port, "/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["sluice_feature_density"].type == "histogram"
    assert families["sluice_tokens_trained"].samples[0].value == 1000


def test_health_and_readiness_are_asked_apart_from_metrics():
    """Each is 200 or 503 with a sentence; other paths are 404 and not a scrape."""
    with _served(new_registry(), alive=lambda: (True, "starved"), ready=lambda: (False, "no trainer yet")) as port:
        assert _get(port, "/healthz") == "starved\n"
        with pytest.raises(urllib.error.HTTPError, match="503") as error:
            _get(port, "/readyz")
        assert error.value.read() == b"no trainer yet\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(port, "/health")


def test_second_producer_takes_the_next_free_port():
    """Several producers of one machine share a run file; each finds a port, and none takes the monitor's."""
    with _served(new_registry()) as port:
        second, close = start_metrics_server(new_registry(), "127.0.0.1", port, next_free=20, leave=[port + 1])
        try:
            assert port + 1 < second <= port + 20
            assert "process_cpu_seconds_total" in _get(second, "/metrics")
        finally:
            close()


def test_occupied_port_is_named():
    """Where nothing else may be tried, the error says which port and what to do."""
    with _served(new_registry()) as port, pytest.raises(OSError, match=rf"port {port}.*\[monitor\]"):
        start_metrics_server(new_registry(), "127.0.0.1", port)


def test_a_buffer_that_fills_is_in_the_history(tmp_path: Path):
    """The page and `top` read it there; while nothing comes, no line is added."""
    with Reporter(tmp_path, TrainerMetrics(new_registry(), {}, 1.0)) as reporter:
        for rows in (5, 5, 7):
            reporter.on_fill(replace(REPORT, state="filling", buffer_rows=rows, saes=()))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["buffer_rows"] for line in lines] == [5, 7]


def test_a_full_disk_costs_the_history_a_line_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Not a whole line is no line: what follows must not be appended to half of one."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    with Reporter(tmp_path / "full", TrainerMetrics(new_registry(), {}, 1.0)) as reporter:
        reporter.on_report(REPORT)
    assert "metrics.jsonl not written: [Errno 28] No space left on device; training goes on" in caplog.text

    with Reporter(tmp_path, TrainerMetrics(new_registry(), {}, 1.0)) as reporter:
        reporter.on_report(REPORT)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        reporter.on_report(REPORT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size - 1, resource.RLIM_INFINITY))
        try:
            reporter.on_report(REPORT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        reporter.on_report(REPORT)
    assert [json.loads(line)["tokens"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1000] * 3


def test_a_run_that_starves_again_and_again_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Its producers are the bottleneck, and the lines on its progress say so."""
    starved = replace(REPORT, state=RunPhase.STARVED, stream=StreamReport(producers={"working": 2}))
    with Reporter(tmp_path, TrainerMetrics(new_registry(), {}, 1.0)) as reporter:
        for _ in range(5):
            reporter.on_report(starved)
            reporter.on_report(replace(REPORT, state=RunPhase.TRAINING))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["the buffer is under half full and training waits; producers at work: 2"]


def test_a_bottleneck_that_stays_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Progress is logged each time; what holds it up where it changes, whatever the percentage."""
    caplog.set_level("INFO")
    ratios = [(0.9, 0.0), (0.8, 0.0), (0.0, 0.7), (0.0, 0.6), (0.9, 0.0)]
    with Reporter(tmp_path, TrainerMetrics(new_registry(), {}, 1.0)) as reporter:
        for data, credit in ratios:
            reporter._logged_at = float("-inf")
            stream = StreamReport(producers={"working": 1}, data_wait_ratio=data, credit_wait_ratio=credit)
            reporter.on_report(replace(REPORT, state=RunPhase.TRAINING, stream=stream))
    lines = [record.getMessage() for record in caplog.records]
    assert sum(" tokens · " in line for line in lines) == 5
    sides = [line.partition(" ")[0:3:2] for line in lines if "bottleneck" in line]
    assert [words.split()[0] for _, words in sides] == ["producers", "trainer", "producers"]


@contextmanager
def _served(registry: CollectorRegistry, **verdicts: Verdict) -> Iterator[int]:
    port, close = start_metrics_server(registry, "127.0.0.1", 0, **verdicts)
    try:
        yield port
    finally:
        close()


def _get(port: int, path: str, headers: dict[str, str] | None = None) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers or {})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()
