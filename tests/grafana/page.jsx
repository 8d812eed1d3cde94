// Draws a dashboard with Grafana's own components. The page defines `dashboard` and `recording` before this runs;
// afterwards `drawn` is what each panel shows, and the title of the document is "drawn".
//
// Grafana's package has the frame of a panel, the stat panel's values and the curves. Its heat map lives in its app:
// here cells of its data stand for it.
import React from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, dateTime, FieldMatcherID, fieldMatchers, ThemeContext } from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, preparePlotFrame, TimeSeries, VizRepeater } from '@grafana/ui';
import { describe, displayValues, messageOf, prepare } from './panels.js';

const MARGIN = 8;
const ROW_HEIGHT = 38;
const COLUMNS = 24;
const HEADER = 40;
const PADDING = 16;

const { dashboard, recording, mode = 'dark' } = window;
const theme = createTheme({ colors: { mode } });
const range = {
  from: dateTime(recording.from * 1000),
  to: dateTime(recording.to * 1000),
  raw: { from: 'now-1h', to: 'now' },
};
const ticks = {};

function Numbers({ panel, frames, width, height }) {
  const values = displayValues(panel, frames, theme);
  const { colorMode, graphMode, justifyMode, orientation, textMode } = panel.options;
  return (
    <VizRepeater
      getValues={() => values}
      source={values}
      width={width}
      height={height}
      orientation={orientation}
      itemSpacing={3}
      renderValue={({ value, width, height, count, orientation }) => (
        <BigValue
          value={value.display}
          {...{ count, width, height, theme, colorMode, graphMode, justifyMode, textMode }}
          parentOrientation={orientation}
        />
      )}
    />
  );
}

function Curves({ panel, frames, width, height }) {
  const { legend, xField } = panel.options;
  const byX = (frames, fields) =>
    preparePlotFrame(frames, { ...fields, x: fieldMatchers.get(FieldMatcherID.byName).get(xField) });
  return (
    <TimeSeries
      frames={frames}
      timeRange={range}
      timeZone="utc"
      width={width}
      height={height}
      legend={legend}
      options={panel.options}
      replaceVariables={(text) => text}
      preparePlotFrame={panel.type === 'trend' ? byX : undefined}
    >
      {(config) => {
        config.addHook('draw', (plot) => {
          ticks[panel.id] = plot.axes.map((axis) => axis._values ?? []);
        });
        return null;
      }}
    </TimeSeries>
  );
}

function Cells({ frames, width, height }) {
  const buckets = frames[0].fields.slice(1);
  const largest = Math.max(...buckets.flatMap(({ values }) => values));
  const [cellWidth, cellHeight] = [width / frames[0].length, height / buckets.length];
  return (
    <svg width={width} height={height} shapeRendering="crispEdges">
      {buckets.flatMap((bucket, row) =>
        bucket.values.map((count, column) => (
          <rect
            key={`${row} ${column}`}
            x={column * cellWidth}
            y={height - (row + 1) * cellHeight}
            width={cellWidth}
            height={cellHeight}
            fill={theme.visualization.getColorByName('blue')}
            fillOpacity={Math.sqrt(Math.max(count, 0) / largest)}
          />
        ))
      )}
    </svg>
  );
}

const LINES = new Set(['timeseries', 'trend']);
const KINDS = { stat: Numbers, timeseries: Curves, trend: Curves, heatmap: Cells };

function Body({ panel, frames, ...size }) {
  const message = messageOf(panel, frames);
  if (message !== null) {
    const style = { display: 'flex', height: '100%', alignItems: 'center', justifyContent: 'center' };
    return <div style={{ ...style, color: theme.colors.text.secondary, textAlign: 'center' }}>{message}</div>;
  }
  const Kind = KINDS[panel.type];
  return <Kind panel={panel} frames={frames} {...size} />;
}

function Panel({ panel, frames, column }) {
  const { x, y, w, h } = panel.gridPos;
  const [width, height] = [w * column - MARGIN, h * ROW_HEIGHT - MARGIN];
  const [innerWidth, innerHeight] = [width - PADDING, height - HEADER - MARGIN];
  const place = { position: 'absolute', left: MARGIN + x * column, top: MARGIN + y * ROW_HEIGHT, width, height };
  return (
    <div style={place} data-panel={panel.id}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {() => (
          <div style={{ width: innerWidth, height: innerHeight }}>
            <Body panel={panel} frames={frames} width={innerWidth} height={innerHeight} />
          </div>
        )}
      </PanelChrome>
    </div>
  );
}

async function main() {
  Object.assign(document.body.style, { background: theme.colors.background.canvas, color: theme.colors.text.primary });
  Object.assign(document.body.style, { fontFamily: theme.typography.fontFamily, fontSize: '14px' });
  const panels = [];
  window.drawn = [];
  for (const panel of dashboard.panels) {
    panels.push({ panel, frames: await prepare(panel, recording, theme) });
    window.drawn.push({ id: panel.id, ...(await describe(panel, recording, theme)) });
  }
  const column = (window.innerWidth - MARGIN) / COLUMNS;
  createRoot(document.getElementById('root')).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles isExtensionsEnabled={false} />
      {panels.map((one) => (
        <Panel key={one.panel.id} column={column} {...one} />
      ))}
    </ThemeContext.Provider>
  );
  // Curves are drawn in their own time, after their place has been laid out.
  const waiting = () => window.drawn.some(({ id, type, message }) => LINES.has(type) && message === null && !ticks[id]);
  for (let tries = 0; waiting() && tries < 1000; tries++) await new Promise((resolve) => setTimeout(resolve, 200));
  for (const panel of window.drawn) panel.ticks = ticks[panel.id] ?? [];
  document.title = 'drawn';
}

main().catch((error) => {
  window.failure = String(error.stack);
  document.title = 'failed';
});
