"""The parts of a comparison: what is measured on both sides, and in which order."""

import json
import os
import subprocess
import sys
import tempfile
import time

from peer.ours import Ours, product_rates, scan_times
from peer.processes import Failure, shown, tail
from peer.search import search
from peer.shapes import CONFIGS, LENGTH, PEER_MODELS, PEER_STEPS, PRODUCTS, WRITING
from peer.theirs import Peer


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
