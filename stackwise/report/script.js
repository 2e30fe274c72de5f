// Hints at the pointer, and the folded configuration on paper. The page is whole without this.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const holder = event.target.closest?.("[data-tip]");
  tip.hidden = !holder;
  if (!holder) return;
  tip.textContent = holder.dataset.tip;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - height - 4)}px`;
});
document.addEventListener("pointerleave", () => (tip.hidden = true));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((fold) => (fold.open = true)));
