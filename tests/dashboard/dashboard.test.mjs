// The dashboard in a real browser. Run by run.sh, which names the program and the browser.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import { append, evaluation, random, write } from './runs.mjs';

const { MAMBABYTE: program, CHROMIUM: executablePath, FIGURES: figures } = process.env;
const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

const root = mkdtempSync(join(tmpdir(), 'dashboard-'));
const runs = join(root, 'checkpoints');
const children = [];
const problems = [];
let browser;
let base;
let rows;

/** A process that is ended with the tests. */
function start(args) {
  const child = spawn(program, args, { cwd: root, stdio: ['ignore', 'ignore', 'pipe'] });
  children.push(child);
  child.said = '';
  child.stderr.on('data', (text) => { child.said += text; });
  return child;
}

async function until(what, condition, seconds = 30) {
  const end = Date.now() + 1000 * seconds;
  for (;;) {
    const value = await condition();
    if (value) return value;
    assert.ok(Date.now() < end, `waited ${seconds} s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

/** A page whose complaints are collected. */
async function open(hash = '', options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 960 }, colorScheme: 'light', ...options });
  const page = await context.newPage();
  page.on('console', (message) => ['error', 'warning'].includes(message.type()) && problems.push(`${hash}: ${message.text()}`));
  page.on('pageerror', (error) => problems.push(`${hash}: ${error.stack}`));
  await page.goto(`${base}/#${hash}`);
  return page;
}

/** What a chart shows: ranges and lines. */
const chart = (page, id) => page.evaluate((name) => {
  const it = document.querySelector(`[data-chart="${name}"]`)?.chart;
  if (!it?.plot) return null;
  const lines = it.drawn.map(({ run, role, x, y }) => ({ run: run.id, color: run.color, role, x, y }));
  return { x: [it.plot.scales.x.min, it.plot.scales.x.max], y: [it.plot.scales.y.min, it.plot.scales.y.max], log: it.plot.scales.y.distr === 3, xlog: it.plot.scales.x.distr === 3, lines };
}, id);

const drawn = async (page, id = 'bpb') => {
  await until(`${id} is drawn`, () => chart(page, id));
  return chart(page, id);
};

const readout = (page, id) => page.locator(`[data-chart="${id}"] .readout`).innerText();

before(async () => {
  mkdirSync(runs);
  const now = Date.now() / 1000 - 4000;
  rows = write(runs, 'first', { steps: 600, total: 2000, seed: 1, end: now });
  write(runs, 'second', { steps: 500, total: 2000, seed: 2, lr: 8e-4, base: 1.1, end: now });
  write(runs, 'other-model', { steps: 300, seed: 3, gpu: false, base: 1.6, end: now });
  evaluation(join(runs, 'first'), 1);
  append(runs, 'first', { kind: 'sample', step: 601, prompt: '', text: '<b id="injected">bold</b> \u0007 \ufffd end' });
  // Half a line is not a line yet.
  append(runs, 'second', '{"kind":"train","step":501,"bp');
  const server = start(['dash', runs, '--port', '0']);
  base = await until('the address', () => server.said.match(/http:\/\/localhost:\d+/)?.[0]);
  browser = await chromium.launch({
    executablePath,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
});

after(async () => {
  await browser?.close();
  for (const child of children) child.kill('SIGKILL');
  rmSync(root, { recursive: true, force: true });
});

test('the page opens with runs, numbers and charts', async () => {
  const page = await open('runs=first');
  const { lines } = await drawn(page);
  const raw = lines.find(({ role }) => role === 'raw');
  assert.deepEqual(raw.x, rows.map(({ step }) => step));
  assert.deepEqual(raw.y.map(Math.fround), rows.map(({ bpb }) => Math.fround(bpb)));
  assert.equal(await page.locator('.run').count(), 3);
  assert.match(await page.locator('.tiles').innerText(), /600[\s\S]*of 2,000/);
  for (const id of ['loss', 'word_perplexity', 'lr', 'grad_norm', 'bytes_per_second', 'mfu', 'seconds', 'parts', 'wait', 'save', 'memory', 'gpu_util', 'gpu_power', 'gpu_temp']) {
    assert.equal(await page.locator(`[data-chart="${id}"]`).count(), 1, id);
  }
  await page.context().close();
});

test('smoothing is the debiased average of TensorBoard, with the raw line behind', async () => {
  const page = await open('runs=first&smooth=0.9');
  const { lines } = await drawn(page);
  let [sum, mass] = [0, 0];
  const expected = rows.map(({ bpb }) => {
    sum = 0.9 * sum + 0.1 * bpb;
    mass = 0.9 * mass + 0.1;
    return sum / mass;
  });
  const main = lines.find(({ role }) => role === 'main');
  main.y.forEach((it, i) => assert.ok(Math.abs(it - expected[i]) < 1e-5, `${i}: ${it} ${expected[i]}`));
  assert.ok(lines.some(({ role }) => role === 'raw'));
  // The learning rate is no measurement: it is never smoothed.
  await page.locator('[data-chart=lr]').scrollIntoViewIfNeeded();
  assert.deepEqual((await drawn(page, 'lr')).lines.map(({ role }) => role), ['main']);
  await page.locator('#smoothing').focus();
  await page.keyboard.press('Home');
  await until('the slider is in the address', () => page.url().includes('smooth=0'));
  await until('no smoothing', async () => (await chart(page, 'bpb')).lines.every(({ role }) => role !== 'raw'));
  await page.context().close();
});

test('both axes can be logarithmic', async () => {
  const page = await open('runs=first');
  assert.equal((await drawn(page)).log, false);
  await page.locator('[data-chart=bpb] button', { hasText: 'log' }).click();
  await until('a logarithmic y axis', async () => (await chart(page, 'bpb')).log);
  await page.locator('#x-log').click();
  await until('a logarithmic x axis', async () => (await chart(page, 'bpb')).xlog);
  assert.equal((await chart(page, 'bpb')).x[0], 1);
  for (const kind of ['bytes', 'elapsed', 'clock']) {
    await page.locator('#x-axis').selectOption(kind);
    await until(kind, async () => page.url().includes(`x=${kind}`) && (await chart(page, 'bpb'))?.lines.length);
  }
  await page.context().close();
});

test('runs are compared in colours, filtered, and their configs told apart', async () => {
  const page = await open('runs=first,second');
  const { lines } = await until('both runs', async () => {
    const it = await chart(page, 'bpb');
    return new Set(it?.lines.map(({ run }) => run)).size === 2 && it;
  });
  assert.equal(new Set(lines.map(({ color }) => color)).size, 2);
  assert.equal(lines.filter(({ run, role }) => run === 'second' && role === 'raw')[0].x.length, 500, 'the half-written line is not there');
  await page.locator('#filter').fill('^(other|sec)');
  assert.deepEqual((await page.locator('.run-name').allInnerTexts()).sort(), ['other-model', 'second']);
  await page.locator('#tab-config').click();
  const keys = await page.locator('.config tbody th').allInnerTexts();
  assert.deepEqual(keys.sort(), ['optimizer.lr', 'train.seed']);
  await page.context().close();
});

test('the cursor is in all charts at the same step', async () => {
  const page = await open('runs=first');
  await drawn(page);
  await drawn(page, 'loss');
  await page.locator('[data-chart=bpb] .u-over').hover({ position: { x: 150, y: 50 } });
  const step = await until('a step', async () => (await readout(page, 'bpb')).match(/step [\d,]+/)?.[0]);
  assert.ok((await readout(page, 'loss')).includes(step));
  await page.context().close();
});

test('zoom, its reset, and the state in the address', async () => {
  const page = await open('runs=first&smooth=0');
  await drawn(page);
  const box = await page.locator('[data-chart=bpb] .u-over').boundingBox();
  await page.mouse.move(box.x + 0.5 * box.width, box.y + 50);
  await page.mouse.down();
  await page.mouse.move(box.x + 0.75 * box.width, box.y + 50, { steps: 4 });
  await page.mouse.up();
  const { x } = await until('a zoom', async () => {
    const it = await chart(page, 'bpb');
    return it.x[0] > 250 && it;
  });
  assert.ok(Math.abs(x[0] - 300) < 20 && Math.abs(x[1] - 450) < 20, String(x));
  assert.deepEqual((await drawn(page, 'loss')).x, x, 'all charts');
  const other = await open(new URL(page.url()).hash.slice(1));
  assert.deepEqual((await drawn(other)).x, x, 'the address says it all');
  assert.equal((await chart(other, 'bpb')).lines[0].role, 'main');
  await other.context().close();
  await page.locator('#reset').click();
  await until('everything', async () => (await chart(page, 'bpb')).x[1] >= 600);
  await page.context().close();
});

test('downloads are what was recorded', async () => {
  const page = await open('runs=first');
  await drawn(page);
  const fetch = async (label) => {
    await page.locator('[data-chart=bpb] summary').click();
    const [download] = await Promise.all([page.waitForEvent('download'), page.getByRole('button', { name: label }).click()]);
    return readFileSync(await download.path());
  };
  const csv = (await fetch('CSV, every step')).toString().trim().split('\n');
  assert.equal(csv[0], 'step,bytes_seen,time,bpb,valid_bpb');
  const bpb = csv.slice(1).map((line) => line.split(',')).filter((it) => it[3]).map((it) => Number(it[3]));
  assert.deepEqual(bpb.map(Math.fround), rows.map((it) => Math.fround(it.bpb)));
  const json = JSON.parse(await fetch('JSON, every step'));
  assert.equal(json.filter((it) => 'bpb' in it).length, rows.length);
  assert.equal(json.find(({ step }) => step === 7).bytes_seen, rows[6].bytes_seen);
  const png = await fetch('PNG, this picture');
  assert.equal(png.subarray(1, 4).toString(), 'PNG');
  assert.ok(png.length > 5000, `${png.length} bytes`);
  await page.context().close();
});

test('text by step, escaped, with bad bytes visible', async () => {
  const page = await open('tab=text&runs=first');
  const sample = page.locator('.sample');
  await until('the newest', async () => (await page.locator('.sample').count()) && (await sample.innerText()).includes('<b id="injected">'));
  assert.equal(await page.locator('#injected').count(), 0, 'nothing becomes HTML');
  assert.deepEqual(await page.locator('.odd').allInnerTexts(), ['\\x07', '\ufffd']);
  await page.locator('#step').focus();
  await page.keyboard.press('Home');
  await until('the first', async () => (await page.locator('.text-card h3').innerText()).includes('step 250'));
  assert.ok(page.url().includes('step=250'));
  await page.locator('h3').first().click();
  await page.keyboard.press('.');
  await until('a later one', async () => !(await page.locator('.text-card h3').innerText()).includes('step 250'));
  await page.context().close();
});

test('evaluations by position', async () => {
  const page = await open('tab=position&runs=first,second');
  await page.locator('[aria-label="By position"] canvas').waitFor();
  assert.match(await page.locator('.config tbody').innerText(), /eval-test\.json\s+1\.1\s/);
  await page.context().close();
});

test('a trainer at work: live, stalled, killed, resumed', async () => {
  const text = join(root, 'text');
  mkdirSync(text);
  const draw = random(9);
  for (let i = 0; i < 12; i++) writeFileSync(join(text, `${i}.txt`), Array.from({ length: 900 }, () => ['river', 'stone', 'and', 'night', '\n'][Math.floor(5 * draw())]).join(' '));
  const config = '[model]\ndim = 16\ndepth = 2\n[train]\nsteps = 100000\nbatch = 2\nlength = 64\nvalidate_every = 200\nvalidate_bytes = 300\nsample_every = 200\nsample_bytes = 20\ninspect_every = 50\n[optimizer]\nwarmup_steps = 5\n[data]\npath = "data"\n[checkpoint]\nevery_steps = 100\n[device]\nkind = "cpu"\n';
  writeFileSync(join(root, 'config.toml'), config);
  const prepared = spawnSync(program, ['data', 'prepare', '--source', 'text', '--path', text, '--out', 'data', '--held-out', '0.1'], { cwd: root });
  assert.equal(prepared.status, 0, String(prepared.stderr));
  const page = await open('runs=live&smooth=0');
  const step = async () => (await chart(page, 'bpb'))?.lines.find(({ role }) => role === 'main')?.x.at(-1) ?? 0;
  const trainer = start(['train', '--config', 'config.toml', '--run', 'live']);
  await until('the first steps', async () => (await step()) > 20, 60);
  const seen = await step();
  await until('later ones, without loading the page again', async () => (await step()) > seen + 50);
  await until('it is known to run', async () => /running/.test(await page.locator('.tiles').innerText()));
  await until('a checkpoint', async () => (await step()) > 220, 60);

  trainer.kill('SIGSTOP');
  const alarm = page.locator('.alarm[data-kind=stall]');
  await alarm.waitFor({ timeout: 40_000 });
  assert.match(await alarm.innerText(), /step [\d,]+[\s\S]*no step for/);
  trainer.kill('SIGCONT');
  await until('the stall is over', async () => (await alarm.count()) === 0);

  trainer.kill('SIGKILL');
  await until('it is known to have stopped', async () => /stopped/.test(await page.locator('.tiles').innerText()));
  const before = await step();
  const again = start(['resume', 'checkpoints/live']);
  await until('steps past those before', async () => (await step()) > before + 50, 60);
  const { x } = (await chart(page, 'bpb')).lines.find(({ role }) => role === 'main');
  assert.ok(x.every((it, i) => i === 0 || it > x[i - 1]), 'every step is there once');

  await page.locator('#tab-model').click();
  await page.locator('[aria-label="Mean of Δ"] canvas').waitFor();
  await page.locator('[aria-label="Weights"] canvas').waitFor();
  again.kill('SIGTERM');
  await new Promise((resolve) => again.on('exit', resolve));
  await page.context().close();
});

test('what is no number, and a spike, are alarms with their step', async () => {
  const page = await open('runs=second');
  await drawn(page);
  append(runs, 'second', 'b":1.9}\n');
  append(runs, 'second', { kind: 'train', step: 502, bpb: 9.5, grad_norm: 0.2, bytes_seen: 1.98e8 });
  append(runs, 'second', { kind: 'skip', step: 503, reason: 'nonfinite', in_a_row: 1, batch: 503, epoch: 0, offsets: [] });
  await page.locator('.alarm[data-kind="not-a-number"]').waitFor();
  assert.match(await page.locator('.alarm[data-kind="not-a-number"]').innerText(), /step 503/);
  assert.match(await page.locator('.alarm[data-kind=spike]').innerText(), /step 502[\s\S]*9\.5/);
  assert.match(await page.locator('.run[data-run=second] .badge').innerText(), /2/);
  await page.locator('.alarm[data-kind=spike] button').click();
  await until('the place is shown', async () => {
    const [from, to] = (await chart(page, 'bpb')).x;
    return from > 400 && from < 502 && to > 502;
  });
  await page.context().close();
});

test('everything can be done from the keyboard', async () => {
  const page = await open('runs=first');
  await drawn(page);
  await page.keyboard.press('2');
  await page.locator('.sample').first().waitFor();
  await page.keyboard.press('1');
  await drawn(page);
  await page.keyboard.press('?');
  assert.ok(await page.locator('dialog[open]').isVisible());
  await page.keyboard.press('Escape');
  await page.keyboard.press('d');
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), 'dark');
  await page.keyboard.press('+');
  await until('zoomed', () => page.url().includes('from='));
  await page.keyboard.press('0');
  await until('all', () => !page.url().includes('from='));
  await page.locator('[data-chart=bpb] .plot').focus();
  await page.keyboard.press('ArrowRight');
  await page.keyboard.press('ArrowRight');
  assert.match(await readout(page, 'bpb'), /step 2\b/);
  await page.keyboard.press('f');
  assert.equal(await page.locator('.card.expanded').count(), 1);
  await page.keyboard.press('Escape');
  assert.equal(await page.locator('.card.expanded').count(), 0);
  await page.keyboard.press('/');
  await page.keyboard.type('other');
  assert.deepEqual(await page.locator('.run-name').allInnerTexts(), ['other-model']);
  await page.context().close();
});

test('a phone of 400 pixels', async () => {
  const page = await open('runs=first', { viewport: { width: 400, height: 800 }, hasTouch: true, isMobile: true });
  for (const tab of ['scalars', 'text', 'position', 'model', 'config']) {
    await page.locator(`#tab-${tab}`).click();
    await page.waitForTimeout(200);
    const [wide, here] = await page.evaluate(() => [document.scrollingElement.scrollWidth, innerWidth]);
    assert.ok(wide <= here, `${tab}: ${wide} pixels wide`);
  }
  assert.ok(!(await page.locator('#filter').isVisible()));
  await page.locator('#menu').click();
  assert.ok(await page.locator('#filter').isVisible());
  await page.context().close();
});

test('nothing serious for axe, in any view, light and dark', async () => {
  for (const colorScheme of ['light', 'dark']) {
    for (const tab of ['scalars', 'text', 'position', 'model', 'config']) {
      const page = await open(`tab=${tab}&runs=first,second,live`, { colorScheme });
      await page.locator('main > *').first().waitFor();
      await page.waitForTimeout(400);
      await page.evaluate(AXE);
      const { violations } = await page.evaluate(() => window.axe.run());
      const serious = violations.filter(({ impact }) => ['serious', 'critical'].includes(impact));
      const told = serious.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html.slice(0, 120)} ${failureSummary}`).join('\n')}`);
      assert.deepEqual(told, [], `${tab}, ${colorScheme}`);
      await page.context().close();
    }
  }
});

