#!/usr/bin/env python3
"""Where the GPU time of one training step goes, as a Markdown table.

  python3 benches/gpu_trace.py --mambabyte target/release/mambabyte -- \
      --config configs/pg19_353m.toml --set train.accumulation=1 --set train.batch=2

Everything after -- goes to `mambabyte bench step`. Times are those of the running program (CUPTI's
activity records), not of kernels run one by one. Needs the CUDA toolkit (cupti.h) and a C compiler.
"""

import argparse
import collections
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# The first kernel of a step, and how names begin by kind. The first match counts.
FIRST = "gather"
KINDS = [
    ("scan, backward", ("adjoint", "sum_cubes", "sum_chunks")),
    ("scan, forward", ("chunk_ends", "outputs", "walk")),
    ("scan, carry", ("carry",)),
    ("products (cuBLASLt)", ("nvjet", "ampere", "sm80", "sm86", "sm90", "cutlass", "_ZN8cublasLt",
                             "void cublasLt", "fill")),
    ("convolution + SiLU", ("conv_",)),
    ("norm", ("normalize", "norm_", "affine")),
    ("rounding of weights and gradients", ("cast", "round_")),
    ("AdamW + gradient norm", ("update", "square_sums", "sum_partials")),
    ("embedding, loss", ("gather", "scatter", "loss_", "sum_rows")),
    ("sums over tiles", ("fold", "sum_tiles")),
]


def kind_of(name):
    for kind, starts in KINDS:
        if name.startswith(starts):
            return kind
    return "other"


def newest(pattern):
    found = sorted(glob.glob(pattern))
    return found[-1] if found else None


def build(folder):
    root = os.environ.get("CUDA_PATH", "/usr/local/cuda")
    header = newest(f"{root}/**/include/cupti.h") or newest(f"{root}/include/cupti.h")
    header = header or newest(f"{root}/targets/*/include/cupti.h")
    library = newest(f"{root}/targets/*/lib/libcupti.so*") or newest(f"{root}/**/lib64/libcupti.so*")
    if not header or not library:
        sys.exit(f"gpu_trace: no cupti.h and libcupti.so under {root}; set CUDA_PATH")
    source = pathlib.Path(__file__).with_name("gpu_trace.c")
    target = folder / "trace.so"
    command = ["cc", "-O1", "-shared", "-fPIC", f"-I{os.path.dirname(header)}", str(source),
               "-o", str(target), library, f"-Wl,-rpath,{os.path.dirname(library)}"]
    subprocess.run(command, check=True)
    return target


def read(path):
    events = []
    for line in open(path, encoding="utf-8", errors="replace"):
        parts = line.rstrip("\n").rsplit(",", 2)
        if len(parts) == 3:
            events.append((int(parts[1]), int(parts[2]), parts[0]))
    return sorted(events)


def last_step(events):
    """The events of the last whole step."""
    starts = [i for i, event in enumerate(events) if event[2].startswith(FIRST)]
    if len(starts) < 2:
        sys.exit("gpu_trace: fewer than two steps in the trace")
    return events[starts[-2]:starts[-1]]


def table(step, nbytes, params, peak):
    span = step[-1][1] - step[0][0]
    busy, end = 0, step[0][0]
    for start, stop, _ in step:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    times, counts = collections.Counter(), collections.Counter()
    for start, stop, name in step:
        times[kind_of(name)] += stop - start
        counts[kind_of(name)] += 1
    print("| kind | ms | share | launches |\n| --- | --- | --- | --- |")
    for kind, time in times.most_common():
        print(f"| {kind} | {time / 1e6:.2f} | {100 * time / span:.1f} % | {counts[kind]} |")
    print(f"| idle | {(span - busy) / 1e6:.2f} | {100 * (span - busy) / span:.1f} % | – |")
    print(f"| step | {span / 1e6:.1f} | | {len(step)} |")
    if nbytes and params:
        rate = nbytes / (span / 1e9)
        print(f"\n{rate / 1e3:.1f} kB/s; model FLOP utilisation "
              f"{100 * 6 * params * rate / (peak * 1e12):.1f} % of {peak:.0f} TFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mambabyte", default="target/release/mambabyte")
    parser.add_argument("--bytes", type=int, default=0, help="bytes of a step, for the rate")
    parser.add_argument("--params", type=float, default=0, help="parameters, for the utilisation")
    parser.add_argument("--peak", type=float, default=811, help="TFLOP/s that count as 100 %%")
    parser.add_argument("--kernels", type=int, default=0, help="list so many kernels too")
    parser.add_argument("step", nargs="+", help="arguments of `mambabyte bench step`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        trace = folder / "trace.csv"
        env = dict(os.environ, CUDA_INJECTION64_PATH=str(build(folder)), TRACE_OUT=str(trace))
        command = [args.mambabyte, "bench", "step", "--repeat", "2", "--json", *args.step]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"gpu_trace: {' '.join(command)} ended with {done.returncode}")
        print(json.loads(done.stdout)[0]["name"])
        step = last_step(read(trace))
    table(step, args.bytes, args.params, args.peak)
    if args.kernels:
        times, counts = collections.Counter(), collections.Counter()
        for start, stop, name in step:
            times[name] += stop - start
            counts[name] += 1
        print("\n| kernel | ms | launches | µs each |\n| --- | --- | --- | --- |")
        for name, time in times.most_common(args.kernels):
            each = time / counts[name] / 1e3
            print(f"| {name} | {time / 1e6:.2f} | {counts[name]} | {each:.1f} |")


if __name__ == "__main__":
    main()
