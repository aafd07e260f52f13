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
import ctypes
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

GIB = 2**30
LENGTH = 8192
# What the CUDA context takes of a card beside the peer's allocator, which alone the cap limits.
CONTEXT = 0.5
# Seconds of each section, for a total of just under 12 minutes. What one leaves, the next ones may use.
SECONDS = {"scan": 80, "gemm": 50, "step353": 90, "step972": 105, "longest": 90, "start": 55,
           "prefill": 30, "decode": 200}
# Exit code of the program when the device's memory does not suffice.
OUT_OF_MEMORY = 6

# Shapes as in mamba-ssm's own models: RMSNorm, tied head.
PEER_MODELS = {
    "353M": {"d_model": 1024, "n_layer": 53},
    "972M": {"d_model": 1792, "n_layer": 48},
}
# (batch, layers checkpointed): the peer's fastest that fit 24 GiB, and the nearest rivals.
PEER_STEPS = {"353M": [(2, 0)], "972M": [(1, 16), (2, 40)]}
CONFIGS = {"353M": "pg19_353m.toml", "972M": "pg19_972m.toml"}
# (model, batch, new bytes) of generation from prompts of 64 bytes.
WRITING = [("353M", 1, 1024), ("353M", 128, 256), ("972M", 1, 8192)]
# (name, inputs, outputs) of the products of a layer with D = 1024.
PRODUCTS = [("in_proj", 1024, 4096), ("out_proj", 2048, 1024), ("x_proj", 2048, 96), ("dt_proj", 64, 2048)]


# ---------------------------------------------------------------- processes and memory


class Failure(Exception):
    """A measurement that did not work, with what it said."""


