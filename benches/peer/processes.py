"""Processes, one at a time, and the lowest free memory of the GPU while they run."""

import ctypes
import os
import signal
import subprocess
import tempfile
import threading
import time


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
