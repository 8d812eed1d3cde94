"""The kinds of panel that the dashboards use, and a dashboard of them, built with Grafana's own SDK.

    number        the present value, large
    over_time     curves by time
    over_tokens   curves by tokens
    heat_map      a histogram's buckets over time
    dashboard     rows of panels, with Sluice's variables, its link and the snapshots as annotations

A panel is explained by the help texts of the metrics in its queries, so that there is one explanation of each.
Queries are abbreviated as ABBREVIATIONS says. They name `$run` and `$sae`, never a scrape job. Several runs can be
chosen: every series keeps its run, and every legend begins with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TypeVar

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries, trend
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    HeatmapCellLayout,
    LineStyle,
    ScaleDistribution,
    ScaleDistributionConfig,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitor.evaluation.measures import MEASURES, Measure
from monitor.metrics import all_metrics

SCHEMA_VERSION = 39
"""Dashboard schema of Grafana 10.4; later versions migrate it when they load it."""
COLUMNS = 24

SOURCE = models.DataSourceRef("prometheus", "${datasource}")
ABBREVIATIONS = {"{RUN": '{run=~"$run"', "{SAE": '{run=~"$run", sae=~"$sae"', "[RATE]": "[$__rate_interval]"}

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
NEUTRAL = "text"
"""The colour of text: of values that are neither good nor bad."""

LONGEST_BRIDGED_GAP = 60_000.0
"""Milliseconds without a value that a curve by time bridges, as after scrapes that failed; longer gaps stay open."""
NOTHING_YET = models.SpecialValueMap(
    models.DashboardSpecialValueMapOptions(
        models.SpecialValueMatch.NULL_AND_NAN, models.ValueMappingResult("–", NEUTRAL, index=0)
    )
)
"""Shows a dash, in no colour that would mean something, where there is no value."""
DASHED = LineStyle(fill="dash", dash=[6, 4])
PAGE = "http://127.0.0.1:8710"
"""Where the monitor serves the live page by default; also behind `kubectl port-forward` and `ssh -L`."""

Panel = stat.Panel | timeseries.Panel | trend.Panel | heatmap.Panel
AnyPanel = TypeVar("AnyPanel", stat.Panel, timeseries.Panel, trend.Panel, heatmap.Panel)
LinePanel = TypeVar("LinePanel", timeseries.Panel, trend.Panel)


# --- Queries ---------------------------------------------------------------------------------------------------------


def expand(expr: str) -> str:
    """The expression with its abbreviations written out."""
    for short, long in ABBREVIATIONS.items():
        expr = expr.replace(short, long)
    return expr


def query(expr: str, legend: str = "") -> prometheus.Dataquery:
    """A query over the range of the dashboard, named by the run and `legend`, which may name labels as {{label}}."""
    legend = f"{{{{run}}}} {legend}".strip()
    return prometheus.Dataquery().datasource(SOURCE).expr(expand(expr)).legend_format(legend).range()


def curves(panel: str) -> list[prometheus.Dataquery]:
    """A query for each measure that has a curve in the panel of this title, one curve per SAE."""
    return [
        query(by_sae(measure), f"{{{{sae}}}} {curve.legend}".strip())
        for measure in MEASURES
        for curve in measure.curves
        if curve.panel == panel
    ]


def by_sae(measure: Measure) -> str:
    """A measure, by run and SAE. Where it has not been taken yet it is NaN.

    Grafana gives colours by the order of curves: so every SAE has its place, and one colour in all panels.
    """
    reported = "max by (run, sae) (sluice_fvu{SAE})"
    values = f"max by (run, sae) ({measure.metric}{{SAE}})"
    return values if values == reported else f"{values} or NaN * {reported}"


def explain(queries: Sequence[prometheus.Dataquery], note: str) -> str:
    """The note, and the help text of every metric that the queries name, as paragraphs."""
    names = dict.fromkeys(re.findall(r"sluice_\w+", " ".join(one.build().expr for one in queries)))
    metrics = [re.sub("_(sum|count|bucket)$", "", name) for name in names]
    help_texts = {metric.name: metric.help for metric in all_metrics()}
    return "\n\n".join([note] * bool(note) + [help_texts[metric] for metric in metrics if metric in help_texts])


# --- Panels ----------------------------------------------------------------------------------------------------------


def describe(panel: AnyPanel, title: str, queries: Sequence[prometheus.Dataquery], note: str = "") -> AnyPanel:
    """Gives a panel what all kinds have: its title, queries and explanation."""
    for letter, one in zip(ascii_uppercase, queries, strict=False):
        panel.with_target(one.ref_id(letter))
    return panel.title(title).description(explain(queries, note)).datasource(SOURCE)


def thresholds(*steps: tuple[float | None, str]) -> builders.ThresholdsConfig:
    """Colours by value: each holds from its value on, the first, None, from minus infinity."""
    config = builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    return config.steps([models.Threshold(value, color) for value, color in steps])


def range_text(start: float, end: float, text: str, color: str) -> models.RangeMap:
    """Shows a number from `start` to `end` as a word. The SDK writes an open end as null, which Grafana takes for 0."""
    return models.RangeMap(models.DashboardRangeMapOptions(start, end, models.ValueMappingResult(text, color, index=0)))


def value_texts(texts: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    """Shows each of these values as a word: {value: (word, colour)}."""
    return models.ValueMap({value: models.ValueMappingResult(*result) for value, result in texts.items()})


def number(
    title: str, expr: str, unit: str = "short", legend: str = "", limits: builders.ThresholdsConfig | None = None,
    text: BigValueTextMode = BigValueTextMode.AUTO, decimals: int | None = None, note: str = "",
    mappings: Sequence[models.ValueMapping] = (), colors: Mapping[str, str] | None = None,
) -> stat.Panel:  # fmt: skip
    """The present value, large; one per series. Without `limits` it is neither good nor bad.

    `colors` is {end of a series' name: its colour}; the others go by limits.
    """
    # Of this moment: over a range, a state that was left an hour ago would be shown beside the present one.
    panel = describe(stat.Panel(), title, [query(expr, legend).instant()], note)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.text_mode(text).graph_mode(BigValueGraphMode.NONE)
    panel.unit(unit).mappings([*mappings, NOTHING_YET]).thresholds(limits or thresholds((None, NEUTRAL)))
    panel.color_scheme(builders.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    if decimals is not None:
        panel.decimals(decimals)
    for series, color in (colors or {}).items():
        fixed = models.FieldColor(models.FieldColorModeId.FIXED, color)
        panel.override_by_regexp(f"/{series}$/", [models.DynamicConfigValue("color", fixed)])
    return panel


def firing_alerts() -> stat.Panel:
    """The names of the alerts that fire: orange for a warning, red for a critical one."""
    firing = 'max by (run, alertname) (ALERTS{RUN, alertstate="firing", severity="%s"})'
    none = 'label_replace(vector(0), "alertname", "none", "", "")'
    expr = f"({firing % 'warning'} or 2 * {firing % 'critical'}) or on () {none}"
    limits = thresholds((None, GREEN), (1, ORANGE), (2, RED))
    note = "Rules of monitor/prometheus/alerts.yml; what to do about each: monitor/RUNBOOK.md."
    return number("Alerts", expr, legend="{{alertname}}", limits=limits, text=BigValueTextMode.NAME, note=note)


def measure_number(
    title: str, measure: Measure, unit: str = "short", limits: builders.ThresholdsConfig | None = None, note: str = ""
) -> stat.Panel:
    """The present value of a measure, large; one per SAE."""
    digits = re.search(r"\.(\d+)", measure.format)
    decimals = int(digits[1]) if digits else None
    expr = f"{measure.metric}{{SAE}}"
    return number(title, expr, unit, legend="{{sae}}", limits=limits, decimals=decimals, note=note)


def draw_lines(
    panel: LinePanel, unit: str, log: bool, stacked: bool = False, bottom: float | None = None, top: float | None = None
) -> LinePanel:
    """Gives a panel thin lines from zero, or on a logarithmic scale, with a legend below.

    Numbers on a logarithmic scale are written as powers of ten: Grafana gives all its ticks the same decimals, so that
    the lower ones would all be 0.
    """
    stacking = StackingMode.NORMAL if stacked else StackingMode.NONE
    scale = common.ScaleDistributionConfig()
    panel.unit(unit).color_scheme(builders.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    panel.draw_style(GraphDrawStyle.LINE).line_width(1).fill_opacity(30 if stacked else 0)
    panel.show_points(VisibilityMode.NEVER).span_nulls(LONGEST_BRIDGED_GAP)
    panel.stacking(common.StackingConfig().mode(stacking).group("A"))
    panel.scale_distribution(scale.type(ScaleDistribution.LOG).log(10) if log else scale)
    panel.legend(common.VizLegendOptions().show_legend(True))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.NONE))
    if log:
        panel.unit("sci").decimals(2)
    if bottom is not None or not log:
        panel.min(bottom or 0)
    if top is not None:
        panel.max(top)
    return panel


def over_time(
    title: str, *queries: prometheus.Dataquery, unit: str = "short", log: bool = False, stacked: bool = False,
    bottom: float | None = None, top: float | None = None, note: str = "", empty: str | None = None,
) -> timeseries.Panel:  # fmt: skip
    """Curves by time; those of held-out text are dashed. `empty` stands in a panel without any.

    Snapshots stand in them as annotations.
    """
    panel = draw_lines(describe(timeseries.Panel(), title, queries, note), unit, log, stacked, bottom, top)
    panel.override_by_regexp("/ held out/", [models.DynamicConfigValue("custom.lineStyle", DASHED)])
    return panel if empty is None else panel.no_value(empty)


def over_tokens(title: str, tokens: str, log: bool = False, points: bool = False) -> trend.Panel:
    """The measure with a curve in the panel of this title, by tokens: one curve per run and SAE.

    With `points` each value is marked: where values are few, a first one alone would not be seen.

    `tokens` is the expression of x, by run, or by run and SAE. Prometheus answers with two tables of time and curve:
    of tokens and of values. Grafana merges them, and makes a matrix with a row per number of tokens and a column per
    curve. So runs that trained at other times lie over each other; and x rises strictly, without which Grafana
    draws nothing, where tokens stand still and where a trainer has gone back to its checkpoint.
    """
    (measure,) = [one for one in MEASURES for curve in one.curves if curve.panel == title]
    values = by_sae(measure)
    labels = "run, sae" if "by (run, sae)" in tokens else "run"
    x, y = f"({values}) ^ 0 * on ({labels}) group_left () ({tokens})", values
    named = [query(f'label_join({expr}, "curve", " ", "run", "sae")').format(PromQueryFormat.TABLE) for expr in (x, y)]
    panel = draw_lines(describe(trend.Panel(), title, named), "short", log)
    # A row has the values of the curves that were at this number of tokens; the others go on in another row.
    panel.x_field("tokens").span_nulls(True)
    panel.point_size(5).show_points(VisibilityMode.ALWAYS if points else VisibilityMode.NEVER)
    linear = ScaleDistributionConfig(ScaleDistribution.LINEAR)
    properties = {"unit": "short", "decimals": None, "custom.axisLabel": "tokens", "custom.scaleDistribution": linear}
    panel.override_by_name("tokens", [models.DynamicConfigValue(*one) for one in properties.items()])
    matrix = {"columnField": "curve", "rowField": "Value #A", "valueField": "Value #B", "emptyValue": "null"}
    corner = f"{matrix['rowField']}\\{matrix['columnField']}"
    transformations = [
        ("merge", {}),
        ("sortBy", {"fields": {}, "sort": [{"field": "curve", "desc": False}]}),
        ("groupingToMatrix", matrix),
        ("sortBy", {"fields": {}, "sort": [{"field": corner, "desc": False}]}),
        ("organize", {"excludeByName": {}, "indexByName": {}, "renameByName": {corner: "tokens"}}),
    ]
    for name, options in transformations:
        panel.with_transformation(models.DataTransformerConfig(name, options=options))
    return panel


def heat_map(title: str, expr: str, label: str, note: str) -> heatmap.Panel:
    """A histogram's buckets over time, the fuller the brighter; `label` names the axis of the buckets."""
    buckets = query(expr).legend_format("{{le}}").format(PromQueryFormat.HEATMAP)
    panel = describe(heatmap.Panel(), title, [buckets], note)
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Viridis").fill("viridis")
    panel.color(color.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).steps(64))
    axis = heatmap.YAxisConfig().axis_placement(AxisPlacement.LEFT).axis_label(label)
    panel.y_axis(axis.unit("short").reverse(False)).cell_gap(0).show_value(VisibilityMode.NEVER)
    panel.rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.LE))
    return panel.mode(TooltipDisplayMode.SINGLE).show_y_histogram().show_color_scale(False).hide_legend()


