// The view: what a user has chosen to see. It stands in the address of the page, so that a link shows the same view to somebody else.

import { AXES } from "./frame.js";

export const KINDS = { module: "modules", call: "calls", recurrent: "recurrent gates", softmax: "softmaxes" };
export const ORDERS = { flow: "data flow", worst: "worst first" };
const FIRST_METRIC = "excess";

// The view that an address says. What it does not say, or says wrongly, has its default.
export function decode(query) {
  return {
    runs: query.has("runs") ? query.getAll("runs").filter(Boolean) : null,
    metric: query.get("metric") ?? FIRST_METRIC,
    run: query.get("run"),
    site: query.get("site"), // null: none chosen yet, and the site of the first alert is shown; "": none is shown
    step: query.has("step") && Number.isFinite(Number(query.get("step"))) ? Number(query.get("step")) : null,
    order: Object.hasOwn(ORDERS, query.get("order") ?? "") ? query.get("order") : "flow",
    axis: Object.hasOwn(AXES, query.get("axis") ?? "") ? query.get("axis") : "step",
    filter: query.get("filter") ?? "",
    hidden: new Set((query.get("hidden") ?? "").split(".").filter((kind) => Object.hasOwn(KINDS, kind))),
  };
}

// The query of an address that says this view. What has its default is left out, so that addresses stay short.
export function encode(view) {
  const query = new URLSearchParams();
  if (view.runs !== null) (view.runs.length ? view.runs : [""]).forEach((run) => query.append("runs", run));
  if (view.metric !== FIRST_METRIC) query.set("metric", view.metric);
  if (view.run !== null && view.site) query.set("run", view.run);
  if (view.site !== null) query.set("site", view.site);
  if (view.step !== null) query.set("step", view.step);
  if (view.order !== "flow") query.set("order", view.order);
  if (view.axis !== "step") query.set("axis", view.axis);
  if (view.filter) query.set("filter", view.filter);
  if (view.hidden.size) query.set("hidden", [...view.hidden].join("."));
  return query;
}
