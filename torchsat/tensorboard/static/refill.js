// Fills a part of the page anew while somebody uses it, as when new data come in.

const FOCUSABLE = "button, summary, input, select, a[href], [tabindex]";

const filled = new WeakMap(); // what each part is about

// Put `nodes` in the place of what is in `part`. If it is still about the same, as `subject` says, then what is focused, unfolded and scrolled in it
// stays so: by its place, where there is as much as before.
export function refill(part, nodes, subject) {
  const isSame = filled.get(part) === subject;
  filled.set(part, subject);
  if (!isSame) return part.replaceChildren(...nodes);
  const found = (selector) => [...part.querySelectorAll(selector)];
  const [focusable, folded, scrolled] = [found(FOCUSABLE), found("details"), found("pre, ul")];
  const focus = focusable.indexOf(document.activeElement);
  const [open, down] = [folded.map((each) => each.open), scrolled.map((each) => each.scrollTop)];
  part.replaceChildren(...nodes);
  const [now, nowFolded, nowScrolled] = [found(FOCUSABLE), found("details"), found("pre, ul")];
  if (nowFolded.length === open.length) nowFolded.forEach((each, index) => (each.open = open[index]));
  if (nowScrolled.length === down.length) nowScrolled.forEach((each, index) => (each.scrollTop = down[index]));
  if (focus >= 0 && now.length === focusable.length) now[focus].focus({ preventScroll: true });
}
