#!/usr/bin/env python3
"""Checks that the CUDA kernels of a training step compile for another GPU: the RTX 3090 (sm_86).

    cargo build --release --features cuda
    python3 benches/sm86.py                    # on a machine with any NVIDIA GPU
    python3 benches/sm86.py --log cubecl.log   # kernels that CubeCL logged before: needs no GPU

Runs a training step of two layers of the 353M shape in each precision and with layers recomputed and
not, has CubeCL log the source of every kernel it compiles, and compiles each with NVRTC as CubeCL
does, but for sm_86. Prints registers, spills, stack and shared memory of each. The exit code is 1 if
a kernel does not compile or needs more shared memory than the 48 KiB that every block may have.

A kernel's source can depend on the GPU that it was made for: this checks those of the GPU at hand. The
matrix products are cuBLAS's and not among them.
"""

import argparse
import concurrent.futures
import ctypes
import glob
import gzip
import os
import re
import subprocess
import sys
import tempfile

LIMIT = 48 << 10
NUMBERS = {
    "double": 8, "int64_t": 8, "uint64_t": 8, "float": 4, "int32_t": 4, "uint32_t": 4, "int": 4,
    "__half": 2, "__nv_bfloat16": 2, "int16_t": 2, "uint16_t": 2, "half": 2,
    "bool": 1, "char": 1, "int8_t": 1, "uint8_t": 1,
}

CUBECL = """
[compilation]
cache = false
[compilation.logger]
level = "full"
file = "{log}"
append = true
"""

CONFIG = """
[model]
preset = "mambabyte_353m"
depth = 2
[train]
steps = 1
batch = 1
length = 8192
validate_every = 0
sample_every = 0
[optimizer]
warmup_steps = 1
[data]
path = "."
[device]
kind = "cuda"
"""


def kernels(log):
    """{name: source} of the kernels in what CubeCL logged."""
    found = {}
    for block in re.split(r"```(?:cpp|cuda|c\+\+)\n", log)[1:]:
        source = block.split("```")[0]
        name = re.search(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", source)
        if name:
            found[name.group(1)] = source
    return found


def bytes_of(kind, source):
    """Size of a C++ type in CubeCL's sources; none if it is not known."""
    kind = kind.strip()
    if array := re.fullmatch(r"array<(.*),\s*(\d+)>", kind):
        element = bytes_of(array.group(1), source)
        return None if element is None else element * int(array.group(2))
    if kind in NUMBERS:
        return NUMBERS[kind]
    # Vectors are structs of the source's own: `struct alignas(8) float_2 { float i_0; float i_1; };`
    struct = re.search(rf"struct alignas\((\d+)\) {re.escape(kind)} {{(.*?)}}", source)
    if struct:
        fields = [bytes_of(field.split()[0], source) for field in struct.group(2).split(";") if field.strip()]
        if None not in fields:
            align = int(struct.group(1))
            return -(-sum(fields) // align) * align
    return None


def dynamic_shared(source):
    """Bytes of shared memory that a launch adds: CubeCL cuts all of it from one array, by offsets.
    None if a piece's size is not known."""
    block = re.search(r"extern __shared__ [^;]*?(\w+)\[\];", source)
    if not block:
        return 0
    pieces = re.findall(rf"reinterpret_cast<([^;]*?)\s*\*\s*>\(&{block.group(1)}\[(\d+)\]\)", source)
    ends = []
    for kind, offset in pieces:
        size = bytes_of(kind.removesuffix("const"), source)
        if size is None:
            return None
        ends.append(int(offset) + size)
    return max(ends, default=None)


def usage(text):
    """{"registers", "spills", "stack", "shared"} in what `ptxas -v` printed."""
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, text))
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill"),
        "stack": number(r"(\d+) bytes stack frame"),
        "shared": number(r"(\d+) bytes smem"),
    }


