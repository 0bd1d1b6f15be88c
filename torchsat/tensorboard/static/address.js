// The view: what a user has chosen to see. It stands in the address of the page, so that a link shows the same view to somebody else.

import { AXES } from "./frame.js";

export const KINDS = { module: "modules", call: "calls", recurrent: "recurrent gates", softmax: "softmaxes" };
export const ORDERS = { flow: "data flow", worst: "worst first" };
export const FOLDS = { auto: "automatic", sites: "every site", blocks: "by block" };

// The view that an address says. What it does not say, or says wrongly, has its default.
export function decode(query) {
  const among = (name, table, otherwise) => (Object.hasOwn(table, query.get(name) ?? "") ? query.get(name) : otherwise);
  const step = (name) => (query.has(name) && query.get(name) !== "" && Number.isFinite(Number(query.get(name))) ? Number(query.get(name)) : null);
  return {
    runs: query.has("runs") ? query.getAll("runs").filter(Boolean) : null, // null: the worst ones
    metric: query.get("metric"), // null: the first metric that the runs have
    run: query.get("run"),
    site: query.get("site"), // null: none chosen yet, and the place of the worst alert is shown; "": none is shown
    step: step("step"), // null: the latest
    from: step("from"), // the steps and the rows that are zoomed in on; null: all
    to: step("to"),
    top: query.get("top"),
    bottom: query.get("bottom"),
    order: among("order", ORDERS, "flow"),
    axis: among("axis", AXES, "step"),
    fold: among("fold", FOLDS, "auto"),
    unfolded: new Set((query.get("unfolded") ?? "").split(",").filter(Boolean)),
    filter: query.get("filter") ?? "",
    difference: query.get("difference") === "1",
    hidden: new Set((query.get("hidden") ?? "").split(".").filter((kind) => Object.hasOwn(KINDS, kind))),
  };
}

// The query of an address that says this view. What has its default is left out, so that addresses stay short.
export function encode(view) {
  const query = new URLSearchParams();
  if (view.runs !== null) (view.runs.length ? view.runs : [""]).forEach((run) => query.append("runs", run));
  if (view.run !== null && view.site) query.set("run", view.run);
  for (const name of ["metric", "site", "step", "from", "to", "top", "bottom"]) if (view[name] !== null) query.set(name, view[name]);
  if (view.order !== "flow") query.set("order", view.order);
  if (view.axis !== "step") query.set("axis", view.axis);
  if (view.fold !== "auto") query.set("fold", view.fold);
  if (view.unfolded.size) query.set("unfolded", [...view.unfolded].join(","));
  if (view.filter) query.set("filter", view.filter);
  if (view.difference) query.set("difference", "1");
  if (view.hidden.size) query.set("hidden", [...view.hidden].join("."));
  return query;
}
