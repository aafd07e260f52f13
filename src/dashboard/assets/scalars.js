// The view with all charts of numbers.

import { Chart } from './chart.js';
import { groups } from './catalog.js';
import { alarmStrip } from './alarms.js';
import { tiles } from './tiles.js';
import { debounce, el } from './dom.js';
import { number } from './format.js';

/** Runs drawn at most: more than that are no picture. */
const MOST = 24;

export function scalars(main, page) {
  const { state, store, update } = page;
  let drawn = [];
  let built = '';
  let extent = [0, 1];

  const strip = el('div');
  const summary = el('div');
  const area = el('div', { class: 'groups' });
  const tools = toolbar(page);
  main.append(strip, summary, tools.node, area);

  /** What charts share; see chart.js. */
  const shared = {
    axis: page.axis,
    runs: () => drawn,
    smoothing: () => state.smooth,
    isLog: (spec) => Boolean(spec.log) !== state.ylog.includes(spec.id),
    toggleLog: (spec) => update({ ylog: state.ylog.includes(spec.id) ? state.ylog.filter((it) => it !== spec.id) : [...state.ylog, spec.id] }),
    view: () => (state.from === null || state.to === null ? null : [state.from, state.to]),
    extent: () => extent,
    zoom: (from, to) => {
      if (from === null) return update({ from: null, to: null });
      const [low, high] = extent;
      const least = (high - low) * 1e-6;
      if (!(to - from > least)) return;
      // All of it and a little more is all of it.
      if (from <= low && to >= high) update({ from: null, to: null });
      else update({ from: Math.max(from, low - (high - low) * 0.2), to: Math.min(to, high + (high - low) * 0.2) });
    },
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.chart?.setVisible(isIntersecting);
  }, { root: main, rootMargin: '300px' });

  const charts = () => [...area.querySelectorAll('.card')].map((it) => it.chart);

  function collect() {
    drawn = page.runs.selected().slice(0, MOST).map(({ id }) => ({ id, color: page.runs.color(id), series: store.get(id) })).filter(({ series }) => series.loaded);
    const axis = page.axis();
    const starts = drawn.map(({ series }) => axis.start(series)).filter((it) => it !== null);
    const ends = drawn.map(({ series }) => axis.end(series));
    extent = starts.length ? [axis.log || axis.id === 'clock' ? Math.min(...starts) : Math.min(0, ...starts), Math.max(...ends)] : [0, 1];
  }

  /** Cards for what there is to draw. They are built anew only where there are others. */
  function build() {
    collect();
    const columns = new Set(drawn.flatMap(({ series }) => Object.keys(series.overview.train.columns)));
    const wanted = [];
    for (const { title, charts } of groups(columns)) {
      const matches = ({ title }) => title.toLowerCase().includes(state.charts.toLowerCase());
      const here = charts.filter(matches).filter((spec) => new Probe(spec, drawn).hasData());
      if (here.length) wanted.push({ title, specs: here });
    }
    const key = wanted.map(({ title, specs }) => title + specs.map(({ id }) => id)).join();
    if (key !== built) {
      built = key;
      const old = new Map(charts().map((chart) => [chart.spec.id, chart]));
      area.replaceChildren(...wanted.map(({ title, specs }) => el('section', { class: 'group', 'aria-label': title },
        el('h2', {}, title),
        el('div', { class: 'cards' }, specs.map((spec) => {
          const chart = old.get(spec.id) ?? new Chart(spec, shared);
          old.delete(spec.id);
          watcher.observe(chart.node);
          return chart.node;
        })))));
      for (const chart of old.values()) chart.destroy();
    }
    if (!wanted.length) area.replaceChildren(empty(page, drawn));
    else area.querySelector('.nothing')?.remove();
    if (!wanted.length) built = '';
  }

  function refresh() {
    build();
    for (const chart of charts()) chart?.refresh();
  }

  let told = '';
  function header() {
    summary.replaceChildren(tiles(page));
    // Built anew only where something has changed: it is read out.
    const shown = page.runs.selected().map(({ id, alarms, alarm_count: count }) => [id, alarms, count, store.get(id).alarms.length]);
    const news = JSON.stringify([shown, Math.floor(page.runs.now / 60), document.documentElement.dataset.theme]);
    if (news === told) return;
    told = news;
    strip.replaceChildren(alarmStrip(page, drawn, (step, run) => {
      const series = run.series;
      const at = page.axis().place(series)(step);
      const width = (extent[1] - extent[0]) / 40;
      if (at !== null) shared.zoom(at - width, at + width);
    }));
  }

  // Messages come one by one; pictures are drawn once for all of them.
  let asked = false;
  const soon = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      refresh();
      header();
    });
  };
  // At once with what is there; smoothing and details follow when it has come to rest.
  const settle = debounce(soon, 200);
  const zoomed = () => {
    charts().forEach((chart) => (chart?.visible ? chart.scale() : chart && (chart.dirty = true)));
    settle();
  };

  refresh();
  header();
  return {
    data: soon,
    runs: soon,
    list: header,
    theme: () => { soon(); },
    state: (changed) => {
      tools.sync();
      if (changed.has('from') || changed.has('to')) zoomed();
      if (['x', 'xlog', 'smooth', 'ylog', 'charts', 'runs'].some((it) => changed.has(it))) soon();
    },
    charts,
    extent: () => extent,
    zoom: shared.zoom,
    range: () => shared.view() ?? extent,
    close: () => {
      watcher.disconnect();
      charts().forEach((chart) => chart?.destroy());
    },
  };
}

