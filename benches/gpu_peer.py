#!/usr/bin/env python3
"""This program beside PyTorch + mamba-ssm + causal-conv1d, in alternation on one NVIDIA GPU.

    cargo build --release --features cuda
    PYTHONPATH=FOLDER python3 benches/gpu_peer.py --mambabyte target/release/mambabyte
    PYTHONPATH=FOLDER python3 benches/gpu_peer.py scan,gemm --mambabyte target/release/mambabyte

FOLDER holds the peer's packages, unless they are installed. Sections, all if none is named:

    scan      selective scan, forward, backward and both, batch 1, 2 and 4
    gemm      the matrix products of a layer of the 353M model
    step353   the whole training step of the 353M model within the memory limit
    step972   the same for the 972M model
    longest   the longest single sequence that a training step of the 353M model takes
    start     from starting the program to the end of the first optimizer step
    prefill   reading a prompt of 8,192 bytes, 353M, batch 1
    decode    writing bytes: 353M at batch 1 and 128, and 8,192 bytes from the 972M model

Every measurement is a process of its own, and only one at a time uses the GPU: ours, the peer's,
ours, the peer's. Each takes medians; the tables show the median of these and, in brackets, the
lowest and highest. Peak memory is polled from the driver, the CUDA context included.

Prints a Markdown table after each section and writes JSON after every round, so that nothing is lost
when time runs out. Running out of the GPU's memory is a result; any other failure is shown and makes
the exit code 1.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
import time

from peer.processes import Failure, Memory, Runner, stop
from peer.results import Results
from peer.sections import Session
from peer.shapes import CONFIGS, CONTEXT, LENGTH, SECONDS


def numbers(text):
    """1,2,4 as a list."""
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("numbers from 1, with commas between")
    return values


def sections(text):
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in SECONDS:
            raise argparse.ArgumentTypeError(f"`{name}` is none of {', '.join(SECONDS)}")
    return names


def parse(arguments):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="?", type=sections, default=list(SECONDS),
                        help="names with commas between; all if left out")
    parser.add_argument("--mambabyte", default=os.path.join(here, "target/release/mambabyte"),
                        metavar="FILE", help="our program, built with `--features cuda`")
    parser.add_argument("--configs", default=os.path.join(here, "configs"), metavar="DIR")
    parser.add_argument("--out", default="gpu_peer.json", metavar="FILE", help="results as JSON")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of alternation")
    parser.add_argument("--minutes", type=float, default=11.7, metavar="T",
                        help="for all sections; they share it")
    parser.add_argument("--limit", type=float, default=24.0, metavar="GIB",
                        help="memory for steps and sequences, the context included")
    parser.add_argument("--precision", default="bf16", help="ours: `train.precision`")
    parser.add_argument("--batches353", type=numbers, default=[2, 4, 8], metavar="N,…",
                        help="ours: batches to try; the fastest counts")
    parser.add_argument("--batches972", type=numbers, default=[1, 2, 4], metavar="N,…")
    parser.add_argument("--longest-start", type=int, default=16 * LENGTH, metavar="N",
                        help="ours: the first length to try, a multiple of 8192")
    parser.add_argument("--longest-set", action="append", metavar="KEY=VALUE",
                        help="ours: settings for long sequences "
                             "(train.checkpoint_every=8 and train.recompute=all if left out)")
    parser.add_argument("--ours-only", action="store_true", help="leave out the peer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.longest_set is None:
        options.longest_set = ["train.checkpoint_every=8", "train.recompute=all"]
    options.configs = os.path.abspath(options.configs)
    options.mambabyte = os.path.abspath(options.mambabyte)
    options.longest_start = max(LENGTH, options.longest_start // LENGTH * LENGTH)
    return parser, options


def check(parser, options):
    """Ends with a clear message where something is missing."""
    if options.rounds < 1 or options.minutes <= 0 or options.limit <= CONTEXT:
        parser.error("--rounds is from 1, --minutes above 0, --limit above the context's 0.5 GiB")
    if not os.access(options.mambabyte, os.X_OK):
        parser.error(f"no program at {options.mambabyte}: run `cargo build --release --features cuda`,"
                     " or give its place with --mambabyte")
    for name in CONFIGS.values():
        if not os.path.isfile(os.path.join(options.configs, name)):
            parser.error(f"no {name} in {options.configs}: give the folder with --configs")
    if not options.ours_only:
        needed = ("torch", "mamba_ssm", "causal_conv1d", "selective_scan_cuda")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            parser.error(f"the peer is not complete: {sys.executable} does not find "
                         f"{', '.join(missing)}. Put the folder with its packages into PYTHONPATH, "
                         "or measure ours alone with --ours-only")


def main():
    parser, options = parse(sys.argv[1:])
    if options.worker:
        from peer import worker

        return worker.run(json.loads(options.worker))
    check(parser, options)
    memory = Memory()
    if memory.free() is None:
        print("neither NVML nor nvidia-smi answers: peak memory is left out", file=sys.stderr)
    about = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
             "sections": options.sections, "rounds": options.rounds, "limit_gib": options.limit,
             "precision": options.precision}
    results, runner = Results(options.out, about), Runner(memory)
    session = Session(options, results, runner)
    results.save()
    # `timeout` and `kill` are to run the clearing up below as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    share = 60 * options.minutes / sum(SECONDS[s] for s in options.sections)
    session.deadline = time.monotonic()
    # With a part of the sections there is no need to use all the time.
    share = min(share, max(1.0, options.minutes / 11.7))
    steps = {"step353": ("353M", options.batches353), "step972": ("972M", options.batches972)}
    try:
        for section in options.sections:
            started = time.monotonic()
            session.deadline += share * SECONDS[section]
            try:
                if section in steps:
                    session.step(section, *steps[section])
                else:
                    getattr(session, section)()
            except Failure as error:
                results.fail(section, "ours", error)
            results.save()
            print(f"\n{section}, {time.monotonic() - started:.0f} s\n\n{results.table(section)}",
                  flush=True)
    finally:
        # Also on Ctrl-C: nothing is left on the GPU.
        if runner.child and runner.child.poll() is None:
            stop(runner.child)
        results.save()
    print(f"\nall\n\n{results.table()}\n\n{json.dumps(json.load(open(options.out)))}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
