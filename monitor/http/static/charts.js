// Curves: one legend for all charts of a page, values under the pointer, PNG and CSV of each chart.
"use strict";

const hiddenCurves = new Set();

// Exponential moving average over so many points; gaps stay gaps.
function smoothed(values, span) {
  if (span <= 1) return values;
  const weight = 2 / (span + 1);
  let mean = null;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    mean = mean === null ? value : mean + weight * (value - mean);
    return mean;
  });
}

function line(name, colour, x, y, { mode = "lines", dash = name.endsWith("-ema") ? "dot" : "solid" } = {}) {
  return { name, x, y, mode, type: "scatter", line: { color: colour, width: 1.8, dash }, marker: { size: 6, color: colour } };
}

// Draws traces into the plot of a chart, or says that there is nothing to draw yet.
function plot(element, traces, { x = {}, y = {}, hovermode = "x unified", ...more } = {}) {
  const visible = traces.filter((trace) => !hiddenCurves.has(trace.name) && trace.y.some((value) => value !== null && value !== undefined));
  const notice = { text: "nothing measured yet", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
  const axis = { visible: visible.length > 0, gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  const layout = {
    uirevision: `${x.type ?? ""}`,
    margin: { l: 44, r: 8, t: 6, b: 30 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--dim"), size: 11, family: "system-ui, sans-serif" },
    showlegend: false,
    annotations: visible.length ? [] : [notice],
    hovermode,
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    xaxis: { ...axis, rangemode: "tozero", exponentformat: "SI", ...x },
    yaxis: { ...axis, exponentformat: "SI", nticks: 5, ...y },
    ...more,
  };
  return Plotly.react(element, visible, layout, { displayModeBar: false, responsive: true });
}

// The legend: a button for each curve that hides and shows it in all charts. `colours` by name.
function drawLegend(element, colours, redraw) {
  const names = Object.keys(colours);
  if (element.dataset.names === JSON.stringify(colours)) return;
  element.dataset.names = JSON.stringify(colours);
  element.replaceChildren(
    ...names.map((name) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const dot = Object.assign(document.createElement("span"), { className: name.endsWith("-ema") ? "dot dashed" : "dot" });
      dot.style.background = dot.style.borderColor = colours[name];
      button.append(dot, name);
      button.title = "show or hide";
      button.setAttribute("aria-pressed", `${!hiddenCurves.has(name)}`);
      button.addEventListener("click", () => {
        hiddenCurves.has(name) ? hiddenCurves.delete(name) : hiddenCurves.add(name);
        button.setAttribute("aria-pressed", `${!hiddenCurves.has(name)}`);
        redraw();
      });
      return button;
    }),
  );
}

// --- Files -----------------------------------------------------------------------------------------------------------

function save(name, address) {
  const link = Object.assign(document.createElement("a"), { href: address, download: name });
  link.click();
}

// The points as they are drawn, one a line.
function csvOf(traces, xName, yName) {
  const quote = (value) => (/[",\n]/.test(`${value}`) ? `"${`${value}`.replaceAll('"', '""')}"` : `${value ?? ""}`);
  const rows = traces.flatMap((trace) => [...trace.y].map((y, index) => [trace.name, trace.x[index], y]));
  return [["curve", xName, yName], ...rows].map((row) => row.map(quote).join(",")).join("\n") + "\n";
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-save]");
  const element = button?.closest(".chart").querySelector(".plot");
  if (!element?.data) return;
  const name = `${document.title.split(" · ")[0]}-${element.id.replace("chart-", "")}`;
  if (button.dataset.save === "csv") {
    const text = csvOf(element.data, element.dataset.x ?? "x", element.dataset.y ?? "y");
    return save(`${name}.csv`, URL.createObjectURL(new Blob([text], { type: "text/csv" })));
  }
  const title = { text: button.closest(".chart").querySelector("h3").textContent.replace(/\s+/g, " ").trim(), font: { size: 14 } };
  const layout = { ...element.layout, title, showlegend: true, margin: { l: 60, r: 20, t: 50, b: 50 }, paper_bgcolor: css("--card"), width: 1000, height: 560 };
  save(`${name}.png`, await Plotly.toImage({ data: element.data, layout }, { format: "png", width: 1000, height: 560, scale: 2 }));
});
