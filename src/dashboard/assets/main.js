// The page: puts the parts together and passes messages between them.

import { listen } from './api.js';
import { Store } from './data.js';
import { byId, debounce, toast } from './dom.js';
import { state, update, onChange } from './state.js';
import { axis } from './axes.js';
import { Runs } from './runs.js';
import { keyboard } from './keys.js';
import { scalars } from './scalars.js';
import { text } from './text.js';
import { position } from './position.js';
import { model } from './model.js';
import { config } from './config.js';

const TABS = { scalars, text, position, model, config };

const store = new Store((id) => {
  if (runs.isSelected(id)) view?.data?.(id);
});
const runs = new Runs(byId('runs'), { onSelect: selected });

/** What all views work with. */
const page = { store, runs, state, update, axis };

let view = null;

/** Shows the tab of the state. */
function show() {
  const name = TABS[state.tab] ? state.tab : 'scalars';
  for (const tab of document.querySelectorAll('[role=tab]')) {
    const on = tab.dataset.tab === name;
    tab.setAttribute('aria-selected', String(on));
    tab.tabIndex = on ? 0 : -1;
  }
  const main = byId('main');
  main.setAttribute('aria-labelledby', `tab-${name}`);
  view?.close?.();
  main.replaceChildren();
  main.scrollTop = 0;
  view = TABS[name](main, page);
  view.name = name;
}

/** Other runs are selected, or the list has changed. */
function selected() {
  for (const { id } of runs.selected()) {
    if (!store.get(id).loaded) store.load(id);
  }
  view?.runs?.();
}

function alarmTitle() {
  const alarms = runs.list.filter(({ state }) => state === 'running').flatMap((it) => it.alarms);
  const first = runs.selected()[0] ?? runs.list[0];
  const bpb = first?.bpb ? ` ${first.bpb.toFixed(3)} bpb` : '';
  document.title = `${alarms.length ? `(${alarms.length}) ` : ''}mambabyte${bpb}`;
}

let connected = false;

function handle(event, data) {
  if (event === 'open') {
    // After a gap nobody knows what was missed.
    if (connected) for (const { id } of runs.selected()) store.load(id);
    connected = true;
    connection('live', 'live');
  } else if (event === 'error') {
    connection('lost', 'no connection to the dashboard, trying again');
  } else if (event === 'lagged') {
    for (const { id } of runs.selected()) store.load(id);
  } else if (event === 'runs') {
    for (const id of runs.update(data)) {
      toast(`${id} is gone`);
      store.forget(id);
    }
    selected();
    view?.list?.();
    alarmTitle();
    refreshAlarms();
  } else if (event === 'rows') {
    if (data.changed?.length) view?.changed?.(data.id, data.changed);
    if (data.step !== undefined || data.train || data.all) store.append(data);
  }
}

function connection(kind, text) {
  const node = byId('connection');
  node.className = `connection ${kind}`;
  node.textContent = text;
}

// Alarms of a run are in the list in short; all of them are fetched when their number changes.
const known = new Map();
function refreshAlarms() {
  for (const { id, alarm_count } of runs.selected()) {
    if (store.get(id).loaded && known.has(id) && known.get(id) !== alarm_count) store.loadMarks(id);
    known.set(id, alarm_count);
  }
}

/** Details of what is looked at, once it has come to rest. */
const details = debounce(() => {
  for (const { id } of runs.selected()) store.loadDetail(id);
}, 150);

store.look((series) => (state.from === null || state.to === null ? null : axis().ask(series, state.from, state.to)));

onChange((changed) => {
  if (changed.has('tab')) return show();
  if (changed.has('runs') || changed.has('filter')) runs.render();
  if (changed.has('runs')) selected();
  if (changed.has('from') || changed.has('to') || changed.has('x') || changed.has('xlog')) details();
  view?.state?.(changed);
});

for (const tab of document.querySelectorAll('[role=tab]')) {
  tab.addEventListener('click', () => update({ tab: tab.dataset.tab }));
  tab.addEventListener('keydown', ({ key }) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!by) return;
    const all = [...document.querySelectorAll('[role=tab]')];
    const next = all[(all.indexOf(tab) + by + all.length) % all.length];
    next.focus();
    next.click();
  });
}

function theme() {
  const dark = document.documentElement.dataset.theme !== 'dark';
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  try {
    localStorage.setItem('theme', dark ? 'dark' : 'light');
  } catch {
    // Not kept, then.
  }
  runs.render();
  view?.theme?.();
}

byId('theme').addEventListener('click', theme);
byId('menu').addEventListener('click', () => sidebar());
byId('main').addEventListener('click', () => sidebar(false));

function sidebar(open = !document.body.classList.contains('side-open')) {
  document.body.classList.toggle('side-open', open);
  byId('menu').setAttribute('aria-expanded', String(open));
}

keyboard({ page, theme, view: () => view, sidebar });
connection('', 'connecting');
show();
listen(handle);
