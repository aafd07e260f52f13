// What needs attention, at a glance, with the step it is about.

import { el } from './dom.js';
import { ago, count } from './format.js';

const NAMES = {
  'not-a-number': 'not a number',
  spike: 'spike',
  stall: 'stalled',
  memory: 'memory grows',
  'data-wait': 'waits for data',
  save: 'save failed',
};
const BAD = new Set(['not-a-number', 'stall', 'save']);

/** Those that are not long past: of the list, which knows the clock. */
const current = (run) => new Set(run.alarms.map((it) => it.kind + it.step));

/** The strip above the charts; `jump({ step, time }, run)` shows the place of an alarm. */
export function alarmStrip({ runs }, drawn, jump) {
  const found = [];
  for (const run of runs.selected()) {
    const now = current(run);
    const series = drawn.find(({ id }) => id === run.id)?.series;
    const all = new Map([...(series?.alarms ?? []), ...run.alarms].map((it) => [it.kind + it.step, it]));
    for (const [key, alarm] of all) {
      // A stall is over when the list says so.
      if (alarm.kind === 'stall' && !now.has(key)) continue;
      found.push({ run, alarm, active: now.has(key), series });
    }
  }
  const active = found.filter((it) => it.active);
  const past = found.filter((it) => !it.active).sort((a, b) => b.alarm.time - a.alarm.time);
  const item = ({ run, alarm, series }) => {
    const { kind, step, last_step: last, text, count: times } = alarm;
    return el('li', { class: `alarm ${BAD.has(kind) ? 'bad' : 'warn'}`, dataset: { kind } },
      el('button', { onclick: () => series && jump(alarm, { series }), title: 'Show the place' },
        el('b', {}, NAMES[kind] ?? kind),
        el('span', {}, last > step ? `steps ${count(step)} to ${count(last)}` : `step ${count(step)}`),
        el('span', { class: 'alarm-text' }, text + (times > 1 && kind !== 'memory' && kind !== 'data-wait' ? ` (${times} times)` : '')),
        runs.selected().length > 1 ? el('span', { class: 'alarm-run' }, el('i', { class: 'swatch', style: { '--c': runs.color(run.id) } }), run.id) : null,
        alarm.time ? el('span', { class: 'alarm-time' }, ago(alarm.time, runs.now)) : null));
  };
  const node = el('div', { class: 'alarms', role: 'region', 'aria-label': 'Alarms', 'aria-live': 'polite' });
  if (active.length) node.append(el('ul', {}, active.map(item)));
  if (past.length) {
    const details = el('details', { class: 'past' }, el('summary', {}, `${past.length} earlier alarm${past.length > 1 ? 's' : ''}`), el('ul', {}, past.slice(0, 50).map(item)));
    details.open = opened;
    details.addEventListener('toggle', () => { opened = details.open; });
    node.append(details);
  }
  return node;
}

// The strip is built anew with every message; what was unfolded stays so.
let opened = false;
