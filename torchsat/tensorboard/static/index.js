// The entry point of the tab, which TensorBoard loads into a frame of its page. Server and page have the same origin. The server is asked by relative
// paths. The view is kept in the address of the page around the frame. That page also tells whether it is dark, and when TensorBoard has reloaded its
// data.

import { start } from "./app.js";
import { fetching } from "./source.js";

export async function render() {
  document.title = "torchsat: Saturation";
  document.documentElement.lang = "en";
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "./style.css";
  const loaded = new Promise((done) => style.addEventListener("load", done));
  document.head.append(style);
  await loaded;
  await start(document.body, fetching("./"), tensorboard());
}

const PREFIX = "p.torchsat.";

// TensorBoard as the host of the view.
function tensorboard() {
  const outer = reachable() ? window.parent : window;
  return {
    read() {
      const parts = outer.location.hash.slice(1).split("&").filter((part) => part.startsWith(PREFIX));
      return new URLSearchParams(parts.map((part) => part.slice(PREFIX.length)).join("&"));
    },
    write(view) {
      const others = outer.location.hash.slice(1).split("&").filter((part) => part && !part.startsWith(PREFIX));
      const ours = view.toString().split("&").filter(Boolean).map((part) => PREFIX + part);
      const hash = "#" + [...others, ...ours].join("&");
      if (hash !== outer.location.hash) outer.history.replaceState(outer.history.state, "", hash);
    },
    dark: () => outer.document.body.classList.contains("dark-mode"),
    onTheme(then) {
      new MutationObserver(then).observe(outer.document.body, { attributes: true, attributeFilter: ["class"] });
    },
    onView(then) {
      outer.addEventListener("hashchange", then);
    },
    onReload: listen,
    canFollow: true,
    asleep: () => !reloads(),
  };
}

// Whether TensorBoard loads new data by itself. It is a setting of TensorBoard's page, which is off at first.
function reloads() {
  try {
    return Boolean(JSON.parse(window.localStorage.getItem("_tb_global_settings") ?? "{}").autoReload);
  } catch {
    return false;
  }
}

// Whether the page around the frame may be read.
function reachable() {
  try {
    return Boolean(window.parent.document.body);
  } catch {
    return false;
  }
}

// TensorBoard sends its messages through a channel that the frame opens. It expects an answer to every message that is not a reply itself.
function listen(then) {
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    channel.port1.postMessage(JSON.stringify({ ...message, payload: null, error: null, isReply: true }));
    if (message.type === "experimental.DataReloaded") then();
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}
