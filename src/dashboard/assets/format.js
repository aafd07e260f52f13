// Numbers as people read them.

const GROUPED = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });
const PREFIXES = [[1e15, 'P'], [1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']];

/** 12,345 */
export const count = (value) => (value === null || value === undefined ? '–' : GROUPED.format(value));

/** Four significant digits, with an exponent only where it has to be. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2).replace('e+', 'e');
  if (size >= 10_000) return GROUPED.format(value);
  return String(Number(value.toPrecision(4)));
}

/** 1.5 M with a unit. */
export function scaled(value, unit = '', digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const [factor, prefix] = PREFIXES.find(([it]) => Math.abs(value) >= it) ?? [1, ''];
  return `${Number((value / factor).toPrecision(digits))} ${prefix}${unit}`.trim();
}

/** 3 d 4 h, 5 min 3 s, 120 ms. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return '–';
  const s = Math.abs(seconds);
  const sign = seconds < 0 ? '-' : '';
  if (s === 0) return '0 s';
  if (s < 1e-3) return `${sign}${Number((s * 1e6).toPrecision(3))} µs`;
  if (s < 1) return `${sign}${Number((s * 1e3).toPrecision(3))} ms`;
  if (s < 60) return `${sign}${Number(s.toPrecision(3))} s`;
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
  const first = parts.findIndex(([it]) => s >= it);
  const [a, unitA] = parts[first];
  const [b, unitB] = parts[first + 1] ?? [0, ''];
  const high = Math.floor(s / a);
  const low = b ? Math.floor((s - high * a) / b) : 0;
  return sign + (low ? `${high} ${unitA} ${low} ${unitB}` : `${high} ${unitA}`);
}

const TIME = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit' });
const DATE = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit' });

/** The time of today, or the day with it. */
export function clock(seconds) {
  const date = new Date(seconds * 1000);
  return (date.toDateString() === new Date().toDateString() ? TIME : DATE).format(date);
}

/** How long ago, in one unit. */
export function ago(seconds, now) {
  if (!seconds) return 'never';
  const s = Math.max(0, now - seconds);
  const [size, unit] = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']].find(([it]) => s >= it) ?? [1, 's'];
  return `${Math.round(s / size)} ${unit} ago`;
}
