// The live page: refreshes its parts, draws the curves, and shows the table of latents without a reload.
"use strict";

const POLL_MS = 2000;
const byId = (id) => document.getElementById(id);

// --- Parts that the server renders -----------------------------------------------------------------------------------

let colours = {};

async function fetchOk(address, signal) {
  const response = await fetch(address, { signal });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `${response.status}`);
  return response;
}

// Replaces the content of an element; its <details> that are open stay open.
function replaceContent(id, html) {
  const element = byId(id);
  if (element.dataset.html === html) return;
  const open = [...element.querySelectorAll("details[open]")].map((details) => details.dataset.key);
  element.innerHTML = element.dataset.html = html;
  for (const details of element.querySelectorAll("details")) details.open = open.includes(details.dataset.key);
}

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

const curves = { generation: -1, next: 0, tokens: [], tokens_per_second: [], saes: {}, edges: [], density: {}, evaluated: -1, evaluations: {} };

// Fetches the points that are not here yet; true when there are any.
async function refreshCurves() {
  const query = new URLSearchParams({ generation: curves.generation, since: curves.next, evaluated: curves.evaluated });
  const update = await (await fetchOk(`/v1/history?${query}`)).json();
  if (update.generation !== curves.generation || update.since === 0) {
    Object.assign(curves, { tokens: [], tokens_per_second: [], saes: {} });
  }
  const length = curves.tokens.length;
  for (const key of ["tokens", "tokens_per_second"]) curves[key].push(...update[key]);
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

function trainingLines(measure) {
  return Object.entries(curves.saes).map(([name, columns]) => line(name, curves.tokens, columns[measure]));
}

function evaluationLines(measure) {
  return Object.entries(curves.evaluations).map(([name, columns]) =>
    line(name, columns.tokens, columns[measure], "lines+markers"),
  );
}

function line(name, x, y, mode = "lines") {
  const dash = name.endsWith("-ema") ? "dot" : "solid";
  return { name, x, y, mode, type: "scatter", line: { color: colours[name], width: 1.8, dash }, marker: { size: 6 } };
}

// Latents by firing rate; the leftmost bar has the silent ones.
function densities() {
  return Object.entries(curves.density).map(([name, counts]) => {
    const [rates, silent] = [counts.slice(0, -1), counts.at(-1)];
    return {
      name,
      x: ["silent", ...curves.edges.map((edge) => `${edge}`)],
      y: [silent, ...rates],
      type: "bar",
      marker: { color: colours[name] },
    };
  });
}

const CHARTS = {
  density: { traces: densities, y: { rangemode: "tozero" }, x: { type: "category", tickangle: 0, tickfont: { size: 9 } } },
  speed: {
    traces: () => [{ ...line("tokens/s", curves.tokens, curves.tokens_per_second), line: { color: css("--dim"), width: 1.5 } }],
    y: { rangemode: "tozero" },
  },
};

for (const [stage, tracesOf] of Object.entries({ training: trainingLines, "held-out": evaluationLines })) {
  for (const { measure, scale, tickFormat } of measures(stage)) {
    const y = scale === "log" ? { type: "log", dtick: "D2" } : { rangemode: "tozero" };
    if (tickFormat) y.tickformat = tickFormat;
    CHARTS[`${stage}-${measure}`] = { traces: () => tracesOf(measure), y };
  }
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw() {
  if (typeof Plotly === "undefined") return;
  for (const [name, { traces, x, y }] of Object.entries(CHARTS)) {
    const visible = traces().filter((trace) => trace.x.length);
    const notice = { text: "nothing measured yet", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
    const axis = { visible: visible.length > 0, gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    const layout = {
      uirevision: "same",
      margin: { l: 44, r: 8, t: 6, b: 30 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--dim"), size: 11, family: "system-ui, sans-serif" },
      showlegend: false,
      annotations: visible.length ? [] : [notice],
      hovermode: name === "density" ? "x" : "x unified",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      bargap: 0.15,
      xaxis: { ...axis, ...(x ?? { rangemode: "tozero", exponentformat: "SI" }) },
      yaxis: { ...axis, exponentformat: "SI", nticks: 5, ...y },
    };
    Plotly.react(`chart-${name}`, visible, layout, { displayModeBar: false, responsive: true });
  }
}

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
let shownText = "";

function tableQuery() {
  const query = { sae: byId("sae").value, search: byId("search").value.trim(), ...tableState };
  return new URLSearchParams(Object.entries(query).filter(([, value]) => value !== ""));
}

// What the reader asked for stays in the address, which can be sent to others, and in the way back from a latent.
async function showTable(isRequested = true) {
  tableRequest?.abort();
  tableRequest = new AbortController();
  const query = tableQuery();
  if (await load("table", `/parts/latents?${query}`, tableRequest.signal)) {
    sessionStorage.setItem("table", query);
    if (isRequested) history.replaceState(null, "", `/?${query}#latents`);
  }
}

// The latents that fire on the text in the box or, with `at`, on one token of the text that is already shown.
async function showFirings(at) {
  firingsRequest?.abort();
  firingsRequest = new AbortController();
  if (at === undefined) shownText = byId("text").value;
  if (!shownText.trim()) return replaceContent("firings", "");
  const query = new URLSearchParams({ sae: byId("sae").value, text: shownText, ...(at === undefined ? {} : { at }) });
  await load("firings", `/parts/fires?${query}`, firingsRequest.signal);
}

// Loads HTML, or an error message, into an element; true when there was no error.
async function load(id, address, signal) {
  byId(id).classList.add("waiting");
  try {
    replaceContent(id, await (await fetchOk(address, signal)).text());
    return true;
  } catch (error) {
    if (error.name !== "AbortError") replaceContent(id, errorHtml(error));
    return false;
  } finally {
    if (!signal.aborted) byId(id).classList.remove("waiting");
  }
}

function errorText(error) {
  return error instanceof TypeError ? "The monitor does not answer." : error.message;
}

function errorHtml(error) {
  const paragraph = document.createElement("p");
  paragraph.className = "empty error";
  paragraph.textContent = errorText(error);
  return paragraph.outerHTML;
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
    showFirings();
  });
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
    byId("text").value = shownText = "";
    replaceContent("firings", "");
  } else if (row && !event.target.closest("a") && !String(getSelection())) {
    location.href = row.dataset.href;
  }
}

function onKey(event) {
  if (event.key === "Escape") event.target.blur();
  if (isTyping(event)) return;
  const rows = [...document.querySelectorAll("#latents tr[data-href]")];
  const selected = rows.findIndex((row) => row.classList.contains("selected"));
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  } else if (step && rows.length) {
    const row = rows[Math.min(Math.max(selected + step, 0), rows.length - 1)];
    rows[selected]?.classList.remove("selected");
    row.classList.add("selected");
    row.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Enter" && selected >= 0 && event.target === document.body) {
    location.href = rows[selected].dataset.href;
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
    if (tableVersion !== undefined && tableVersion !== version) showTable(false);
    tableVersion = version;
    byId("connection").textContent = "";
  } catch (error) {
    byId("connection").textContent = errorText(error);
  }
  setTimeout(poll, document.hidden || state === "finished" ? 5 * POLL_MS : POLL_MS);
}

addListeners();
poll(true);