# --- Dashboards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Panels from left to right, of one height; as wide as one another unless `widths` says otherwise."""

    height: int
    panels: Sequence[Panel]
    widths: tuple[int, ...] = ()

    def place(self, board: builders.Dashboard, first_id: int) -> None:
        """Adds the panels to the dashboard, which goes on to the next line where this row is full."""
        widths = self.widths or (COLUMNS // len(self.panels),) * len(self.panels)
        for index, (panel, width) in enumerate(zip(self.panels, widths, strict=True)):
            board.with_panel(panel.height(self.height).span(width).id(first_id + index))


class SnapshotAnnotations(models.AnnotationQuery):
    """A mark in the curves at every time that a snapshot was published.

    Grafana leaves four of its fields to the Prometheus plugin, and the SDK knows none of them: they are added here.
    """

    def __init__(self) -> None:
        expr = expand("sluice_snapshot_timestamp_seconds{RUN} * 1000")
        super().__init__(name="snapshots", datasource=SOURCE, icon_color=BLUE, expr=expr)

    def to_json(self) -> dict[str, object]:
        of_prometheus = {"useValueForTime": True, "step": "10s"}
        of_prometheus |= {"titleFormat": "snapshot", "textFormat": "published by {{instance}}"}
        return super().to_json() | of_prometheus


def choice(name: str, label: str, values: str) -> builders.QueryVariable:
    """A variable that Prometheus knows the values of, read again with every change of the time range."""
    variable = builders.QueryVariable(name).label(label).datasource(SOURCE).hide(models.VariableHide.DONT_HIDE)
    variable.query({"query": expand(values), "refId": "values"})
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)


