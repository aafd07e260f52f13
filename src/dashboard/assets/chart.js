// One chart: a card with a title, what is under the cursor, and a plot by uPlot.

import { points } from './data.js';
import { cssVar, el, save } from './dom.js';
import { number } from './format.js';
import { smooth } from './smooth.js';
import { stacked } from './stack.js';
import { gestures } from './gestures.js';

const uPlot = window.uPlot;

/** Values that a stretch is smoothed like at most. */
const SCREEN = 1000;

/** What cannot be drawn on a logarithmic axis is not drawn. */
const positive = (value) => (value > 0 ? value : null);

/** The quantile `q` of numbers in order. */
const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

/**
 * A chart of `spec` (see catalog.js). `page` gives it what all charts share:
 * runs() in order with { id, color, series }, axis() (see axes.js), smoothing(), isLog(spec),
 * view() [from, to] or null, zoom(from, to), and events toggleLog(spec).
 */
export class Chart {
  constructor(spec, page) {
    this.spec = spec;
    this.page = page;
    this.plot = null;
    this.shape = '';
    this.visible = false;
    this.dirty = true;
    this.build();
  }

  build() {
    const { spec, page } = this;
    this.logButton = el('button', { class: 'small', title: 'Logarithmic axis (l)', onclick: () => page.toggleLog(spec) }, 'log');
    this.expandButton = el('button', { class: 'small', 'aria-label': `Enlarge ${spec.title}`, title: 'Enlarge (f)', onclick: () => this.expand() }, '⤢');
    this.menu = el('details', { class: 'menu' },
      el('summary', { class: 'small', 'aria-label': `Download ${spec.title}`, title: 'Download' }, '⤓'),
      el('div', { class: 'menu-items' },
        el('button', { onclick: () => this.download('png') }, 'PNG, this picture'),
        el('button', { onclick: () => this.download('csv') }, 'CSV, every step'),
        el('button', { onclick: () => this.download('json') }, 'JSON, every step')));
    this.readout = el('div', { class: 'readout' });
    this.area = el('div', { class: 'plot', tabindex: '0', role: 'img', 'aria-label': spec.title });
    this.area.addEventListener('keydown', (event) => this.key(event));
    this.node = el('section', { class: 'card', dataset: { chart: spec.id }, 'aria-label': spec.title },
      el('div', { class: 'card-head' },
        el('h3', {}, spec.title, spec.unit ? el('span', { class: 'unit' }, spec.unit) : null),
        el('div', { class: 'card-tools' }, spec.stack ? null : this.logButton, this.menu, this.expandButton)),
      this.readout, this.area);
    this.node.chart = this;
    new ResizeObserver(() => this.resize()).observe(this.area);
  }

  /** Whether any selected run has something to draw. */
  hasData() {
    const { spec } = this;
    return this.page.runs().some(({ series }) => {
      if (spec.stack) return spec.stack.some(([key]) => series.overview.train.columns[key]);
      return spec.lines.some(({ part, key, marks }) => (marks
        ? series.marks.some(({ kind }) => kind === marks)
        : series.overview[part].columns[key]?.mean.some((it) => it !== null)));
    });
  }

  /** Draws anew, now if it is on screen, else when it comes there. */
  refresh() {
    this.dirty = true;
    if (this.visible) this.draw();
  }

  setVisible(visible) {
    this.visible = visible;
    if (visible && this.dirty) this.draw();
  }

  draw() {
    this.dirty = false;
    const log = this.page.isLog(this.spec);
    this.logButton.setAttribute('aria-pressed', String(log));
    const axis = this.page.axis();
    const lines = this.spec.stack ? stacked(this.spec, this.page, axis) : this.lines(axis, log);
    this.drawn = lines;
    if (!lines.length) {
      this.plot?.destroy();
      this.plot = null;
      this.readout.textContent = 'no values yet';
      return;
    }
    const data = uPlot.join(lines.map(({ x, y }) => [x, y]));
    const shape = JSON.stringify([lines.map(({ shape }) => shape), log, axis.id, axis.log, document.documentElement.dataset.theme]);
    if (this.plot && shape === this.shape) {
      this.plot.setData(data, false);
      this.scale();
    } else {
      this.shape = shape;
      this.create(lines, data, log, axis);
    }
    this.describe();
    this.read(null);
  }

