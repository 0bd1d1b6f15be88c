// The verdict, which stands before everything else: how many runs are sick, what is wrong with the worst, and a badge for each run.

import { element } from "./charts.js";
import { copyButton } from "./export.js";
import { shownName } from "./source.js";

export const HEALTH = {
  healthy: { word: "healthy", mark: "✓" },
  "not judged": { word: "not judged", mark: "–" },
  "in doubt": { word: "in doubt", mark: "?" },
  warning: { word: "warnings", mark: "▲" },
  critical: { word: "critical", mark: "●" },
  "not finite": { word: "not finite", mark: "✖" },
};
const MOST_BADGES = 12;
const MOST_TOLD = 3; // how many sick runs are told with cause and remedy

// How the sentence on several runs ends that are neither sick nor known to be healthy.
const UNDECIDED = { "in doubt": "in doubt", "not judged": "not judged, since no rules were given" };

// Whether an alert fires at the end of a run.
export function isSick(verdict) {
  return verdict.health !== "healthy" && !(verdict.health in UNDECIDED);
}

// The runs, the worst first, and of runs that are equally bad the newest. Each has a `verdict` with a `rank`, of which the largest is the worst.
export function worstFirstRuns(runs) {
  const compare = (one, other) => {
    const [own, its] = [[...one.verdict.rank, one.time], [...other.verdict.rank, other.time]];
    const at = own.findIndex((part, index) => part !== its[index]);
    return at < 0 ? 0 : its[at] - own[at];
  };
  return [...runs].sort(compare);
}

// The runs whose worst alert the verdict tells, the worst first.
export function toldRuns(runs) {
  return worstFirstRuns(runs).filter(({ verdict }) => verdict.firing > 0).slice(0, MOST_TOLD);
}

// The badge of a run: a mark and a word, so that it does not depend on colours.
export function badge(verdict) {
  const { word, mark } = HEALTH[verdict.health];
  return element("span", { className: `badge ${className(verdict)}` }, element("span", { textContent: mark, ariaHidden: "true" }), ` ${word}`);
}

function className(verdict) {
  return verdict.health.replace(" ", "-");
}

// The section. `runs`: all runs with their verdicts, `shown`: the colour of each run that is shown, by its name, `causes`: the names of causes in words. `choose(run)` is
// called with the run whose name was clicked: it alone is to be shown, with the place of its worst alert. `toggle(run)` shows the run of a badge, or hides it.
export function verdictSection({ runs, shown, causes, choose, toggle }) {
  const ordered = worstFirstRuns(runs);
  const sick = ordered.filter(({ verdict }) => isSick(verdict));
  if (!runs.length) return { nodes: [], className: "" };
  const [alone] = runs.length === 1 ? runs : [null];
  const parts = [];
  if (!sick.length) parts.push(...calm(runs, alone));
  else if (alone) parts.push(element("h1", {}, badge(alone.verdict), " ", shownName(alone.name)));
  else parts.push(element("h1", { textContent: `${sick.length} of ${runs.length} runs ${sick.length === 1 ? "is" : "are"} sick${undecided(runs)}.${sick.length > 1 ? " The worst first:" : ""}` }));
  parts.push(...sick.slice(0, MOST_TOLD).map((run) => told(run, alone !== null, causes, choose)));
  if (runs.length > 1) {
    const badges = ordered.slice(0, MOST_BADGES).map((run) => {
      const key = element("i", { className: "dot", hidden: !shown.has(run.name) });
      key.style.background = shown.get(run.name) ?? "";
      const made = element("button", { type: "button", className: "run-badge", title: `${shownName(run.name)}: ${run.verdict.sentence}` }, key, element("span", { className: "run-name", textContent: shownName(run.name) }), " ", badge(run.verdict));
      made.setAttribute("aria-pressed", String(shown.has(run.name)));
      made.addEventListener("click", () => toggle(run.name));
      return made;
    });
    if (ordered.length > MOST_BADGES) badges.push(element("span", { className: "aside", textContent: `and ${ordered.length - MOST_BADGES} more under Runs` }));
    parts.push(element("div", { className: "badges" }, ...badges));
  }
  return { nodes: parts, className: className(ordered[0].verdict) };
}

function count(runs, health) {
  return runs.filter(({ verdict }) => verdict.health === health).length;
}

// The end of a sentence on several runs: how many of them are neither sick nor known to be healthy.
function undecided(runs) {
  const found = Object.entries(UNDECIDED).map(([health, end]) => [count(runs, health), end]);
  return found.filter(([number]) => number).map(([number, end]) => `, and ${number} ${number === 1 ? "is" : "are"} ${end}`).join("");
}

// What is said where no alert fires; of one run also how far it is from one.
function calm(runs, alone) {
  const several = alone ? `${shownName(alone.name)} is` : runs.length === 2 ? "Both runs are" : `All ${runs.length} runs are`;
  const [first] = runs.map(({ verdict }) => verdict.health);
  const healthy = count(runs, "healthy");
  const margin = alone?.verdict.margin;
  const rest = margin ? [element("p", { textContent: `${margin[0].toUpperCase()}${margin.slice(1)}.` })] : [];
  if (count(runs, first) === runs.length) return [element("h1", { textContent: `${several} ${first}${first === "not judged" ? ": no rules were given" : ""}.` }), ...rest];
  return [element("h1", { textContent: `${healthy} of ${runs.length} runs ${healthy === 1 ? "is" : "are"} healthy${undecided(runs)}.` }), ...rest];
}

// What is wrong with one run, and what to try.
function told(run, alone, causes, choose) {
  const { verdict } = run;
  const name = element("button", { type: "button", className: "link", textContent: shownName(run.name) });
  name.addEventListener("click", () => choose(run.name));
  const lead = alone ? [] : [name, " ", badge(verdict), ": "];
  const cause = verdict.cause ? [" Cause: ", element("b", { textContent: causes[verdict.cause] ?? verdict.cause }), "."] : [];
  const others = verdict.firing > 1 ? ` ${verdict.firing - 1} more alert${verdict.firing > 2 ? "s" : ""} below.` : "";
  const first = element("p", {}, ...lead, element("b", { textContent: verdict.where }), ` — ${verdict.what}, since step ${verdict.since}.`, ...cause, others);
  if (!verdict.advice) return first;
  const copied = verdict.code ? copyButton(verdict.code, "copy the code") : null;
  return element("div", { className: "told" }, first, element("p", { className: "try" }, element("b", { textContent: "Try: " }), `${verdict.advice} `, copied));
}
