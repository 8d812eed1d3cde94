// What Grafana makes of Prometheus' answers, up to the point where a panel draws: frames, transformations, field
// configuration, mappings, colours, and the words that a panel shows instead of a drawing. It runs in Node and browsers.
//
// Grafana's packages do all but four things, which live in its server and its app, and are done here as they do them:
// the data source's frames (series, tables, histograms), the trend panel's checks, the words of an empty panel, and the
// list of properties that a field may have.
'use strict';

const grafana = require('@grafana/data');
const { firstValueFrom } = require('rxjs');

const UTC = 'utc';

grafana.standardTransformersRegistry.setInit(() => {
  const unique = new Map(Object.values(grafana.standardTransformers).map((one) => [one.id, one]));
  return [...unique.values()].map((one) => ({ id: one.id, name: one.name, transformation: one, editor: () => null }));
});

// A recording (recording.py) has `answers`, {query: what Prometheus returned}, and `from`, `to` and `step` in seconds.

/** Frames of one panel. */
function framesOf(panel, answers, step) {
  const several = panel.targets.length > 1;
  return panel.targets.flatMap((target) => {
    const series = answers[`${target.instant ? "now " : ""}${target.expr}`];
    if (!series?.length) return [];
    if (target.format === 'table') return [table(target, series, several ? `Value #${target.refId}` : 'Value')];
    if (target.format === 'heatmap') return [histogram(target, series, step)];
    return series.map((one) => curve(target, one, step));
  });
}

const times = (series) => series.values.map(([seconds]) => seconds * 1000);
const numbers = (series) => series.values.map(([, text]) => Number(text.replace('Inf', 'Infinity')));
const timeField = (values, config = {}) => ({ name: 'Time', type: 'time', values, config });

function legendOf(target, labels) {
  return target.legendFormat.replace(/{{\s*(\w+)\s*}}/g, (_, label) => labels[label] ?? '').trim();
}

function curve(target, series, step) {
  const name = legendOf(target, series.metric);
  const config = { displayNameFromDS: name };
  return grafana.toDataFrame({
    refId: target.refId,
    name,
    fields: [
      timeField(times(series), target.instant ? {} : { interval: step * 1000 }),
      { name: 'Value', type: 'number', values: numbers(series), labels: series.metric, config },
    ],
  });
}

/** One row per series and time, a column per label. */
function table(target, allSeries, valueName) {
  const labels = [...new Set(allSeries.flatMap((series) => Object.keys(series.metric).sort()))];
  const column = (values) => allSeries.flatMap(values);
  const frame = grafana.toDataFrame({
    refId: target.refId,
    fields: [
      timeField(column(times)),
      ...labels.map((label) => ({
        name: label,
        type: 'string',
        config: {},
        values: column((series) => series.values.map(() => series.metric[label] ?? '')),
      })),
      { name: valueName, type: 'number', values: column(numbers), config: {} },
    ],
  });
  return grafana.sortDataFrame(frame, 0);
}

/** A column per bucket, with what lies in this bucket alone; Prometheus counts those below as well. */
function histogram(target, allSeries, step) {
  const edge = (series) => Number(series.metric.le.replace('Inf', 'Infinity'));
  const sorted = [...allSeries].sort((one, other) => edge(one) - edge(other));
  const cumulative = sorted.map(numbers);
  return grafana.toDataFrame({
    refId: target.refId,
    meta: { type: 'heatmap-rows' },
    fields: [
      timeField(times(sorted[0]), { interval: step * 1000 }),
      ...sorted.map((series, index) => ({
        name: series.metric.le,
        type: 'number',
        config: {},
        values: cumulative[index].map((count, at) => count - (index > 0 ? cumulative[index - 1][at] : 0)),
      })),
    ],
  });
}

const fieldConfigOf = (panel) => ({ defaults: {}, overrides: [], ...panel.fieldConfig });

/** The properties that defaults or overrides of the panel set, as Grafana's registry would list them. */
function propertiesOf({ defaults, overrides }) {
  const standard = ['unit', 'min', 'max', 'decimals', 'mappings', 'color', 'thresholds', 'displayName', 'noValue'];
  const overridden = overrides.flatMap((one) => one.properties.map(({ id }) => id));
  const custom = [...Object.keys(defaults.custom ?? {}).map((key) => `custom.${key}`), ...overridden];
  const property = (id) => ({
    id,
    path: id.replace(/^custom\./, ''),
    name: id,
    isCustom: id.startsWith('custom.'),
    process: (value) => value,
    shouldApply: () => true,
  });
  return new grafana.FieldConfigOptionsRegistry(() => [...new Set([...standard, ...custom])].map(property));
}

