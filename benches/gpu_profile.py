#!/usr/bin/env python3
"""Where the GPU's time goes in a training step of the 353M model: a table of kernel times by kind.

    cargo build --release --features cuda
    python3 benches/gpu_profile.py --batch 2 --step-ms 210

Nsight Compute (`ncu`) measures every kernel of a few steps of two small models, 2 and 4 layers of
the 353M shape. Their difference is what a layer takes, the rest is the same for any depth: from both
follow the times of the whole model. Kernels are timed one by one, so that gaps and overlaps between
them are not in the sum; --step-ms, the time of a real step (`mambabyte bench step`), shows these.

--csv takes what `ncu --csv` printed before instead of running it: one file for each depth.
"""

import argparse
import collections
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

# The first pattern that a kernel's name has decides.
KINDS = [
    ("scan backward", r"adjoint|scan_?(bwd|backward)"),
    ("scan forward", r"chunk_ends|^outputs|scan"),
    ("products", r"nvjet|cublas|splitk|gemm|cutlass|xmma|matmul"),
    ("convolution", r"conv"),
    ("norm", r"norm|affine_rows"),
    ("casts", r"^cast"),
    ("optimizer", r"^update|adam|square_sums"),
    ("cross-entropy", r"^loss|cross_entropy"),
    ("embedding", r"gather|scatter|embedding"),
]
# Second halves of other operations: they belong to the kernel before them.
FOLLOWERS = re.compile(r"^(carry|fold_kernel|sum_\w+)")
# Runs once a step: what lies between two of them is one step.
ANCHOR = "loss_forward"
NANOSECONDS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6,
               "s": 1e9, "second": 1e9}

# Everything else is the model's default.
CONFIG = """
[model]
preset = "mambabyte_353m"
depth = {depth}
[train]
steps = 1
batch = {batch}
length = {length}
precision = "{precision}"
recompute = "{recompute}"
validate_every = 0
sample_every = 0
[optimizer]
warmup_steps = 1
[data]
path = "."
[device]
kind = "cuda"
"""


def parse(text):
    """[(kernel's name, ns)] in order of launch, from what `ncu --csv` printed."""
    # Its own messages and the program's output are between the lines.
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if not rows or "Kernel Name" not in rows[0]:
        return []
    launches = []
    for row in rows[1:]:
        record = dict(zip(rows[0], row))
        if record.get("Metric Name") == "gpu__time_duration.sum":
            value = float(record["Metric Value"].replace(",", ""))
            launches.append((record["Kernel Name"], value * NANOSECONDS[record["Metric Unit"]]))
    return launches


def short(name):
    """A kernel's name without the hash of its settings, return type and arguments."""
    name = re.sub(r"_[0-9a-f]{8}$", "", name)
    return re.sub(r"^void |[<(].*", "", name)


def last_step(launches, anchor=ANCHOR):
    """The launches of one whole step: from one anchor to the next, the last two there are."""
    at = [i for i, (name, _) in enumerate(launches) if name.startswith(anchor)]
    if len(at) < 2:
        raise ValueError(
            f"{len(launches)} launches have `{anchor}` {len(at)} times, and one whole step is from one "
            "to the next: raise --launch-count, lower --launch-skip, or name another with --anchor"
        )
    return launches[at[-2] : at[-1]]


def kinds(launches):
    """The kind of each launch."""
    found, before = [], "other"
    for name, _ in launches:
        name = short(name).lower()
        if not FOLLOWERS.match(name):
            before = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
        found.append(before)
    return found


def sums(launches):
    """{(kind, kernel): [ms, launches]} of a step."""
    total = collections.defaultdict(lambda: [0.0, 0])
    for (name, ns), kind in zip(launches, kinds(launches)):
        entry = total[kind, short(name)]
        entry[0] += ns / 1e6
        entry[1] += 1
    return dict(total)


def scale(small, large, depths, layers):
    """What `layers` layers take, by what two depths take."""
    whole = {}
    for key in small.keys() | large.keys():
        values = []
        for part in range(2):
            a, b = small.get(key, (0.0, 0))[part], large.get(key, (0.0, 0))[part]
            layer = (b - a) / (depths[1] - depths[0])
            # Noise of a kernel outside of the layers must not become negative.
            values.append(max(0.0, a + layer * (layers - depths[0])))
        whole[key] = values
    return whole


def by_kind(whole):
    """{kind: [ms, launches]}, the longest first."""
    total = collections.defaultdict(lambda: [0.0, 0.0])
    for (kind, _), (ms, count) in whole.items():
        total[kind][0] += ms
        total[kind][1] += count
    return dict(sorted(total.items(), key=lambda item: -item[1][0]))


