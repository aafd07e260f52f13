// The configurations of the selected runs side by side.

import { el } from './dom.js';

const show = (value) => (value === undefined ? '–' : typeof value === 'string' ? value : JSON.stringify(value));

export function config(main, { runs, store, state, update }) {
  let all = false;
  const toggle = el('button', { class: 'toggle', onclick: () => { all = !all; render(); } }, 'all keys');
  const note = el('span', { class: 'muted' });
  const area = el('div', { class: 'table-scroll', tabindex: '0', role: 'region', 'aria-label': 'Configurations' });
  main.append(el('div', { class: 'toolbar' }, toggle, note), area);

  function render() {
    const shown = runs.selected().map((run) => ({ ...run, config: store.get(run.id).config }));
    const keys = [...new Set(shown.flatMap(({ config }) => Object.keys(config)))].sort();
    const differs = (key) => new Set(shown.map(({ config }) => show(config[key]))).size > 1;
    const different = keys.filter(differs);
    const whole = all || shown.length < 2;
    const rows = whole ? keys : different;
    toggle.setAttribute('aria-pressed', String(whole));
    toggle.disabled = shown.length < 2;
    note.textContent = shown.length < 2 ? 'select two runs or more to compare them' : `${different.length} of ${keys.length} keys differ`;
    area.replaceChildren(el('table', { class: 'config' },
      el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'key'), shown.map(({ id }) => el('th', { scope: 'col' }, el('i', { class: 'swatch', style: { '--c': runs.color(id) } }), id)))),
      el('tbody', {}, rows.map((key) => el('tr', { class: differs(key) && shown.length > 1 ? 'differs' : '' },
        el('th', { scope: 'row' }, key), shown.map(({ config }) => el('td', {}, show(config[key]))))))));
    if (!rows.length) area.append(el('p', { class: 'nothing' }, shown.length ? 'No differences.' : 'No run is selected.'));
  }

  render();
  return { runs: render, data: render, state: render, theme: render };
}
