"""Measurements of PyTorch + mamba-ssm + causal-conv1d."""

import json
import os
import sys

from peer.processes import Failure, tail
from peer.shapes import GIB

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "gpu_peer.py")


class Peer:
    """Measurements of the peer, each by `gpu_peer.py --worker` in a process of its own."""

    def __init__(self, options, runner):
        self.options, self.runner = options, runner

    def run(self, seconds, env=None, **task):
        """The worker's records, each with the peak of memory since the one before."""
        task |= {"limit": self.options.limit, "seconds": seconds}
        command = [sys.executable, SCRIPT, "--worker", json.dumps(task)]
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
