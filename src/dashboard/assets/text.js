// Text that the model wrote, step by step.

import { get } from './api.js';
import { el } from './dom.js';
import { count } from './format.js';
import { visible } from './visible.js';

export function text(main, page) {
  const { runs, state, update } = page;
  const samples = new Map();
  const area = el('div', { class: 'texts' });
  const slider = el('input', { type: 'range', id: 'step', min: 0, max: 0, step: 1, value: 0, 'aria-label': 'Step of the sample' });
  const label = el('output', { for: 'step' });
  const back = el('button', { 'aria-label': 'Earlier sample', onclick: () => move(-1) }, '◂');
  const on = el('button', { 'aria-label': 'Later sample', onclick: () => move(1) }, '▸');
  const newest = el('button', { onclick: () => update({ step: null }) }, 'newest');
  main.append(el('div', { class: 'toolbar', role: 'group', 'aria-label': 'Step' }, back, slider, on, label, newest), area);

  const steps = () => [...new Set(runs.selected().flatMap(({ id }) => (samples.get(id) ?? []).map(({ step }) => step)))].sort((a, b) => a - b);

  async function load(id) {
    try {
      samples.set(id, await get('samples', { run: id }));
    } catch (error) {
      console.debug(error);
      samples.set(id, []);
    }
    render();
  }

  function move(by) {
    const all = steps();
    const at = index(all) + by;
    if (all[at] !== undefined) update({ step: at === all.length - 1 ? null : all[at] });
  }

  /** The place of the chosen step among all: the last one that is not later. */
  function index(all) {
    if (state.step === null) return all.length - 1;
    const i = all.findLastIndex((step) => step <= state.step);
    return i < 0 ? 0 : i;
  }

  slider.addEventListener('input', () => {
    const all = steps();
    const at = Number(slider.value);
    update({ step: at >= all.length - 1 ? null : all[at] });
  });

  function render() {
    const all = steps();
    const at = index(all);
    slider.max = Math.max(0, all.length - 1);
    slider.value = at;
    slider.disabled = back.disabled = on.disabled = all.length < 2;
    newest.disabled = state.step === null;
    const chosen = all[at];
    label.textContent = chosen === undefined ? '' : `step ${count(chosen)}`;
    slider.setAttribute('aria-valuetext', label.textContent);
    const cards = runs.selected().map(({ id }) => {
      const here = (samples.get(id) ?? []).findLast(({ step }) => chosen !== undefined && step <= chosen);
      const name = el('h3', {}, el('i', { class: 'swatch', style: { '--c': runs.color(id) } }), id, here ? el('span', { class: 'unit' }, `step ${count(here.step)}`) : null);
      const body = here
        ? el('div', { class: 'sample', tabindex: '0', role: 'group', 'aria-label': `Sample of ${id}` }, el('span', { class: 'prompt', title: 'the prompt' }, visible(here.prompt)), visible(here.text))
        : el('p', { class: 'muted' }, samples.has(id) ? 'no sample so far' : 'Loading…');
      return el('section', { class: 'card text-card', dataset: { run: id } }, el('div', { class: 'card-head' }, name), body);
    });
    area.replaceChildren(...(cards.length ? cards : [el('p', { class: 'nothing' }, 'No run is selected.')]));
  }

  const loadMissing = () => runs.selected().filter(({ id }) => !samples.has(id)).forEach(({ id }) => load(id));
  loadMissing();
  render();
  return {
    runs: () => {
      loadMissing();
    },
    changed: (id, kinds) => kinds.includes('samples') && samples.has(id) && load(id),
    data: (id) => samples.get(id)?.length === 0 && load(id),
    state: (changed) => {
      if (changed.has('runs')) loadMissing();
      if (changed.has('step') || changed.has('runs')) render();
    },
    theme: render,
    move,
  };
}
