// The series of the runs on screen: an overview of all, the details of what is looked at, and the
// rows that come in meanwhile.

import { get } from './api.js';

const PARTS = ['train', 'valid', 'save'];

/** Rows appended to a series before it is fetched anew, thinned out. */
const MOST_NEW = 1500;

/** Points over the width of a chart. */
const POINTS = 700;

const EMPTY = () => ({ step: [], bytes: [], time: [], records: [], columns: {} });

/** Everything known of one run. */
class Series {
  constructor(id) {
    this.id = id;
    this.generation = -1;
    this.overview = Object.fromEntries(PARTS.map((part) => [part, EMPTY()]));
    this.detail = null; // { from, to, axis, parts }
    this.marks = [];
    this.alarms = [];
    this.config = {};
    this.fresh = 0;
    this.missed = []; // news that came while the series was on its way
    this.loaded = false;
  }

  /** First time of the run in seconds. */
  get start() {
    return this.overview.train.time[0] ?? this.overview.valid.time[0] ?? 0;
  }
}

/** Fetches and keeps series, and tells `changed(id)`. */
export class Store {
  constructor(changed) {
    this.changed = changed;
    this.series = new Map();
    this.pending = new Map();
    this.view = null; // { axis, from, to, log } in the server's terms, by run
  }

  get(id) {
    if (!this.series.has(id)) this.series.set(id, new Series(id));
    return this.series.get(id);
  }

  forget(id) {
    this.series.delete(id);
  }

  /** Fetches a run that is not here yet, or one that has changed. */
  async load(id) {
    if (this.pending.has(id)) return this.pending.get(id);
    this.get(id).missed = [];
    const work = this.fetch(id).finally(() => {
      this.pending.delete(id);
      // What has arrived since the server answered; rows that are there already are passed over.
      const { missed } = this.get(id);
      this.get(id).missed = [];
      missed.forEach((news) => this.append(news));
    });
    this.pending.set(id, work);
    return work;
  }

  async fetch(id) {
    const series = this.get(id);
    try {
      const [lines, about] = await Promise.all([
        get('series', { run: id, points: POINTS }),
        get('run', { run: id }),
      ]);
      series.generation = lines.generation;
      for (const part of PARTS) series.overview[part] = lines[part];
      series.marks = about.marks;
      series.alarms = about.alarms;
      series.config = about.config;
      series.complete = about.complete;
      series.fresh = 0;
      series.loaded = true;
      series.detail = null;
      this.changed(id);
      await this.loadDetail(id);
    } catch (error) {
      // Gone between two messages: the list of runs will say so.
      console.debug(error);
    }
  }

  /** Marks and alarms anew. */
  async loadMarks(id) {
    const series = this.get(id);
    try {
      const about = await get('run', { run: id });
      series.marks = about.marks;
      series.alarms = about.alarms;
      series.config = about.config;
      this.changed(id);
    } catch (error) {
      console.debug(error);
    }
  }

  /** What is looked at: `ask(series)` gives { axis, from, to, log_from }, or null for all. */
  look(ask) {
    this.ask = ask;
  }

  /** Fetches the part that is looked at in detail, with as much again on both sides, so that the
   * picture can be moved without waiting. */
  async loadDetail(id) {
    const series = this.get(id);
    const want = this.ask?.(series);
    if (!want) {
      series.detail = null;
      return;
    }
    const width = want.to - want.from;
    const [from, to] = [want.from - width, want.to + width];
    const { axis, log_from } = want;
    try {
      const lines = await get('series', { run: id, x: axis, from, to, log_from, points: 3 * POINTS });
      if (lines.generation !== series.generation) return;
      series.detail = { axis, from, to, parts: Object.fromEntries(PARTS.map((part) => [part, lines[part]])) };
      this.changed(id);
    } catch (error) {
      console.debug(error);
    }
  }

  /** New rows of a run, as the server tells them. */
  append(news) {
    const series = this.series.get(news.id);
    if (!series) return;
    if (this.pending.has(news.id)) {
      series.missed.push(news);
      return;
    }
    if (!series.loaded) return;
    // Older than what is here: part of it already.
    if (news.generation !== undefined && news.generation < series.generation) return;
    if (news.generation !== undefined && news.generation > series.generation) {
      this.load(news.id);
      return;
    }
    for (const part of PARTS) {
      const rows = news[part];
      if (!rows?.step.length) continue;
      push(series.overview[part], rows);
      if (series.detail && reaches(series.detail, series, part)) push(series.detail.parts[part], rows);
      series.fresh += rows.step.length;
    }
    if (news.changed?.includes('marks')) this.loadMarks(news.id);
    if (series.fresh > MOST_NEW) this.load(news.id);
    else this.changed(news.id);
  }
}

/** Whether the detail goes on to the end of the run, so that new rows belong to it. */
function reaches(detail, series, part) {
  const x = series.overview[part][detail.axis];
  return x.length > 0 && x[x.length - 1] <= detail.to;
}

/** Adds rows to the end of columns; what is there already is passed over. */
function push(lines, rows) {
  const last = lines.step.length ? lines.step[lines.step.length - 1] : -Infinity;
  const before = lines.step.length;
  const fresh = rows.step.map((step) => step > last);
  for (let i = 0; i < rows.step.length; i++) {
    if (!fresh[i]) continue;
    lines.step.push(rows.step[i]);
    lines.bytes.push(rows.bytes[i]);
    lines.time.push(rows.time[i]);
    lines.records.push(1);
  }
  const names = new Set([...Object.keys(lines.columns), ...Object.keys(rows.columns)]);
  for (const name of names) {
    const column = (lines.columns[name] ??= { mean: new Array(before).fill(null) });
    const values = rows.columns[name];
    for (let i = 0; i < rows.step.length; i++) {
      if (!fresh[i]) continue;
      const value = values ? values[i] : null;
      column.mean.push(value);
      column.min?.push(value);
      column.max?.push(value);
      column.count?.push(value === null ? 0 : 1);
    }
  }
}

/**
 * The points of one metric: { x, mean, min, max, count }, the overview with the details in their
 * place. `x` maps (step, bytes, time) to the axis of the page. Null without data.
 */
export function points(series, part, name, axis, x) {
  const overview = series.overview[part];
  if (!overview.columns[name]) return null;
  const out = { x: [], mean: [], min: [], max: [], count: [], step: [] };
  const take = (lines, keep) => {
    const column = lines.columns[name];
    if (!column) return;
    for (let i = 0; i < lines.step.length; i++) {
      if (!keep(lines[axis][i])) continue;
      const mean = column.mean[i] ?? null;
      if (mean === null) continue;
      out.x.push(x(lines.step[i], lines.bytes[i], lines.time[i]));
      out.step.push(lines.step[i]);
      out.mean.push(mean);
      out.min.push(column.min?.[i] ?? mean);
      out.max.push(column.max?.[i] ?? mean);
      out.count.push(column.count?.[i] ?? lines.records[i] ?? 1);
    }
  };
  const detail = series.detail;
  if (!detail || detail.axis !== axis || !detail.parts[part].step.length) {
    take(overview, () => true);
    return out;
  }
  const inside = detail.parts[part];
  const [from, to] = [inside[axis][0], inside[axis][inside[axis].length - 1]];
  take(overview, (at) => at < from);
  take(inside, () => true);
  take(overview, (at) => at > to);
  return out.x.length ? out : null;
}