def report(whole, options):
    """The tables, and the same as a dictionary."""
    kinds_of_step = by_kind(whole)
    ms = sum(value for value, _ in kinds_of_step.values())
    count = sum(value for _, value in kinds_of_step.values())
    lines = ["| kind | ms | share | launches |", "| --- | --- | --- | --- |"]
    for kind, (value, number) in kinds_of_step.items():
        lines.append(f"| {kind} | {value:.2f} | {100 * value / ms:.1f} % | {number:.0f} |")
    lines.append(f"| all | {ms:.2f} | | {count:.0f} |")
    lines += ["", "| kernel | kind | ms | ms each | launches |", "| --- | --- | --- | --- | --- |"]
    kernels = sorted(whole.items(), key=lambda item: -item[1][0])
    for (kind, kernel), (value, number) in kernels[: options.kernels]:
        each = f"{value / number:.4f}" if number else "–"
        lines.append(f"| {kernel} | {kind} | {value:.2f} | {each} | {number:.0f} |")
    size = options.batch * options.length
    lines.append("")
    result = {"batch": options.batch, "length": options.length, "layers": options.layers,
              "kernel_ms": ms, "launches": count, "kinds": kinds_of_step,
              "kernels": [[kind, kernel, *value] for (kind, kernel), value in kernels]}

    def mfu(step):
        return 6 * options.parameters * size / (step / 1e3) / (options.peak * 1e12)

    def speed(what, step):
        lines.append(f"{what}: {step:.1f} ms, {size / step:,.1f} kB/s, MFU {100 * mfu(step):.1f} % "
                     f"of {options.peak:g} TFLOP/s")

    speed("kernels back to back", ms)
    result["kernel_mfu"] = mfu(ms)
    if options.step_ms:
        speed("the step as measured", options.step_ms)
        lines.append(f"kernels take {100 * ms / options.step_ms:.1f} % of it")
        result |= {"step_ms": options.step_ms, "mfu": mfu(options.step_ms)}
    return "\n".join(lines), result


def profile(options, depth, folder):
    """What ncu prints about a model of `depth` layers."""
    config = os.path.join(folder, f"depth{depth}.toml")
    with open(config, "w") as file:
        file.write(CONFIG.format(depth=depth, batch=options.batch, length=options.length,
                                 precision=options.precision, recompute=options.recompute))
    command = [options.ncu, "--clock-control", "none", "--metrics", "gpu__time_duration.sum", "--csv"]
    if options.launch_skip is not None:
        command += ["--launch-skip", str(options.launch_skip)]
    if options.launch_count is not None:
        command += ["--launch-count", str(options.launch_count)]
    # Three steps of warm-up and one more.
    command += [options.mambabyte, "bench", "step", "--config", config, "--repeat", "1"]
    for setting in options.set or []:
        command += ["--set", setting]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        sys.exit(f"error: ncu took more than {options.seconds} s for {depth} layers: give more "
                 "with --seconds, or profile less with --launch-skip and --launch-count")
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-8:])
        sys.exit(f"error: exit code {ended.returncode}: {' '.join(command)}\n{said}")
    if options.keep:
        os.makedirs(options.keep, exist_ok=True)
        with gzip.open(os.path.join(options.keep, f"depth{depth}.csv.gz"), "wt") as file:
            file.write(ended.stdout)
    return ended.stdout


def read(path):
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
            return file.read()
    except OSError as error:
        sys.exit(f"error: {error}")


def arguments(given=None):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mambabyte", default=os.path.join(root, "target/release/mambabyte"), metavar="FILE")
    add("--ncu", default=shutil.which("ncu") or "ncu", metavar="FILE")
    add("--csv", nargs=2, metavar="FILE", help="ncu's output for the first and the second depth")
    add("--batch", type=int, default=2)
    add("--length", type=int, default=8192)
    add("--precision", default="bf16")
    add("--recompute", default="none", choices=["none", "all"])
    add("--set", action="append", metavar="KEY=VALUE", help="another setting of the config")
    add("--depths", type=int, nargs=2, default=[2, 4], metavar="N", help="of the two small models")
    add("--layers", type=int, default=53, help="of the whole model")
    add("--parameters", type=int, default=353_945_600, help="of the whole model")
    add("--peak", type=float, default=811.0, metavar="TFLOP/S",
        help="what the GPU does at most: 811 is an 8192³ product in bf16 on an H200")
    add("--step-ms", type=float, metavar="MS", help="time of a real step of the whole model")
    add("--kernels", type=int, default=20, metavar="N", help="rows of the second table")
    add("--launch-skip", type=int, metavar="N", help="ncu: launches not profiled at the start")
    add("--launch-count", type=int, metavar="N", help="ncu: launches profiled; all if left out")
    add("--anchor", default=ANCHOR, metavar="NAME", help="start of the name of a kernel that runs "
                                                         "once a step")
    add("--seconds", type=float, default=280, help="time limit of each of the two runs")
    add("--keep", metavar="DIR", help="keep ncu's output there")
    add("--out", default="gpu_profile.json", metavar="FILE")
    options = parser.parse_args(given)
    if not 0 < options.depths[0] < options.depths[1]:
        parser.error("--depths are two numbers, the smaller one first")
    if not options.csv:
        if not os.access(options.mambabyte, os.X_OK):
            parser.error(f"no program at {options.mambabyte}: run `cargo build --release --features "
                         "cuda`, or give its place with --mambabyte")
        if not shutil.which(options.ncu):
            parser.error("no `ncu` on the path: install Nsight Compute, or give its place with --ncu")
    return options


def main():
    options = arguments()
    if options.csv:
        texts = [read(path) for path in options.csv]
    else:
        with tempfile.TemporaryDirectory(prefix="gpu_profile") as folder:
            texts = [profile(options, depth, folder) for depth in options.depths]
    steps = []
    for depth, text in zip(options.depths, texts):
        launches = parse(text)
        if not launches:
            sys.exit(f"error: no kernel times in ncu's output for {depth} layers:\n{text[:500]}")
        try:
            steps.append(sums(last_step(launches, options.anchor)))
        except ValueError as error:
            sys.exit(f"error: {depth} layers: {error}")
        number = sum(count for _, count in steps[-1].values())
        ms = sum(ms for ms, _ in steps[-1].values())
        print(f"{depth} layers: {number} launches a step, {ms:.2f} ms", file=sys.stderr)
    text, result = report(scale(*steps, options.depths, options.layers), options)
    print(text)
    with open(options.out, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
