#!/usr/bin/env bash
# Scores a checkpoint on six tasks twice, with the real lm-evaluation-harness through `mambabyte
# serve` and with `mambabyte eval-tasks`, and compares.
#
#   run.sh PROGRAM CHECKPOINT DATA WORK [LIMIT] [PYTHON]
#
# DATA is a folder with the tasks as JSON lines, WORK a folder for the virtual environment, which is
# made once, and for results. LIMIT is how many items of each task; 0 is all.
set -euo pipefail
program=$1 checkpoint=$2 data=$(realpath "$3") work=$4 limit=${5:-0} python=${6:-python3}
here=$(dirname "$(realpath "$0")")
mkdir -p "$work"
if [ ! -x "$work/venv/bin/lm_eval" ]; then
    "$python" -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check 'lm_eval[api]==0.4.13'
fi

tasks=(lambada_openai hellaswag piqa arc_easy arc_challenge winogrande)
rm -rf "$work/tasks" "$work/results"
mkdir -p "$work/tasks" "$work/results"
for task in "${tasks[@]}"; do
    sed "s,@DATA@,$data," "$here/tasks/$task.yaml" > "$work/tasks/$task.yaml"
done
limited=()
if [ "$limit" != 0 ]; then limited=(--limit "$limit"); fi

files=$(printf "$data/%s.jsonl " lambada_openai hellaswag_val_every10th piqa arc_easy arc_challenge winogrande)
# Names of files have no spaces here.
"$program" eval-tasks --checkpoint "$checkpoint" --tasks $files "${limited[@]}" --json \
    --samples "$work/results/ours.jsonl" > "$work/results/ours.json"

"$program" serve --checkpoint "$checkpoint" --port 0 > "$work/results/address" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 600); do
    if [ -s "$work/results/address" ]; then break; fi
    kill -0 $server
    sleep 0.1
done
address=$(head -n 1 "$work/results/address")
names=$(printf 'local_%s,' "${tasks[@]}")
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$work/huggingface" \
    "$work/venv/bin/lm_eval" --model local-completions \
    --model_args "model=mambabyte,base_url=$address/completions,max_length=8192,num_concurrent=1" --batch_size 32 \
    --tasks "${names%,}" --include_path "$work/tasks" "${limited[@]}" \
    --output_path "$work/results" --log_samples

"$work/venv/bin/python" "$here/compare.py" "$work/results"