class Nvrtc:
    """The compiler that CubeCL uses, as a shared library."""

    def __init__(self, folders, arch):
        names = [n for folder in folders for n in
                 sorted(glob.glob(os.path.join(folder, "lib*", "libnvrtc.so*")), key=len)]
        self.library = None
        for name in [*names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        if self.library is None:
            sys.exit("error: NVRTC (libnvrtc.so) is not found: install CUDA's toolkit, or give its "
                     "folder with --cuda")
        include = next((os.path.join(f, "include") for f in folders
                        if os.path.isfile(os.path.join(f, "include", "cuda_bf16.h"))), None)
        if include is None:
            sys.exit("error: CUDA's headers (include/cuda_bf16.h) are not found: give the toolkit's "
                     "folder with --cuda")
        options = [f"--gpu-architecture={arch}", f"--include-path={include}",
                   f"--include-path={include}/cccl", "-lineinfo", "-Xptxas", "-O3", "-Xptxas", "-v"]
        self.options = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))

    def compile(self, source):
        """(whether it compiled, what the compiler said)."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        library = self.library
        if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
            return False, "nvrtcCreateProgram failed"
        failed = library.nvrtcCompileProgram(program, len(self.options), self.options)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(max(1, size.value))
        library.nvrtcGetProgramLog(program, said)
        library.nvrtcDestroyProgram(ctypes.byref(program))
        return not failed, said.value.decode(errors="replace")


def examine(name, source, nvrtc):
    """One row of the table, with what is wrong with the kernel."""
    ok, said = nvrtc.compile(source)
    row = {"name": name, "threads": re.search(r"__launch_bounds__\((\d+)", source), "why": ""}
    row["threads"] = row["threads"].group(1) if row["threads"] else "?"
    if not ok:
        return row | {"why": "does not compile:\n" + "\n".join(said.splitlines()[:6])}
    if "registers" not in said:
        return row | {"why": "the compiler said nothing of its resources:\n" + said}
    row |= usage(said)
    row["dynamic"] = dynamic_shared(source)
    if row["dynamic"] is None:
        row["why"] = "the size of its shared memory could not be read from its source"
    elif row["shared"] + row["dynamic"] > LIMIT:
        row["why"] = f"{row['shared'] + row['dynamic']} bytes of shared memory are more than {LIMIT}"
    return row


def collect(options):
    """What CubeCL logs while training steps run."""
    log = ""
    # CubeCL looks for its config upwards from the working directory; its caches and CUDA's are empty,
    # as a kernel that was found in one would not be logged.
    with tempfile.TemporaryDirectory(prefix="sm86") as folder:
        path = os.path.join(folder, "cubecl.log")
        with open(os.path.join(folder, "cubecl.toml"), "w") as file:
            file.write(CUBECL.format(log=path))
        with open(os.path.join(folder, "config.toml"), "w") as file:
            file.write(CONFIG)
        env = {**os.environ, "HOME": folder, "XDG_CACHE_HOME": folder, "CUDA_CACHE_PATH": folder}
        for precision in options.precision.split(","):
            for recompute in ("none", "all"):
                command = [options.mambabyte, "bench", "step", "--config", "config.toml", "--repeat", "1",
                           "--set", f"train.precision={precision}", "--set", f"train.recompute={recompute}"]
                for setting in options.set or []:
                    command += ["--set", setting]
                print(f"{precision}, recompute {recompute}", file=sys.stderr)
                try:
                    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True,
                                           timeout=options.seconds)
                except subprocess.TimeoutExpired:
                    sys.exit(f"error: took more than {options.seconds} s: {' '.join(command)}")
                if ended.returncode:
                    said = "\n".join(ended.stderr.strip().splitlines()[-6:])
                    sys.exit(f"error: exit code {ended.returncode}: {' '.join(command)}\n{said}")
        try:
            with open(path) as file:
                log = file.read()
        except FileNotFoundError:
            sys.exit("error: CubeCL logged nothing: was the program built with `--features cuda`?")
    if options.keep:
        with gzip.open(options.keep, "wt") as file:
            file.write(log)
    return log


def read(path):
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", errors="replace") as file:
            return file.read()
    except OSError as error:
        sys.exit(f"error: {error}")


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mambabyte", default=os.path.join(root, "target/release/mambabyte"), metavar="FILE")
    add("--log", metavar="FILE", help="what CubeCL logged before (also .gz): runs no training step")
    add("--keep", metavar="FILE", help="keep CubeCL's log, compressed, as FILE")
    add("--cuda", metavar="DIR", help="CUDA's toolkit; CUDA_PATH or /usr/local/cuda if left out")
    add("--arch", default="sm_86")
    add("--precision", default="bf16,fp32", help="values of `train.precision`")
    add("--set", action="append", metavar="KEY=VALUE", help="another setting of the config")
    add("--seconds", type=float, default=120, help="time limit of each training step's process")
    options = parser.parse_args()
    options.mambabyte = os.path.abspath(options.mambabyte)
    folders = [f for f in (options.cuda, os.environ.get("CUDA_PATH"), "/usr/local/cuda") if f]
    nvrtc = Nvrtc(folders, options.arch)
    if not options.log and not os.access(options.mambabyte, os.X_OK):
        parser.error(f"no program at {options.mambabyte}: run `cargo build --release --features cuda`, "
                     "or give its place with --mambabyte")
    found = kernels(read(options.log) if options.log else collect(options))
    if not found:
        sys.exit("error: no kernels in CubeCL's log")
    # NVRTC compiles outside of Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda item: examine(*item, nvrtc), sorted(found.items())))
    print(f"| kernel, {options.arch} | threads | registers | spills, B | stack, B | shared, B | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [row["name"], row["threads"]]
        if "registers" in row:
            shared = "?" if row["dynamic"] is None else row["shared"] + row["dynamic"]
            cells += [row["registers"], row["spills"], row["stack"], shared]
        else:
            cells += ["–"] * 4
        cells.append("FAILS" if row["why"] else "")
        print("| " + " | ".join(map(str, cells)) + " |")
    failed = [row for row in rows if row["why"]]
    spilled = sum(bool(row.get("spills")) for row in rows)
    print(f"\n{len(rows)} kernels, {len(failed)} fail, {spilled} spill registers")
    for row in failed:
        print(f"\nFAILS: {row['name']}: {row['why']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
