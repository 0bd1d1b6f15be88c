// The rows of a heatmap: which sites pass the filters, in which order they stand, and which of them share a row because their block is folded.

import { worse } from "./numbers.js";
import { Grid } from "./source.js";

const MOST_UNFOLDED = 40; // beyond so many sites blocks are folded by themselves

// The function that tells whether a text passes the filter: words that all occur in it, or a regular expression between slashes. `wrong` is the
// reason why a regular expression cannot be used; the filter then lets everything pass.
export function matcher(filter) {
  const pattern = /^\/(.*?)\/?$/.exec(filter.trim());
  if (pattern === null) {
    const terms = filter.toLowerCase().split(/\s+/).filter(Boolean);
    return { test: (text) => terms.every((term) => text.toLowerCase().includes(term)), wrong: null };
  }
  try {
    const expression = new RegExp(pattern[1], "i");
    return { test: (text) => expression.test(text), wrong: null };
  } catch (error) {
    return { test: () => true, wrong: error.message };
  }
}

// The rows of one run. given: {about, grid (one metric of every site), metric, view, step}. The answer:
//   sites     the names of the rows: those of sites, and of blocks. The row of a block that is unfolded stands above those of its sites
//   facts     what is known of each row, by name. That of a block has `block`, its name, and `members`, the names of its sites
//   grid      the numbers of all rows. That of a block is the worst of its sites
//   row       a Map from each site that is shown to the name of its row
//   measured, filtered    how many sites have the metric at all, and how many of those the filters leave out
export function rowsOf({ about, grid, metric, view, step }) {
  const { test } = matcher(view.filter);
  const has = new Set(grid.names.filter((_, column) => grid.steps.some((_, row) => !Number.isNaN(grid.at(row, column)))));
  const passing = about.sites.filter(({ site, activation, kind }) => has.has(site) && !view.hidden.has(kind) && test(`${site} ${activation}`));
  const blocks = blocksOf(passing.map(({ site }) => site));
  const folds = view.fold === "blocks" || (view.fold === "auto" && passing.length > MOST_UNFOLDED);
  const facts = new Map();
  const row = new Map();
  for (const fact of passing) {
    const block = blocks.get(fact.site);
    const grouped = folds && block !== undefined;
    const open = grouped && view.unfolded.has(block);
    const head = `${open ? "▾" : "▸"} ${block}`;
    if (grouped && !facts.has(head)) facts.set(head, { site: head, block, kind: "block", activation: "", members: [] });
    if (grouped) facts.get(head).members.push(fact.site);
    if (!grouped || open) facts.set(fact.site, fact);
    row.set(fact.site, grouped && !open ? head : fact.site);
  }
  for (const fact of facts.values()) if (fact.members) fact.activation = `${fact.members.length} sites`;
  const joined = withBlocks(grid, metric, [...facts.values()].filter((fact) => fact.members));
  let sites = [...facts.keys()];
  if (view.order === "worst") sites = worstFirst(sites, facts, joined, metric, about, step);
  const [top, bottom] = [sites.indexOf(view.top), sites.indexOf(view.bottom)];
  if (top >= 0 && bottom >= top) sites = sites.slice(top, bottom + 1);
  return { sites, facts, grid: joined, row, measured: has.size, filtered: has.size - passing.length };
}

// The block of each site that shares one with another site: the path to the first number in its name, as `encoder.layers.3`.
function blocksOf(names) {
  const found = new Map();
  const count = new Map();
  for (const name of names) {
    const parts = name.split("/")[0].split(".");
    const at = parts.findIndex((part) => /^\d+$/.test(part));
    if (at < 0) continue;
    const block = parts.slice(0, at + 1).join(".");
    found.set(name, block);
    count.set(block, (count.get(block) ?? 0) + 1);
  }
  for (const [name, block] of found) if (count.get(block) < 2) found.delete(name);
  return found;
}

// The grid with one more column for each folded block.
function withBlocks(grid, metric, blocks) {
  if (!blocks.length) return grid;
  const width = grid.names.length + blocks.length;
  const values = new Float32Array(grid.steps.length * width).fill(NaN);
  const columns = blocks.map((block) => block.members.map((site) => grid.column.get(site)).filter((column) => column !== undefined));
  for (let row = 0; row < grid.steps.length; row++) {
    const start = row * width;
    values.set(grid.values.subarray(row * grid.names.length, (row + 1) * grid.names.length), start);
    columns.forEach((members, index) => {
      let worst = NaN;
      for (const column of members) {
        const value = grid.at(row, column);
        if (worse(metric, value, worst)) worst = value;
      }
      values[start + grid.names.length + index] = worst;
    });
  }
  return new Grid([...grid.names, ...blocks.map((block) => block.site)], grid.steps, values);
}

// The names of rows, those first that suffer from an alert that fires, critical ones before warnings; then those whose number is worst at the step.
function worstFirst(names, facts, grid, metric, about, step) {
  const row = step === null ? grid.steps.length - 1 : grid.row(step);
  const sign = metric.worst === "low" ? 1 : -1;
  const suffering = new Map();
  for (const alert of about.alerts.filter((each) => each.cleared === null)) {
    for (const site of [...alert.places, ...alert.also]) suffering.set(site, Math.min(suffering.get(site) ?? 2, alert.severity === "critical" ? 0 : 1));
  }
  const key = (name) => {
    const members = facts.get(name).members ?? [name];
    const value = grid.at(row, grid.column.get(name));
    return [Math.min(...members.map((site) => suffering.get(site) ?? 2)), Number.isNaN(value) ? Infinity : Number.isFinite(value) ? sign * value : -Infinity];
  };
  const keys = new Map(names.map((name) => [name, key(name)]));
  return names.sort((one, other) => keys.get(one)[0] - keys.get(other)[0] || keys.get(one)[1] - keys.get(other)[1] || 0);
}