  /** For every run and line: the faint raw values, their range, and the smooth line. */
  lines(axis, log) {
    const weight = this.spec.smooth === false ? 0 : this.page.smoothing();
    const keep = log ? positive : (it) => it;
    const out = [];
    for (const run of this.page.runs()) {
      for (const line of this.spec.lines) {
        const found = line.marks ? counted(run.series, line.marks, axis) : this.found(run, line, axis);
        if (!found) continue;
        const map = line.map ?? ((it) => it);
        const mean = found.mean.map((it) => keep(map(it)));
        const base = { run, line, x: found.x };
        const named = [run.id, line.label ?? '', line.dash, run.color];
        const wide = found.min.some((it, i) => it !== found.max[i]);
        if (wide) {
          out.push({ ...base, y: found.max.map((it) => keep(map(it))), role: 'max', shape: ['max', ...named] });
          out.push({ ...base, y: found.min.map((it) => keep(map(it))), role: 'min', shape: ['min', ...named] });
        }
        const smoothed = weight > 0 && line.part === 'train';
        if (smoothed) out.push({ ...base, y: mean, role: 'raw', shape: ['raw', ...named] });
        const y = smoothed ? smooth(found.mean.map(map), weight, this.share(found)).map(keep) : mean;
        out.push({ ...base, y, raw: mean, step: found.step, role: 'main', shape: ['main', smoothed, ...named] });
      }
    }
    return out;
  }

  /** How much each point counts in smoothing: as many values as are behind it; in a long stretch as
   * many as if 1,000 were shown, so that smoothing is as strong on the screen as in a short one. */
  share({ x, count }) {
    const [from, to] = this.range();
    const shown = count.reduce((sum, it, i) => (x[i] >= from && x[i] <= to ? sum + it : sum), 0);
    const scale = Math.min(1, SCREEN / Math.max(1, shown));
    return count.map((it) => it * scale);
  }

  /** The points of a line, or of its share of another column. */
  found(run, { part, key, per }, axis) {
    const x = axis.of(run.series);
    const found = points(run.series, part, key, axis.column, x);
    if (!found || !per) return found;
    const whole = points(run.series, part, per, axis.column, x);
    if (!whole || whole.x.length !== found.x.length) return null;
    const share = found.mean.map((it, i) => it / whole.mean[i]);
    return { ...found, mean: share, min: share, max: share };
  }

