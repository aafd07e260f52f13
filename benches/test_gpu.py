#!/usr/bin/env python3
"""Tests of the GPU scripts' reading and arithmetic, with canned outputs: needs no GPU, no PyTorch.

    python3 benches/test_gpu.py
"""

import json
import os
import stat
import subprocess
import sys
import tempfile
import types
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import gpu_trace
import sm86
from peer import ours, processes, results, search, shapes

# Stands for the program: 12,345 bytes a second and sequence; batches above 4 and sequences above
# 300,000 bytes do not fit.
PROGRAM = r"""#!/usr/bin/env python3
import json, os, sys, time
words = sys.argv[1:]
settings = dict(w.split("=", 1) for i, w in enumerate(words) if words[i - 1] == "--set")
if words[:2] == ["bench", "scan"]:
    batch = int(words[words.index("--batch") + 1])
    lines = [("forward", 0.25 * batch), ("forward + sum + backward", 1.5 * batch), ("forward: carry", 9)]
    print(json.dumps([{"name": n, "milliseconds": t, "rate": 1, "unit": "x"} for n, t in lines]))
elif words[:2] == ["bench", "step"]:
    batch, length = int(settings["train.batch"]), int(settings["train.length"])
    print("2026 INFO `train.recompute` is 7 for this run", file=sys.stderr)
    if batch > 4 or length > 300000:
        print("error: out of memory", file=sys.stderr)
        sys.exit(6)
    size = batch * length
    print(json.dumps([{"name": f"step of {size} bytes", "milliseconds": length / 12.345}]))
elif words[0] == "train":
    run = os.path.join(settings["checkpoint.dir"], "run")
    os.makedirs(run)
    with open(os.path.join(run, "metrics.jsonl"), "w") as file:
        file.write('{"kind": "train", "step": 1, "seconds": 0.5}\n')
    time.sleep(60)
elif words[0] == "bench":
    sys.exit("error: this fails")
"""


class Peer(unittest.TestCase):
    def run_ours(self, folder, sections, *more):
        program = os.path.join(folder, "program")
        with open(program, "w") as file:
            file.write(PROGRAM.replace("/usr/bin/env python3", sys.executable))
        os.chmod(program, stat.S_IRWXU)
        out = os.path.join(folder, "out.json")
        command = [sys.executable, os.path.join(HERE, "gpu_peer.py"), sections, "--mambabyte", program,
                   "--ours-only", "--rounds", "2", "--out", out, *more]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        with open(out) as file:
            return ended, {row["name"]: row.get("ours") for row in json.load(file)["rows"]}

    def test_reports_are_an_array_or_lines(self):
        self.assertEqual(ours.parse_report('[{"name": "a"}]'), [{"name": "a"}])
        self.assertEqual(ours.parse_report('noise\n{"name": "a"}\n[{"name": "b"}]\n3\n'),
                         [{"name": "a"}, {"name": "b"}])
        self.assertEqual(ours.parse_report(""), [])

    def test_names_of_scans(self):
        record = lambda name, ms: {"name": name, "milliseconds": ms}
        records = [record("forward", 1), record("forward: ChunkEnds", 2), record("backward", 3),
                   record("backward: Carry", 4), record("forward + backward", 5)]
        self.assertEqual(ours.scan_times(records), {"forward": 1, "backward": 3, "both": 5})
        records = [record("Forward + sum + backward (autodiff)", 7)]
        self.assertEqual(ours.scan_times(records), {"both": 7})

    def test_names_of_products(self):
        records = [{"name": "in_proj 16384 x 1024 x 4096 y", "rate": 5.0},
                   {"name": "in_proj 16384 x 1024 x 4096 y (Burn's)", "rate": 6.0},
                   {"name": "x_proj 16384 x 2048 x 96 dW", "rate": 7.0}]
        self.assertEqual(ours.product_rates(records), {("in_proj", "y"): 5.0, ("x_proj", "dW"): 7.0})

    def test_peak_of_memory(self):
        gib = shapes.GIB
        # Within a limit of 24 GiB, 1.5 were never used; what is above was held.
        self.assertEqual(ours.peak_within(24 * gib, 1.5 * gib, 139 * gib), 22.5)
        self.assertEqual(ours.peak_within(None, 100 * gib, 139 * gib), 39)
        self.assertEqual(ours.peak_within(24 * gib, 100 * gib, 139 * gib), 39)

    def test_search(self):
        for most in (8192, 5 * 8192, 100 * 8192):
            tried = []

            def fits(length):
                tried.append(length)
                return length <= most

            low, high = search.search(fits, 16 * 8192, lambda: False)
            self.assertEqual((low, high), (most, most + 8192))
            self.assertTrue(all(length % 8192 == 0 for length in tried))
            self.assertEqual(len(tried), len(set(tried)))
        self.assertEqual(search.search(lambda _: False, 8192, lambda: False), (0, 8192))
        self.assertEqual(search.search(lambda _: True, 8192, lambda: True), (0, 0))

    def test_table(self):
        table = results.Results("", {})
        for value in (2.0, 1.0, 3.0):
            table.add("s", "scan", "peer", value)
            table.add("s", "scan", "ours", value / 2, peak=20.0)
            table.add("s", "product", "peer", 400, "TFLOP/s", "percent")
            table.add("s", "product", "ours", 300, "TFLOP/s", "percent")
        table.add("s", "step", "ours", None, note="batch 8: out of memory")
        self.assertEqual(table.table("s").splitlines()[2:], [
            "| scan | 2 ms (1–3) | 1 ms (0.5–1.5) | 2.00 × | – | 20.0 GiB |",
            "| product | 400 TFLOP/s (400–400) | 300 TFLOP/s (300–300) | 75 % | – | – |",
            "| step | – | –; batch 8: out of memory | – | – | – |",
        ])

    def test_runs_of_the_program(self):
        with tempfile.TemporaryDirectory() as folder:
            ended, rows = self.run_ours(folder, "scan,step353,longest")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertEqual(rows["scan forward, B 4"]["values"], [1.0, 1.0])
        self.assertEqual(rows["scan backward, B 2"]["values"], [2.5, 2.5])
        # Batch 4 is the fastest that fits, batch 8 does not: both are told.
        best = rows["353M step, 8,192 bytes a sequence"]
        self.assertEqual([round(v) for v in best["values"]], [49380, 49380])
        self.assertEqual(best["notes"], ["batch 4, recompute 7"])
        notes = [note for row in rows.values() for note in row["notes"]]
        self.assertIn("batch 8, recompute 7: out of memory", notes)
        self.assertEqual(rows["353M, longest sequence"]["values"], [294912])

    def test_start(self):
        with tempfile.TemporaryDirectory() as folder:
            ended, rows = self.run_ours(folder, "start")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertEqual(rows["353M, first step alone, warm"]["values"], [0.5])

    def test_a_failure_is_shown_and_the_rest_goes_on(self):
        with tempfile.TemporaryDirectory() as folder:
            ended, rows = self.run_ours(folder, "gemm,scan")
        self.assertEqual(ended.returncode, 1)
        self.assertIn("error: this fails", ended.stderr)
        self.assertIn("scan forward, B 1", rows)

    def test_errors_of_the_command_line(self):
        def error(*words):
            command = [sys.executable, os.path.join(HERE, "gpu_peer.py"), *words]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60,
                                   env={**os.environ, "PYTHONPATH": ""})
            self.assertEqual(ended.returncode, 2)
            return ended.stderr

        self.assertIn("`scam` is none of scan", error("scam"))
        self.assertIn("no program at", error("--mambabyte", "/nowhere"))
        self.assertIn("no pg19_353m.toml", error("--mambabyte", sys.executable, "--configs", "/"))

    def test_time_runs_out(self):
        with tempfile.TemporaryDirectory() as folder:
            runner = processes.Runner(types.SimpleNamespace(free=lambda: None))
            with self.assertRaisesRegex(processes.Failure, "more than 0 s"):
                runner.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, cwd=folder)
            with self.assertRaisesRegex(processes.Failure, "could not start"):
                runner.run(["/nowhere"], 1)

    def test_memory_between_lines(self):
        free = iter([90, 80, 70] + [60] * 10000)
        runner = processes.Runner(types.SimpleNamespace(free=lambda: next(free) << 30))
        code, lines, _, low, before = runner.run(
            [sys.executable, "-c", "import time; time.sleep(.4); print('a')"], 20
        )
        self.assertEqual((code, lines[0][0]), (0, "a"))
        self.assertEqual((lines[0][1], low, before), (60 << 30, 60 << 30, 90 << 30))


