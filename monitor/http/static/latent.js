// The page of one latent: arrows go to its neighbours, u goes up to the table, as it was left.
const table = sessionStorage.getItem("table");
const sae = decodeURIComponent(location.pathname.split("/")[2]);
if (table && new URLSearchParams(table).get("sae") === sae) document.getElementById("up").href = `/?${table}#latents`;

addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  const link = { ArrowLeft: "before", ArrowRight: "after", u: "up" }[event.key];
  if (link) document.getElementById(link).click();
});