def dashboard(name: str, title: str, rows: Sequence[Row], by_sae: bool = False) -> models.Dashboard:
    """Rows from top to bottom, under the choice of run, and of SAEs too if `by_sae`."""
    board = builders.Dashboard(title).uid(f"sluice-{name}").tags(["sluice"]).editable()
    board.tooltip(models.DashboardCursorSync.CROSSHAIR).time("now-1h", "now").refresh("10s").timezone("browser")
    source = builders.DatasourceVariable("datasource").label("data").type("prometheus")
    board.with_variable(source.hide(models.VariableHide.DONT_HIDE))
    board.with_variable(choice("run", "runs", "label_values(sluice_run_info, run)").multi(True))
    if by_sae:
        saes = choice("sae", "SAE", "label_values(sluice_fvu{RUN}, sae)").multi(True).include_all(True).all_value(".*")
        board.with_variable(saes.current(models.VariableOption(selected=True, text="All", value="$__all")))
    address = builders.TextBoxVariable("page").label("live page").default_value(PAGE)
    board.with_variable(address.current(models.VariableOption(selected=True, text=PAGE, value=PAGE)))
    link = builders.DashboardLink("Sluice").type(models.DashboardLinkType.DASHBOARDS).tags(["sluice"])
    board.link(link.icon("external link").include_vars(True).keep_time(True))
    page = builders.DashboardLink("Live page").type(models.DashboardLinkType.LINK).url("${page}").icon("external link")
    board.link(page.tooltip("The monitor's page of the run: curves, snapshots, latents").target_blank(True))
    first_id = 1
    for row in rows:
        row.place(board, first_id)
        first_id += len(row.panels)
    built = board.build()
    built.schema_version = SCHEMA_VERSION
    built.annotations = models.AnnotationContainer([SnapshotAnnotations()])
    return built
