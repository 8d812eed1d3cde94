// The live page: refreshes its parts, draws the curves, and shows the table of latents without a reload.
"use strict";

const POLL_MS = 2000;

// --- Parts that the server renders -----------------------------------------------------------------------------------

let colours = {};

async function refreshParts() {
  const content = await (await fetchOk("/parts")).json();
  colours = content.colours;
  for (const [id, html] of Object.entries(content.parts)) replaceContent(id, html);
  updateSaeOptions(content.latents);
  return content;
}

// The SAEs to choose from; the choice stays while there is such an SAE.
function updateSaeOptions(saes) {
  const names = saes.map((sae) => sae.name);
  const select = byId("sae");
  if (!names.length || [...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  const selected = select.value;
  select.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(selected)) select.value = selected;
}

// --- Curves ----------------------------------------------------------------------------------------------------------

const curves = { generation: -1, next: 0, tokens: [], time: [], tokens_per_second: [], saes: {}, edges: [], density: {}, evaluated: -1, evaluations: {} };
const RUN_COLUMNS = ["tokens", "time", "tokens_per_second"];

// Fetches the points that are not here yet; true when there are any.
async function refreshCurves() {
  const query = new URLSearchParams({ generation: curves.generation, since: curves.next, evaluated: curves.evaluated });
  const update = await (await fetchOk(`/v1/history?${query}`)).json();
  if (update.generation !== curves.generation || update.since === 0) {
    Object.assign(curves, { tokens: [], time: [], tokens_per_second: [], saes: {} });
  }
  const length = curves.tokens.length;
  for (const key of RUN_COLUMNS) curves[key].push(...update[key]);
  for (const name of new Set([...Object.keys(curves.saes), ...Object.keys(update.saes)])) {
    const columns = (curves.saes[name] ??= {});
    for (const { measure } of measures("training")) {
      columns[measure] ??= Array(length).fill(null);
      columns[measure].push(...(update.saes[name]?.[measure] ?? Array(update.tokens.length).fill(null)));
    }
  }
  const { generation, next, density, evaluated } = update;
  const hasChanged = update.tokens.length > 0 || update.evaluations !== null;
  const evaluations = update.evaluations ?? curves.evaluations; // null: no newer ones
  Object.assign(curves, { generation, next, density, edges: update.density_edges, evaluated, evaluations });
  return hasChanged;
}

// The charts of measures, as the page declares them.
function measures(stage) {
  return [...document.querySelectorAll(`[data-stage="${stage}"]`)].map((element) => element.dataset);
}

const isByTime = () => byId("x-axis").value === "time";
const xOf = ({ tokens, time }) => (isByTime() ? time.map((seconds) => new Date(1000 * seconds)) : tokens);

function trainingLines(measure) {
  const span = Number(byId("smoothing").value);
  const x = xOf(curves);
  return Object.entries(curves.saes).map(([name, columns]) => line(name, colours[name], x, smoothed(columns[measure], span)));
}

function evaluationLines(measure) {
  return Object.entries(curves.evaluations).map(([name, columns]) =>
    line(name, colours[name], xOf(columns), columns[measure], { mode: "lines+markers" }),
  );
}

// Latents by decade of their firing rate. Bins differ in width, so their height is the number of latents per decade; the
// leftmost bin has all rates below it, and the silent latents have a place of their own, each one decade wide.
function densities() {
  const shown = Object.entries(curves.density).filter(([name, counts]) => counts.length && !hiddenCurves.has(name));
  const { edges } = curves;
  const lows = [edges[0] - 3, edges[0] - 1, ...edges.slice(0, -1)];
  const widths = [1, 1, ...edges.slice(1).map((edge, index) => edge - edges[index])];
  return shown.map(([name, counts], place) => {
    const ordered = [counts.at(-1), ...counts.slice(0, -1)];
    return {
      name,
      type: "bar",
      x: lows,
      y: ordered.map((count, index) => count / widths[index]),
      offset: widths.map((width) => width * (0.05 + (0.9 * place) / shown.length)),
      width: widths.map((width) => (0.9 * width) / shown.length),
      customdata: ordered.map((count, index) => [
        count,
        index === 0 ? "silent" : index === 1 ? `rate below 10^${edges[0]}` : `rate 10^${lows[index]} to 10^${lows[index] + widths[index]}`,
      ]),
      hovertemplate: "%{customdata[1]}: %{customdata[0]:,} latents",
      marker: { color: colours[name] },
    };
  });
}

const CHARTS = {
  density: {
    traces: densities,
    y: { rangemode: "tozero" },
    x: () => ({
      rangemode: "normal",
      tickangle: 0,
      tickvals: [curves.edges[0] - 2.5, ...curves.edges.filter(Number.isInteger)],
      ticktext: ["silent", ...curves.edges.filter(Number.isInteger).map((edge) => `10<sup>${edge}</sup>`)],
    }),
    hovermode: "closest",
  },
  speed: {
    traces: () => [line("tokens/s", css("--dim"), xOf(curves), smoothed(curves.tokens_per_second, Number(byId("smoothing").value)))],
    y: { rangemode: "tozero" },
  },
};

for (const [stage, tracesOf] of Object.entries({ training: trainingLines, "held-out": evaluationLines })) {
  for (const { measure, scale, tickFormat } of measures(stage)) {
    // Few ticks: Plotly then labels 1, 2 and 5 of each decade and, within one decade, round steps.
    const y = scale === "log" ? { type: "log", nticks: 3 } : { rangemode: "tozero" };
    if (tickFormat) y.tickformat = tickFormat;
    CHARTS[`${stage}-${measure}`] = { traces: () => tracesOf(measure), y };
  }
}

function draw() {
  if (typeof Plotly === "undefined") return;
  drawLegend(byId("legend"), colours, draw);
  for (const [name, { traces, x, y, hovermode }] of Object.entries(CHARTS)) {
    const element = byId(`chart-${name}`);
    element.dataset.x = name === "density" ? "log10_rate" : byId("x-axis").value;
    plot(element, traces(), { x: x ? x() : isByTime() ? { type: "date", rangemode: "normal" } : { type: "linear" }, y, hovermode });
  }
}

for (const id of ["x-axis", "smoothing"]) byId(id).addEventListener("change", draw);
addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// --- Latents ---------------------------------------------------------------------------------------------------------

// Order and page of the table; its SAE and search are in the form.
const tableState = {};
{
  const query = new URLSearchParams(location.search);
  for (const key of ["order", "descending", "offset"]) if (query.has(key)) tableState[key] = query.get(key);
}
let tableRequest, firingsRequest;
let shownText = byId("text").value;
let shownAt = new URLSearchParams(location.search).get("at") ?? undefined;

function tableQuery() {
  const form = Object.fromEntries(new FormData(byId("search-form")));
  const query = { ...form, search: form.search.trim(), ...tableState };
  if (shownText.trim()) Object.assign(query, { text: shownText, ...(shownAt === undefined ? {} : { at: shownAt }) });
  return new URLSearchParams(Object.entries(query).filter(([, value]) => value !== ""));
}

// What the reader asked for stays in the address, which can be sent to others, and in the way back from a latent.
function keepInAddress(anchor) {
  const query = tableQuery();
  sessionStorage.setItem("table", query);
  history.replaceState(null, "", `/?${query}#${anchor}`);
}

async function showTable(isRequested = true) {
  tableRequest?.abort();
  tableRequest = new AbortController();
  if ((await load("table", `/parts/latents?${tableQuery()}`, tableRequest.signal)) && isRequested) keepInAddress("latents");
}

// The latents that fire on the text in the box or, with `at`, on one token of the text that is already shown.
async function showFirings(at, isRequested = true) {
  firingsRequest?.abort();
  firingsRequest = new AbortController();
  if (isRequested && at === undefined) shownText = byId("text").value;
  shownAt = at;
  if (!shownText.trim()) replaceContent("firings", "");
  else {
    const query = new URLSearchParams({ sae: byId("sae").value, text: shownText, ...(at === undefined ? {} : { at }) });
    if (!(await load("firings", `/parts/fires?${query}`, firingsRequest.signal))) return;
  }
  if (isRequested) keepInAddress("latents");
}

function addListeners() {
  let searchTimer;
  byId("search").addEventListener("input", () => {
    clearTimeout(searchTimer);
    delete tableState.offset;
    searchTimer = setTimeout(showTable, 150);
  });
  byId("sae").addEventListener("change", () => {
    delete tableState.offset;
    showTable();
    if (shownText.trim()) showFirings();
  });
  for (const id of ["density", "marked"]) {
    byId(id).addEventListener("change", () => {
      delete tableState.offset;
      showTable();
    });
  }
  byId("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    showTable();
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return; // Shift+Enter begins a line of the text
    event.preventDefault();
    showFirings();
  });
  byId("text-form").addEventListener("submit", (event) => {
    event.preventDefault();
    showFirings();
  });
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
}

