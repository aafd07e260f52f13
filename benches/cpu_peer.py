#!/usr/bin/env python3
"""One training step on the CPU: this program beside mambapy (pure PyTorch), in alternation.

    python3 -m venv venv && venv/bin/pip install torch mambapy
    cargo build --release
    venv/bin/python benches/cpu_peer.py --binary target/release/mambabyte --data data/cargo

Both train the same shape in fp32 with AdamW and clipping, on as many threads. A step's time is the
median after warm-up; memory is the peak resident set of a process that does nothing else.
Prints a Markdown table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PEER = r"""
import json, resource, sys, time, torch
from mambapy.mamba import Mamba, MambaConfig
dim, depth, batch, length, steps, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)

class Lm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, dim)
        self.stack = Mamba(MambaConfig(d_model=dim, n_layers=depth))
        self.norm = torch.nn.LayerNorm(dim)
        self.head = torch.nn.Linear(dim, 256, bias=False)
    def forward(self, x):
        return self.head(self.norm(self.stack(self.embedding(x))))

model = Lm()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
times = []
for _ in range(steps):
    x = torch.randint(0, 256, (batch, length + 1))
    start = time.perf_counter()
    logits = model(x[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), x[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"times": times, "peak": peak}))
"""

# The peak of an interpreter that has loaded the peer's libraries and done nothing.
PEER_BASE = r"""
import json, resource, torch, mambapy.mamba
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

CONFIG = """
[model]
preset = "custom"
dim = {dim}
depth = {depth}
norm = "rms"
[train]
steps = {steps}
batch = {batch}
length = {length}
validate_every = 0
sample_every = 0
threads = {threads}
[optimizer]
lr = 1e-3
clip = 1.0
warmup_steps = 1
[data]
path = "{data}"
[checkpoint]
dir = "{dir}"
every_steps = 0
[device]
kind = "cpu"
"""


def peer(shape, steps, threads):
    arguments = [str(n) for n in (*shape, steps, threads)]
    out = subprocess.run(
        [sys.executable, "-c", PEER, *arguments], check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(out)
    return result["times"], result["peak"]


def ours(binary, data, shape, steps, threads):
    dim, depth, batch, length = shape
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "config.toml")
        with open(config, "w") as file:
            file.write(
                CONFIG.format(
                    dim=dim, depth=depth, batch=batch, length=length, steps=steps,
                    threads=threads, data=os.path.abspath(data), dir=folder,
                )
            )
        process = subprocess.Popen(
            [binary, "train", "--config", config, "--run", "run"], stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{binary} failed")
        with open(os.path.join(folder, "run", "metrics.jsonl")) as file:
            records = [json.loads(line) for line in file]
    times = [r["seconds"] for r in records if r["kind"] == "train"]
    return times, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    base = json.loads(
        subprocess.run([sys.executable, "-c", PEER_BASE], check=True, capture_output=True).stdout
    )["peak"]
    print(f"threads {options.threads}; the peer's libraries alone take {base / 1e6:.0f} MB")
    print("| D | layers | batch x length | mambapy s | ours s | faster | "
          "mambapy MB | ours MB | less |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape, steps in [((128, 4, 8, 512), 6), ((160, 6, 8, 512), 5), ((128, 4, 1, 2048), 5)]:
        theirs, mine, their_peak, my_peak = [], [], 0, 0
        for _ in range(options.rounds):
            times, peak = peer(shape, steps, options.threads)
            theirs += times[1:]
            their_peak = max(their_peak, peak)
            times, peak = ours(options.binary, options.data, shape, 3 * steps, options.threads)
            mine += times[2:]
            my_peak = max(my_peak, peak)
        a, b = statistics.median(theirs), statistics.median(mine)
        print(
            f"| {shape[0]} | {shape[1]} | {shape[2]} x {shape[3]} | {a:.3f} | {b:.3f} | "
            f"{a / b:.1f} x | {their_peak / 1e6:.0f} | {my_peak / 1e6:.0f} | "
            f"{their_peak / my_peak:.1f} x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
