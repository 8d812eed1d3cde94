"""The three dashboards as code: `python -m monitor.grafana.generate` writes their JSON into dashboards/ beside it.

Each answers a person's questions in the order in which they come, on one screen of 1080 lines:

    training     does it learn, and what: numbers now, curves by tokens, then by time
    stream       who waits for whom, and what went wrong between producers and trainer
    resources    what each process uses of its machine

A dashboard is rows of panels from left to right, 24 units wide and 24 high; `laid_out` gives places and ids. What a
panel shows is said by the help texts of the metrics that its queries name, so that there is one explanation of each.
Queries name `$run` and `$sae`, never a scrape job, and work without the recording rules.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from monitor.metrics import ALL

Json = dict[str, Any]

FOLDER = Path(__file__).parent / "dashboards"
SCHEMA_VERSION = 39
"""Of Grafana 10.4; later ones migrate it when they load it."""
COLUMNS = 24

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SHORT = {"{RUN": '{run="$run"', "{SAE": '{run="$run", sae=~"$sae"', "[RATE]": "[$__rate_interval]"}
"""What the queries below abbreviate."""
HELP = {metric.name: metric.help for metric in ALL}

GOOD, ODD, BAD, CALM = "green", "orange", "red", "blue"


# --- Panels ----------------------------------------------------------------------------------------------------------


def query(expr: str, legend: str = "", **more: Any) -> Json:
    """One query, abbreviated as SHORT says; `legend` may name labels as {{label}}."""
    asked = {"datasource": SOURCE, "expr": _spelled_out(expr), "legendFormat": legend or "__auto"}
    return asked | {"range": True, "instant": False} | more


def _spelled_out(expr: str) -> str:
    for short, long in SHORT.items():
        expr = expr.replace(short, long)
    return expr


def panel(
    kind: str, title: str, queries: list[Json], options: Json, field: Json, note: str = "",
    overrides: list[Json] | None = None,
) -> Json:  # fmt: skip
    """What all kinds have in common. The description explains every metric that is asked for."""
    expressions = " ".join(one["expr"] for one in queries)
    named = dict.fromkeys(re.findall(r"sluice_\w+", expressions))
    explained = [HELP[base] for name in named if (base := re.sub("_(sum|count|bucket)$", "", name)) in HELP]
    return {
        "type": kind,
        "title": title,
        "description": "\n\n".join([note] * bool(note) + explained),
        "datasource": SOURCE,
        "targets": [one | {"refId": chr(ord("A") + index)} for index, one in enumerate(queries)],
        "options": options,
        "fieldConfig": {"defaults": field, "overrides": overrides or []},
    }


def steps(*limits: tuple[float | None, str]) -> Json:
    """Colours by value: each holds from its limit on, the first from minus infinity."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in limits]}


def number(
    title: str, expr: str, unit: str = "short", legend: str = "", limits: Json | None = None, text: str = "auto",
    decimals: int | None = None, note: str = "", mappings: list[Json] | None = None,
    overrides: list[Json] | None = None,
) -> Json:  # fmt: skip
    """The present value, large; one per series."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
        "textMode": text,
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
    }
    field: Json = {"unit": unit, "color": {"mode": "thresholds"}, "thresholds": limits or steps((None, GOOD))}
    field |= {"mappings": mappings or []}
    if decimals is not None:
        field["decimals"] = decimals
    # Of this moment: over a range, a state that was left an hour ago would be shown beside the present one.
    asked = query(expr, legend, range=False, instant=True)
    return panel("stat", title, [asked], options, field, note, overrides)


def _lines(unit: str, log: bool, stacked: bool = False, top: float | None = None) -> Json:
    field: Json = {
        "unit": unit,
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if stacked else 0,
            "showPoints": "never",
            "spanNulls": True,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        },
    }
    if not log:
        field["min"] = 0
    if top is not None:
        field["max"] = top
    return field


LEGEND = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
TOOLTIP = {"mode": "multi", "sort": "none"}


def over_time(
    title: str, *queries: Json, unit: str = "short", log: bool = False, stacked: bool = False,
    top: float | None = None, note: str = "",
) -> Json:  # fmt: skip
    """Curves by time. Snapshots stand in them as annotations."""
    options = {"legend": LEGEND, "tooltip": TOOLTIP}
    return panel("timeseries", title, list(queries), options, _lines(unit, log, stacked, top), note)


def over_tokens(title: str, tokens: str, *queries: Json, unit: str = "short", log: bool = False) -> Json:
    """Curves by tokens, which `tokens` counts: joined by time, then put in the order of tokens.

    That order also mends what a trainer does that went back to its checkpoint, and counts some tokens again.
    """
    options = {"legend": LEGEND, "tooltip": TOOLTIP, "xField": "tokens"}
    of_tokens = {
        "matcher": {"id": "byName", "options": "tokens"},
        "properties": [
            {"id": "unit", "value": "short"},
            {"id": "custom.axisLabel", "value": "tokens"},
            {"id": "custom.scaleDistribution", "value": {"type": "linear"}},
        ],
    }
    asked = [query(tokens, "tokens"), *queries]
    shown = panel("trend", title, asked, options, _lines(unit, log), overrides=[of_tokens])
    shown["transformations"] = [
        {"id": "joinByField", "options": {"byField": "Time", "mode": "outer"}},
        {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": "tokens", "desc": False}]}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": {}}},
    ]
    return shown


def heat_map(title: str, expr: str, label: str, note: str) -> Json:
    """A histogram's buckets over time, the fuller the brighter."""
    options = {
        "calculate": False,
        "cellGap": 0,
        "color": {"mode": "scheme", "scheme": "Viridis", "fill": "viridis", "scale": "exponential", "exponent": 0.5,
                  "steps": 64, "reverse": False},
        "filterValues": {"le": 1e-9},
        "yAxis": {"axisPlacement": "left", "axisLabel": label, "unit": "short", "reverse": False},
        "rowsFrame": {"layout": "le"},
        "legend": {"show": False},
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "showValue": "never",
    }  # fmt: skip
    return panel("heatmap", title, [query(expr, "{{le}}", format="heatmap")], options, {}, note)


