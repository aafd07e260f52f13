// Which charts there are: what each one draws, in which group it stands, how its numbers read.

import { count, duration, number, scaled } from './format.js';

const percent = (value) => `${number(100 * value)} %`;
const seconds = (value) => duration(value);

/** Of one line: part and column of the record, how it is drawn, and a function of its values. */
const line = (part, key, options = {}) => ({ part, key, ...options });

/** Validation beside training: dashed, with points, never smoothed. */
const VALID = { dash: true, label: 'valid' };

export const GROUPS = [
  {
    title: 'Quality',
    charts: [
      { id: 'bpb', title: 'Bits per byte', lines: [line('train', 'bpb', { label: 'train' }), line('valid', 'bpb', VALID)] },
      {
        id: 'loss',
        title: 'Loss',
        unit: 'nats a byte',
        lines: [
          line('train', 'loss_nats', { label: 'train' }),
          line('valid', 'bpb', { ...VALID, map: (bpb) => bpb * Math.LN2 }),
        ],
      },
      { id: 'word_perplexity', title: 'Word perplexity', unit: 'validation', log: true, lines: [line('valid', 'word_perplexity', { label: 'valid', dots: true })] },
    ],
  },
  {
    title: 'Optimisation',
    charts: [
      { id: 'lr', title: 'Learning rate', smooth: false, lines: [line('train', 'lr')] },
      { id: 'grad_norm', title: 'Gradient norm', unit: 'before clipping', log: true, lines: [line('train', 'grad_norm')] },
      { id: 'skipped', title: 'Skipped steps', unit: 'so far', smooth: false, format: count, lines: [{ marks: 'skip' }] },
    ],
  },
  {
    title: 'Speed',
    charts: [
      { id: 'bytes_per_second', title: 'Speed', unit: 'bytes a second', format: (it) => scaled(it, 'B/s'), lines: [line('train', 'bytes_per_second')] },
      { id: 'mfu', title: 'Model FLOP utilisation', format: percent, lines: [line('train', 'mfu')] },
      { id: 'tflops', title: 'Arithmetic', unit: 'TFLOP/s of the model', lines: [line('train', 'tflops')] },
      { id: 'seconds', title: 'Step time', format: seconds, lines: [line('train', 'seconds')] },
      {
        id: 'parts',
        title: 'Parts of a step',
        unit: 'one run',
        format: seconds,
        stack: [
          ['wait_seconds', 'waiting for data'],
          ['forward_seconds', 'forward'],
          ['backward_seconds', 'backward'],
          ['optimizer_seconds', 'optimizer'],
          ['save_seconds', 'saving'],
        ],
      },
      {
        id: 'wait',
        title: 'Waiting for data',
        unit: 'share of the step',
        format: percent,
        lines: [line('train', 'wait_seconds', { per: 'seconds' })],
      },
      { id: 'pause', title: 'Pause of a save', format: seconds, smooth: false, lines: [line('save', 'pause_seconds', { dots: true })] },
      { id: 'save', title: 'Duration of a save', format: seconds, smooth: false, lines: [line('save', 'seconds', { dots: true })] },
    ],
  },
  {
    title: 'Device',
    charts: [
      {
        id: 'memory',
        title: 'Device memory',
        unit: 'GiB',
        smooth: false,
        lines: [line('train', 'memory_gib', { label: 'held' }), line('train', 'memory_in_use_gib', { label: 'in tensors', dash: true })],
      },
      { id: 'gpu_memory', title: 'Memory of the card', unit: 'GiB, all programs', smooth: false, lines: [line('train', 'gpu_memory_gib')] },
      { id: 'gpu_util', title: 'GPU utilisation', format: percent, lines: [line('train', 'gpu_util')] },
      { id: 'gpu_power', title: 'Power', unit: 'W', lines: [line('train', 'gpu_power_w')] },
      { id: 'gpu_temp', title: 'Temperature', unit: '°C', lines: [line('train', 'gpu_temp_c')] },
      { id: 'host_memory', title: 'Host memory', unit: 'GiB, resident', smooth: false, lines: [line('train', 'host_memory_gib')] },
    ],
  },
];

/** Columns that have a chart, or none because they say what another one says. */
const KNOWN = new Set(
  GROUPS.flatMap(({ charts }) => charts.flatMap((it) => [
    ...(it.lines ?? []).filter(({ part }) => part === 'train').map(({ key }) => key),
    ...(it.stack ?? []).map(([key]) => key),
  ])),
);

/** All groups, with a chart for every column of training that has none of its own. */
export function groups(columns) {
  const others = [...columns].filter((key) => !KNOWN.has(key)).sort();
  if (!others.length) return GROUPS;
  const charts = others.map((key) => ({ id: `train.${key}`, title: key.replaceAll('_', ' '), lines: [line('train', key)] }));
  return [...GROUPS, { title: 'Other', charts }];
}
