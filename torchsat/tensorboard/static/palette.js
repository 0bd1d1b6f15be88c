// The colours of runs. They are those of TensorBoard's own charts, so that a run has one colour in all of its dashboards. TensorBoard gives each run a
// colour of its palette by the order in which the runs began. Some of these colours are too pale for thin lines, so they are changed until their
// contrast to the page is at least 3:1 (WCAG 2.2, 1.4.11).

const PALETTE = {
  light: ["#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
  dark: ["#8e98a3", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
};
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const LEAST_CONTRAST = 3;
const LEAST_DISTANCE = 80; // between two colours in RGB, of 441 between black and white

// The colour of the run at this place of TensorBoard's list, on a page of this theme ({page, name}).
export function runColour(place, theme) {
  const palette = PALETTE[theme.name];
  return readable(palette[place % palette.length], theme.page);
}

// Whether lines of two colours could be taken for each other, as the yellow and the orange of the palette once they are dark enough.
export function alike(one, other) {
  const [own, its] = [channels(one), channels(other)];
  return Math.hypot(...own.map((each, index) => each - its[index])) < LEAST_DISTANCE;
}

// The dashes of a line where so many runs before it have a colour like its own.
export function runDash(before) {
  return DASHES[before % DASHES.length];
}

// The colour, made darker on a light page and lighter on a dark one until it has enough contrast.
export function readable(colour, page) {
  const target = luminance(channels(page)) > 0.4 ? 0 : 255;
  let mixed = channels(colour);
  for (let step = 0; step < 40 && contrast(mixed, channels(page)) < LEAST_CONTRAST; step++) mixed = mixed.map((each) => each + 0.06 * (target - each));
  return `#${mixed.map((each) => Math.round(each).toString(16).padStart(2, "0")).join("")}`;
}

function channels(colour) {
  return [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
}

function luminance(rgb) {
  const [red, green, blue] = rgb.map((each) => each / 255).map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