/** Frames as a panel's drawing gets them: transformed, and with the configuration of every field. */
async function prepare(panel, recording, theme) {
  const frames = framesOf(panel, recording.answers, recording.step);
  const transformations = panel.transformations ?? [];
  const transformed = await firstValueFrom(grafana.transformDataFrame(transformations, frames));
  const prepared = grafana.applyFieldOverrides({
    data: transformed,
    fieldConfig: fieldConfigOf(panel),
    fieldConfigRegistry: propertiesOf(fieldConfigOf(panel)),
    replaceVariables: (text) => text,
    theme,
    timeZone: UTC,
  });
  grafana.cacheFieldDisplayNames(prepared);
  return panel.type === 'stat' ? prepared : graphable(prepared, panel, recording, theme);
}

/** Nulls where values are missing or cannot be drawn, x first, and colours by the order of the others. */
function graphable(frames, panel, { from, to }, theme) {
  const { xField } = panel.options;
  const edges = { refFieldPseudoMin: from * 1000, refFieldPseudoMax: to * 1000 };
  const withGaps = xField ? frames : frames.map((frame) => grafana.applyNullInsertThreshold({ frame, ...edges }));
  let index = 0;
  return withGaps.map((frame) => {
    const isX = (field) => field.type === 'time' || field.state.displayName === xField;
    const fields = [...frame.fields.filter(isX), ...frame.fields.filter((field) => !isX(field))];
    const drawn = fields.map((field) => {
      const values = field.values.map((value) => (Number.isFinite(value) ? value : null));
      const state = isX(field) ? field.state : { ...field.state, seriesIndex: index++ };
      const copy = { ...field, state, values };
      return { ...copy, display: grafana.getDisplayProcessor({ field: copy, theme }) };
    });
    return { ...frame, fields: drawn };
  });
}

/** The values of a stat panel, each with its text, colour and name. */
function displayValues(panel, frames, theme) {
  return grafana.getFieldDisplayValues({
    fieldConfig: fieldConfigOf(panel),
    reduceOptions: panel.options.reduceOptions,
    replaceVariables: (text) => text,
    theme,
    data: frames,
    timeZone: UTC,
  });
}

const curvesOf = (frame, xField) =>
  frame.fields.filter((field) => field.type === 'number' && field.state.displayName !== xField);

/** What the panel says instead of drawing; null when it draws. */
function messageOf(panel, frames) {
  if (panel.type === 'stat') return null;
  if (panel.type === 'trend') {
    if (frames.length > 1) return 'Only one frame is supported, consider adding a join transformation';
    const x = frames[0]?.fields.find((field) => field.state.displayName === panel.options.xField);
    if (!x) return `Unable to find field: ${panel.options.xField}`;
    if (!grafana.isLikelyAscendingVector(x.values)) return 'Values must be in ascending order';
  }
  if (frames.every((frame) => frame.length === 0)) return fieldConfigOf(panel).defaults.noValue ?? 'No data';
  return null;
}

/** A panel in words: what it says, and its values or curves. */
async function describe(panel, recording, theme) {
  const frames = await prepare(panel, recording, theme);
  const shown = { title: panel.title, type: panel.type, message: messageOf(panel, frames) };
  if (panel.type === 'stat') {
    const named = panel.options.textMode === 'name';
    return {
      ...shown,
      values: displayValues(panel, frames, theme).map(({ display }) => ({
        name: display.title ?? '',
        text: named ? (display.title ?? '') : grafana.formattedValueToString(display),
        color: display.color,
      })),
    };
  }
  return { ...shown, curves: frames.flatMap((frame) => curvesOf(frame, panel.options.xField).map(describeCurve(theme))) };
}

const describeCurve = (theme) => (field) => ({
  name: field.state.displayName,
  color: grafana.getFieldSeriesColor(field, theme).color,
  points: field.values.filter(Number.isFinite).length,
});

module.exports = { describe, displayValues, messageOf, prepare };
