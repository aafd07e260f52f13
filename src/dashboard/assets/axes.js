// The horizontal axis: steps, bytes, or time since the start of a run or on the clock.

import { state } from './state.js';
import { clock, count, duration, scaled } from './format.js';

/** Distances of labels in seconds that read well. */
const ROUND_TIMES = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, ...[1, 2, 5, 10, 20, 50, 100].map((days) => 86400 * days)];

const KINDS = {
  step: { column: 'step', value: (step) => step, short: (it) => scaled(it), long: (it) => `step ${count(Math.round(it))}` },
  bytes: { column: 'bytes', value: (_, bytes) => bytes, short: (it) => scaled(it, 'B'), long: (it) => scaled(it, 'B') },
  elapsed: { column: 'time', value: (_, __, time, start) => time - start, short: duration, long: (it) => duration(it) },
  clock: { column: 'time', value: (_, __, time) => time, short: clock, long: clock },
};

/** The axis that is chosen. */
export function axis() {
  const id = KINDS[state.x] ? state.x : 'step';
  const kind = KINDS[id];
  const log = state.xlog && id !== 'clock';
  // A logarithm needs something above zero.
  const least = { step: 1, bytes: 1, elapsed: 1 }[id];
  const clean = (it) => (log ? Math.max(it, least) : it);
  return {
    id,
    log,
    column: kind.column,
    incrs: id === 'elapsed' ? ROUND_TIMES : undefined,
    short: kind.short,
    long: kind.long,
    /** From step, bytes and time of a row to the axis. */
    of: (series) => (step, bytes, time) => clean(kind.value(step, bytes, time, series.start)),
    /** From a mark or an alarm, which has step and time, to the axis. */
    place: (series) => ({ step, time }) => {
      if (id === 'step') return clean(step);
      if (id === 'bytes') {
        const { step: steps, bytes } = series.overview.train;
        const i = steps.findIndex((it) => it >= step);
        return i < 0 ? bytes[bytes.length - 1] ?? null : clean(bytes[i]);
      }
      return time ? clean(id === 'elapsed' ? time - series.start : time) : null;
    },
    /** Where the run is now. */
    end: (series) => {
      const { step, bytes, time } = series.overview.train;
      const i = step.length - 1;
      return i < 0 ? 0 : clean(kind.value(step[i], bytes[i], time[i], series.start));
    },
    start: (series) => {
      const { step, bytes, time } = series.overview.train;
      return step.length ? clean(kind.value(step[0], bytes[0], time[0], series.start)) : null;
    },
    /** What to ask the server for. */
    ask: (series, from, to) => {
      const base = id === 'elapsed' ? series.start : 0;
      return { axis: kind.column, from: from + base, to: to + base, log_from: log ? base : undefined };
    },
  };
}
