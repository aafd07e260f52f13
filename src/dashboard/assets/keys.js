// The keyboard.

import { byId, el } from './dom.js';

const HELP = [
  ['1 … 5', 'the five views'],
  ['/', 'filter runs'],
  ['← →', 'on a chart: from point to point; else move the zoomed part'],
  ['+ −', 'zoom in, out'],
  ['0', 'show everything'],
  ['x', 'next x axis: step, bytes, time, clock'],
  ['l', 'logarithmic y axis of the chart in focus, or of all'],
  ['[ ]', 'less, more smoothing'],
  ['f', 'enlarge the chart in focus; Esc puts it back'],
  [', .', 'earlier, later sample of text'],
  ['a n', 'all runs, no runs'],
  ['d', 'dark or light'],
  ['?', 'this list'],
];

const MOUSE = [
  ['drag', 'zoom in on a stretch'],
  ['double click', 'show everything'],
  ['Shift + drag', 'move'],
  ['Ctrl + wheel', 'zoom in, out'],
  ['two fingers', 'zoom and move'],
];

const TABS = ['scalars', 'text', 'position', 'model', 'config'];
const AXES = ['step', 'bytes', 'elapsed', 'clock'];

/** Listens to keys; `view()` is the view that is open. */
export function keyboard({ page, theme, view, sidebar }) {
  const { state, update } = page;
  const dialog = byId('keys');
  const rows = (list) => el('dl', {}, list.flatMap(([key, what]) => [el('dt', {}, el('kbd', {}, key)), el('dd', {}, what)]));
  dialog.append(
    el('form', { method: 'dialog' }, el('button', { class: 'icon', 'aria-label': 'Close' }, '✕')),
    el('h2', { id: 'keys-title' }, 'Keyboard'), rows(HELP), el('h2', {}, 'Mouse and fingers'), rows(MOUSE));
  // A form of this kind may not be sent where forms are forbidden; the button closes by itself.
  dialog.querySelector('form').addEventListener('submit', (event) => {
    event.preventDefault();
    dialog.close();
  });
  byId('help').addEventListener('click', () => dialog.showModal());

  /** The zoomed part moved by a share of its width, or made wider. */
  const zoom = (move, factor) => {
    const scalars = view();
    if (!scalars?.zoom) return;
    const [from, to] = scalars.range();
    const [middle, half] = [(from + to) / 2 + move * (to - from), ((to - from) / 2) * factor];
    scalars.zoom(middle - half, middle + half);
  };
  const focused = () => document.activeElement?.closest?.('.card')?.chart;
  const smooth = (by) => {
    // Half or twice the rows that go in.
    const past = 1 - state.smooth;
    const weight = Math.min(0.999, Math.max(0, 1 - past * (by > 0 ? 0.7 : 1 / 0.7)));
    update({ smooth: weight < 0.05 && by < 0 ? 0 : Math.round(weight * 1000) / 1000 });
  };
  const log = () => {
    const chart = focused();
    if (chart) return chart.page.toggleLog(chart.spec);
    const ids = view()?.charts?.().filter(({ spec }) => !spec.stack).map(({ spec }) => spec) ?? [];
    const on = ids.every((spec) => Boolean(spec.log) !== state.ylog.includes(spec.id));
    update({ ylog: ids.filter((spec) => Boolean(spec.log) === on).map(({ id }) => id) });
  };
  const escape = () => {
    const open = document.querySelector('.card.expanded');
    if (open) open.chart.expand(false);
    else sidebar(false);
  };
  const actions = {
    '/': () => { sidebar(true); byId('filter').focus(); },
    0: () => update({ from: null, to: null }),
    '+': () => zoom(0, 0.6),
    '=': () => zoom(0, 0.6),
    '-': () => zoom(0, 1 / 0.6),
    ArrowLeft: () => zoom(-0.2, 1),
    ArrowRight: () => zoom(0.2, 1),
    x: () => update({ x: AXES[(AXES.indexOf(state.x) + 1) % AXES.length], from: null, to: null }),
    l: log,
    '[': () => smooth(-1),
    ']': () => smooth(1),
    f: () => focused()?.expand(),
    ',': () => view()?.move?.(-1),
    '.': () => view()?.move?.(1),
    a: () => byId('all').click(),
    n: () => byId('none').click(),
    d: theme,
    '?': () => dialog.showModal(),
    Escape: escape,
  };
  TABS.forEach((tab, i) => { actions[i + 1] = () => update({ tab }); });

  addEventListener('keydown', (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const typing = target.matches?.('input:not([type=checkbox]), select, textarea');
    if (key === 'Escape' && typing) return target.blur();
    if (typing || (key.startsWith('Arrow') && target.matches?.('[role=tab], summary'))) return;
    const action = actions[key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}
