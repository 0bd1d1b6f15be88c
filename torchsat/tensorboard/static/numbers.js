// Numbers for people: how they are printed, and where they lie on a scale.

// Prints numbers. `format` is the PercentFormat of percent.py, which the server sends with the scales, so that shares are printed as in Python.
// Python prints no negative shares; here the excess over N(0, 1) can be one.
export function printer(format) {
  const percent = (share) => {
    const points = 100 * share;
    if (points < 0) return `−${percent(-share)}`.replace("−< ", "> −");
    if (points > 0 && points < format.least) return `< ${format.least} %`;
    if (points < 100 && points > format.most) return `> ${format.most} %`;
    return `${points.toFixed(points < format.fine_below || points > format.fine_above ? format.decimals : 0)} %`;
  };
  const value = (metric, given) => {
    if (Number.isNaN(given) || given === undefined || given === null) return "not measured";
    if (!Number.isFinite(given)) return "not finite";
    return metric.form === "share" ? percent(given) : metric.form === "level" ? level(given) : number(given);
  };
  return { percent, value };
}

export const BEYOND = 0.5; // the alert level at the limit of a warning (alert_level.py)

// An alert level in words.
export function level(value) {
  if (value >= 1) return "critical";
  if (value >= BEYOND) return "warning";
  return value > 0 ? "near a warning" : "healthy";
}

// Three digits.
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

// Whether a number of a metric is worse than another one. What is not finite is worst, and no number at all is never worse.
export function worse(metric, value, than) {
  if (Number.isNaN(value) || Math.abs(than) === Infinity) return false;
  if (Number.isNaN(than) || Math.abs(value) === Infinity) return true;
  return metric.worst === "low" ? value < than : value > than;
}

// The position of a number on a scale: 0 at `low`, 1 at `high`. It lies outside [0, 1] if the number lies outside the scale.
export function along(scale, value, low, high) {
  if (scale === "log") {
    [value, low, high] = [value, low, high].map((each) => Math.log10(Math.max(each, 1e-300)));
  }
  return high > low ? (value - low) / (high - low) : 0;
}

// Round numbers on a scale, about `most` of them.
export function ticks(scale, low, high, most = 5) {
  if (scale === "log") {
    const first = Math.ceil(Math.log10(low) - 1e-9);
    const last = Math.floor(Math.log10(high) + 1e-9);
    const stride = Math.max(1, Math.ceil((last - first + 1) / most));
    const found = [];
    for (let power = first; power <= last; power += stride) found.push(Number(`1e${power}`));
    if (found.length > 1) return found;
    return [low, high];
  }
  const rough = (high - low) / most;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / stride - 1e-9) * stride; at <= high + stride * 1e-9; at += stride) found.push(Number(at.toPrecision(12)));
  return found;
}

// A number for a tick or an axis, where room is scarce.
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return value.toExponential(0).replace("e+", "e");
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0).replace("e-", "e−");
  return String(Number(value.toPrecision(4)));
}

// The ends of a scale: those of the metric if it has any. Otherwise half a per cent of the numbers on either side lies outside, so that one outlier
// does not give all others the same colour.
export function range(metric, values) {
  if (metric.low !== null && metric.high !== null) return [metric.low, metric.high];
  const known = Float64Array.from(values).filter((value) => Number.isFinite(value) && (metric.scale !== "log" || value > 0)).sort();
  if (!known.length) return metric.scale === "log" ? [1e-6, 1] : [0, 1];
  const spared = Math.floor(known.length / 200);
  const [low, high] = [known[spared], known[known.length - 1 - spared]];
  if (metric.scale === "log") {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high) + 1e-9)];
    return [10 ** first, 10 ** Math.max(first + 1, last)];
  }
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}
