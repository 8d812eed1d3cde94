// The page of one latent: arrows go to its neighbours, u goes up to the table.
addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  const link = { ArrowLeft: "before", ArrowRight: "after", u: "up" }[event.key];
  if (link) document.getElementById(link).click();
});
