// What is shown as a file: a picture, or a table of its numbers.

import { element } from "./charts.js";

// The numbers that are shown as a table: one line per observation in sight, one column per row of the picture.
export function asTable({ grid, sites, from, to }) {
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [["step", ...sites.map(quoted)].join(",")];
  grid.steps.forEach((step, row) => {
    if ((from !== null && step < from) || (to !== null && step > to)) return;
    const cells = sites.map((site) => {
      const value = grid.at(row, grid.column.get(site));
      return Number.isNaN(value) ? "" : Number.isFinite(value) ? String(value) : "not finite";
    });
    lines.push([step, ...cells].join(","));
  });
  return `${lines.join("\n")}\n`;
}

// The picture of a heatmap with a title above it, as a canvas.
export function asPicture(canvas, title, theme) {
  const head = Math.round(26 * (canvas.width / Math.max(1, canvas.clientWidth || canvas.width)));
  const made = element("canvas", { width: canvas.width, height: canvas.height + head });
  const pen = made.getContext("2d");
  pen.fillStyle = theme.page;
  pen.fillRect(0, 0, made.width, made.height);
  pen.fillStyle = theme.ink;
  pen.font = `600 ${Math.round(head / 2)}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  pen.fillText(title, head / 3, head / 2, made.width - head);
  pen.drawImage(canvas, 0, head);
  return made;
}

// Have the browser save a Blob under a name.
export function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g, "_") });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Put a text on the clipboard. Where the browser does not let us, it is selected in a field of its own and copied the old way.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

// A button that copies a text and says so for a moment.
export function copyButton(text, label = "copy") {
  const made = element("button", { type: "button", className: "copy", textContent: label, title: "copy to the clipboard" });
  made.addEventListener("click", async () => {
    await copy(text);
    made.textContent = "copied";
    setTimeout(() => (made.textContent = label), 1500);
  });
  return made;
}