/** Asks whether a chart would have data, without making one. */
class Probe {
  constructor(spec, drawn) {
    this.spec = spec;
    this.page = { runs: () => drawn };
  }
}
Probe.prototype.hasData = Chart.prototype.hasData;

function empty(page, drawn) {
  const text = !page.runs.list.length
    ? 'No runs yet. They appear here as soon as training writes its first line.'
    : !page.runs.selected().length ? 'No run is selected. Choose some in the list.'
      : drawn.length ? 'Nothing to draw yet.' : 'Loading…';
  return el('p', { class: 'nothing' }, text);
}

/** The row of controls above the charts. */
function toolbar({ state, update }) {
  const x = el('select', { id: 'x-axis', onchange: () => update({ x: x.value, from: null, to: null }) },
    [['step', 'step'], ['bytes', 'bytes seen'], ['elapsed', 'time since start'], ['clock', 'clock']].map(([value, name]) => el('option', { value }, name)));
  const xlog = el('button', { class: 'toggle', id: 'x-log', title: 'Logarithmic x axis', onclick: () => update({ xlog: !state.xlog }) }, 'log x');
  const out = el('output', { for: 'smoothing' });
  const slider = el('input', { type: 'range', id: 'smoothing', min: 0, max: 0.999, step: 'any', 'aria-label': 'Smoothing' });
  // Most of the way is for strong smoothing, where small differences count.
  const toWeight = (position) => 1 - (1 - position) ** 2;
  const toPosition = (weight) => 1 - Math.sqrt(1 - weight);
  const settle = debounce((weight) => update({ smooth: weight }), 30);
  slider.addEventListener('input', () => {
    const weight = Math.round(1000 * toWeight(Number(slider.value))) / 1000;
    out.textContent = number(weight);
    settle(Math.min(0.999, weight));
  });
  const filter = el('input', { type: 'search', id: 'chart-filter', placeholder: 'Filter charts', 'aria-label': 'Filter charts', oninput: () => update({ charts: filter.value }) });
  const reset = el('button', { id: 'reset', title: 'Show everything (0)', onclick: () => update({ from: null, to: null }) }, 'reset zoom');
  const sync = () => {
    x.value = state.x;
    xlog.setAttribute('aria-pressed', String(state.xlog));
    xlog.disabled = state.x === 'clock';
    if (document.activeElement !== slider) slider.value = toPosition(state.smooth);
    out.textContent = number(state.smooth);
    if (document.activeElement !== filter) filter.value = state.charts;
    reset.disabled = state.from === null;
  };
  sync();
  const node = el('div', { class: 'toolbar', role: 'group', 'aria-label': 'Charts' },
    el('label', {}, 'x ', x), xlog,
    el('label', { class: 'smoothing' }, 'smoothing ', slider, out),
    reset, filter);
  return { node, sync };
}