class Memory:
    """Free memory of the GPU, from NVML; through nvidia-smi where NVML cannot be loaded."""

    class _Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self):
        # CUDA numbers devices by this variable, NVML does not know it.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.index = int(visible) if visible.isdigit() else 0
        self.nvml = None
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.handle = ctypes.c_void_p()
            failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(
                ctypes.c_uint(self.index), ctypes.byref(self.handle)
            )
            if not failed:
                self.nvml = nvml
        except (OSError, AttributeError):
            pass

    def free(self):
        """Free bytes; none where there is no NVIDIA driver."""
        if self.nvml:
            info = self._Info()
            if self.nvml.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(info)) == 0:
                return info.free
        command = ["nvidia-smi", f"--id={self.index}", "--query-gpu=memory.free",
                   "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            return int(text.stdout.split()[0]) << 20
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None


class Lowest(threading.Thread):
    """The lowest free memory while it runs."""

    def __init__(self, memory, interval=0.05):
        super().__init__(daemon=True)
        self.memory, self.interval = memory, interval
        self.before = self.lowest = memory.free()
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(self.interval):
            free = self.memory.free()
            if free is not None:
                self.lowest = min(self.lowest, free)

    def take(self):
        """The lowest so far; from here on it is looked for anew."""
        lowest, self.lowest = self.lowest, self.memory.free() or self.lowest
        return lowest

    def wait_until_given_back(self, seconds=5):
        """A process's memory may come back a moment after its end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (self.memory.free() or self.before) < self.before - (64 << 20):
            time.sleep(0.05)


class Runner:
    """Starts processes one after the other, each with a time limit."""

    def __init__(self, memory):
        self.memory = memory
        self.child = None

    def run(self, command, seconds, env=None, cwd=None, watch=None):
        """(exit code, lines of output as (text, lowest free memory since the line before), text of
        standard error, lowest free memory, free memory before). `watch` is called with the running
        process every 10 ms, and ends it by returning true."""
        lowest = Lowest(self.memory)
        if lowest.before is not None:
            lowest.start()
        lines = []
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            try:
                self.child = child = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=cwd,
                    start_new_session=True,
                )
            except OSError as error:
                lowest.done.set()
                raise Failure(f"could not start {command[0]}: {error}") from error
            whole = [lowest.before]

            def read():
                for line in child.stdout:
                    low = lowest.take() if lowest.before is not None else None
                    whole.append(low)
                    lines.append((line.rstrip("\n"), low))

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            end = time.monotonic() + seconds
            late = False
            while child.poll() is None:
                late = time.monotonic() > end
                if late or (watch and watch(child)):
                    stop(child)
                time.sleep(0.01)
            reader.join(10)
            child.stdout.close()
            self.child = None
            if lowest.before is not None:
                lowest.done.set()
                lowest.join()
                whole.append(lowest.lowest)
                lowest.wait_until_given_back()
            errors.seek(0)
            said = errors.read()
        if late:
            raise Failure(f"took more than {seconds:.0f} s: {shown(command)}")
        low = None if lowest.before is None else min(whole)
        return child.returncode, lines, said, low, lowest.before


def stop(child):
    """Ends a process and those that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def shown(command):
    """A command as a reader would type it, cut to a line."""
    text = " ".join(command)
    return text if len(text) < 300 else text[:297] + "..."


def tail(text, lines=6):
    """The end of what a program said."""
    return "\n".join(text.strip().splitlines()[-lines:])


# ---------------------------------------------------------------- our program


def parse_report(text):
    """The lines of `bench … --json`: one array, or one object a line; other text is passed over."""
    try:
        value = json.loads(text)
        return [r for r in (value if isinstance(value, list) else [value]) if isinstance(r, dict)]
    except json.JSONDecodeError:
        pass
    records = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        records += value if isinstance(value, list) else [value]
    return [r for r in records if isinstance(r, dict)]


def scan_times(records):
    """{"forward": ms, "backward": ms, "both": ms} of `bench scan`, as far as they are there.

    Lines with other names, such as those of single kernels, are passed over.
    """
    times = {}
    for record in records:
        name, ms = str(record.get("name", "")).lower(), record.get("milliseconds")
        # "forward + sum + backward (autodiff)" is the set of its three words.
        words = frozenset(word.strip() for word in name.split("(")[0].split("+"))
        key = {
            frozenset(["forward"]): "forward",
            frozenset(["backward"]): "backward",
            frozenset(["forward", "backward"]): "both",
            frozenset(["forward", "sum", "backward"]): "both",
        }.get(words)
        if key and isinstance(ms, (int, float)):
            times.setdefault(key, ms)
    return times


def product_rates(records):
    """{(layer, pass): TFLOP/s} of `bench gemm`, Burn's own products left out."""
    rates = {}
    for record in records:
        words = str(record.get("name", "")).split()
        if len(words) >= 2 and "Burn" not in " ".join(words) and words[-1] in ("y", "dX", "dW"):
            rates[words[0], words[-1]] = record["rate"]
    return rates


class Ours:
    """Measurements of our program."""

    def __init__(self, options, runner):
        self.options, self.runner = options, runner

    def bench(self, arguments, seconds, limit=None):
        """(records, peak memory in GiB, what it logged); records are none out of memory.

        Within a limit the program takes all memory above it for itself, so that what is left free
        is what the limit leaves: the peak is their difference.
        """
        command = [self.options.mambabyte, "bench", *arguments, "--json"]
        code, lines, said, low, before = self.runner.run(command, seconds)
        peak = None if low is None else peak_within(limit, low, before)
        if code == OUT_OF_MEMORY:
            return None, peak, said
        records = parse_report("\n".join(text for text, _ in lines))
        if code or not records:
            raise Failure(f"exit code {code}: {shown(command)}\n{tail(said)}")
        return records, peak, said

    def step(self, model, batch, seconds, length=LENGTH, settings=(), repeat=5):
        """Of one training step: {"rate": bytes/s, "ms", "peak", "note"}; no rate out of memory."""
        limit = self.options.limit
        settings = [
            f"train.batch={batch}", "train.accumulation=1", f"train.precision={self.options.precision}",
            f"train.memory_limit={limit:g}GiB", f"train.length={length}", *settings,
        ]
        if not any(s.startswith("train.recompute=") for s in settings):
            settings.append("train.recompute=auto")
        arguments = ["step", "--config", os.path.join(self.options.configs, CONFIGS[model])]
        for setting in settings:
            arguments += ["--set", setting]
        records, peak, said = self.bench([*arguments, "--repeat", str(repeat)], seconds, limit * GIB)
        note = f"batch {batch}"
        # Logged where the setting is "auto".
        for line in said.splitlines():
            if "`train.recompute` is " in line:
                note += ", recompute " + line.split("`train.recompute` is ")[1].split()[0]
        if records is None:
            return {"note": note + ": out of memory", "peak": peak, "why": tail(said, 2)}
        ms = next(r["milliseconds"] for r in records if "step" in str(r.get("name", "")))
        return {"rate": batch * length / ms * 1e3, "ms": ms, "peak": peak, "note": note}


def peak_within(limit, low, before):
    """Peak memory in GiB of a process, by the lowest free memory; `limit` in bytes if it had one."""
    if limit is not None and low <= limit:
        return (limit - low) / GIB
    return (before - low) / GIB


# ---------------------------------------------------------------- the peer


class Peer:
    """Measurements of the peer, each by this script in another process."""

    def __init__(self, options, runner):
        self.options, self.runner = options, runner

    def run(self, seconds, env=None, **task):
        """The worker's records, each with the peak of memory since the one before."""
        task |= {"limit": self.options.limit, "seconds": seconds}
        command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(task)]
        # Segments that grow keep the allocator's waste small: the peer at its best.
        env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, **(env or {})}
        code, lines, said, _, before = self.runner.run(command, seconds, env=env)
        records = []
        for text, low in lines:
            if text.startswith("@@ "):
                record = json.loads(text[3:])
                record["peak"] = None if low is None else (before - low) / GIB
                records.append(record)
        if code or not records:
            raise Failure(f"the peer's process ended with {code} ({task})\n{tail(said)}")
        return records


