// The live page: keeps its parts new, draws the curves, and saves the table of latents a reload.
"use strict";

const EVERY_MS = 2000;
const byId = (id) => document.getElementById(id);

// --- Parts that the server draws -------------------------------------------------------------------------------------

let colours = {};

async function fetchOk(address, signal) {
  const answer = await fetch(address, { signal });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `${answer.status}`);
  return answer;
}

function put(id, html) {
  const element = byId(id);
  if (element.dataset.html === html) return;
  const open = [...element.querySelectorAll("details[open]")].map((details) => details.dataset.key);
  element.innerHTML = element.dataset.html = html;
  for (const details of element.querySelectorAll("details")) details.open = open.includes(details.dataset.key);
}

async function refresh() {
  const told = await (await fetchOk("/parts")).json();
  colours = told.colours;
  for (const [id, html] of Object.entries(told.parts)) put(id, html);
  offer(told.latents);
  return told;
}

// The SAEs that there are to choose from; the choice stays, as long as it is one.
function offer(saes) {
  const names = saes.map((sae) => sae.name);
  const select = byId("sae");
  if (!names.length || [...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) select.value = chosen;
}

// --- Curves ----------------------------------------------------------------------------------------------------------

const curves = { generation: -1, next: 0, tokens: [], tokens_per_second: [], saes: {}, edges: [], density: {}, evaluated: -1, evaluations: {} };

async function learn() {
  const { generation: had, next: since, evaluated: knows } = curves;
  const news = await (await fetchOk(`/v1/history?generation=${had}&since=${since}&evaluated=${knows}`)).json();
  if (news.generation !== curves.generation || news.since === 0) {
    Object.assign(curves, { tokens: [], tokens_per_second: [], saes: {} });
  }
  const before = curves.tokens.length;
  for (const key of ["tokens", "tokens_per_second"]) curves[key].push(...news[key]);
  for (const name of new Set([...Object.keys(curves.saes), ...Object.keys(news.saes)])) {
    const columns = (curves.saes[name] ??= {});
    for (const { measure: key } of measures("training")) {
      columns[key] ??= Array(before).fill(null);
      columns[key].push(...(news.saes[name]?.[key] ?? Array(news.tokens.length).fill(null)));
    }
  }
  const { generation, next, density, evaluated } = news;
  const isNew = news.tokens.length > 0 || news.evaluations !== null;
  const evaluations = news.evaluations ?? curves.evaluations; // null: those that are here already
  Object.assign(curves, { generation, next, density, edges: news.density_edges, evaluated, evaluations });
  return isNew;
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

// Those that never fired stand left of all the others.
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
    const shown = traces().filter((trace) => trace.x.length);
    const nothing = { text: "nothing measured yet", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
    const axis = { visible: shown.length > 0, gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    const layout = {
      uirevision: "kept",
      margin: { l: 44, r: 8, t: 6, b: 30 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--dim"), size: 11, family: "system-ui, sans-serif" },
      showlegend: false,
      annotations: shown.length ? [] : [nothing],
      hovermode: name === "density" ? "x" : "x unified",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      bargap: 0.15,
      xaxis: { ...axis, ...(x ?? { rangemode: "tozero", exponentformat: "SI" }) },
      yaxis: { ...axis, exponentformat: "SI", nticks: 5, ...y },
    };
    Plotly.react(`chart-${name}`, shown, layout, { displayModeBar: false, responsive: true });
  }
}

addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// --- Latents ---------------------------------------------------------------------------------------------------------

const view = {};
{
  const query = new URLSearchParams(location.search);
  for (const key of ["order", "descending", "offset"]) if (query.has(key)) view[key] = query.get(key);
}
let askingTable, askingFires;
let shownText = "";

function tableQuery() {
  const wanted = { sae: byId("sae").value, search: byId("search").value.trim(), ...view };
  return new URLSearchParams(Object.entries(wanted).filter(([, value]) => value !== ""));
}

// What a person asked for is kept in the address, to be sent to others, and for the way back from a latent.
async function showTable(isAsked = true) {
  askingTable?.abort();
  askingTable = new AbortController();
  const query = tableQuery();
  if (await ask("table", `/parts/latents?${query}`, askingTable.signal)) {
    sessionStorage.setItem("table", query);
    if (isAsked) history.replaceState(null, "", `/?${query}#latents`);
  }
}

// Of the text in the box; or, of one token of the text that is shown already.
async function showFires(at) {
  askingFires?.abort();
  askingFires = new AbortController();
  if (at === undefined) shownText = byId("text").value;
  if (!shownText.trim()) return put("fires", "");
  const query = new URLSearchParams({ sae: byId("sae").value, text: shownText, ...(at === undefined ? {} : { at }) });
  await ask("fires", `/parts/fires?${query}`, askingFires.signal);
}

// Puts an answer, or why there is none, where it belongs; false when there is none.
async function ask(id, address, signal) {
  byId(id).classList.add("waiting");
  try {
    put(id, await (await fetchOk(address, signal)).text());
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    put(id, complaint(error));
    return false;
  } finally {
    if (!signal.aborted) byId(id).classList.remove("waiting");
  }
}

function complaint(error) {
  const paragraph = document.createElement("p");
  paragraph.className = "empty error";
  paragraph.textContent = error instanceof TypeError ? "The monitor does not answer." : error.message;
  return paragraph.outerHTML;
}

function listen() {
  let pause;
  byId("search").addEventListener("input", () => {
    clearTimeout(pause);
    delete view.offset;
    pause = setTimeout(showTable, 150);
  });
  byId("sae").addEventListener("change", () => {
    delete view.offset;
    showTable();
    showFires();
  });
  byId("tools").addEventListener("submit", (event) => {
    event.preventDefault();
    showTable();
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return; // with Shift it is a line of the text
    event.preventDefault();
    showFires();
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    showFires();
  });
  document.addEventListener("click", click);
  document.addEventListener("keydown", press);
}

function click(event) {
  const sort = event.target.closest("a[data-order]");
  const page = event.target.closest("button[data-offset]");
  const token = event.target.closest("a[data-at]");
  const row = event.target.closest("tr[data-href]");
  if (sort) {
    event.preventDefault();
    Object.assign(view, { order: sort.dataset.order, descending: sort.dataset.descending });
    delete view.offset;
    showTable();
  } else if (page) {
    view.offset = page.dataset.offset;
    showTable().then(() => {
      byId("latents").scrollIntoView();
      byId(page.id)?.focus({ preventScroll: true });
    });
  } else if (token) {
    event.preventDefault();
    showFires(token.dataset.at);
  } else if (event.target.id === "clear") {
    byId("text").value = shownText = "";
    put("fires", "");
  } else if (row && !event.target.closest("a") && !String(getSelection())) {
    location.href = row.dataset.href;
  }
}

function press(event) {
  if (event.key === "Escape") event.target.blur();
  if (isTyping(event)) return;
  const rows = [...document.querySelectorAll("#latents tr[data-href]")];
  const chosen = rows.findIndex((row) => row.classList.contains("chosen"));
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  } else if (step && rows.length) {
    const next = rows[Math.min(Math.max(chosen + step, 0), rows.length - 1)];
    rows[chosen]?.classList.remove("chosen");
    next.classList.add("chosen");
    next.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Enter" && chosen >= 0 && event.target === document.body) {
    location.href = rows[chosen].dataset.href;
  } else if (event.key === "[" || event.key === "]") {
    byId(event.key === "[" ? "back" : "on")?.click();
  }
}

// --- The beat --------------------------------------------------------------------------------------------------------

// The newest snapshot in which the chosen SAE's latents can be read, as the table was last drawn.
let drawnFor;

async function beat(isFirst) {
  let state = "unknown";
  try {
    const told = await refresh();
    state = told.state;
    if ((await learn()) || isFirst) draw();
    const snapshot = `${told.ready} ${told.latents.find((sae) => sae.name === byId("sae").value)?.snapshot}`;
    if (drawnFor !== undefined && drawnFor !== snapshot) showTable(false);
    drawnFor = snapshot;
    byId("lost").textContent = "";
  } catch (error) {
    byId("lost").textContent = error instanceof TypeError ? "The monitor does not answer." : error.message;
  }
  setTimeout(beat, document.hidden || state === "finished" ? 5 * EVERY_MS : EVERY_MS);
}

listen();
beat(true);