test('fifty pages of one browser are all live', async () => {
  const context = await browser.newContext({ viewport: { width: 500, height: 400 } });
  const pages = [];
  for (let i = 0; i < 50; i += 5) {
    pages.push(...await Promise.all(Array.from({ length: 5 }, async () => {
      const page = await context.newPage();
      page.on('pageerror', (error) => problems.push(`fifty: ${error.stack}`));
      await page.goto(`${base}/#runs=other-model&tab=config`);
      return page;
    })));
  }
  append(runs, 'other-model', { kind: 'train', step: 12345, bpb: 1.5, bytes_seen: 1e9 });
  for (const page of pages) {
    await page.locator('.run[data-run=other-model]', { hasText: '12,345' }).waitFor({ state: 'attached', timeout: 30_000 });
  }
  await context.close();
});

test('a run that is deleted while it is shown goes away', async () => {
  const page = await open('runs=other-model,first');
  await until('both', async () => new Set((await chart(page, 'bpb'))?.lines.map(({ run }) => run)).size === 2);
  rmSync(join(runs, 'other-model'), { recursive: true });
  await page.locator('#toast', { hasText: 'other-model is gone' }).waitFor();
  await until('one is left', async () => new Set((await chart(page, 'bpb')).lines.map(({ run }) => run)).size === 1);
  await page.context().close();
});

