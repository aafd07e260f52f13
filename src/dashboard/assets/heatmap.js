// Numbers in two directions as colours, with a scale and what is under the cursor.

import { cssVar, el } from './dom.js';
import { count, scaled } from './format.js';

/** Dark blue to yellow, even in brightness and readable without red and green. */
const STOPS = [[34, 29, 82], [46, 74, 148], [32, 132, 156], [74, 180, 128], [188, 211, 82], [253, 231, 60]];

function color(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (STOPS.length - 1);
  const i = Math.floor(at);
  const mix = STOPS[i].map((from, k) => Math.round(from + (STOPS[i + 1][k] - from) * (at - i)));
  return mix;
}

/**
 * A heat map: `columns` are steps, `rows` values or layers from bottom to top, `value(column, row)`
 * a number or null, by index.
 */
export function heatmap({ title, columns, rows, value, rowName, format, log, floor = 0 }) {
  let [low, high] = [Infinity, -Infinity];
  const at = (c, r) => {
    const it = value(c, r);
    return it === null || !Number.isFinite(it) || (log && it <= floor) ? null : it;
  };
  for (let c = 0; c < columns.length; c++) {
    for (let r = 0; r < rows.length; r++) {
      const it = at(c, r);
      if (it !== null) [low, high] = [Math.min(low, it), Math.max(high, it)];
    }
  }
  const scale = log ? Math.log : (it) => it;
  const share = (it) => (high > low ? (scale(it) - scale(low)) / (scale(high) - scale(low)) : 0.5);
  const picture = el('canvas', { width: columns.length, height: rows.length, class: 'heat' });
  const ctx = picture.getContext('2d');
  const pixels = ctx.createImageData(columns.length, rows.length);
  for (let c = 0; c < columns.length; c++) {
    for (let r = 0; r < rows.length; r++) {
      const it = at(c, r);
      if (it === null) continue;
      const i = 4 * ((rows.length - 1 - r) * columns.length + c);
      pixels.data.set([...color(share(it)), 255], i);
    }
  }
  ctx.putImageData(pixels, 0, 0);
  const known = high >= low;
  const readout = el('div', { class: 'readout' });
  const rest = () => readout.replaceChildren(el('span', { class: 'muted' }, known ? `${format(low)} to ${format(high)}` : 'no values'));
  rest();
  const area = el('div', { class: 'heat-area', tabindex: '0', role: 'img', 'aria-label': `${title}, steps ${count(columns[0])} to ${count(columns.at(-1))}, from ${known ? format(low) : '–'} to ${known ? format(high) : '–'}` }, picture);
  area.addEventListener('pointermove', (event) => {
    const box = picture.getBoundingClientRect();
    const c = Math.min(columns.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns.length)));
    const r = Math.min(rows.length - 1, Math.max(0, rows.length - 1 - Math.floor(((event.clientY - box.top) / box.height) * rows.length)));
    const it = value(c, r);
    readout.replaceChildren(el('span', { class: 'at' }, `step ${count(columns[c])}, ${rowName(r, rows[r])}`), el('b', {}, it === null ? '–' : format(it)));
  });
  area.addEventListener('pointerleave', rest);
  const ramp = Array.from({ length: 6 }, (_, i) => `rgb(${color(i / 5.001)})`).join(',');
  return el('div', {}, readout,
    el('div', { class: 'heat-frame' },
      el('div', { class: 'heat-rows' }, el('span', {}, rowName(rows.length - 1, rows.at(-1))), el('span', {}, rowName(0, rows[0]))),
      area,
      el('div', { class: 'heat-scale', style: { background: `linear-gradient(to top, ${ramp})`, 'border-color': cssVar('--line') } })),
    el('div', { class: 'heat-columns' }, el('span', {}, scaled(columns[0])), el('span', {}, 'step'), el('span', {}, scaled(columns.at(-1)))));
}
