// Made-up runs for the tests: the shape of real ones, the same numbers every time.

import { appendFileSync, mkdirSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** Numbers from 0 to 1, the same for a seed (mulberry32). */
export function random(seed) {
  let a = seed;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const WORDS = 'the of and a to in he was that it his her with as had for not on at but she is night dark river stone'.split(' ');

/** What a model of so many steps might write. */
function prose(step, draw) {
  if (step < 800) return Array.from({ length: 220 }, () => 'etaoin shrdlu\n'[Math.floor(draw() * 14)]).join('');
  return Array.from({ length: 60 }, () => WORDS[Math.floor(draw() * WORDS.length)]).join(' ');
}

/** Writes a run of `steps` steps into `root/name`; returns its lines of training. */
export function write(root, name, { steps, total = steps, seed, lr = 4e-4, base = 1, gpu = true, end = Date.now() / 1000, seconds = 3.9, spike = null, looks = false, keep = true }) {
  const draw = random(seed);
  const noise = () => (draw() + draw() + draw() - 1.5) * 1.15;
  const folder = join(root, name);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'config.toml'), `[model]\ndim = ${gpu ? 1024 : 160}\ndepth = ${gpu ? 53 : 6}\n[train]\nsteps = ${total}\nbatch = 4\nlength = 8192\nseed = ${seed}\n[optimizer]\nlr = ${lr}\nwarmup_steps = 500\n[data]\npath = "data/pg19"\n`);
  const file = join(folder, 'metrics.jsonl');
  writeFileSync(file, '');
  let lines = [];
  const rows = [];
  const flush = () => {
    if (lines.length) appendFileSync(file, lines.join('\n') + '\n');
    lines = [];
  };
  const put = (record) => {
    lines.push(JSON.stringify(record));
    if (lines.length === 20_000) flush();
  };
  const bytes = gpu ? 393216 : 4096;
  const curve = (step) => base + 6.5 / (1 + step / 40) ** 0.9 + 0.5 / (1 + step / 2000);
  let time = end - steps * seconds;
  for (let step = 1; step <= steps; step++) {
    const high = spike !== null && step >= spike && step < spike + 3;
    const bpb = Number((curve(step) + 0.03 * noise() + (high ? 1.4 : 0)).toPrecision(6));
    const took = seconds * (1 + 0.015 * noise());
    const saved = step % 500 === 0 ? 0.35 : 0;
    time += took + saved;
    const row = {
      kind: 'train', step, loss_nats: Number((bpb * Math.LN2).toPrecision(6)), bpb,
      lr: Number((lr * Math.min(1, step / 500) * 0.5 * (1 + Math.cos((Math.PI * step) / total)) + 1e-5).toPrecision(5)),
      grad_norm: Number(((0.11 + 0.6 / (1 + step / 300)) * Math.exp(0.15 * noise()) * (high ? 20 : 1)).toPrecision(5)),
      bytes_per_second: Number((bytes / took).toPrecision(6)), bytes_seen: bytes * step, seconds: Number(took.toPrecision(5)),
      wait_seconds: Number((0.002 + 0.003 * draw()).toPrecision(3)),
      ...(gpu && step % 100 ? {} : { forward_seconds: took * 0.28, backward_seconds: took * 0.66, optimizer_seconds: took * 0.05 }),
      ...(saved ? { save_seconds: saved } : {}),
      tflops: Number(((gpu ? 96 : 0.09) * (seconds / took)).toPrecision(4)), host_memory_gib: 1.9,
      ...(gpu ? { memory_gib: 22.4, memory_in_use_gib: 5.8, mfu: Number((0.34 * (seconds / took)).toPrecision(4)), gpu_util: Math.min(1, 0.985 + 0.01 * noise()), gpu_power_w: Math.round(336 + 6 * noise()), gpu_temp_c: Math.round(71 + 3 * Math.sin(step / 700)), gpu_memory_gib: 23.1 } : {}),
      time: Number(time.toFixed(3)),
    };
    put(row);
    if (keep) rows.push(row);
    if (step % 250 === 0 || step === steps) {
      const valid = Number((curve(step) + 0.03).toPrecision(6));
      put({ kind: 'valid', step, bpb: valid, bytes: 1048576, word_perplexity: 2 ** (valid * 5.9), seconds: 11, time });
      put({ kind: 'sample', step, prompt: 'It was a dark night, ', text: prose(step, draw), time });
    }
    if (saved) put({ kind: 'save', step, pause_seconds: saved, seconds: 6 + draw(), bytes: 4.2e9, attempts: 1, time });
    if (looks && step % 100 === 0) put(look(step, steps, draw, time));
  }
  flush();
  utimesSync(file, end, end);
  return rows;
}

/** A look into a model of 53 layers. */
function look(step, steps, draw, time) {
  const done = step / steps;
  const layers = (f) => Array.from({ length: 53 }, (_, i) => Number(f(i).toPrecision(4)));
  const bell = (width) => Array.from({ length: 32 }, (_, i) => Math.round(4000 * Math.exp(-(((i - 15.5) / width) ** 2))));
  const names = ['embedding.weight', 'mixer.in_proj.weight', 'mixer.out_proj.weight', 'mixer.a_log', 'lm_head.weight'];
  return {
    kind: 'inspect', step, seconds: 0.019,
    delta_mean: layers((i) => 0.02 + 0.05 * Math.exp(-i / 20) * (1 + done) + 0.004 * draw()),
    delta_max: layers((i) => 0.6 + 2 * done * (i / 53) + 0.2 * draw()),
    grad_norm: layers((i) => 0.02 + 0.1 * Math.exp(-i / 12) * (1.5 - done) + 0.01 * draw()),
    weight_norm: layers((i) => 30 + 15 * done + 0.2 * i + draw()),
    groups: names.map((name) => ({ name, weights: { low: -0.2 - 0.3 * done, high: 0.2 + 0.3 * done, counts: bell(5 - 1.5 * done) }, gradients: { low: -0.002, high: 0.002, counts: bell(2.5) } })),
    time,
  };
}

/** What `mambabyte eval --json` prints, as far as the page shows it. */
export function evaluation(folder, base) {
  const curve = Array.from({ length: 12 }, (_, i) => ({ from: i ? 256 * 2 ** (i - 1) : 0, to: i < 11 ? 256 * 2 ** i : null, bytes: 1e6, bits_per_byte: base + 1.2 / (1 + i) ** 1.5 }));
  writeFileSync(join(folder, 'eval-test.json'), JSON.stringify({ bits_per_byte: base + 0.1, nats_per_byte: 0.7, bytes: 41289101, words: 7e6, word_perplexity: 59.1, curve, buckets: [], documents: Array.from({ length: 100 }, () => ({})) }));
}

/** Adds a record, or part of a line, to a run. */
export function append(root, name, what) {
  appendFileSync(join(root, name, 'metrics.jsonl'), typeof what === 'string' ? what : JSON.stringify(what) + '\n');
}
