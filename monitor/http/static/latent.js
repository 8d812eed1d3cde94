// The page of one latent: keys that lead on, texts that are tried, and notes.
"use strict";

// Arrow keys lead to the previous and the next latent, u to the table in its last state.
const tableQuery = sessionStorage.getItem("table");
const sae = decodeURIComponent(location.pathname.split("/")[2]);
if (tableQuery && new URLSearchParams(tableQuery).get("sae") === sae) byId("all-latents").href = `/?${tableQuery}#latents`;

addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  const link = { ArrowLeft: "previous", ArrowRight: "next", u: "all-latents" }[event.key];
  if (link) byId(link).click();
});

// --- Texts that are tried --------------------------------------------------------------------------------------------

const tryForm = byId("try-form");
const tryMode = byId("try-mode");
let tryRequest;

// The mode and the strength of the address, which a reload and the way back keep.
for (const [name, value] of new URLSearchParams(location.search)) {
  if (name === "mode" || name === "strength") byId(`try-${name}`).value = value;
}

function showStrength() {
  byId("try-strength").disabled = tryMode.value !== "steer";
}

async function tryText(at) {
  tryRequest?.abort();
  tryRequest = new AbortController();
  const query = new URLSearchParams(new FormData(tryForm));
  if (at !== undefined) query.set("at", at);
  const { sae, latent } = tryForm.dataset;
  if (await load("tried", `/parts/try?${new URLSearchParams({ sae, latent })}&${query}`, tryRequest.signal)) {
    history.replaceState(null, "", `${location.pathname}?${query}#try`);
  }
}

tryForm.addEventListener("submit", (event) => {
  event.preventDefault();
  tryText();
});
tryMode.addEventListener("change", showStrength);
byId("tried").addEventListener("click", (event) => {
  const token = event.target.closest("a[data-at]");
  if (!token) return;
  event.preventDefault();
  tryText(token.dataset.at);
});
showStrength();

// --- Notes -----------------------------------------------------------------------------------------------------------

byId("note-form")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { elements, dataset } = event.target;
  const note = { label: elements.label.value, note: elements.note.value, is_bookmarked: elements.is_bookmarked.checked };
  const saved = byId("note-saved");
  try {
    await fetchOk(dataset.address, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(note),
    });
    saved.textContent = "saved";
  } catch (error) {
    saved.textContent = errorText(error);
  }
});
