// Inside the model: what each layer does over time, and how its numbers are spread.

import { get } from './api.js';
import { el } from './dom.js';
import { number } from './format.js';
import { heatmap } from './heatmap.js';

const LAYERS = [
  ['delta_mean', 'Mean of Δ', 'how fast a layer forgets', true],
  ['delta_max', 'Largest Δ', '', true],
  ['grad_norm', 'Gradient norm', 'of a layer, before clipping', true],
  ['weight_norm', 'Weight norm', 'of a layer', false],
];

export function model(main, { runs, store, update }) {
  const found = new Map();
  const picked = { group: null };
  const choose = el('select', { id: 'focus', onchange: () => update({ focus: choose.value }) });
  const group = el('select', { id: 'group', onchange: () => { picked.group = group.value; render(); } });
  const area = el('div', { class: 'groups' });
  main.append(el('div', { class: 'toolbar', role: 'group', 'aria-label': 'Model' }, el('label', {}, 'run ', choose), el('label', {}, 'parameters ', group)), area);

  async function load(id) {
    try {
      found.set(id, await get('inspections', { run: id }));
    } catch (error) {
      console.debug(error);
      found.set(id, []);
    }
    render();
  }

  function card(title, unit, body) {
    return el('section', { class: 'card', 'aria-label': title }, el('div', { class: 'card-head' }, el('h3', {}, title, unit ? el('span', { class: 'unit' }, unit) : null)), body);
  }

  function render() {
    const run = runs.focus();
    choose.replaceChildren(...runs.selected().map(({ id }) => el('option', { value: id }, id)));
    if (!run) return area.replaceChildren(el('p', { class: 'nothing' }, 'No run is selected.'));
    choose.value = run.id;
    const records = found.get(run.id);
    if (!records) return area.replaceChildren(el('p', { class: 'nothing' }, 'Loading…'));
    if (!records.length) {
      group.replaceChildren();
      return area.replaceChildren(el('p', { class: 'nothing' }, 'This run has not looked into its model yet: it does so every `train.inspect_every` steps.'));
    }
    const names = [...new Set(records.flatMap(({ groups }) => (groups ?? []).map(({ name }) => name)))];
    if (!names.includes(picked.group)) picked.group = names.find((it) => it.includes('in_proj')) ?? names[0];
    group.replaceChildren(...names.map((it) => el('option', { value: it }, it)));
    group.value = picked.group ?? '';
    const steps = records.map(({ step }) => step);
    const layers = LAYERS.filter(([key]) => records.some((it) => Array.isArray(it[key]))).map(([key, title, unit, log]) => {
      const depth = Math.max(...records.map((it) => it[key]?.length ?? 0));
      return card(title, unit, heatmap({
        title,
        columns: steps,
        rows: Array.from({ length: depth }, (_, i) => i),
        value: (column, row) => records[column][key]?.[row] ?? null,
        rowName: (row) => `layer ${row}`,
        format: number,
        log,
      }));
    });
    const spread = [['weights', 'Weights'], ['gradients', 'Gradients']].map(([key, title]) => histogram(records, key, title)).filter(Boolean);
    const cost = records.at(-1).seconds;
    area.replaceChildren(
      el('section', { class: 'group', 'aria-label': 'Layers' }, el('h2', {}, 'Layers over time', el('span', { class: 'unit' }, cost ? `one look takes ${number(cost * 1000)} ms` : '')), el('div', { class: 'cards' }, layers)),
      el('section', { class: 'group', 'aria-label': 'Spread' }, el('h2', {}, 'How numbers are spread', el('span', { class: 'unit' }, picked.group ?? '')), el('div', { class: 'cards' }, spread)));
  }

  /** Histograms of one group of parameters over time, on one axis of values for all. */
  function histogram(records, key, title) {
    const own = records.map(({ step, groups }) => ({ step, bins: groups?.find(({ name }) => name === picked.group)?.[key] })).filter(({ bins }) => bins?.counts?.length);
    if (!own.length) return null;
    const low = Math.min(...own.map(({ bins }) => bins.low));
    const high = Math.max(...own.map(({ bins }) => bins.high));
    const rows = 48;
    const width = (high - low) / rows || 1;
    /** Share of the values between two bounds: bins are cut where they overlap. */
    const share = ({ low: from, high: to, counts }, a, b) => {
      const bin = (to - from) / counts.length || 1;
      const total = counts.reduce((sum, it) => sum + it, 0) || 1;
      return counts.reduce((sum, it, i) => {
        const overlap = Math.min(b, from + (i + 1) * bin) - Math.max(a, from + i * bin);
        return overlap > 0 ? sum + (it * overlap) / bin : sum;
      }, 0) / total;
    };
    return card(title, 'share of values', heatmap({
      title,
      columns: own.map(({ step }) => step),
      rows: Array.from({ length: rows }, (_, i) => low + (i + 0.5) * width),
      value: (column, row) => share(own[column].bins, low + row * width, low + (row + 1) * width) || null,
      rowName: (_, value) => number(value),
      format: (it) => `${number(100 * it)} %`,
      log: true,
      floor: 1e-5,
    }));
  }

  const loadFocus = () => {
    const run = runs.focus();
    if (run && !found.has(run.id)) load(run.id);
  };
  loadFocus();
  render();
  return {
    runs: loadFocus,
    changed: (id, kinds) => kinds.includes('inspections') && found.has(id) && load(id),
    data: (id) => found.get(id)?.length === 0 && store.get(id).loaded && load(id),
    state: () => {
      loadFocus();
      render();
    },
    theme: render,
  };
}
