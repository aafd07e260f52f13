// The state of one run in a row of numbers.

import { el } from './dom.js';
import { ago, clock, count, duration, number, scaled } from './format.js';

/** A row of tiles about the run in focus. */
export function tiles({ runs, store }) {
  const run = runs.focus();
  if (!run) return el('div');
  const { config } = store.get(run.id);
  const late = run.alarms.some(({ kind }) => kind === 'stall');
  const done = run.total ? run.step / run.total : null;
  const left = run.state === 'running' && run.seconds_left !== null;
  const tile = (name, value, note, title) => (value === '–' || value === null ? null : el('div', { class: 'tile', title },
    el('span', { class: 'tile-name' }, name), el('b', {}, value), note ? el('span', { class: 'tile-note' }, note) : null));
  const width = config?.['model.dim'];
  const shape = width ? `D ${width}, ${config['model.depth']} layers` : null;
  return el('section', { class: 'tiles', 'aria-label': `State of ${run.id}`, style: { '--c': runs.color(run.id) } },
    el('div', { class: 'tile wide' },
      el('span', { class: 'tile-name' }, el('i', { class: 'swatch' }), run.id),
      el('b', { class: `state ${run.state}` }, run.state, done === null ? '' : ` ${Math.floor(done * 100)} %`),
      el('span', { class: `tile-note${late ? ' late' : ''}`, title: [run.last_time ? clock(run.last_time) : null, shape, run.folder].filter(Boolean).join(', ') }, run.last_time ? `last line ${ago(run.last_time, runs.now)}` : 'no line yet')),
    tile('step', count(run.step), run.total ? `of ${count(run.total)}` : null),
    tile('bits per byte', number(run.bpb), 'training'),
    tile('validation', number(run.valid_bpb), run.word_perplexity ? `word perplexity ${number(run.word_perplexity)}` : 'bits per byte'),
    tile('speed', run.bytes_per_second ? scaled(run.bytes_per_second, 'B/s') : '–', run.bytes ? `${scaled(run.bytes, 'B')} seen` : null),
    left && run.seconds_left > 0 ? tile('time left', duration(run.seconds_left), clock(runs.now + run.seconds_left)) : null,
    tile('gradient norm', number(run.grad_norm), run.lr ? `lr ${number(run.lr)}` : null),
    run.memory_gib ? tile('memory', `${number(run.memory_gib)} GiB`, 'held by the run') : null);
}