def of_series(name: str, color: str) -> Json:
    """The series of this name in a colour of its own."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
    }


def mapped(start: float | None, end: float | None, text: str, color: str) -> Json:
    """A number between `start` and `end` is shown as a word."""
    result = {"text": text, "color": color, "index": 0}
    return {"type": "range", "options": {"from": start, "to": end, "result": result}}


# --- Dashboards ------------------------------------------------------------------------------------------------------

Row = tuple[int, list[tuple[int, Json]]]
"""Height, and the panels from left to right with their widths."""


def laid_out(rows: list[Row]) -> list[Json]:
    """The panels with ids and places."""
    panels: list[Json] = []
    y = 0
    for height, row in rows:
        x = 0
        for width, one in row:
            panels.append({"id": len(panels) + 1, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **one})
            x += width
        assert x == COLUMNS, f"the row at {y} is {x} wide"
        y += height
    return panels


def variable(name: str, label: str, values: str, **more: Any) -> Json:
    """A choice that Prometheus knows the values of."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": values, "refId": "values"},
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        **more,
    }


def dashboard(name: str, title: str, rows: list[Row], by_sae: bool = False) -> Json:
    source = {"type": "datasource", "name": "datasource", "label": "data", "query": "prometheus", "hide": 0}
    run = variable("run", "run", "label_values(sluice_run_info, run)")
    sae = variable(
        "sae", "SAE", _spelled_out("label_values(sluice_fvu{RUN}, sae)"), multi=True, includeAll=True, allValue=".*",
        current={"text": "All", "value": "$__all", "selected": True},
    )  # fmt: skip
    snapshots = {
        "name": "snapshots",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": CALM,
        "expr": _spelled_out("sluice_snapshot_timestamp_seconds{RUN} * 1000"),
        "useValueForTime": True,
        "step": "10s",
        "titleFormat": "snapshot",
        "textFormat": "published by {{instance}}",
    }
    link = {
        "type": "dashboards", "title": "Sluice", "tags": ["sluice"], "asDropdown": False, "includeVars": True,
        "keepTime": True, "targetBlank": False, "icon": "external link", "tooltip": "",
    }  # fmt: skip
    return {
        "uid": f"sluice-{name}",
        "title": title,
        "tags": ["sluice"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "timezone": "browser",
        "templating": {"list": [source, run, sae] if by_sae else [source, run]},
        "annotations": {"list": [snapshots]},
        "links": [link],
        "panels": laid_out(rows),
    }


def training() -> Json:
    """Does it learn?"""
    trained = "max(sluice_tokens_trained_total{RUN})"
    evaluated = "max(sluice_evaluated_snapshot_tokens{SAE})"
    by_sae = "{{sae}}"
    states = [of_series("starved", BAD), of_series("filling", ODD), of_series("paused", CALM)]
    now = [
        number("State", "sluice_state{RUN} == 1", legend="{{state}}", text="name", overrides=states),
        number("Tokens trained", trained),
        number("Tokens per second", "sluice_tokens_per_second{RUN}"),
        number("Time left", "(sluice_target_tokens{RUN} - sluice_tokens_trained_total{RUN}) / "
               "(sluice_tokens_per_second{RUN} > 0)", unit="s",
               note="At the present speed; empty in a run without an end."),
        number("FVU", "sluice_fvu{SAE}", legend=by_sae, decimals=4),
        number("ΔCE", "sluice_ce_delta{SAE}", legend=by_sae, decimals=3),
        number("L0", "sluice_l0{SAE}", legend=by_sae, decimals=1),
        number("Dead latents", "sluice_dead_latents_ratio{SAE}", unit="percentunit", legend=by_sae, decimals=1,
               limits=steps((None, GOOD), (0.1, ODD), (0.3, BAD)), note="Empty until dead_tokens have been seen."),
    ]  # fmt: skip
    by_tokens = [
        over_tokens("FVU by tokens", trained, query("sluice_fvu{SAE}", by_sae), log=True),
        over_tokens("ΔCE by tokens", evaluated, query("sluice_ce_delta{SAE}", by_sae), log=True),
        over_tokens("L0 by tokens", trained, query("sluice_l0{SAE}", by_sae)),
    ]
    by_time = [
        over_time("Loss, by part", query("sluice_loss{SAE}", "{{sae}} {{part}}"), log=True),
        over_time("FVU", query("sluice_fvu{SAE}", by_sae),
                  query("sluice_evaluation_fvu{SAE}", "{{sae}} held out"), log=True),
        over_time("MSE", query("sluice_mse{SAE}", by_sae), log=True),
        over_time("Dead and dense latents", query("sluice_dead_latents{SAE}", "{{sae}} dead"),
                  query("sluice_evaluation_dense_latents{SAE}", "{{sae}} dense")),
    ]  # fmt: skip
    why = [
        heat_map("Latents by firing rate", "sum by (le) (sluice_feature_density_bucket{SAE})", "log10 rate",
                 "Dead latents lie at the bottom, dense ones at the top. All chosen SAEs together: choose one above."),
        over_time("Shrinkage", query("sluice_shrinkage{SAE}", by_sae),
                  query("sluice_evaluation_shrinkage{SAE}", "{{sae}} held out")),
        over_time("Learning rate", query("sluice_learning_rate{SAE}", by_sae)),
        over_time("Gradient norm", query("sluice_grad_norm{SAE}", by_sae),
                  query("increase(sluice_skipped_steps_total{SAE}[RATE])", "{{sae}} skipped steps")),
        over_time("Held out", query("sluice_ce_recovered{SAE}", "{{sae}} CE recovered"),
                  query("sluice_ce_recovered_mean_ablation{SAE}", "{{sae}} CE recovered, mean ablation"),
                  query("sluice_kl{SAE}", "{{sae}} KL"), query("sluice_evaluation_cosine{SAE}", "{{sae}} cosine")),
    ]  # fmt: skip
    rows: list[Row] = [
        (3, [(3, one) for one in now]),
        (7, [(8, one) for one in by_tokens]),
        (7, [(6, one) for one in by_time]),
        (7, list(zip((7, 4, 4, 4, 5), why, strict=True))),
    ]
    return dashboard("training", "Sluice · training", rows, by_sae=True)


def stream() -> Json:
    """Who waits for whom?"""
    waits = "sluice_data_wait_ratio{RUN} - sluice_credit_wait_ratio{RUN}"
    verdicts = [
        mapped(None, -0.05, "the trainer", GOOD),
        mapped(-0.05, 0.05, "nobody", GOOD),
        mapped(0.05, None, "the producers", ODD),
    ]
    sent = "rate(sluice_producer_tokens_total{RUN}[RATE])"
    fault_limits = steps((None, GOOD), (1, ODD))
    now = [
        number("Bottleneck", waits, mappings=verdicts,
               note="Who keeps the other waiting. The trainer: training goes as fast as it can."),
        number("Producers", "sum(sluice_producers{RUN})", limits=steps((None, BAD), (1, GOOD))),
        number("Tokens sent per second", "sum(rate(sluice_producer_tokens_total{RUN}[RATE]))"),
        number("Buffer filled", "sluice_buffer_rows{RUN} / sluice_buffer_capacity_rows{RUN}",
               unit="percentunit", limits=steps((None, BAD), (0.5, GOOD))),
        number("Pass over the corpus", "sluice_epoch{RUN}"),
        number("Shards set aside", 'sluice_leases{RUN, state="set_aside"}', limits=fault_limits),
        number("Producers lost", "sluice_sessions_lost_total{RUN}", limits=fault_limits),
        number("Broken invariants", "sum(sluice_invariant_breaches_total{RUN})",
               limits=steps((None, GOOD), (1, BAD))),
    ]  # fmt: skip
    flow = [
        over_time("Who waits", query("sluice_data_wait_ratio{RUN}", "trainer, for rows"),
                  query("sluice_credit_wait_ratio{RUN}", "producers, for room"), unit="percentunit", top=1),
        over_time("Tokens per second", query("rate(sluice_tokens_trained_total{RUN}[RATE])", "trained"),
                  query(sent, "sent by {{instance}}")),
        over_time("Producers wait, by cause",
                  query("avg by (cause) (rate(sluice_producer_stall_seconds_total{RUN}[RATE]))",
                        "{{cause}}"), unit="percentunit", stacked=True, note="Share of the time, mean over producers."),
    ]  # fmt: skip
    inside = [
        over_time("Producers", query("sluice_producers{RUN}", "{{state}}"), stacked=True),
        over_time("Buffer and credit", query("sluice_buffer_rows{RUN}", "rows"),
                  query("sluice_credit_rows_outstanding{RUN}", "may still come"),
                  query("sluice_buffer_capacity_rows{RUN}", "capacity")),
        over_time("Mixing: mates of a row in its batch", query("sluice_buffer_same_context_mates{RUN}", "mates")),
        over_time("Shards of this pass", query("sluice_leases{RUN}", "{{state}}"), stacked=True),
    ]  # fmt: skip
    faults = [
        over_time("Rows rejected",
                  query("sum by (reason) (increase(sluice_rows_rejected_total{RUN}[RATE]))",
                        "{{reason}}"), note="Empty when all is well."),
        over_time("Protocol errors and strangers",
                  query("sum by (kind) (increase(sluice_protocol_errors_total{RUN}[RATE]))", "{{kind}}"),
                  query("increase(sluice_auth_failures_total{RUN}[RATE])", "unknown key")),
        over_time("Positions not sent",
                  query("sum by (reason) (rate(sluice_producer_rows_dropped_total{RUN}[RATE]))",
                        "{{reason}} per second"),
                  query("rate(sluice_tokens_discarded_total{RUN}[RATE])", "outliers, as told")),
        over_time("A forward pass",
                  query("rate(sluice_producer_forward_seconds_sum{RUN}[RATE]) / "
                        "rate(sluice_producer_forward_seconds_count{RUN}[RATE])", "{{instance}}"), unit="s"),
    ]  # fmt: skip
    rows: list[Row] = [
        (3, [(3, one) for one in now]),
        (7, [(8, one) for one in flow]),
        (7, [(6, one) for one in inside]),
        (7, [(6, one) for one in faults]),
    ]
    return dashboard("stream", "Sluice · stream", rows)


def resources() -> Json:
    """What does it cost?"""
    process = "{{job}} {{instance}}"
    up = [{"type": "value", "options": {"0": {"text": "down", "color": BAD}, "1": {"text": "up", "color": GOOD}}}]
    since_checkpoint = "time() - sluice_checkpoint_last_success_timestamp_seconds{RUN}"
    now = [
        number("Processes", "up{RUN}", legend=process, mappings=up, text="value_and_name"),
        number("Memory, all processes", "sum(process_resident_memory_bytes{RUN})", unit="bytes"),
        number("CPU cores, all processes", "sum(rate(process_cpu_seconds_total{RUN}[RATE]))",
               decimals=1),
        number("Since the last checkpoint", since_checkpoint, unit="s"),
    ]  # fmt: skip
    machine = [
        over_time("CPU cores", query("rate(process_cpu_seconds_total{RUN}[RATE])", process)),
        over_time("Memory", query("process_resident_memory_bytes{RUN}", process), unit="bytes"),
        over_time("Open files, of those allowed",
                  query("process_open_fds{RUN} / process_max_fds{RUN}", process), unit="percentunit"),
    ]  # fmt: skip
    pace = [
        over_time("Tokens per second",
                  query("rate(sluice_tokens_trained_total{RUN}[RATE])", "trained"),
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
                  query("sluice_evaluated_snapshot_tokens{RUN}", "newest evaluated, {{sae}}")),
        over_time("An evaluation", query("sluice_evaluation_seconds{RUN}", "{{sae}}"), unit="s"),
        over_time("A scrape", query("scrape_duration_seconds{RUN}", process), unit="s"),
    ]  # fmt: skip
    rows: list[Row] = [
        (4, list(zip((12, 4, 4, 4), now, strict=True))),
        (7, [(8, one) for one in machine]),
        (7, [(8, one) for one in pace]),
        (6, [(6, one) for one in upkeep]),
    ]
    return dashboard("resources", "Sluice · resources", rows)


DASHBOARDS = {"training": training, "stream": stream, "resources": resources}


def as_text(board: Json) -> str:
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, make in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(as_text(make()), encoding="utf-8")


if __name__ == "__main__":
    main()
