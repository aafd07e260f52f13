// What the page shows, kept in its address: a link to it shows the same.

const DEFAULTS = {
  tab: 'scalars',
  runs: null, // ids; null is the newest few
  filter: '',
  x: 'step', // step, bytes, elapsed, clock
  xlog: false,
  ylog: [], // charts that differ from their default
  smooth: 0.6,
  from: null, // the part of the x axis that is shown; null is all
  to: null,
  charts: '', // filter of charts
  step: null, // of the text tab; null is the newest
  focus: null, // run of the tabs that show one
};

const listeners = new Set();

/** The state. Change it by `update`. */
export const state = { ...DEFAULTS, ...parse(location.hash) };

/** A name in the address; as it stands where it is no encoding of one. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function parse(hash) {
  const read = {};
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ''))) {
    const usual = DEFAULTS[key];
    if (!(key in DEFAULTS)) continue;
    if (key === 'runs') read.runs = text === '' ? [] : text.split(',').map(decoded);
    else if (key === 'ylog') read.ylog = text.split(',').filter(Boolean);
    else if (typeof usual === 'boolean') read[key] = text === '1';
    else if (['from', 'to', 'step'].includes(key)) read[key] = Number.isFinite(Number(text)) ? Number(text) : null;
    else if (key === 'smooth') read.smooth = Math.min(0.999, Math.max(0, Number(text) || 0));
    else read[key] = text;
  }
  return read;
}

function print() {
  const out = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    const usual = DEFAULTS[key];
    if (value === null || value === usual || (Array.isArray(value) && value.length === 0 && key !== 'runs')) continue;
    if (key === 'runs') out.set(key, value.map(encodeURIComponent).join(','));
    else if (Array.isArray(value)) out.set(key, value.join(','));
    else out.set(key, typeof value === 'boolean' ? '1' : String(value));
  }
  return out.toString();
}

/** Changes some keys and tells everyone which. */
export function update(changes) {
  const changed = Object.keys(changes).filter((key) => JSON.stringify(state[key]) !== JSON.stringify(changes[key]));
  if (!changed.length) return;
  Object.assign(state, changes);
  history.replaceState(null, '', `#${print()}`);
  for (const listener of listeners) listener(new Set(changed));
}

/** Calls `listener` with the set of changed keys. */
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

// Another address typed in, or the browser's back.
addEventListener('hashchange', () => update({ ...DEFAULTS, ...parse(location.hash) }));
