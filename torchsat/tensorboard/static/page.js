// The entry point of a page that holds all numbers itself (torchsat report --format html): the last part of the script of that page.

import { start } from "./app.js";
import { embedded } from "./source.js";

const night = window.matchMedia("(prefers-color-scheme: dark)");

start(document.getElementById("torchsat") ?? document.body, embedded(JSON.parse(document.getElementById("torchsat-data").textContent)), {
  read: () => new URLSearchParams(window.location.hash.slice(1)),
  write(view) {
    if (view.toString() !== window.location.hash.slice(1)) window.history.replaceState(null, "", `#${view}`);
  },
  dark: () => night.matches,
  onTheme: (then) => night.addEventListener("change", then),
  onView: (then) => window.addEventListener("hashchange", then),
  onReload() {},
});