def worker(task):
    """One measurement of the peer, in a process of its own."""
    import gc

    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    bf16 = torch.bfloat16

    def emit(**record):
        print("@@ " + json.dumps(record), flush=True)

    def bench(work, calls, repeat=7, warm=3):
        """Median milliseconds of a call, each time over several calls, by CUDA's events."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeat):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)

    def scan():
        import math

        import selective_scan_cuda
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        e, n = 2048, 16
        for b in task["batches"]:
            wide = lambda: torch.randn(b, e, LENGTH, device="cuda", dtype=bf16)
            narrow = lambda: torch.randn(b, 1, n, LENGTH, device="cuda", dtype=bf16)
            u, z, dy, B, C = wide(), wide(), wide(), narrow(), narrow()
            delta = (0.5 * torch.rand(b, e, LENGTH, device="cuda")).to(bf16)
            A = -torch.arange(1, n + 1, device="cuda", dtype=torch.float32).repeat(e, 1)
            D = torch.randn(e, device="cuda")
            # Step sizes drawn log-uniformly from 0.001 to 0.1, as at the start of training.
            step = torch.exp(torch.rand(e, device="cuda") * math.log(100) + math.log(0.001))
            bias = torch.log(torch.expm1(step))
            forward = lambda: selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
            out, states, _ = forward()
            backward = lambda: selective_scan_cuda.bwd(
                u, delta, A, B, C, D, z, bias, dy, states, out, None, True, False
            )
            leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]
            both = lambda: torch.autograd.grad(selective_scan_fn(*leaves, True), leaves, dy)
            calls = max(2, 8 // b)
            emit(batch=b, forward=bench(forward, calls), backward=bench(backward, calls),
                 both=bench(both, calls))

    def gemm():
        m = task["rows"]
        for name, k, n in PRODUCTS:
            x = torch.randn(m, k, device="cuda", dtype=bf16)
            dy = torch.randn(m, n, device="cuda", dtype=bf16)
            w = torch.randn(n, k, device="cuda", dtype=bf16)
            for which, work in (
                ("y", lambda: torch.matmul(x, w.t())),
                ("dX", lambda: torch.matmul(dy, w)),
                ("dW", lambda: torch.matmul(dy.t(), x)),
            ):
                ms = bench(work, 10)
                emit(layer=name, which=which, ms=ms, rate=2 * m * k * n / ms / 1e9)

    def cap():
        """Holds the allocator to the limit without the context."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (task["limit"] - CONTEXT) * GIB / total))

    class Trainer:
        def __init__(self):
            from mamba_ssm.models.config_mamba import MambaConfig
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

            torch.manual_seed(0)
            config = MambaConfig(
                vocab_size=256, ssm_cfg={"layer": "Mamba1", "d_state": 16, "d_conv": 4, "expand": 2},
                rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
                pad_vocab_size_multiple=8, tie_embeddings=True, **PEER_MODELS[task["model"]],
            )
            self.model = MambaLMHeadModel(config, device="cuda", dtype=torch.float32)
            self.parameters = list(self.model.parameters())
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )

        def logits(self, ids, checkpointed):
            """The model's own forward pass, its first layers checkpointed."""
            from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
            from torch.utils.checkpoint import checkpoint

            if not checkpointed:
                return self.model(ids).logits
            stack = self.model.backbone
            hidden, residual = stack.embedding(ids), None
            for i, layer in enumerate(stack.layers):
                if i < checkpointed:
                    hidden, residual = checkpoint(
                        layer, hidden, residual, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    hidden, residual = layer(hidden, residual)
            hidden = layer_norm_fn(
                hidden, stack.norm_f.weight, stack.norm_f.bias, eps=stack.norm_f.eps,
                residual=residual, prenorm=False, residual_in_fp32=True, is_rms_norm=True,
            )
            return self.model.lm_head(hidden)

        def step(self, batch, checkpointed, length=LENGTH):
            x = torch.randint(0, 256, (batch, length + 1), device="cuda")
            inputs, targets = x[:, :-1].contiguous(), x[:, 1:].reshape(-1)
            with torch.autocast("cuda", bf16):
                logits = self.logits(inputs, checkpointed)
                loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256).float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        def fits(self, work):
            """Whether memory suffices for `work`; clears up behind it."""
            try:
                work()
                torch.cuda.synchronize()
                return True
            except torch.OutOfMemoryError:
                return False
            finally:
                # The error's traceback holds tensors until the handler is left.
                self.optimizer.zero_grad(set_to_none=True)

    def clear():
        """Gives memory back: before a record is emitted, so that it is not in the next one's peak."""
        gc.collect()
        torch.cuda.empty_cache()

    def step():
        cap()
        trainer = Trainer()
        for batch, checkpointed in task["steps"]:
            times = []

            def work():
                for i in range(2 + task["repeat"]):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    trainer.step(batch, checkpointed)
                    end.record()
                    end.synchronize()
                    if i >= 2:
                        times.append(begin.elapsed_time(end))

            ok = trainer.fits(work)
            ms = statistics.median(times) if ok else None
            clear()
            emit(batch=batch, checkpointed=checkpointed, ms=ms,
                 rate=batch * LENGTH / ms * 1e3 if ok else None)

    def longest():
        cap()
        begin = time.monotonic()
        trainer = Trainer()
        layers = PEER_MODELS[task["model"]]["n_layer"]
        # AdamW's moments come into being in the first step.
        trainer.step(1, layers)
        clear()

        def fits(length):
            ok = trainer.fits(lambda: trainer.step(1, layers, length))
            clear()
            emit(length=length, fits=ok)
            return ok

        # Half of the time at most is left unused: what a try takes grows with the length.
        search(fits, 2 * LENGTH, lambda: time.monotonic() - begin > 0.7 * task["seconds"])

    def start():
        trainer = Trainer()
        begin = time.time()
        trainer.step(1, 0)
        torch.cuda.synchronize()
        emit(wall=time.time() - task["launched"], step=time.time() - begin)

    def generator(model, dtype):
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        torch.manual_seed(0)
        config = MambaConfig(
            vocab_size=256, ssm_cfg={"layer": "Mamba1", "d_state": 16, "d_conv": 4, "expand": 2},
            rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
            pad_vocab_size_multiple=8, tie_embeddings=True, **PEER_MODELS[model],
        )
        return MambaLMHeadModel(config, device="cuda", dtype=dtype).eval()

    def prefill():
        from mamba_ssm.utils.generation import InferenceParams

        model = generator("353M", bf16)
        ids = torch.randint(0, 256, (1, LENGTH), device="cuda")
        with torch.inference_mode():
            work = lambda: model(
                ids, num_last_tokens=1,
                inference_params=InferenceParams(max_seqlen=LENGTH + 1, max_batch_size=1),
            )
            emit(ms=bench(work, 1))

    def decode():
        """`generate` with CUDA graphs, by the clock, without the first call, which captures. In the
        format that is faster there: fp32 at batch 1 where the model is small, else bf16."""
        for name, batch, new in task["writing"]:
            dtype = torch.float32 if (name, batch) == ("353M", 1) else bf16
            model = generator(name, dtype)
            ids = torch.randint(0, 256, (batch, 64), device="cuda")
            times = []
            # A long text is written once: capturing is nothing beside it.
            lengths = [new] * 3 if new < 4096 else [new]
            warm = 64 + new if new < 4096 else 96
            model.generate(input_ids=ids, max_length=warm, cg=True, top_k=1)
            for length in lengths:
                torch.cuda.synchronize()
                begin = time.perf_counter()
                model.generate(input_ids=ids, max_length=64 + length, cg=True, top_k=1)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            seconds = statistics.median(times)
            emit(model=name, batch=batch, new=new, rate=batch * new / seconds,
                 note="fp32" if dtype == torch.float32 else "bf16")
            del model
            clear()

    tasks = {"scan": scan, "gemm": gemm, "step": step, "longest": longest, "start": start,
             "prefill": prefill, "decode": decode}
    tasks[task["task"]]()


