// The page of several runs: refreshes its tables, and draws their curves over each other and their frontiers.
"use strict";

const POLL_MS = 10_000;

let content = { colours: {}, saes: [], frontiers: {}, runs: [] };
const histories = {};

// More SAEs than colours: the second round of colours is dashed, the third dotted.
function styleOf(title) {
  const titles = Object.keys(content.colours);
  const round = Math.floor(titles.indexOf(title) / 8);
  return { colour: content.colours[title], dash: ["solid", "dash", "dot"][round % 3] };
}

function xOf(columns, history) {
  if (byId("x-axis").value === "tokens") return columns.tokens;
  const start = history.time[0] ?? 0;
  return columns.time.map((seconds) => (seconds - start) / 3600);
}

function curvesOf(measure, stage) {
  const span = Number(byId("smoothing").value);
  return Object.entries(histories).flatMap(([run, history]) => {
    const columnsOf = stage === "training" ? history.saes : history.evaluations;
    return Object.entries(columnsOf ?? {}).map(([sae, columns]) => {
      const title = `${run}/${sae}`;
      const { colour, dash } = styleOf(title);
      const isTraining = stage === "training";
      const x = isTraining ? xOf(history, history) : xOf(columns, history);
      const y = isTraining ? smoothed(columns[measure] ?? [], span) : (columns[measure] ?? []);
      return line(title, colour, x, y, { mode: isTraining ? "lines" : "lines+markers", dash });
    });
  });
}

// A point for each SAE, with its name, and the line through those on the frontier.
function frontierOf(measure) {
  const points = content.saes.filter((sae) => sae.l0 !== null && sae[measure] !== null);
  const byTitle = Object.fromEntries(points.map((sae) => [sae.title, sae]));
  const middle = Math.max(...points.map((sae) => sae.l0)) / 2;
  const best = (content.frontiers[measure] ?? []).map((title) => byTitle[title]).filter(Boolean);
  return [
    { name: "frontier", x: best.map((sae) => sae.l0), y: best.map((sae) => sae[measure]), mode: "lines", type: "scatter", line: { color: css("--dim"), dash: "dot", width: 1.5 }, hoverinfo: "skip" },
    ...points.map((sae) => ({
      name: sae.title,
      x: [sae.l0],
      y: [sae[measure]],
      text: [sae.title],
      mode: points.length > 12 ? "markers" : "markers+text",
      textposition: sae.l0 > middle ? "middle left" : "middle right", // inside the chart
      textfont: { size: 10, color: css("--dim") },
      type: "scatter",
      cliponaxis: false,
      marker: { color: content.colours[sae.title], size: 10, symbol: sae.measured === "held-out" ? "circle" : "circle-open" },
      hovertemplate: `%{text}<br>L0 %{x:.1f}, %{y:.4f}, ${sae.measured === "held-out" ? "held-out text" : "in training"}<extra></extra>`,
    })),
  ];
}

function draw() {
  if (typeof Plotly === "undefined") return;
  drawLegend(byId("legend"), content.colours, draw);
  for (const element of document.querySelectorAll("[data-measure]")) {
    const { measure, stage, scale, tickFormat } = element.dataset;
    element.dataset.x = byId("x-axis").value;
    const y = scale === "log" ? { type: "log", nticks: 3 } : { rangemode: "tozero" };
    if (tickFormat) y.tickformat = tickFormat;
    plot(element, curvesOf(measure, stage), { y });
  }
  for (const element of document.querySelectorAll("[data-frontier]")) {
    plot(element, frontierOf(element.dataset.frontier), { hovermode: "closest", x: { title: { text: "L0" } }, y: { rangemode: "tozero" } });
  }
}

async function refresh() {
  try {
    content = await (await fetchOk("/parts")).json();
    for (const [id, html] of Object.entries(content.parts)) replaceContent(id, html);
    for (const run of Object.keys(histories)) if (!content.runs.includes(run)) delete histories[run];
    for (const run of content.runs) {
      const address = run.split("/").map(encodeURIComponent).join("/");
      histories[run] = await (await fetchOk(`/v1/runs/${address}/history`)).json();
    }
    draw();
    byId("connection").textContent = "";
  } catch (error) {
    byId("connection").textContent = errorText(error);
  }
  setTimeout(refresh, document.hidden || !content.is_running ? 6 * POLL_MS : POLL_MS);
}

for (const id of ["x-axis", "smoothing"]) byId(id).addEventListener("change", draw);
addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
refresh();
