#!/usr/bin/env python3
"""Draws training and validation curves of runs as SVG: curve.py OUT.svg RUN/metrics.jsonl…

Pure Python, so that the figures of the documentation can be made anywhere.
"""

import json
import math
import os
import sys

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 380, 60, 50, 20, 20
COLOURS = ["#1f6feb", "#d1491d", "#2a7d3f"]


def points(path):
    """(bytes, bpb) of training, averaged over 20 steps, and of validation."""
    train, valid, seen = [], [], {}
    with open(path) as file:
        for record in map(json.loads, file):
            if record["kind"] == "train":
                seen[record["step"]] = record["bytes_seen"]
                train.append((record["bytes_seen"], record["bpb"]))
            elif record["kind"] == "valid":
                valid.append((seen[record["step"]], record["bpb"]))
    groups = [train[i : i + 20] for i in range(0, len(train), 20)]
    mean = lambda values: sum(values) / len(values)
    train = [(mean([x for x, _ in g]), mean([y for _, y in g])) for g in groups]
    return train, valid


def main():
    out, paths = sys.argv[1], sys.argv[2:]
    runs = {os.path.basename(os.path.dirname(p)): points(p) for p in paths}
    everything = [p for run in runs.values() for curve in run for p in curve]
    most = max(x for x, _ in everything)
    low = math.floor(2 * min(y for _, y in everything)) / 2
    high = min(5.0, math.ceil(2 * max(y for _, y in everything)) / 2)
    at = lambda x, y: (
        LEFT + (WIDTH - LEFT - RIGHT) * x / most,
        TOP + (HEIGHT - TOP - BOTTOM) * (high - min(y, high)) / (high - low),
    )
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    y = low
    while y <= high:
        _, py = at(0, y)
        svg.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        svg.append(f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{y:.1f}</text>')
        y += 0.5
    for i in range(5):
        px, _ = at(most * i / 4, low)
        label = f"{most * i / 4 / 1e6:.1f}"
        svg.append(f'<text x="{px:.1f}" y="{HEIGHT - 28}" text-anchor="middle">{label}</text>')
    svg.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">MB learnt from</text>')
    svg.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "bits per byte</text>"
    )
    for i, (name, (train, valid)) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join("%.1f %.1f" % at(*p) for p in train)
        svg.append(f'<path d="M{path}" fill="none" stroke="{colour}" opacity="0.45"/>')
        path = "L".join("%.1f %.1f" % at(*p) for p in valid)
        svg.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        svg += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (*at(*p), colour) for p in valid]
        x = WIDTH - RIGHT - 8
        svg.append(
            f'<text x="{x}" y="{TOP + 16 + 18 * i}" text-anchor="end" fill="{colour}">'
            f"{name}: training (faint), held out (dots)</text>"
        )
    svg.append("</svg>\n")
    with open(out, "w") as file:
        file.write("\n".join(svg))


if __name__ == "__main__":
    main()
