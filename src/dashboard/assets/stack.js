// The parts of a step on top of each other, of the first run that has them.

import { cssVar } from './dom.js';

const COLORS = ['--part-1', '--part-2', '--part-3', '--part-4', '--part-5'];

/** Lines for chart.js, the highest sum first, each filled down to the axis. */
export function stacked(spec, page, axis) {
  const run = page.runs().find(({ series }) => spec.stack.some(([key]) => series.overview.train.columns[key]));
  if (!run) return [];
  const { series } = run;
  const lines = series.detail?.axis === axis.column ? series.detail.parts.train : series.overview.train;
  const columns = spec.stack.map(([key]) => lines.columns[key]?.mean);
  // On a GPU only some steps are timed in all parts.
  const timed = lines.columns.forward_seconds?.mean ?? columns.find(Boolean);
  const rows = [...lines.step.keys()].filter((i) => timed?.[i] !== null && timed?.[i] !== undefined);
  if (!rows.length) return [];
  const at = axis.of(series);
  const x = rows.map((i) => at(lines.step[i], lines.bytes[i], lines.time[i]));
  const sums = rows.map(() => 0);
  const out = [];
  spec.stack.forEach(([, name], part) => {
    const column = columns[part];
    if (!column) return;
    const values = rows.map((i) => column[i] ?? 0);
    const y = values.map((value, i) => (sums[i] += value));
    const color = cssVar(COLORS[part]);
    const byX = new Map(x.map((it, i) => [it, values[i]]));
    const own = Object.assign((it) => byX.get(it) ?? null, { last: values[values.length - 1] });
    out.push({ run, line: { label: '' }, name, x, y, own, role: 'main', stroke: color, fill: `${color}c0`, shape: ['stack', name, run.id] });
  });
  // Painted one over the other: the widest first.
  return out.reverse();
}
