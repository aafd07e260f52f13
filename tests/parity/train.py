#!/usr/bin/env python3
"""Trains in PyTorch what this program trains: same weights, same bytes, same recipe.

    train.py --dump FOLDER --initial FOLDER --out losses.jsonl

`--dump` is what the example `dump_training` has written (the config with every key, and the bytes
of every step); `--initial` the initial weights, exported in mamba_ssm's form. Writes a line
for each step: its loss in nats before the update, and the gradient's norm before clipping.

On a CPU the model is mamba_ssm's with its reference functions (peers.py). With `--device cuda` it
is mamba_ssm with its kernels, which has to be installed.
"""

import argparse
import json
import math
import time
import tomllib
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F


def learning_rate(step, optimizer, steps):
    """Linear warm-up to the peak, then half a cosine. Steps count from 1."""
    peak, floor = optimizer["lr"], optimizer["min_lr"]
    warmup, end = optimizer["warmup_steps"], optimizer["decay_steps"] or steps
    if step <= warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(end - warmup, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def groups(model, decay):
    """Weight decay on matrices; not on vectors, nor on the rates of the recurrence."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and not name.endswith("A_log")
        (decayed if matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def load(folder, device):
    if device == "cpu":
        import peers

        peers.use_linear_scan()
        return peers.load(folder).train()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = json.loads((folder / "config.json").read_text())
    model = MambaLMHeadModel(MambaConfig(**config), device=device, dtype=torch.float32)
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", map_location=device))
    return model.train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dump", required=True, type=Path)
    parser.add_argument("--initial", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay in fp32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # fp32 means fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    config = tomllib.loads((options.dump / "step-0" / "config.toml").read_text())
    train, recipe = config["train"], config["optimizer"]
    vocabulary = config["model"]["vocab_size"]
    batches = numpy.load(options.dump / "batches.npy", mmap_mode="r")
    model = load(options.initial, options.device)
    optimizer = torch.optim.AdamW(
        groups(model, recipe["weight_decay"]),
        lr=0.0,
        betas=(recipe["beta1"], recipe["beta2"]),
        eps=recipe["eps"],
    )
    autocast = torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16)
    with open(options.out, "w") as out:
        for step, rows in enumerate(batches, start=1):
            started = time.perf_counter()
            lr = learning_rate(step, recipe, train["steps"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = torch.from_numpy(rows.astype(numpy.int64)).to(options.device)
            optimizer.zero_grad()
            total = torch.zeros((), device=options.device)
            for micro in rows.split(train["batch"]):
                with autocast:
                    logits = model(micro[:, :-1]).logits[..., :vocabulary]
                loss = F.cross_entropy(
                    logits.float().reshape(-1, vocabulary), micro[:, 1:].reshape(-1)
                )
                loss = loss / train["accumulation"]
                loss.backward()
                total += loss.detach()
            limit = recipe["clip"] or math.inf
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            record = {
                "kind": "train",
                "step": step,
                "loss_nats": total.item(),
                "lr": lr,
                "grad_norm": norm.item(),
                "seconds": time.perf_counter() - started,
            }
            out.write(json.dumps(record) + "\n")
            out.flush()
    print(f"step {step}: {total.item():.5f} nats, {options.out}")


if __name__ == "__main__":
    main()
