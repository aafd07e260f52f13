#!/usr/bin/env python3
"""Initial weights of this program beside the recipe, and beside what PyTorch draws by it.

    initial.py --checkpoint EXPORTED_FOLDER

The checkpoint is an export of a model that has learnt nothing. Of each kind of tensor the
distribution is compared with that of the recipe, and with a draw of mamba_ssm's and, where its
recipe is the same, of transformers', by the largest distance of two distribution functions
(Kolmogorov and Smirnov). Prints a Markdown table.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy
import torch

import peers

# A distance of D between n numbers and their distribution: sqrt(n) D passes 2.23 once in 10,000.
LIMIT = 2.23


def uniform(bound):
    return lambda x: numpy.clip((x + bound) / (2 * bound), 0, 1), f"uniform in ±{bound:.5f}"


def normal(deviation):
    cdf = numpy.vectorize(lambda x: 0.5 * (1 + math.erf(x / (deviation * math.sqrt(2)))))
    return cdf, f"normal, deviation {deviation}"


def log_uniform_steps(low, high):
    """Of the bias of Δ: its softplus is log-uniform."""

    def cdf(bias):
        step = numpy.log1p(numpy.exp(bias))
        return numpy.clip((numpy.log(step) - math.log(low)) / math.log(high / low), 0, 1)

    return cdf, f"softplus log-uniform in {low} … {high}"


def constant(value):
    return value, f"{value}"


def recipe(config):
    """Kind of tensor: what it is drawn from (mamba_simple.py and mixer_seq_simple.py)."""
    width, depth = config["d_model"], config["n_layer"]
    ssm = config["ssm_cfg"]
    inner = ssm.get("expand", 2) * width
    rank = ssm.get("dt_rank", "auto")
    rank = math.ceil(width / 16) if rank == "auto" else rank
    kernel = ssm.get("d_conv", 4)
    return {
        "embedding.weight": normal(0.02),
        "norm.weight": constant(1),
        "norm.bias": constant(0),
        "norm_f.weight": constant(1),
        "norm_f.bias": constant(0),
        "mixer.in_proj.weight": uniform(width**-0.5),
        "mixer.conv1d.weight": uniform(kernel**-0.5),
        "mixer.conv1d.bias": uniform(kernel**-0.5),
        "mixer.x_proj.weight": uniform(inner**-0.5),
        "mixer.dt_proj.weight": uniform(rank**-0.5),
        "mixer.dt_proj.bias": log_uniform_steps(1e-3, 0.1),
        "mixer.D": constant(1),
        "mixer.out_proj.weight": uniform((inner * depth) ** -0.5),
        "lm_head.weight": uniform(width**-0.5),
    }


# Kinds that transformers draws from the same distributions, if `rescale_prenorm_residual` is set.
SHARED = {
    "norm.weight", "norm_f.weight", "mixer.conv1d.weight", "mixer.dt_proj.weight",
    "mixer.dt_proj.bias", "mixer.D", "mixer.out_proj.weight",
}


def by_kind(tensors):
    """All numbers of a kind of tensor, over the layers."""
    kinds = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("backbone.").replace("embeddings.", "embedding.")
        kind = ".".join(name.split(".")[2:]) if name.startswith("layers.") else name
        kinds.setdefault(kind, []).append(tensor.detach().double().flatten().numpy())
    return {kind: numpy.sort(numpy.concatenate(parts)) for kind, parts in kinds.items()}


def distance(values, cdf):
    """sqrt(n) D of sorted `values`."""
    n = len(values)
    expected = cdf(values)
    above = (numpy.arange(1, n + 1) / n - expected).max()
    below = (expected - numpy.arange(n) / n).max()
    return max(above, below) * math.sqrt(n)


def distance_of_two(a, b):
    both = numpy.concatenate([a, b])
    gap = numpy.searchsorted(a, both, "right") / len(a) - numpy.searchsorted(b, both, "right") / len(b)
    return numpy.abs(gap).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True, type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((options.checkpoint / "config.json").read_text())
    tensors = peers.state_dict(options.checkpoint)
    model = peers.mamba_ssm_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if ours != shapes:
        sys.exit(f"not the tensors of mamba_ssm: {set(ours.items()) ^ set(shapes.items())}")
    hub = peers.transformers_model({
        "hidden_size": config["d_model"], "num_hidden_layers": config["n_layer"],
        "vocab_size": config["vocab_size"], "rescale_prenorm_residual": True,
    })
    rates = max(
        (tensors[name] - value).abs().max().item()
        for name, value in model.state_dict().items() if name.endswith("A_log")
    )
    kinds, theirs = by_kind(tensors), by_kind(model.state_dict())
    hubs = by_kind(hub.state_dict())

    print("| tensor | numbers | recipe | mean | deviation | mamba_ssm's | least | most "
          "| √n · D to the recipe | to mamba_ssm | to transformers |")
    print("| --- |" + " --- |" * 10)
    failed = [] if rates <= 5e-7 else ["mixer.A_log"]
    for kind, (expected, text) in recipe(config).items():
        if kind not in kinds:
            continue
        values = kinds[kind]
        numbers = [f"{it:.5f}" for it in (values.mean(), values.std(), theirs[kind].std(),
                                           values[0], values[-1])]
        if callable(expected):
            gaps = [distance(values, expected), distance_of_two(values, theirs[kind])]
            if kind in SHARED:
                gaps.append(distance_of_two(values, hubs[kind]))
            if max(gaps) > LIMIT:
                failed.append(kind)
            gaps = [f"{it:.2f}" for it in gaps]
        else:
            exact = (values == expected).all() and (theirs[kind] == expected).all()
            gaps = ["equal", "equal"] + ["equal"] * (kind in SHARED)
            if not exact or (kind in SHARED and not (hubs[kind] == expected).all()):
                failed.append(kind)
        gaps += [""] * (3 - len(gaps))
        print(f"| `{kind}` | {len(values):,} | {text} | " + " | ".join(numbers + gaps) + " |")
    print(f"\n`mixer.A_log` is log(1 … N) in every channel; the largest difference to "
          f"mamba_ssm's is {rates:.1e}.")
    if failed:
        sys.exit(f"not as the recipe has it: {', '.join(failed)}")


if __name__ == "__main__":
    main()
