"""Starts TensorBoard on a folder of runs and asks it what it shows.

ask_tensorboard.py TENSORBOARD LOGDIR RUN
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

PLUGINS = {"scalars": "train/bpb", "histograms": "weights/mixer.in_proj.weight", "text": "sample"}


def wait(what, ask, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        try:
            if found := ask():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"waited {seconds} s: {what}")


def main(program, logdir, run):
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([program, "--logdir", logdir, "--port", "0"],
                                  stdout=log, stderr=subprocess.STDOUT)

        def address():
            log.seek(0)
            return re.search(r"at (http://localhost:\d+/)", log.read())

        try:
            base = wait("the address", address)[1]

            def tags(plugin):
                with urllib.request.urlopen(f"{base}data/plugin/{plugin}/tags") as answer:
                    return json.load(answer).get(run, {})

            for plugin, tag in PLUGINS.items():
                wait(f"{tag} in {plugin}", lambda: tag in tags(plugin))
        finally:
            server.terminate()
            server.wait()
    print(f"TensorBoard shows {', '.join(PLUGINS)} of the run")


main(*sys.argv[1:])