class Trace(unittest.TestCase):
    def test_the_last_whole_step(self):
        step = [("gather_x", 5), ("nvjet_sm90", 10), ("adjoint_main_u", 20), ("update_g", 3)]
        events, at = [], 0
        for name, length in step * 3:
            events.append((at, at + length, name))
            at += length + 1
        found = gpu_trace.last_step(events)
        self.assertEqual([name for _, _, name in found], [name for name, _ in step])
        with self.assertRaises(SystemExit):
            gpu_trace.last_step(events[:4])

    def test_kinds(self):
        kinds = {"adjoint_main_u": "scan, backward", "outputs_u": "scan, forward",
                 "nvjet_sm90_tst": "products (cuBLASLt)", "fill": "products (cuBLASLt)",
                 "update_g": "AdamW + gradient norm", "unary_float": "other"}
        for name, kind in kinds.items():
            self.assertEqual(gpu_trace.kind_of(name), kind)


SOURCE = """
struct alignas(8) float_2 { float i_0; float i_1; };
struct alignas(4) __nv_bfloat16_2 { __nv_bfloat16 i_0; __nv_bfloat16 i_1; };
extern "C" __global__ void __launch_bounds__(128)  outputs_1234(float const* v1, info_st const v2) {
extern __shared__ __align__(8) char v9[];bool v3 = true;
array<float_2, 256> * const v10 = reinterpret_cast<array<float_2, 256> *>(&v9[0]);
array<__nv_bfloat16_2, 16> * const v11 = reinterpret_cast<array<__nv_bfloat16_2, 16> *>(&v9[2048]);
"""


class Sm86(unittest.TestCase):
    def test_sources(self):
        log = f"[START]\nsource:\n```cpp\n{SOURCE}\n```\n[END]\n[START]\nsource:\n```cpp\nint x;\n```\n"
        self.assertEqual(list(sm86.kernels(log)), ["outputs_1234"])
        self.assertEqual(sm86.dynamic_shared(SOURCE), 2112)
        self.assertEqual(sm86.dynamic_shared("int x;"), 0)
        self.assertIsNone(sm86.dynamic_shared(SOURCE.replace("<float_2, 256>", "<wide, 256>")))

    def test_usage(self):
        said = ("ptxas info    : Function properties for x\n"
                "ptxas         .     16 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
                "ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem, 584 bytes cmem[0]\n")
        self.assertEqual(sm86.usage(said), {"registers": 168, "spills": 28, "stack": 16, "shared": 512})
        self.assertEqual(sm86.usage("ptxas info : Used 10 registers, 5 bytes cmem[0]")["shared"], 0)


if __name__ == "__main__":
    unittest.main()
