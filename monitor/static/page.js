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
  return told.state;
}

// --- Curves ----------------------------------------------------------------------------------------------------------

const curves = { generation: -1, next: 0, tokens: [], tokens_per_second: [], saes: {}, evaluations: {} };

async function learn() {
  const news = await (await fetchOk(`/v1/history?generation=${curves.generation}&since=${curves.next}`)).json();
  if (news.generation !== curves.generation || news.since === 0) {
    Object.assign(curves, { tokens: [], tokens_per_second: [], saes: {} });
  }
  const before = curves.tokens.length;
  for (const key of ["tokens", "tokens_per_second"]) curves[key].push(...news[key]);
  for (const name of new Set([...Object.keys(curves.saes), ...Object.keys(news.saes)])) {
    const columns = (curves.saes[name] ??= {});
    for (const key of ["fvu", "l0", "dead_latents_ratio", "density"]) {
      columns[key] ??= Array(before).fill(null);
      columns[key].push(...(news.saes[name]?.[key] ?? Array(news.tokens.length).fill(null)));
    }
  }
  Object.assign(curves, { generation: news.generation, next: news.next, evaluations: news.evaluations });
  return news.tokens.length > 0;
}

const DENSITY_EDGES = [-7, -6, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0];

function lines(key) {
  return Object.entries(curves.saes).map(([name, columns]) => line(name, curves.tokens, columns[key]));
}

function line(name, x, y, mode = "lines") {
  return { name, x, y, mode, type: "scatter", line: { color: colours[name], width: 1.8 }, marker: { size: 6 } };
}

// Those that never fired stand left of all the others.
function densities() {
  return Object.entries(curves.saes).map(([name, columns]) => {
    const counts = columns.density.at(-1) ?? [];
    const [rates, silent] = [counts.slice(0, -1), counts.at(-1)];
    return {
      name,
      x: ["silent", ...DENSITY_EDGES.map((edge) => `${edge}`)],
      y: [silent, ...rates],
      type: "bar",
      marker: { color: colours[name] },
    };
  });
}

const CHARTS = {
  fvu: { traces: () => lines("fvu"), y: { type: "log", dtick: "D2", tickformat: ".2~g" } },
  l0: { traces: () => lines("l0"), y: { rangemode: "tozero" } },
  dead: { traces: () => lines("dead_latents_ratio"), y: { rangemode: "tozero", tickformat: ".1~%" } },
  ce: {
    traces: () =>
      Object.entries(curves.evaluations).map(([name, told]) => line(name, told.tokens, told.ce_delta, "lines+markers")),
    y: { rangemode: "tozero" },
  },
  density: { traces: densities, y: { rangemode: "tozero" }, x: { type: "category", tickangle: 0, tickfont: { size: 9 } } },
  speed: {
    traces: () => [{ ...line("tokens/s", curves.tokens, curves.tokens_per_second), line: { color: css("--dim"), width: 1.5 } }],
    y: { rangemode: "tozero" },
  },
};

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
let asking;

function tableQuery() {
  const wanted = { sae: byId("sae").value, search: byId("search").value.trim(), ...view };
  return new URLSearchParams(Object.entries(wanted).filter(([, value]) => value !== ""));
}

async function showTable() {
  asking?.abort();
  asking = new AbortController();
  const query = tableQuery();
  byId("table").classList.add("waiting");
  try {
    const html = await (await fetchOk(`/parts/latents?${query}`, asking.signal)).text();
    put("table", html);
    history.replaceState(null, "", `/?${query}#latents`);
  } catch (error) {
    if (error.name === "AbortError") return;
    put("table", "");
    byId("table").append(complaint(error));
  }
  byId("table").classList.remove("waiting");
}

async function showFires(at) {
  const text = byId("text").value;
  if (!text.trim()) return put("fires", "");
  const query = new URLSearchParams({ sae: byId("sae").value, text, ...(at === undefined ? {} : { at }) });
  byId("fires").classList.add("waiting");
  try {
    put("fires", await (await fetchOk(`/parts/fires?${query}`)).text());
  } catch (error) {
    put("fires", "");
    byId("fires").append(complaint(error));
  }
  byId("fires").classList.remove("waiting");
}

function complaint(error) {
  const paragraph = document.createElement("p");
  paragraph.className = "empty error";
  paragraph.textContent = error instanceof TypeError ? "The monitor does not answer." : error.message;
  return paragraph;
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
    showTable();
  } else if (token) {
    event.preventDefault();
    showFires(token.dataset.at);
  } else if (event.target.id === "clear") {
    byId("text").value = "";
    put("fires", "");
  } else if (row && !event.target.closest("a") && !String(getSelection())) {
    location.href = row.dataset.href;
  }
}

function press(event) {
  if (event.key === "Escape") event.target.blur();
  if (isTyping(event)) return;
  const rows = [...byId("table").querySelectorAll("tr[data-href]")];
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

async function beat(first) {
  let state = "unknown";
  try {
    state = await refresh();
    if ((await learn()) || first) draw();
    document.body.classList.remove("lost");
    // What could not be shown when the page came, may be by now.
    if (byId("table").querySelector(".empty") && !byId("search").value && state !== "waiting") showTable();
  } catch (error) {
    document.querySelector("#headline .state")?.replaceChildren("monitor does not answer");
    delete byId("headline").dataset.html; // so that the next answer is put there, even if it is the last one again
  }
  setTimeout(beat, document.hidden || state === "finished" ? 5 * EVERY_MS : EVERY_MS);
}

listen();
beat(true);
