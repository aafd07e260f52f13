// The list of runs: which there are, how they are doing, which are shown and in which colour.

import { byId, cssVar, el } from './dom.js';
import { ago, count, duration, number, scaled } from './format.js';
import { state, update } from './state.js';

/** Colours of the palette in style.css. */
const COLORS = 10;

/** Runs shown when nobody has chosen. */
const FIRST = 4;

const STATES = { running: 'running', finished: 'finished', stopped: 'stopped' };

export class Runs {
  constructor(node, { onSelect }) {
    this.node = node;
    this.onSelect = onSelect;
    this.list = [];
    this.order = [];
    this.now = Date.now() / 1000;
    const filter = byId('filter');
    filter.value = state.filter;
    filter.addEventListener('input', () => update({ filter: filter.value }));
    byId('all').addEventListener('click', () => update({ runs: this.matching().map(({ id }) => id) }));
    byId('none').addEventListener('click', () => update({ runs: [] }));
  }

  /** A new list from the server; returns the ids that are gone. */
  update({ runs, now }) {
    const gone = this.list.filter(({ id }) => !runs.some((it) => it.id === id)).map(({ id }) => id);
    this.list = runs;
    this.now = now;
    // Colours by age, so that a new run does not change those of the others.
    const byAge = [...runs].sort((a, b) => (a.first_time ?? Infinity) - (b.first_time ?? Infinity) || a.id.localeCompare(b.id));
    for (const { id } of byAge) if (!this.order.includes(id)) this.order.push(id);
    this.order = this.order.filter((id) => runs.some((it) => it.id === id));
    this.render();
    return gone;
  }

  color(id) {
    return cssVar(`--run-${this.order.indexOf(id) % COLORS}`);
  }

  /** Newest first, those at work before all others. */
  sorted() {
    const rank = (it) => (it.state === 'running' ? 1e12 : 0) + (it.modified ?? 0);
    return [...this.list].sort((a, b) => rank(b) - rank(a) || a.id.localeCompare(b.id));
  }

  /** Those that the filter lets through: part of the name, or a regular expression. */
  matching() {
    let matches = (id) => id.toLowerCase().includes(state.filter.toLowerCase());
    try {
      const expression = new RegExp(state.filter, 'i');
      matches = (id) => expression.test(id);
    } catch {
      // Half-typed: taken as text.
    }
    return this.sorted().filter(({ id }) => matches(id));
  }

  /** The runs that are shown, in the order of their colours. */
  selected() {
    const chosen = state.runs ?? this.sorted().slice(0, FIRST).map(({ id }) => id);
    return this.order.filter((id) => chosen.includes(id)).map((id) => this.list.find((it) => it.id === id)).filter(Boolean);
  }

  isSelected(id) {
    return this.selected().some((it) => it.id === id);
  }

  /** The run of tabs that show one: the chosen one, or the newest of those shown. */
  focus() {
    const shown = this.selected();
    return shown.find(({ id }) => id === state.focus) ?? this.sorted().find(({ id }) => shown.some((it) => it.id === id)) ?? null;
  }

  toggle(id, only) {
    const shown = this.selected().map((it) => it.id);
    if (only) update({ runs: [id], focus: id });
    else if (shown.includes(id)) update({ runs: shown.filter((it) => it !== id) });
    else update({ runs: [...shown, id] });
  }

  render() {
    const matching = this.matching();
    const shown = new Set(this.selected().map(({ id }) => id));
    byId('run-count').textContent = `${shown.size} of ${this.list.length} shown`;
    const focused = document.activeElement?.closest?.('[data-run]')?.dataset.run;
    const control = document.activeElement?.className;
    this.node.replaceChildren(...matching.map((run) => this.row(run, shown.has(run.id))));
    if (!matching.length) {
      this.node.append(el('li', { class: 'empty' }, this.list.length ? 'no run matches' : 'no runs yet: they appear here when training starts'));
    }
    // The list is built anew every second; who was in it stays in it.
    if (focused) this.node.querySelector(`[data-run="${CSS.escape(focused)}"] .${control.split(' ')[0]}`)?.focus();
  }

  row(run, shown) {
    const { id, step, total } = run;
    const share = total ? Math.min(1, step / total) : 0;
    const alarms = run.alarms.length;
    const quiet = run.state === 'running' && run.seconds_left ? `${duration(run.seconds_left)} left` : run.state === 'running' ? 'running' : `${STATES[run.state]}, ${ago(run.last_time ?? run.modified, this.now)}`;
    const color = this.color(id);
    const check = el('input', { type: 'checkbox', class: 'check', id: `run-${id}`, onchange: () => this.toggle(id) });
    check.checked = shown;
    return el('li', { class: `run ${run.state}${shown ? ' shown' : ''}`, dataset: { run: id }, style: { '--c': color } },
      el('label', { class: 'run-name', title: run.folder }, check, el('i', { class: 'swatch' }), el('span', {}, id)),
      el('button', { class: 'only small', title: 'Show only this run', 'aria-label': `Show only ${id}`, onclick: () => this.toggle(id, true) }, 'only'),
      el('div', { class: 'run-line' },
        el('span', { class: `dot ${run.state}`, role: 'img', 'aria-label': run.state, title: run.state }),
        el('span', {}, run.indexed < 1 ? `reading ${Math.floor(run.indexed * 100)} %` : quiet),
        alarms ? el('span', { class: 'badge', title: run.alarms.map((it) => `step ${count(it.last_step)}: ${it.text}`).join('\n') }, `${alarms} ⚠`) : null),
      el('div', { class: 'bar', role: 'progressbar', 'aria-label': `progress of ${id}`, 'aria-valuemin': 0, 'aria-valuemax': 100, 'aria-valuenow': Math.round(share * 100) }, el('i', { style: { width: `${100 * share}%` } })),
      el('div', { class: 'run-line muted' },
        el('span', {}, total ? `${count(step)} / ${count(total)}` : count(step)),
        run.valid_bpb ?? run.bpb ? el('span', {}, `${number(run.valid_bpb ?? run.bpb)} bpb`) : null,
        run.bytes_per_second ? el('span', {}, scaled(run.bytes_per_second, 'B/s', 3)) : null));
  }
}
