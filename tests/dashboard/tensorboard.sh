#!/usr/bin/env bash
# Trains a small model with event files, kills it, resumes it, and reads them with the real TensorBoard:
# tensorboard.sh PROGRAM WORKFOLDER [PYTHON]
#
# TensorBoard comes from PyPI into a virtual environment in WORKFOLDER, once.
set -euo pipefail

program=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
python=${3:-python3}
here=$(cd "$(dirname "$0")" && pwd)

skip() {
    echo '=============================================================='
    echo "SKIPPED: event files in the real TensorBoard: $1"
    echo '=============================================================='
    exit 0
}

if ! [ -x "$work/venv/bin/tensorboard" ]; then
    command -v "$python" >/dev/null || skip "no $python"
    rm -rf "$work/venv"
    "$python" -m venv "$work/venv" >/dev/null 2>&1 || skip "$python cannot make a virtual environment"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check 'tensorboard==2.21.0' </dev/null ||
        skip 'tensorboard could not be installed from PyPI'
fi

runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
cd "$runs"
mkdir text
for i in 1 2 3 4 5 6 7 8; do
    for j in $(seq 200); do echo "the river $i walks under stone $((i * j % 7)) and light"; done >"text/$i.txt"
done
cat >config.toml <<'TOML'
[model]
dim = 16
depth = 2
[train]
steps = 60
batch = 2
length = 64
validate_every = 20
validate_bytes = 300
sample_every = 20
sample_bytes = 30
inspect_every = 10
tensorboard = true
[optimizer]
warmup_steps = 5
[data]
path = "data"
[checkpoint]
every_steps = 20
[device]
kind = "cpu"
TOML
quietly() { "$@" >log 2>&1 || { cat log; exit 1; }; }
quietly "$program" data prepare --source text --path text --out data --held-out 0.1
quietly "$program" train --config config.toml --run run --stop-after 45
# Back to step 40: what was recorded of the five steps after it counts no longer.
rm -r checkpoints/run/step-45
quietly "$program" resume checkpoints/run
ls checkpoints/run | grep -c '^events.out.tfevents' | grep -qx 2
"$work/venv/bin/python" "$here/read_events.py" checkpoints/run checkpoints/run
quietly "$program" export-metrics checkpoints/run --format tensorboard --out exported
"$work/venv/bin/python" "$here/read_events.py" checkpoints/run exported
"$work/venv/bin/python" "$here/ask_tensorboard.py" "$work/venv/bin/tensorboard" checkpoints run
