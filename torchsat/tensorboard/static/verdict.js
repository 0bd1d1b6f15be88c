// The verdict, which stands before everything else: how many runs are sick, what is wrong with the worst, and a badge for each run.

import { element } from "./charts.js";
import { copyButton } from "./export.js";
import { shownName } from "./source.js";

export const HEALTH = {
  healthy: { word: "healthy", mark: "✓" },
  warning: { word: "warnings", mark: "▲" },
  critical: { word: "critical", mark: "●" },
  "not finite": { word: "not finite", mark: "✖" },
};
const MOST_BADGES = 12;

// The runs, the worst first, and of runs that are equally bad the newest. Each has a `verdict` with a `rank`, of which the largest is the worst.
export function worstFirstRuns(runs) {
  const compare = (one, other) => {
    const [own, its] = [[...one.verdict.rank, one.time], [...other.verdict.rank, other.time]];
    const at = own.findIndex((part, index) => part !== its[index]);
    return at < 0 ? 0 : its[at] - own[at];
  };
  return [...runs].sort(compare);
}

// The badge of a run: a mark and a word, so that it does not depend on colours.
export function badge(verdict) {
  const { word, mark } = HEALTH[verdict.health];
  return element("span", { className: `badge ${className(verdict)}` }, element("span", { textContent: mark, ariaHidden: "true" }), ` ${word}`);
}

function className(verdict) {
  return verdict.health.replace(" ", "-");
}

// The section. `runs`: all runs with their verdicts, `shown`: the names of those that are shown, `code(run)`: the code of the first remedy of a run that
// is shown. `choose(run)` is called with the run that was clicked: it is to be shown, with the place of its worst alert.
export function verdictSection({ runs, shown, code, choose }) {
  const ordered = worstFirstRuns(runs);
  const sick = ordered.filter(({ verdict }) => verdict.health !== "healthy");
  const [worst] = ordered;
  const button = (run, text) => {
    const made = element("button", { type: "button", className: "link", textContent: text });
    made.addEventListener("click", () => choose(run.name));
    return made;
  };
  const parts = [];
  if (!runs.length) return { nodes: [], className: "" };
  if (!sick.length) parts.push(element("h1", { textContent: runs.length === 1 ? `${shownName(worst.name)} is healthy.` : `${runs.length === 2 ? "Both" : `All ${runs.length}`} runs are healthy.` }));
  else {
    const { verdict } = worst;
    const head = runs.length === 1 ? element("h1", {}, badge(verdict), " ", shownName(worst.name)) : element("h1", { textContent: `${sick.length} of ${runs.length} runs ${sick.length === 1 ? "is" : "are"} sick.` });
    const where = element("b", { textContent: verdict.where });
    const cause = verdict.cause ? element("span", {}, " Cause: ", element("b", { textContent: verdict.cause }), ".") : null;
    const others = verdict.firing > 1 ? ` ${verdict.firing - 1} more alert${verdict.firing > 2 ? "s" : ""} below.` : "";
    const lead = runs.length === 1 ? [] : ["Worst: ", button(worst, shownName(worst.name)), " ", badge(verdict), ": "];
    parts.push(head, element("p", {}, ...lead, where, ` — ${verdict.what}, since step ${verdict.since}.`, cause, others));
    if (verdict.advice) parts.push(element("p", { className: "try" }, element("b", { textContent: "Try: " }), `${verdict.advice} `, code(worst.name) ? copyButton(code(worst.name), "copy the code") : null));
  }
  if (runs.length > 1) {
    const badges = ordered.slice(0, MOST_BADGES).map((run) => {
      const made = element("button", { type: "button", className: "run-badge", title: run.verdict.sentence }, shownName(run.name), " ", badge(run.verdict));
      made.setAttribute("aria-pressed", String(shown.has(run.name)));
      made.addEventListener("click", () => choose(run.name));
      return made;
    });
    if (ordered.length > MOST_BADGES) badges.push(element("span", { className: "aside", textContent: `and ${ordered.length - MOST_BADGES} more under Runs` }));
    parts.push(element("div", { className: "badges" }, ...badges));
  }
  return { nodes: parts, className: sick.length ? className(worst.verdict) : "healthy" };
}
