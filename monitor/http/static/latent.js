// The page of one latent: arrow keys lead to the previous and the next one, u to the table in its last state.
"use strict";

const tableQuery = sessionStorage.getItem("table");
const sae = decodeURIComponent(location.pathname.split("/")[2]);
if (tableQuery && new URLSearchParams(tableQuery).get("sae") === sae) {
  document.getElementById("all-latents").href = `/?${tableQuery}#latents`;
}

addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  const link = { ArrowLeft: "previous", ArrowRight: "next", u: "all-latents" }[event.key];
  if (link) document.getElementById(link).click();
});
