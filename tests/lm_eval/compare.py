"""Compares the results of lm-evaluation-harness with those of `mambabyte eval-tasks`."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
ours = {score["name"]: score for score in json.loads((folder / "ours.json").read_text())}
options = {}
for line in (folder / "ours.jsonl").read_text().splitlines():
    sample = json.loads(line)
    options[sample["task"], sample["item"]] = sample["log_probs"]
theirs = json.loads(next(folder.glob("**/results_*.json")).read_text())["results"]

bad = 0
print(f"{'task':<16} {'items':>6} {'metric':<11} {'lm_eval':>22} {'eval-tasks':>22}")
for file in ("lambada_openai", "hellaswag_val_every10th", "piqa", "arc_easy", "arc_challenge", "winogrande"):
    task = file.removesuffix("_val_every10th")
    their, our = theirs[f"local_{task}"], ours[file]
    pairs = [("acc", their["acc,none"], our["acc"]["value"])]
    if "acc_norm" in our:
        pairs.append(("acc_norm", their["acc_norm,none"], our["acc_norm"]["value"]))
    if "perplexity" in our:
        pairs.append(("perplexity", their["perplexity,none"], our["perplexity"]))
    for metric, a, b in pairs:
        # Shares are equal; a perplexity is exp of a sum, whose terms differ in the last digits of f32.
        same = a == b if metric != "perplexity" else abs(a / b - 1) < 1e-5
        bad += not same
        print(f"{task:<16} {our['items']:>6} {metric:<11} {a:>22.15g} {b:>22.15g}{'' if same else '  DIFFER'}")
    # Every option of every item, not only the scores.
    worst = 0.0
    samples = next(folder.glob(f"**/samples_local_{task}_*.jsonl"))
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for resp, own in zip(sample["filtered_resps"], options[file, sample["doc_id"]], strict=True):
            worst = max(worst, abs(float(resp[0]) - own))
    bad += worst > 1e-3
    print(f"{'':<16} {'':>6} largest difference of a log-probability: {worst:.2g} nats")
if bad:
    sys.exit(f"{bad} differ")
print("equal")
