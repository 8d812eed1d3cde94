// Light or dark: the system's preference until the reader chooses. It runs before the first paint, so nothing flashes.
(() => {
  const root = document.documentElement;
  const savedTheme = localStorage.getItem("theme");
  if (savedTheme) root.dataset.theme = savedTheme;

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function toggle() {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    dispatchEvent(new Event("theme"));
  }

  addEventListener("DOMContentLoaded", () => document.getElementById("theme")?.addEventListener("click", toggle));
  addEventListener("keydown", (event) => {
    if (event.key === "t" && !isTyping(event)) toggle();
  });
})();

// Whether a key belongs to a field or to a shortcut of the browser, and is no command of the page.
function isTyping(event) {
  return event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
}