function onClick(event) {
  const heading = event.target.closest("a[data-order]");
  const pageButton = event.target.closest("button[data-offset]");
  const token = event.target.closest("a[data-at]");
  const row = event.target.closest("tr[data-href]");
  if (heading) {
    event.preventDefault();
    Object.assign(tableState, { order: heading.dataset.order, descending: heading.dataset.descending });
    delete tableState.offset;
    showTable();
  } else if (pageButton) {
    tableState.offset = pageButton.dataset.offset;
    showTable().then(() => {
      byId("latents").scrollIntoView();
      byId(pageButton.id)?.focus({ preventScroll: true });
    });
  } else if (token) {
    event.preventDefault();
    showFirings(token.dataset.at);
  } else if (event.target.id === "clear") {
    byId("text").value = "";
    showFirings();
    byId("text").focus();
  } else if (row && !event.target.closest("a") && !String(getSelection())) {
    location.href = row.dataset.href;
  }
}

function onKey(event) {
  if (event.key === "Escape" && isTyping(event)) event.target.blur();
  if (isTyping(event)) return;
  const links = [...document.querySelectorAll("#latents tr[data-href] a")].filter((link) => link.checkVisibility());
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  } else if (step && links.length) {
    const focused = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
    const link = links[Math.min(Math.max(focused + step, 0), links.length - 1)];
    link.focus({ preventScroll: true });
    link.closest("tr").scrollIntoView({ block: "nearest" });
  } else if (event.key === "[" || event.key === "]") {
    byId(event.key === "[" ? "previous-page" : "next-page")?.click();
  }
}

// --- Polling ---------------------------------------------------------------------------------------------------------

// Whether latents can be read, and the newest snapshot for those of the selected SAE, when the table was last drawn.
let tableVersion;

async function poll(isFirst) {
  let state = "unknown";
  try {
    const content = await refreshParts();
    state = content.state;
    if ((await refreshCurves()) || isFirst) draw();
    const snapshot = content.latents.find((sae) => sae.name === byId("sae").value)?.snapshot;
    const version = `${content.ready} ${snapshot}`;
    if (tableVersion !== undefined && tableVersion !== version) {
      showTable(false);
      if (shownText.trim()) showFirings(shownAt, false);
    }
    tableVersion = version;
    byId("connection").textContent = "";
  } catch (error) {
    byId("connection").textContent = errorText(error);
  }
  setTimeout(poll, document.hidden || state === "finished" ? 5 * POLL_MS : POLL_MS);
}

addListeners();
poll(true);