test('pictures for the documentation', { skip: !figures && 'FIGURES is not set' }, async () => {
  const now = Date.now() / 1000;
  for (const name of ['first', 'second', 'live', 'other-model']) rmSync(join(runs, name), { recursive: true, force: true });
  write(runs, '353m-lr4e-4', { steps: 6000, total: 80000, seed: 1, end: now - 1, spike: 5950, looks: true });
  write(runs, '353m-lr8e-4', { steps: 4500, total: 80000, seed: 2, lr: 8e-4, base: 1.12, end: now - 7e4 });
  write(runs, '353m-seed2', { steps: 5200, total: 80000, seed: 7, base: 0.92, end: now - 3e5 });
  evaluation(join(runs, '353m-lr4e-4'), 1);
  await until('only these', async () => (await (await fetch(`${base}/api/runs`)).json()).runs.map(({ id }) => id).join() === '353m-lr4e-4,353m-lr8e-4,353m-seed2');
  const list = 'runs=353m-lr4e-4,353m-lr8e-4,353m-seed2&smooth=0.9&ylog=bpb,loss';
  const shots = [
    ['dashboard_light', list, {}],
    ['dashboard_dark', 'runs=353m-lr4e-4&smooth=0.9&from=4200&to=6000', { colorScheme: 'dark' }],
    ['dashboard_model', 'tab=model&runs=353m-lr4e-4', { colorScheme: 'dark' }],
    ['dashboard_text', `tab=text&${list}`, {}],
    ['dashboard_phone', list, { viewport: { width: 400, height: 860 }, isMobile: true, hasTouch: true }],
    ['dashboard_phone_dark', list, { viewport: { width: 400, height: 860 }, colorScheme: 'dark', isMobile: true, hasTouch: true }],
  ];
  for (const [name, hash, options] of shots) {
    const page = await open(hash, { viewport: { width: 1280, height: 860 }, ...options });
    await until('the runs', async () => (await page.locator('.run').count()) === 3);
    await page.waitForTimeout(1500);
    if (name.includes('phone')) await page.evaluate(() => { document.querySelector('main').scrollTop = 380; });
    await page.waitForTimeout(400);
    await page.screenshot({ path: join(figures, `${name}.png`) });
    await page.context().close();
  }
});

test('nothing was complained about in any page', () => {
  assert.deepEqual(problems, []);
});
