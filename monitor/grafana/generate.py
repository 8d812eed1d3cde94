"""The three dashboards: `python -m monitor.grafana.generate` writes their JSON into dashboards/ beside it.

Each answers questions in the order in which they arise, on one screen of 1080 lines:

    training     does it learn, and what: numbers now, curves by tokens, then by time
    stream       who waits for whom, and what went wrong between producers and trainer
    resources    what each process uses of its machine

A dashboard is 24 units wide and 24 high, in rows of panels; `panels` defines the kinds of panel. The measures say in
which panels they have curves (`monitor.evaluation.measures`). Queries work without the recording rules.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitor.evaluation.measures import Stage, get
from monitor.grafana.panels import (
    BLUE,
    GREEN,
    NEUTRAL,
    ORANGE,
    RED,
    Panel,
    Row,
    curves,
    dashboard,
    firing_alerts,
    heat_map,
    measure_number,
    number,
    over_time,
    over_tokens,
    query,
    range_text,
    thresholds,
    value_texts,
)

FOLDER = Path(__file__).parent / "dashboards"


def training() -> Dashboard:
    """Builds the dashboard `training`: does it learn, and what?"""
    trained = "max by (run) (sluice_tokens_trained_total{RUN})"
    evaluated = "max by (run, sae) (sluice_evaluated_snapshot_tokens{SAE}) or 0 * max by (run, sae) (sluice_fvu{SAE})"
    now = [
        number("State", 'sluice_state{RUN} == 1 or on () label_replace(vector(0), "state", "no trainer", "", "")',
               legend="{{state}}", text=BigValueTextMode.NAME, limits=thresholds((None, NEUTRAL), (1, GREEN)),
               colors={"starved": RED, "filling": ORANGE, "paused": BLUE}),
        number("Tokens trained", trained),
        number("Tokens per second", "sluice_tokens_per_second{RUN}"),
        number("Time left", "(sluice_target_tokens{RUN} - sluice_tokens_trained_total{RUN}) / "
               "(sluice_tokens_per_second{RUN} > 0)", unit="s",
               note="At the present speed; empty in a run without an end."),
        measure_number("FVU", get("fvu", Stage.TRAINING),
                       limits=thresholds((None, GREEN), (0.3, ORANGE), (0.6, RED)),
                       note="Orange from 0.3, red from 0.6: usual at the beginning of a run, and not at its end."),
        measure_number("ΔCE", get("ce_delta", Stage.HELD_OUT),
                       limits=thresholds((None, GREEN), (0.3, ORANGE), (1, RED)),
                       note="Orange from 0.3 nats, red from 1: usual at the beginning of a run, and not at its end."),
        measure_number("L0", get("l0", Stage.TRAINING)),
        measure_number("Dead latents", get("dead_latents_ratio", Stage.TRAINING), unit="percentunit",
                       limits=thresholds((None, GREEN), (0.1, ORANGE), (0.3, RED)),
                       note="Empty until dead_tokens have been seen."),
        firing_alerts(),
    ]  # fmt: skip
    by_tokens = [
        over_tokens("FVU by tokens", trained, log=True),
        over_tokens("ΔCE by tokens", evaluated, log=True, points=True),
        over_tokens("L0 by tokens", trained),
    ]
    by_time = [
        over_time("Loss, by part",
                  query('max by (run, sae) (sluice_loss{SAE, part="reconstruction"})', "{{sae}} reconstruction"),
                  query('sluice_loss{SAE, part!="reconstruction"}', "{{sae}} {{part}}"), log=True, bottom=1e-4,
                  note="Parts below 1e-4 are cut off."),
        over_time("FVU", *curves("FVU"), log=True),
        over_time("MSE", *curves("MSE"), log=True),
        over_time("Dead and dense latents", *curves("Dead and dense latents")),
    ]  # fmt: skip
    causes: list[Panel] = [
        heat_map("Latents by firing rate", "sum by (le) (sluice_feature_density_bucket{SAE})", "log10 rate",
                 "Dead latents lie at the bottom, dense ones at the top. All chosen SAEs together."),
        over_time("Shrinkage", *curves("Shrinkage")),
        over_time("Learning rate", *curves("Learning rate")),
        over_time("Gradient norm", *curves("Gradient norm"),
                  query("increase(sluice_skipped_steps_total{SAE}[RATE])", "{{sae}} skipped steps")),
        over_time("Held out", *curves("Held out")),
    ]  # fmt: skip
    rows = [
        Row(3, now, widths=(3, 3, 3, 2, 3, 3, 2, 2, 3)),
        Row(7, by_tokens),
        Row(7, by_time),
        Row(7, causes, widths=(7, 4, 4, 4, 5)),
    ]
    return dashboard("training", "Sluice · training", rows, by_sae=True)


def stream() -> Dashboard:
    """Builds the dashboard `stream`: who waits for whom, and what went wrong?"""
    faults_are_odd = thresholds((None, GREEN), (1, ORANGE))
    now = [
        number("Bottleneck", "(sluice_data_wait_ratio{RUN} - sluice_credit_wait_ratio{RUN})"
               ' * on (run) (1 - max by (run) (sluice_state{RUN, state="paused"}))',
               mappings=[
                   range_text(-1, -0.05, "the trainer", GREEN),
                   range_text(-0.05, 0.05, "nobody", GREEN),
                   range_text(0.05, 1, "the producers", ORANGE),
               ],
               note="Who keeps the other waiting. The trainer: training goes as fast as it can. In a pause: nobody."),
        number("Producers", "sum by (run) (sluice_producers{RUN})", limits=thresholds((None, RED), (1, GREEN))),
        number("Tokens sent per second", "sum by (run) (rate(sluice_producer_tokens_total{RUN}[RATE]))"),
        number("Buffer filled", "sluice_buffer_rows{RUN} / sluice_buffer_capacity_rows{RUN}", unit="percentunit",
               limits=thresholds((None, RED), (0.5, GREEN))),
        number("Pass over the corpus", "sluice_epoch{RUN}"),
        number("Shards quarantined", 'sluice_leases{RUN, state="set_aside"}', limits=faults_are_odd),
        number("Producers lost", "sluice_sessions_lost_total{RUN}", limits=faults_are_odd),
        number("Broken invariants", "sum by (run) (sluice_invariant_breaches_total{RUN})",
               limits=thresholds((None, GREEN), (1, RED))),
        firing_alerts(),
    ]  # fmt: skip
    flow = [
        over_time("Who waits", query("sluice_data_wait_ratio{RUN}", "trainer, for activations"),
                  query("sluice_credit_wait_ratio{RUN}", "producers, for room"), unit="percentunit", top=1),
        over_time("Tokens per second", query("rate(sluice_tokens_trained_total{RUN}[RATE])", "trained"),
                  query("rate(sluice_producer_tokens_total{RUN}[RATE])", "sent by {{instance}}")),
        over_time("Tokens trained per second, by corpus",
                  query("rate(sluice_corpus_tokens_trained_total{RUN}[RATE])", "{{corpus}}"), stacked=True,
                  empty="One corpus alone."),
        over_time("Producers wait, by cause",
                  query("avg by (run, cause) (rate(sluice_producer_stall_seconds_total{RUN}[RATE]))", "{{cause}}"),
                  unit="percentunit", stacked=True, note="Share of the time, mean over producers."),
    ]  # fmt: skip
    inside = [
        over_time("Producers", query("sluice_producers{RUN}", "{{state}}"), stacked=True),
        over_time("Buffer and credit", query("sluice_buffer_rows{RUN}", "buffered"),
                  query("sluice_credit_rows_outstanding{RUN}", "may still come"),
                  query("sluice_buffer_capacity_rows{RUN}", "capacity")),
        over_time("Mixing: others from a window in a batch",
                  query("sluice_buffer_same_context_mates{RUN}", "expected number")),
        over_time("Shards of this pass", query("sluice_leases{RUN}", "{{state}}"),
                  query("sluice_suspect_shards{RUN} > 0", "on which producers are lost"), stacked=True),
    ]  # fmt: skip
    faults = [
        over_time("Tokens rejected", query("sum by (run, reason) (increase(sluice_rows_rejected_total{RUN}[RATE]))",
                                         "{{reason}}"),
                  query("sluice_tokens_quarantined{RUN} > 0", "quarantined, in all"),
                  empty="none"),
        over_time("Protocol errors and strangers",
                  query("sum by (run, kind) (increase(sluice_protocol_errors_total{RUN}[RATE]))", "{{kind}}"),
                  query("increase(sluice_auth_failures_total{RUN}[RATE])", "unknown key"), empty="none"),
        over_time("Positions not sent",
                  query("sum by (run, reason) (rate(sluice_producer_rows_dropped_total{RUN}[RATE]))",
                        "{{reason}} per second"),
                  query("rate(sluice_tokens_discarded_total{RUN}[RATE])", "outliers, as reported")),
        over_time("A forward pass",
                  query("rate(sluice_producer_forward_seconds_sum{RUN}[RATE]) / "
                        "rate(sluice_producer_forward_seconds_count{RUN}[RATE])", "{{instance}}"), unit="s"),
    ]  # fmt: skip
    rows = [Row(3, now, widths=(3, 2, 3, 2, 3, 3, 2, 3, 3)), Row(7, flow), Row(7, inside), Row(7, faults)]
    return dashboard("stream", "Sluice · stream", rows)


def resources() -> Dashboard:
    """Builds the dashboard `resources`: what does each process use of its machine?"""
    process = "{{job}} {{instance}}"
    since_checkpoint = "time() - sluice_checkpoint_last_success_timestamp_seconds{RUN}"
    now = [
        number("Processes", "up{RUN}", legend=process, text=BigValueTextMode.VALUE_AND_NAME,
               mappings=[value_texts({"0": ("down", RED), "1": ("up", GREEN)})]),
        number("Ranks", "sluice_ranks{RUN}"),
        number("Memory, all processes", "sum by (run) (process_resident_memory_bytes{RUN})", unit="bytes"),
        number("CPU cores, all processes", "sum by (run) (rate(process_cpu_seconds_total{RUN}[RATE]))", decimals=1),
        number("Since the last checkpoint", since_checkpoint, unit="s"),
        firing_alerts(),
    ]  # fmt: skip
    machine = [
        over_time("CPU cores", query("rate(process_cpu_seconds_total{RUN}[RATE])", process)),
        over_time("Memory", query("process_resident_memory_bytes{RUN}", process), unit="bytes"),
        over_time("Open files, of those allowed",
                  query("process_open_fds{RUN} / process_max_fds{RUN}", process), unit="percentunit"),
    ]  # fmt: skip
    pace = [
        over_time("Tokens per second", query("rate(sluice_tokens_trained_total{RUN}[RATE])", "trained"),
                  query("rate(sluice_tokens_received_total{RUN}[RATE])", "received")),
        over_time("A training step", query("sluice_step_seconds{RUN}", "step"), unit="s"),
        over_time("Share of the time",
                  query("rate(sluice_producer_forward_seconds_sum{RUN}[RATE])", "{{instance}} in the model"),
                  query("rate(sluice_data_wait_seconds_total{RUN}[RATE])", "trainer waits"),
                  unit="percentunit", note="Above 100 % when passes run side by side, a core each."),
    ]  # fmt: skip
    upkeep = [
        over_time("Checkpoints", query(since_checkpoint, "since the last one"),
                  query("sluice_checkpoint_interval_seconds{RUN}", "interval"), unit="s"),
        over_time("Snapshots", query("sluice_monitor_newest_snapshot_tokens{RUN}", "newest"),
                  query("sluice_evaluated_snapshot_tokens{RUN}", "newest evaluated, {{sae}}"),
                  empty="no snapshot yet"),
        over_time("An evaluation", query("sluice_evaluation_seconds{RUN}", "{{sae}}"), unit="s",
                  empty="no evaluation yet"),
        over_time("A scrape", query("scrape_duration_seconds{RUN}", process), unit="s"),
    ]  # fmt: skip
    by_rank, alone = "rank {{rank}}", "One rank alone."
    ranks = [
        over_time("A step, by rank", query("sluice_rank_step_seconds{RUN}", by_rank),
                  query("sluice_rank_work_seconds{RUN}", f"{by_rank} without exchanges"), unit="s", empty=alone),
        over_time("Exchanges in a step, by rank", query("sluice_rank_exchange_seconds{RUN}", by_rank),
                  unit="s", empty=alone),
        over_time("Exchanged between ranks",
                  query("sum by (run, purpose) (rate(sluice_exchange_bytes_total{RUN}[RATE]))", "{{purpose}}"),
                  unit="Bps", empty=alone),
        over_time("Time of rank 0 in exchanges",
                  query("sum by (run, purpose) (rate(sluice_exchange_seconds_total{RUN}[RATE]))", "{{purpose}}"),
                  unit="percentunit", empty=alone),
        over_time("Memory, by rank", query("sluice_rank_memory_bytes{RUN}", by_rank), unit="bytes", empty=alone),
        over_time("Active latents, by rank", query("sluice_rank_active_latents{RUN}", by_rank), empty=alone),
    ]  # fmt: skip
    rows = [Row(4, now, widths=(9, 2, 3, 3, 4, 3)), *(Row(5, panels) for panels in (machine, pace, ranks, upkeep))]
    return dashboard("resources", "Sluice · resources", rows)


DASHBOARDS = {"training": training, "stream": stream, "resources": resources}


def as_text(board: Dashboard) -> str:
    """The JSON that Grafana loads."""
    return json.dumps(board, indent=1, ensure_ascii=False, cls=JSONEncoder) + "\n"


def main(folder: Path = FOLDER) -> None:
    """Writes the dashboards into `folder`, which is made if there is none."""
    folder.mkdir(exist_ok=True)
    for name, build in DASHBOARDS.items():
        (folder / f"{name}.json").write_text(as_text(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