def search(fits, length, late):
    """The longest that fits, a multiple of 8192, and the shortest tried that does not (0: none was):
    doubling from `length`, then halving what is between. Ends early when `late()`."""
    low, high = 0, 0
    while not high and not late():
        if fits(length):
            low, length = length, 2 * length
        else:
            high = length
    while not low and high > LENGTH and not late():
        length = max(LENGTH, high // 2 // LENGTH * LENGTH)
        if fits(length):
            low = length
        else:
            high = length
    while high - low > LENGTH and low and not late():
        length = (low + high) // 2 // LENGTH * LENGTH
        if fits(length):
            low = length
        else:
            high = length
    return low, high


# ---------------------------------------------------------------- results


class Results:
    """Rows of numbers of both sides, printed as a table and stored as JSON."""

    def __init__(self, path, about):
        self.path, self.about = path, about
        self.rows, self.failures = {}, []

    def add(self, section, name, side, value, unit="ms", better="lower", peak=None, note=None):
        """One measurement. `better` says whether "lower" or "higher" is, or "percent" of the peer's."""
        row = self.rows.setdefault((section, name), {"unit": unit, "better": better})
        entry = row.setdefault(side, {"values": [], "peaks": [], "notes": []})
        if value is not None:
            entry["values"].append(value)
        if peak is not None:
            entry["peaks"].append(peak)
        if note and note not in entry["notes"]:
            entry["notes"].append(note)

    def fail(self, section, side, error):
        """A measurement that did not work: shown at once, stored, and the run goes on."""
        self.failures.append({"section": section, "side": side, "error": str(error)})
        print(f"FAILED: {section}, {side}: {error}", file=sys.stderr, flush=True)

    def save(self):
        rows = [{"section": s, "name": n, **row} for (s, n), row in self.rows.items()]
        text = json.dumps(self.about | {"rows": rows, "failures": self.failures}, indent=1)
        # In one go, so that a reader never finds half a file.
        with open(self.path + ".new", "w") as file:
            file.write(text + "\n")
        os.replace(self.path + ".new", self.path)

    def table(self, section=None):
        """A Markdown table of a section, or of all."""
        lines = ["| what | peer | ours | ours against the peer | peak memory, peer | ours |",
                 "| --- | --- | --- | --- | --- | --- |"]
        for (of, name), row in self.rows.items():
            if section in (None, of):
                peer, ours = row.get("peer", {}), row.get("ours", {})
                cells = [name, cell(peer, row["unit"]), cell(ours, row["unit"]), against(row),
                         peak_cell(peer), peak_cell(ours)]
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def number(value):
    """Four digits that matter, with separators for thousands."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def cell(side, unit):
    values, notes = side.get("values", []), side.get("notes", [])
    text = "–"
    if values:
        text = f"{number(statistics.median(values))} {unit}"
        if len(values) > 1:
            text += f" ({number(min(values))}–{number(max(values))})"
    return text + ("" if not notes else f"; {'; '.join(notes)}")


def against(row):
    """How ours compares: by medians."""
    ours, peer = (row.get(side, {}).get("values") for side in ("ours", "peer"))
    if not ours or not peer:
        return "–"
    ours, peer = statistics.median(ours), statistics.median(peer)
    if row["better"] == "percent":
        return f"{100 * ours / peer:.0f} %"
    return f"{peer / ours if row['better'] == 'lower' else ours / peer:.2f} ×"


def peak_cell(side):
    return f"{max(side['peaks']):.1f} GiB" if side.get("peaks") else "–"


# ---------------------------------------------------------------- sections


class Session:
    """Everything that the sections need, and how long each may take."""

    def __init__(self, options, results, runner):
        self.options, self.results = options, results
        self.ours, self.peer = Ours(options, runner), Peer(options, runner)
        self.deadline = time.monotonic()

    def left(self):
        """Seconds that a process may take: to the section's end and a little more, so that one which
        has started can finish."""
        return max(15.0, self.deadline - time.monotonic() + 10)

    def late(self):
        return time.monotonic() > self.deadline

    def try_side(self, section, side, work):
        """Whether it worked; a failure ends this side's part in the section."""
        try:
            work()
            return True
        except Failure as error:
            self.results.fail(section, side, error)
            return False

    def alternate(self, section, ours, peer):
        """Both sides in turn, as often as asked for and as long as time lasts."""
        works = {"ours": ours} if self.options.ours_only else {"ours": ours, "peer": peer}
        for turn in range(self.options.rounds):
            started = time.monotonic()
            for side in list(works):
                if not self.try_side(section, side, lambda: works[side](turn)):
                    del works[side]
            self.results.save()
            took = time.monotonic() - started
            last = turn + 1 == self.options.rounds
            # The first round also fills the system's file cache: the next ones are faster.
            likely = (0.5 if turn == 0 else 0.9) * took
            if not works or (not last and time.monotonic() + likely > self.deadline):
                if not last:
                    print(f"{section}: {turn + 1} of {self.options.rounds} rounds", file=sys.stderr)
                return

    def scan(self):
        batches = [1, 2, 4]

        def put(side, batch, times):
            for which in ("forward", "backward", "both"):
                if which in times:
                    name = f"scan {which.replace('both', 'forward + backward')}, B {batch}"
                    self.results.add("scan", name, side, times[which], note=times.get("note " + which))

        def ours(_):
            for batch in batches:
                arguments = ["scan", "--batch", str(batch), "--length", str(LENGTH), "--inner", "2048",
                             "--state", "16", "--dtype", "bf16", "--device", "cuda", "--repeat", "20"]
                records, _, said = self.ours.bench(arguments, self.left())
                if records is None:
                    raise Failure("out of memory\n" + tail(said))
                times = scan_times(records)
                if "backward" not in times and {"forward", "both"} <= set(times):
                    times["backward"] = times["both"] - times["forward"]
                    times["note backward"] = "difference"
                put("ours", batch, times)

        def peer(_):
            for record in self.peer.run(self.left(), task="scan", batches=batches):
                put("peer", record["batch"], record)

        self.alternate("scan", ours, peer)

    def gemm(self):
        rows = 2 * LENGTH

        def put(side, layer, which, rate):
            sizes = next(f"{k} → {n}" for name, k, n in PRODUCTS if name == layer)
            name = f"{layer} {sizes}, {which}"
            self.results.add("gemm", name, side, rate, "TFLOP/s", "percent")

        def ours(_):
            arguments = ["gemm", "--rows", str(rows), "--dtype", "bf16", "--device", "cuda"]
            records, _, said = self.ours.bench([*arguments, "--repeat", "10"], self.left())
            if records is None:
                raise Failure("out of memory\n" + tail(said))
            for (layer, which), rate in product_rates(records).items():
                if any(layer == name for name, _, _ in PRODUCTS):
                    put("ours", layer, which, rate)

        def peer(_):
            for record in self.peer.run(self.left(), task="gemm", rows=rows):
                put("peer", record["layer"], record["which"], record["rate"])

        self.alternate("gemm", ours, peer)

    def step(self, section, model, batches):
        """All candidates in the first round, the best of each side in the others."""
        name = f"{model} step, {LENGTH:,} bytes a sequence"
        best = {}
        steps = PEER_STEPS[model]
        layers = PEER_MODELS[model]["n_layer"]

        def add(side, tried):
            """The best of a side's candidates is the row's; the others get rows of their own."""
            good = [t for t in tried if t.get("rate")]
            if not good:
                notes = "; ".join(t["note"] for t in tried)
                raise Failure(f"nothing fits: {notes}")
            winner = best.setdefault(side, max(good, key=lambda t: t["rate"])["key"])
            for t in tried:
                of = name if t["key"] == winner else f"{name}: {t['note'].split(':')[0]}"
                self.results.add(section, of, side, t.get("rate"), "B/s", "higher", t["peak"], t["note"])

        def ours(turn):
            tried = []
            for batch in batches if turn == 0 else [best["ours"]]:
                if tried and self.late():
                    break
                tried.append(self.ours.step(model, batch, self.left()) | {"key": batch})
            add("ours", tried)

        def peer(turn):
            wanted = steps if turn == 0 else [best["peer"]]
            tried = self.peer.run(self.left(), task="step", model=model, steps=wanted, repeat=4)
            for t in tried:
                t["key"] = (t["batch"], t["checkpointed"])
                t["note"] = f"batch {t['batch']}, {t['checkpointed']} of {layers} checkpointed"
                t["note"] += "" if t["rate"] else ": out of memory"
            add("peer", tried)

        self.alternate(section, ours, peer)

    def longest(self):
        """One search of each: what fits does not vary."""
        name = "353M, longest sequence"

        def add(side, tried, note):
            """`tried` is {length: peak, or none where it did not fit}."""
            fit = [length for length, (ok, _) in tried.items() if ok]
            if not fit:
                raise Failure("no length fits")
            best = max(fit)
            not_fit = [length for length, (ok, _) in tried.items() if not ok]
            if not not_fit:
                note += "; longer was not tried"
            elif min(not_fit) - best > LENGTH:
                note += f"; {min(not_fit):,} does not fit, between was not tried"
            self.results.add("longest", name, side, best, "bytes", "higher", tried[best][1], note)

        def peer():
            # What the peer does not need of the time is left to ours.
            seconds = max(20, 0.5 * (self.deadline - time.monotonic()))
            records = self.peer.run(seconds + 15, task="longest", model="353M")
            add("peer", {r["length"]: (r["fits"], r["peak"]) for r in records},
                "all layers checkpointed")

        def ours():
            tried = {}
            settings = list(self.options.longest_set)

            def fits(length):
                step = self.ours.step("353M", 1, self.left(), length, settings, repeat=1)
                tried[length] = ("rate" in step, step["peak"])
                print(f"longest: {length:,} bytes {'fit' if 'rate' in step else 'do not fit'}",
                      file=sys.stderr, flush=True)
                return "rate" in step

            try:
                search(fits, self.options.longest_start, self.late)
            except Failure as error:
                # Time that ran out in a try leaves the result of those before.
                if not any(ok for ok, _ in tried.values()):
                    raise
                print(f"longest: stopped: {error}", file=sys.stderr)
            add("ours", tried, ", ".join(settings))

        if not self.options.ours_only:
            self.try_side("longest", "peer", peer)
            self.results.save()
        self.try_side("longest", "ours", ours)

    def prefill(self):
        name = "353M, prompt of 8,192 bytes"

        def ours(_):
            arguments = ["prefill", "--preset", "353M", "--device", "cuda", "--prompt-len", str(LENGTH),
                         "--repeat", "7"]
            records, _, said = self.ours.bench(arguments, self.left())
            if records is None:
                raise Failure("out of memory\n" + tail(said))
            self.results.add("prefill", name, "ours", records[0]["prefill_ms"])

        def peer(_):
            self.results.add("prefill", name, "peer", self.peer.run(self.left(), task="prefill")[0]["ms"])

        self.alternate("prefill", ours, peer)

    def decode(self):
        def add(side, model, batch, new, rate, note):
            name = f"{model}, batch {batch}, {new:,} bytes each"
            self.results.add("decode", name, side, rate, "B/s", "higher", note=note)

        def ours(_):
            for model, batch, new in WRITING:
                arguments = ["decode", "--preset", model, "--device", "cuda", "--prompt-len", "64",
                             "--gen-len", str(new), "--batch", str(batch), "--top-k", "1", "--repeat",
                             "3" if new < 4096 else "1"]
                records, _, said = self.ours.bench(arguments, self.left())
                if records is None:
                    raise Failure("out of memory\n" + tail(said))
                # As the peer's: prompt and bytes together.
                rate = batch * new / records[0]["total_ms"] * 1e3
                add("ours", model, batch, new, rate, records[0]["precision"])

        def peer(_):
            # One process for each: what was measured stays where a later one takes too long.
            for item in WRITING:
                for record in self.peer.run(self.left(), task="decode", writing=[item]):
                    add("peer", record["model"], record["batch"], record["new"], record["rate"],
                        record["note"])

        self.alternate("decode", ours, peer)

    def start(self):
        """Cold: every cache of compiled kernels empty. Warm: a second process with what the first left."""
        with tempfile.TemporaryDirectory(prefix="gpu_peer") as folder:
            caches = {}
            for side in ("ours", "peer"):
                home = os.path.join(folder, side)
                os.makedirs(home)
                caches[side] = {
                    name: os.path.join(home, name.lower())
                    for name in ("CUDA_CACHE_PATH", "XDG_CACHE_HOME", "TRITON_CACHE_DIR",
                                 "TORCHINDUCTOR_CACHE_DIR")
                }
            data = self.tiny_data(folder)

            def put(side, state, wall, step):
                self.results.add("start", f"353M, program's start to first step's end, {state}", side,
                                 wall, "s")
                self.results.add("start", f"353M, first step alone, {state}", side, step, "s")

            def ours(state):
                put("ours", state, *self.first_step(folder, data, caches["ours"], state))

            def peer(state):
                launched = time.time()
                record = self.peer.run(self.left(), env=caches["peer"], task="start", model="353M",
                                       launched=launched)[0]
                put("peer", state, record["wall"], record["step"])

            sides = {"ours": ours} if self.options.ours_only else {"ours": ours, "peer": peer}
            for state in ("cold", "warm"):
                for side in list(sides):
                    if not self.try_side("start", side, lambda: sides[side](state)):
                        del sides[side]
                self.results.save()

    def tiny_data(self, folder):
        """A data set of random bytes; the folder that `data.path` is set to."""
        text, out = os.path.join(folder, "text"), os.path.join(folder, "data")
        os.makedirs(text)
        with open(os.path.join(text, "random.bin"), "wb") as file:
            file.write(os.urandom(4 << 20))
        command = [self.options.mambabyte, "data", "prepare", "--source", "text", "--path", text,
                   "--out", out]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if ended.returncode:
            raise Failure(f"{shown(command)}\n{tail(ended.stderr)}")
        return out

    def first_step(self, folder, data, caches, state):
        """(seconds from the program's start to the first step's end, seconds of that step).

        The program is ended there: writing a checkpoint is not what is measured.
        """
        # CubeCL keeps its cache by the working directory, or else by the user's folder.
        home = os.path.join(folder, "ours")
        runs = os.path.join(folder, "runs-" + state)
        metrics = os.path.join(runs, "run", "metrics.jsonl")
        command = [self.options.mambabyte, "train", "--run", "run", "--config",
                   os.path.join(self.options.configs, CONFIGS["353M"])]
        for setting in (
            "train.batch=1", "train.accumulation=1", f"train.precision={self.options.precision}",
            "train.recompute=auto", f"train.memory_limit={self.options.limit:g}GiB", "train.steps=1000",
            "train.validate_every=0", "train.sample_every=0", "checkpoint.every_steps=0",
            f"data.path={data}", f"checkpoint.dir={runs}",
        ):
            command += ["--set", setting]
        launched, seen = time.monotonic(), []

        def watch(_):
            # A line counts once it has its end: it may be read while it is written.
            try:
                with open(metrics) as file:
                    text = file.read()
            except OSError:
                return False
            for line in text.splitlines(keepends=True):
                if line.endswith("\n"):
                    record = json.loads(line)
                    if record.get("kind") == "train":
                        seen.append((time.monotonic() - launched, record["seconds"]))
                        return True
            return False

        env = {**os.environ, **caches, "HOME": home}
        code, _, said, _, _ = self.ours.runner.run(command, self.left(), env=env, cwd=home, watch=watch)
        if not seen:
            raise Failure(f"exit code {code} before the first step: {shown(command)}\n{tail(said)}")
        return seen[0]


# ---------------------------------------------------------------- command line


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
        return worker(json.loads(options.worker))
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
