// What all pages share: fetching, replacing parts, and the keys that belong to a field.
"use strict";

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

async function fetchOk(address, options) {
  const response = await fetch(address, options);
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `${response.status}`);
  return response;
}

// Replaces the content of an element; its <details> that are open stay open, and the focus stays where it was.
function replaceContent(id, html) {
  const element = byId(id);
  if (element.dataset.html === html) return;
  const open = [...element.querySelectorAll("details[open]")].map((details) => details.dataset.key);
  const focused = element.contains(document.activeElement) ? focusKey(document.activeElement) : null;
  element.innerHTML = element.dataset.html = html;
  for (const details of element.querySelectorAll("details")) details.open = open.includes(details.dataset.key);
  if (focused) element.querySelector(focused)?.focus({ preventScroll: true });
}

// A selector of what stands for the same thing in newer HTML.
function focusKey(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  for (const name of ["data-order", "data-at", "data-key", "href"]) {
    const holder = element.closest(`[${name}]`);
    if (!holder) continue;
    const selector = `[${name}="${CSS.escape(holder.getAttribute(name))}"]`;
    return holder === element ? selector : `${selector} > ${element.localName}`;
  }
  return null;
}

// Loads HTML, or an error message, into an element; true when there was no error.
async function load(id, address, signal) {
  byId(id).classList.add("waiting");
  try {
    replaceContent(id, await (await fetchOk(address, { signal })).text());
    return true;
  } catch (error) {
    if (error.name !== "AbortError") replaceContent(id, errorHtml(error));
    return false;
  } finally {
    if (!signal?.aborted) byId(id).classList.remove("waiting");
  }
}

function errorText(error) {
  return error instanceof TypeError ? "The monitor does not answer." : error.message;
}

function errorHtml(error) {
  const paragraph = document.createElement("p");
  paragraph.className = "empty error";
  paragraph.setAttribute("role", "alert");
  paragraph.textContent = errorText(error);
  return paragraph.outerHTML;
}

// --- The values of tokens, which a mouse sees as titles --------------------------------------------------------------

// A tap on a token, or the arrow keys in a text that has the focus, shows the token's value beside it.
function showValue(token) {
  document.querySelector(".t.chosen")?.classList.remove("chosen");
  document.querySelector("#token-value")?.remove();
  if (!token) return;
  token.classList.add("chosen");
  const output = document.createElement("output");
  output.id = "token-value";
  output.setAttribute("role", "status");
  output.textContent = `${token.textContent.trim() || "␣"}: ${token.title}`;
  document.body.append(output);
  const place = token.getBoundingClientRect();
  output.style.left = `${Math.max(4, Math.min(place.left, innerWidth - output.offsetWidth - 8)) + scrollX}px`;
  output.style.top = `${place.bottom + scrollY + 4}px`;
}

addEventListener("click", (event) => {
  const token = event.target.closest?.(".t[title]");
  showValue(token && !token.closest("a") ? token : null);
});

addEventListener(
  "keydown",
  (event) => {
    const text = event.target.closest?.(".text[tabindex]");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") showValue(null);
    if (!text || !step || isTyping(event)) return;
    const tokens = [...text.querySelectorAll(".t[title]")];
    if (!tokens.length) return;
    event.preventDefault();
    event.stopPropagation(); // arrow keys elsewhere lead to other latents
    const chosen = tokens.findIndex((token) => token.classList.contains("chosen"));
    showValue(tokens[chosen < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(Math.max(chosen + step, 0), tokens.length - 1)]);
  },
  true,
);

addEventListener("focusout", (event) => {
  if (event.target.closest?.(".text[tabindex]")) showValue(null);
});
