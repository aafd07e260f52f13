// Bits per byte by how far into its document a byte lies, as `mambabyte eval --json` measured it.

import { get } from './api.js';
import { cssVar, el } from './dom.js';
import { count, number, scaled } from './format.js';

const uPlot = window.uPlot;

export function position(main, { runs }) {
  const reports = new Map();
  let plot = null;
  const area = el('div');
  main.append(area);

  async function load(id) {
    try {
      reports.set(id, await get('evaluations', { run: id }));
    } catch (error) {
      console.debug(error);
      reports.set(id, []);
    }
    render();
  }

  /** Every evaluation with a curve, of every selected run. */
  function curves() {
    const found = [];
    for (const { id } of runs.selected()) {
      (reports.get(id) ?? []).forEach(({ name, report }, i) => {
        if (typeof report?.bits_per_byte !== 'number') return;
        const curve = (Array.isArray(report.curve) ? report.curve : []).filter((it) => typeof it?.bits_per_byte === 'number');
        found.push({ id, name, report, curve, color: runs.color(id), dash: [[], [6, 4], [2, 3], [8, 3, 2, 3]][i % 4] });
      });
    }
    return found;
  }

  function render() {
    plot?.destroy();
    plot = null;
    const found = curves();
    if (!found.length) {
      area.replaceChildren(el('div', { class: 'nothing' },
        el('p', {}, 'No evaluations. Put what `mambabyte eval --json` prints beside the run, in a file whose name begins with eval:'),
        el('pre', { tabindex: '0' }, 'mambabyte eval --checkpoint checkpoints/RUN --data data/pg19 --json > checkpoints/RUN/eval-test.json')));
      return;
    }
    const drawn = found.filter(({ curve }) => curve.length);
    const readout = el('div', { class: 'readout' });
    const place = el('div', { class: 'plot tall', tabindex: '0', role: 'img', 'aria-label': `Bits per byte by position: ${drawn.map(({ id, name }) => `${id} ${name}`).join(', ')}` });
    area.replaceChildren(
      drawn.length ? el('section', { class: 'card', 'aria-label': 'By position' }, el('div', { class: 'card-head' }, el('h3', {}, 'Bits per byte by position', el('span', { class: 'unit' }, 'bytes into the document, logarithmic'))), readout, place) : el('p', { class: 'nothing' }, 'These evaluations have no scores by position.'),
      el('div', { class: 'table-scroll', tabindex: '0', role: 'region', 'aria-label': 'Evaluations' }, table(found)));
    if (drawn.length) plot = draw(place, readout, drawn);
  }

  function table(found) {
    return el('table', { class: 'config' },
      el('thead', {}, el('tr', {}, ['run', 'evaluation', 'bits per byte', 'word perplexity', 'bytes', 'documents'].map((it) => el('th', { scope: 'col' }, it)))),
      el('tbody', {}, found.map(({ id, name, report, color }) => el('tr', {},
        el('th', { scope: 'row' }, el('i', { class: 'swatch', style: { '--c': color } }), id),
        el('td', {}, name), el('td', {}, number(report.bits_per_byte)), el('td', {}, number(report.word_perplexity)),
        el('td', {}, count(report.bytes)), el('td', {}, Array.isArray(report.documents) ? count(report.documents.length) : '–')))));
  }

  function draw(place, readout, drawn) {
    // A point stands at the end of its positions; the last may have none.
    const end = ({ from, to, bytes }) => to ?? from + Math.max(1, bytes);
    const data = uPlot.join(drawn.map(({ curve }) => [curve.map(end), curve.map((it) => it.bits_per_byte)]));
    const text = cssVar('--muted');
    const grid = { stroke: cssVar('--grid'), width: 1 };
    const read = (u) => {
      const at = u?.cursor.idx;
      const hovering = at !== null && at !== undefined && u.cursor.left >= 0;
      readout.replaceChildren(
        hovering ? el('span', { class: 'at' }, `up to byte ${count(data[0][at])}`) : '',
        ...drawn.map(({ id, name, color, report }, i) => {
          const value = hovering ? data[i + 1][at] : report.bits_per_byte;
          return value === null || value === undefined ? '' : el('span', { class: 'value' }, el('i', { class: 'swatch', style: { '--c': color } }), `${id} ${name} `, el('b', {}, number(value)));
        }));
    };
    const options = {
      width: place.clientWidth || 600,
      height: place.clientHeight || 360,
      legend: { show: false },
      padding: [8, 24, 0, 0],
      scales: { x: { time: false, distr: 3 }, y: {} },
      axes: [
        { stroke: text, grid, ticks: { show: false }, size: 28, values: (_, at) => at.map((it) => (it === null ? null : scaled(it, 'B'))) },
        { stroke: text, grid, ticks: { show: false }, size: 54, values: (_, at) => at.map((it) => (it === null ? null : number(it))) },
      ],
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
      hooks: { setCursor: [read] },
      series: [{}, ...drawn.map(({ color, dash }) => ({ stroke: color, width: 1.8, dash, spanGaps: true, points: { show: true, size: 5 } }))],
    };
    const made = new uPlot(options, data, place);
    read(null);
    return made;
  }

  const resized = new ResizeObserver(() => {
    const place = area.querySelector('.plot');
    if (plot && place?.clientWidth) plot.setSize({ width: place.clientWidth, height: place.clientHeight });
  });
  resized.observe(area);
  const loadMissing = () => runs.selected().filter(({ id }) => !reports.has(id)).forEach(({ id }) => load(id));
  loadMissing();
  render();
  return {
    runs: loadMissing,
    changed: (id, kinds) => kinds.includes('evaluations') && load(id),
    state: (changed) => {
      if (changed.has('runs')) {
        loadMissing();
        render();
      }
    },
    theme: render,
    close: () => {
      resized.disconnect();
      plot?.destroy();
    },
  };
}
