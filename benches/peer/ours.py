"""Measurements of this program."""

import json
import os

from peer.processes import Failure, shown, tail
from peer.shapes import CONFIGS, GIB, LENGTH, OUT_OF_MEMORY


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
