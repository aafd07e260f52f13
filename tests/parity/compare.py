#!/usr/bin/env python3
"""Compares the losses of two runs step by step: compare.py OURS.jsonl THEIRS.jsonl [--svg FILE].

Prints a Markdown table; fails above the tolerances. The figure has both curves, and below them
their difference.
"""

import argparse
import json
import math
import sys
from pathlib import Path

WIDTH, LEFT, RIGHT = 760, 70, 20
# Top and height of the two panels.
CURVES, GAPS = (20, 230), (290, 110)


def read(path):
    records = map(json.loads, Path(path).read_text().splitlines())
    return [it for it in records if it["kind"] == "train"]


def figure(ours, theirs, names):
    """Losses above, relative differences on a logarithmic scale below, as SVG."""
    steps = len(ours)
    gaps = [max(abs(a - b) / b, 1e-9) for a, b in zip(ours, theirs)]
    x = lambda i: LEFT + (WIDTH - LEFT - RIGHT) * i / (steps - 1)
    low, high = math.floor(min(ours + theirs)), math.ceil(max(ours + theirs))
    y = lambda v: CURVES[0] + CURVES[1] * (high - v) / (high - low)
    least, most = math.floor(math.log10(min(gaps))), math.ceil(math.log10(max(gaps)))
    most = max(most, least + 1)
    z = lambda v: GAPS[0] + GAPS[1] * (most - math.log10(v)) / (most - least)
    line = lambda values, at: "L".join(f"{x(i):.1f} {at(v):.1f}" for i, v in enumerate(values))
    bottom = GAPS[0] + GAPS[1]
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 50}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{bottom + 50}" fill="white"/>',
    ]
    grid = [(y(v), f"{v}") for v in range(low, high + 1)]
    grid += [(z(10.0**v), f"1e{v}") for v in range(least, most + 1)]
    for at, label in grid:
        svg.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        svg.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for i in range(5):
        step = round((steps - 1) * i / 4)
        svg.append(
            f'<text x="{x(step):.1f}" y="{bottom + 20}" text-anchor="middle">{step + 1}</text>'
        )
    svg.append(f'<text x="{WIDTH / 2}" y="{bottom + 40}" text-anchor="middle">step</text>')
    # Wide below thin: where they lie on each other both can be seen.
    svg.append(f'<path d="M{line(theirs, y)}" fill="none" stroke="#f0a06a" stroke-width="4"/>')
    svg.append(f'<path d="M{line(ours, y)}" fill="none" stroke="#1f4fd1" stroke-width="1.2"/>')
    svg.append(f'<path d="M{line(gaps, z)}" fill="none" stroke="#444"/>')
    texts = [
        (CURVES[0] + 16, "#1f4fd1", f"{names[0]} (thin)"),
        (CURVES[0] + 34, "#d1701d", f"{names[1]} (wide)"),
        (CURVES[0] + 52, "black", "loss in nats per byte"),
        (GAPS[0] - 6, "#444", "relative difference of the two"),
    ]
    for at, colour, text in texts:
        svg.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{at}" text-anchor="end" fill="{colour}">{text}</text>'
        )
    return "\n".join([*svg, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("theirs")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--names", nargs=2, default=["mambabyte", "PyTorch"])
    parser.add_argument("--each", type=float, help="largest relative difference of a step")
    parser.add_argument("--last", type=float, help="largest mean of it over the last 50 steps")
    options = parser.parse_args()
    ours, theirs = read(options.ours), read(options.theirs)
    if len(ours) != len(theirs):
        sys.exit(f"{len(ours)} steps beside {len(theirs)}")
    losses = [[it["loss_nats"] for it in run] for run in (ours, theirs)]
    gaps = [abs(a - b) / b for a, b in zip(*losses)]
    last = sum(gaps[-50:]) / len(gaps[-50:])

    print(f"| step | {options.names[0]}: loss | {options.names[1]}: loss | relative difference "
          "| gradient's norm | its relative difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    shown = sorted({1, 2, 5, *range(10, len(ours) + 1, max(len(ours) // 10, 1)), len(ours)})
    for step in shown:
        a, b = ours[step - 1], theirs[step - 1]
        norm = abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"]
        print(f"| {step} | {a['loss_nats']:.6f} | {b['loss_nats']:.6f} | {gaps[step - 1]:.1e} "
              f"| {a['grad_norm']:.4f} | {norm:.1e} |")
    print(f"\nLargest difference of a step: {max(gaps):.1e} (step {gaps.index(max(gaps)) + 1}); "
          f"mean of all {sum(gaps) / len(gaps):.1e}, of the last 50 {last:.1e}.")
    if options.svg:
        options.svg.write_text(figure(*losses, options.names))
    if options.each and max(gaps) > options.each:
        sys.exit(f"a step differs by more than {options.each:g}")
    if options.last and last > options.last:
        sys.exit(f"the last 50 steps differ by more than {options.last:g}")


if __name__ == "__main__":
    main()
