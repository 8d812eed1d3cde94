// Light or dark, as the machine says until somebody chooses. Runs before anything is drawn, so that nothing flashes.
(() => {
  const root = document.documentElement;
  const chosen = localStorage.getItem("theme");
  if (chosen) root.dataset.theme = chosen;

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function turn() {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    dispatchEvent(new Event("theme"));
  }

  addEventListener("DOMContentLoaded", () => document.getElementById("theme")?.addEventListener("click", turn));
  addEventListener("keydown", (event) => {
    if (event.key === "t" && !isTyping(event)) turn();
  });
})();

// Keys are commands only where nobody types and no browser's own shortcut is meant.
function isTyping(event) {
  return event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
}
