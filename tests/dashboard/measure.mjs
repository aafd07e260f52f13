// How the dashboard does with a long run: measure.mjs PROGRAM CHROMIUM [STEPS]
//
// Prints time to read the file, to open the page, of one answer, between frames while panning, and the
// server's memory. Needs what run.sh installs: run it in its work folder.

import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';
import { write } from './runs.mjs';

const [program, executablePath, steps = '1000000'] = process.argv.slice(2);
const root = mkdtempSync(join(tmpdir(), 'dashboard-'));
write(root, 'long', { steps: Number(steps), seed: 5, seconds: 0.5, keep: false });
console.log(`${steps} steps, ${(statSync(join(root, 'long', 'metrics.jsonl')).size / 1e6).toFixed(0)} MB`);

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

const started = Date.now();
const server = spawn(program, ['dash', root, '--port', '0'], { stdio: ['ignore', 'ignore', 'pipe'] });
let said = '';
server.stderr.on('data', (text) => { said += text; });
let base;
while (!(base = said.match(/http:\/\/localhost:\d+/)?.[0])) await wait(20);
const memory = () => {
  const status = readFileSync(`/proc/${server.pid}/status`, 'utf8');
  return ['VmRSS', 'VmHWM'].map((key) => `${(Number(status.match(`${key}:\\s+(\\d+)`)[1]) / 1024).toFixed(0)} MiB`).join(', at most ');
};
for (;;) {
  const { runs } = await (await fetch(`${base}/api/runs`)).json();
  if (runs[0]?.indexed >= 1) break;
  await wait(50);
}
console.log(`read to its end: ${Date.now() - started} ms`);

const browser = await chromium.launch({
  executablePath,
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const page = await browser.newPage({ viewport: { width: 1440, height: 1000 } });
const opened = [];
for (let i = 0; i < 7; i++) {
  const at = Date.now();
  await page.goto(`${base}/?${i}`);
  await page.waitForSelector('[data-chart=bpb] canvas');
  opened.push(Date.now() - at);
}
console.log(`page opened, charts drawn: median ${median(opened)} ms, first ${opened[0]} ms`);

const [from, to] = [0.4 * steps, 0.6 * steps];
for (const [name, query] of [['all steps, 700 points', 'points=700'], ['a fifth of them, 2,100 points', `points=2100&from=${from}&to=${to}`]]) {
  const times = [];
  let size = 0;
  for (let i = 0; i < 9; i++) {
    const at = performance.now();
    size = (await (await fetch(`${base}/api/series?run=long&${query}`)).text()).length;
    times.push(performance.now() - at);
  }
  console.log(`answer, all metrics, ${name}: median ${median(times).toFixed(0)} ms, ${(size / 1e3).toFixed(0)} kB`);
}

const box = await page.locator('[data-chart=bpb] .u-over').boundingBox();
await page.mouse.move(box.x + 200, box.y + 60);
await page.keyboard.down('Control');
for (let i = 0; i < 8; i++) await page.mouse.wheel(0, -100);
await page.keyboard.up('Control');
await wait(1000);
await page.evaluate(() => {
  window.frames = [];
  let last = performance.now();
  const frame = (now) => {
    window.frames.push(now - last);
    last = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
});
await page.keyboard.down('Shift');
await page.mouse.down();
for (let i = 0; i < 120; i++) {
  await page.mouse.move(box.x + 200 - i, box.y + 60);
  await wait(16);
}
await page.mouse.up();
await page.keyboard.up('Shift');
const frames = (await page.evaluate(() => window.frames)).slice(2);
console.log(`between frames while panning: median ${median(frames).toFixed(1)} ms, 95 % within ${frames[Math.floor(0.95 * frames.length)].toFixed(1)} ms`);
console.log(`memory of the server: ${memory()}`);
await browser.close();
server.kill();
rmSync(root, { recursive: true });