  create(lines, data, log, axis) {
    this.plot?.destroy();
    const faint = { raw: 0.26, min: 0, max: 0 };
    const color = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, '0');
    const few = lines.filter(({ role }) => role === 'main').length <= 12;
    const series = lines.map(({ run, line, role, fill, stroke }) => ({
      scale: 'y',
      spanGaps: true,
      stroke: stroke ?? color(run.color, faint[role] ?? 1),
      width: role === 'main' && !fill ? 1.8 : role === 'raw' ? 1 : fill ? 1 : 0,
      dash: line.dash && role === 'main' ? [5, 4] : undefined,
      fill,
      points: { show: role === 'main' && (line.dash || line.dots) && few ? (u, i) => u.data[i].filter((it) => it !== null).length < 100 || undefined : false, size: 5 },
    }));
    const bands = [];
    lines.forEach(({ role, run }, i) => {
      if (role === 'max') bands.push({ series: [i + 1, i + 2], fill: color(run.color, 0.13) });
    });
    const text = cssVar('--muted');
    const grid = { stroke: cssVar('--grid'), width: 1 };
    const font = '11px system-ui, sans-serif';
    const options = {
      width: this.area.clientWidth || 400,
      height: this.area.clientHeight || 200,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      focus: { alpha: 1 },
      scales: {
        x: { time: axis.id === 'clock', distr: axis.log ? 3 : 1, range: () => this.range() },
        y: { distr: log ? 3 : 1, range: () => this.height(log) },
      },
      axes: [
        { stroke: text, grid, ticks: { show: false }, font, size: 26, space: 70, splits: axis.log ? decades : undefined, filter: axis.log ? all : undefined, incrs: axis.incrs, values: axis.id === 'clock' ? undefined : (_, at) => at.map((it) => (it === null ? null : axis.short(it))) },
        { stroke: text, grid, ticks: { show: false }, font, size: 58, space: 32, splits: log ? decades : undefined, filter: log ? all : undefined, values: (_, at) => at.map((it) => (it === null ? null : (this.spec.format ?? number)(it))) },
      ],
      cursor: {
        sync: { key: 'x', scales: ['x', null], setSeries: false },
        drag: { x: true, y: false, setScale: false },
        points: { size: 7, one: false, show: (u, i) => (lines[i - 1].role === 'main' ? undefined : el('div', { hidden: true })) },
        dataIdx: nearest,
        focus: { prox: -1 },
      },
      hooks: {
        setCursor: [(u) => this.read(u)],
        setSelect: [(u) => this.select(u)],
        draw: [(u) => this.marks(u)],
      },
      series: [{}, ...series],
      bands,
    };
    this.plot = new uPlot(options, data, this.area);
    this.plot.over.addEventListener('dblclick', () => this.page.zoom(null, null));
    gestures(this.plot, this.page);
  }

  /** What the x axis shows: the view, or all there is. */
  range() {
    const view = this.page.view();
    if (view) return view;
    const extent = this.page.extent();
    return extent[0] === extent[1] ? [extent[0], extent[0] + 1] : extent;
  }

  /** From the lowest to the highest that matters. Of many values a few may be cut off, so that the
   * first steps or a spike do not flatten everything else; zooming in shows them. */
  height(log) {
    const [from, to] = this.range();
    const whole = !this.page.view() && !log && this.spec.smooth !== false && !this.spec.stack;
    const begin = whole ? from + 0.02 * (to - from) : from;
    let [low, high] = [Infinity, -Infinity];
    for (const { x, y, role } of this.drawn) {
      if (role === 'min' || role === 'max') continue;
      const within = (start) => y.filter((it, i) => it !== null && x[i] >= start && x[i] <= to);
      let seen = within(begin);
      if (!seen.length) seen = within(from);
      if (!seen.length) continue;
      seen = Float64Array.from(seen).sort();
      const cut = seen.length > 200 && this.spec.smooth !== false && !this.spec.stack ? 0.015 : 0;
      low = Math.min(low, quantile(seen, log ? 0 : cut / 4));
      high = Math.max(high, cut && !log ? quantile(seen, 1 - cut) : seen[seen.length - 1]);
    }
    if (!(low <= high) || (log && !(low > 0))) return log ? [0.1, 1] : [0, 1];
    if (this.spec.stack) return [0, high * 1.05 || 1];
    if (log) [low, high] = [Math.max(low, 1e-12), Math.min(high, 1e12)];
    if (log) return low === high ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
  }

  /** Scales after new data or another view. */
  scale() {
    if (!this.plot) return;
    const [min, max] = this.range();
    this.plot.setScale('x', { min, max });
  }

  select(u) {
    const { left, width } = u.select;
    if (width > 4) this.page.zoom(u.posToVal(left, 'x'), u.posToVal(left + width, 'x'));
    if (width) u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  /** Lines where something happened. */
  marks(u) {
    if (this.spec.stack) return;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    const axis = this.page.axis();
    for (const { series, color } of this.page.runs()) {
      const place = axis.place(series);
      for (const mark of series.marks.slice(-200)) {
        const x = place(mark);
        if (x === null) continue;
        const left = Math.round(u.valToPos(x, 'x', true)) + 0.5;
        if (left < bbox.left || left > bbox.left + bbox.width) continue;
        ctx.strokeStyle = mark.kind === 'resume' ? color : cssVar('--bad');
        ctx.globalAlpha = 0.55;
        ctx.setLineDash(mark.kind === 'resume' ? [3, 5] : [6, 3]);
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  /** The values under the cursor, or the newest. */
  read(u) {
    if (!this.plot) return;
    const hovering = u && u.cursor.left >= 0 && u.cursor.idx !== null;
    const format = this.spec.format ?? number;
    const parts = [];
    if (hovering) parts.push(el('span', { class: 'at' }, this.page.axis().long(u.posToVal(u.cursor.left, 'x'))));
    this.drawn.forEach(({ role, run, line, y, raw, own, stroke, name }, i) => {
      if (role !== 'main') return;
      let [value, rough] = [null, null];
      if (hovering) {
        const at = u.cursor.idxs[i + 1];
        value = at === null || at === undefined ? null : this.plot.data[i + 1][at];
        if (own && value !== null) value = own(this.plot.data[0][at]);
      } else {
        const last = y.findLastIndex((it) => it !== null);
        value = own ? own.last : y[last] ?? null;
        rough = raw?.[last] ?? null;
      }
      if (value === null || value === undefined) return;
      const title = [run.id, line.label].filter(Boolean).join(', ');
      parts.push(el('span', { class: 'value', title },
        el('i', { class: line.dash ? 'swatch dashed' : 'swatch', style: { '--c': stroke ?? run.color } }),
        name ? `${name} ` : line.label && this.spec.lines.length > 1 ? `${line.label} ` : '',
        el('b', {}, format(value)),
        rough !== null && rough !== value && !hovering && this.page.runs().length === 1 ? el('span', { class: 'muted' }, `\u00a0raw ${format(rough)}`) : null));
    });
    this.readout.replaceChildren(...parts);
  }

  /** What a screen reader says. */
  describe() {
    const format = this.spec.format ?? number;
    const told = this.drawn.filter(({ role }) => role === 'main').slice(0, 8).map(({ run, line, y, name, own }) => {
      const last = y.findLast((it) => it !== null);
      return `${run.id} ${name ?? line.label ?? ''} ${format(own ? own.last : last)}`;
    });
    this.area.setAttribute('aria-label', `${this.spec.title}. Newest: ${told.join('; ')}`);
  }

  /** Left and right move the cursor from point to point. */
  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const x = this.plot.data[0];
    const [from, to] = this.range();
    const idx = this.plot.cursor.left >= 0 ? this.plot.cursor.idx ?? 0 : step > 0 ? -1 : x.length;
    let next = idx + step;
    while (next > 0 && next < x.length - 1 && (x[next] < from || x[next] > to)) next += step;
    next = Math.min(x.length - 1, Math.max(0, next));
    this.plot.setCursor({ left: this.plot.valToPos(x[next], 'x'), top: 10 });
  }

  expand(on = !this.node.classList.contains('expanded')) {
    this.node.classList.toggle('expanded', on);
    document.body.classList.toggle('has-expanded', on);
    this.expandButton.textContent = on ? '✕' : '⤢';
    this.resize();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.area;
    if (this.plot && width && height) this.plot.setSize({ width, height });
  }

  download(kind) {
    this.menu.open = false;
    if (kind === 'png') return this.picture();
    const columns = this.spec.stack?.map(([key]) => key) ?? this.spec.lines.map(({ key }) => key).filter(Boolean);
    for (const { id } of this.page.runs()) {
      const query = new URLSearchParams({ run: id, format: kind, columns: columns.join(',') });
      el('a', { href: `/api/download?${query}`, download: '' }).click();
    }
  }

  /** The plot with its title and the names of the runs. */
  picture() {
    const source = this.plot?.ctx.canvas;
    if (!source) return;
    const scale = devicePixelRatio || 1;
    const names = this.page.runs();
    const [top, rowHeight] = [34, 18];
    const canvas = el('canvas', { width: source.width, height: source.height + (top + names.length * rowHeight + 8) * scale });
    const ctx = canvas.getContext('2d');
    ctx.fillStyle = cssVar('--card');
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    ctx.drawImage(source, 0, top * scale);
    ctx.scale(scale, scale);
    ctx.fillStyle = cssVar('--text');
    ctx.font = '600 14px system-ui, sans-serif';
    ctx.fillText([this.spec.title, this.spec.unit].filter(Boolean).join(', '), 12, 22);
    ctx.font = '12px system-ui, sans-serif';
    names.forEach(({ id, color }, i) => {
      const y = top + source.height / scale + i * rowHeight + 12;
      ctx.fillStyle = color;
      ctx.fillRect(12, y - 8, 10, 10);
      ctx.fillStyle = cssVar('--text');
      ctx.fillText(id, 28, y);
    });
    canvas.toBlob((blob) => save(`${this.spec.id}.png`, blob));
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
    this.node.remove();
  }
}

const all = (_, splits) => splits;

/** Places of the labels of a logarithmic axis: powers of ten, with 2 and 5 or more between where
 * there are few. */
function decades(_, axis, min, max) {
  if (!(min > 0) || !(max > min)) return [];
  const span = Math.log10(max / min);
  const steps = span > 6 ? [1] : span > 1.5 ? [1, 2, 5] : span > 0.5 ? [1, 1.5, 2, 3, 4, 5, 7] : null;
  if (!steps) {
    const size = 10 ** Math.floor(Math.log10((max - min) / 2));
    const first = Math.ceil(min / size);
    const every = Math.ceil((max - min) / size / 6);
    return Array.from({ length: Math.floor(max / size) - first + 1 }, (_, i) => (first + i) * size).filter((_, i) => i % every === 0);
  }
  const out = [];
  for (let e = Math.floor(Math.log10(min)); e <= Math.log10(max); e++) {
    for (const it of steps) if (it * 10 ** e >= min && it * 10 ** e <= max) out.push(it * 10 ** e);
  }
  const every = Math.ceil(out.length / (axis === 0 ? 8 : 9));
  return out.filter((_, i) => i % every === 0);
}

/** The nearest point that this line has, at most 40 pixels away. */
function nearest(u, series, at) {
  const y = u.data[series];
  if (y[at] !== null && y[at] !== undefined) return at;
  const x = u.data[0];
  const here = u.valToPos(x[at], 'x');
  const near = (i) => Math.abs(u.valToPos(x[i], 'x') - here) < 40;
  for (let d = 1; d < x.length; d++) {
    const [a, b] = [at - d, at + d];
    const [left, right] = [a >= 0 && near(a), b < x.length && near(b)];
    if (left && y[a] !== null && y[a] !== undefined) return a;
    if (right && y[b] !== null && y[b] !== undefined) return b;
    if (!left && !right) return null;
  }
  return null;
}

/** How many marks of a kind there have been, at every one and at the end. */
function counted(series, kind, axis) {
  const place = axis.place(series);
  const at = series.marks.filter((it) => it.kind === kind).map(place).filter((it) => it !== null).sort((a, b) => a - b);
  if (!at.length) return null;
  const end = axis.end(series);
  const x = [...new Set([...at, end])].sort((a, b) => a - b);
  const mean = x.map((it) => at.filter((mark) => mark <= it).length);
  return { x, mean, min: mean, max: mean, count: x.map(() => 1), step: x };
}
