// The page of a scaling law: points, lines and predictions, a colour for each k.
"use strict";

let law = null;

function pointsOf(k, isHeldOut) {
  const cells = law.cells.filter((cell) => cell.k === k && cell.is_held_out === isHeldOut);
  const colour = law.colours[k] ?? css("--dim");
  return {
    name: `k = ${k}`,
    x: cells.map((cell) => cell.d_sae),
    y: cells.map((cell) => cell.loss),
    text: cells.map((cell) => `${cell.name}${isHeldOut ? ", held out" : ""}<br>${percent(cell.fitted / cell.loss - 1)} by the law`),
    mode: "markers",
    type: "scatter",
    marker: { color: colour, size: 9, symbol: isHeldOut ? "circle-open" : "circle", line: { width: isHeldOut ? 2 : 0, color: colour } },
    hovertemplate: "%{text}<br>%{x:,} latents, FVU %{y:.4f}<extra></extra>",
  };
}

function predictionsOf(k) {
  const points = law.predictions.filter((prediction) => prediction.k === k);
  const colour = law.colours[k] ?? css("--dim");
  return {
    name: `k = ${k}`,
    x: points.map((point) => point.d_sae),
    y: points.map((point) => point.loss),
    mode: "markers",
    type: "scatter",
    marker: { color: colour, size: 10, symbol: "diamond-open", line: { width: 1.5, color: colour } },
    error_y: {
      type: "data",
      symmetric: false,
      array: points.map((point) => point.high - point.loss),
      arrayminus: points.map((point) => point.loss - point.low),
      color: colour,
      thickness: 1.2,
      width: 4,
    },
    hovertemplate: "predicted: %{x:,} latents, FVU %{y:.4f}<extra></extra>",
  };
}

function floorOf(curve) {
  const ends = [curve.d_sae[0], curve.d_sae[curve.d_sae.length - 1]];
  return { ...line(`k = ${curve.k}`, law.colours[curve.k], ends, [curve.floor, curve.floor], { dash: "dot" }), hoverinfo: "skip" };
}

function percent(share) {
  return `${share < 0 ? "−" : "+"}${(100 * Math.abs(share)).toFixed(1)} %`;
}

function draw() {
  if (law === null || typeof Plotly === "undefined") return;
  const ks = Object.keys(law.colours).map(Number).sort((a, b) => a - b);
  drawLegend(byId("legend"), Object.fromEntries(ks.map((k) => [`k = ${k}`, law.colours[k]])), draw);
  const traces = [
    ...law.curves.flatMap((curve) => [
      { ...line(`k = ${curve.k}`, law.colours[curve.k], curve.d_sae, curve.loss), hoverinfo: "skip" },
      ...(curve.floor === null ? [] : [floorOf(curve)]),
    ]),
    ...ks.flatMap((k) => [pointsOf(k, false), pointsOf(k, true), predictionsOf(k)]),
  ];
  const sizes = [...new Set([...law.cells, ...law.predictions].map((point) => point.d_sae))].sort((a, b) => a - b);
  const x = { type: "log", rangemode: "normal", tickvals: sizes, ticktext: sizes.map((size) => size.toLocaleString("en")), title: { text: "latents" } };
  plot(byId("chart-scaling"), traces, { hovermode: "closest", x, y: { type: "log", nticks: 6, title: { text: "FVU" } } });
}

async function refresh() {
  if (byId("chart-scaling") === null) return;
  law = await (await fetchOk("/v1/scaling")).json();
  draw();
}

addEventListener("theme", draw);
addEventListener("DOMContentLoaded", refresh);
