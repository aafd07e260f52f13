#!/usr/bin/env python3
"""Forward pass, stepping and round trip, on random checkpoints of many shapes and forms.

    forward.py --program target/release/mambabyte --work FOLDER

PyTorch writes a checkpoint; this program imports it, and its logits have to be PyTorch's. Then it
exports, and what PyTorch computes from the export has to be what it computed before, bit for bit.
Prints a Markdown table.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

import peers

LENGTHS = [1, 7, 256, 4096]
# Largest difference of two logits, absolute.
TOLERANCE = 1e-4
# Bytes that go through one at a time, here and in mamba_ssm.
STEPS, THEIR_STEPS = 256, 64

SIZE = {"mamba_ssm": ("d_model", "n_layer"), "transformers": ("hidden_size", "num_hidden_layers")}


@dataclass
class Case:
    """A checkpoint: what model, and in what form it is stored."""

    name: str
    config: dict
    dtype: torch.dtype = torch.float32
    format: str = "bin"
    shards: int = 1
    rename: tuple = ()


def mamba_ssm(name, d_model, n_layer, stored=None, **config):
    keys = {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": 256,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }
    return Case(name, keys | config, **(stored or {}))


def transformers(name, hidden_size, num_hidden_layers, stored=None, **config):
    keys = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "vocab_size": 256,
        "use_bias": False,
    }
    return Case(name, keys | config, **({"format": "safetensors"} | (stored or {})))


# How a checkpoint of that repository names them (torch_utils.py undoes the first three).
JXIW = (("backbone.", "mambabyte."), ("embedding", "token_embedding"), ("norm_f", "final_norm"),
        ("", "module."))
BF16 = {"dtype": torch.bfloat16}
CASES = [
    mamba_ssm("RMSNorm, tied head", 64, 2),
    mamba_ssm("LayerNorm with bias, untied head", 96, 3, rms_norm=False, tie_embeddings=False,
              ssm_cfg={"expand": 2}),
    mamba_ssm("the same, bf16", 96, 3, BF16, rms_norm=False, tie_embeddings=False),
    mamba_ssm("the same, safetensors in 3 files", 96, 3, {"format": "safetensors", "shards": 3},
              rms_norm=False, tie_embeddings=False),
    mamba_ssm("the same, .bin in 3 files", 96, 3, {"shards": 3},
              rms_norm=False, tie_embeddings=False),
    mamba_ssm("the same, names of jxiw/MambaByte, out of DataParallel", 96, 3, {"rename": JXIW},
              rms_norm=False, tie_embeddings=False),
    mamba_ssm("vocabulary 1003, padded to 1008", 48, 2, vocab_size=1003),
    mamba_ssm("vocabulary 260, padded to 320, untied", 48, 2, vocab_size=260,
              pad_vocab_size_multiple=64, tie_embeddings=False),
    mamba_ssm("N 8, R 7, K 3, expand 3, no bias of the convolution", 40, 2,
              ssm_cfg={"d_state": 8, "dt_rank": 7, "d_conv": 3, "expand": 3, "conv_bias": False}),
    mamba_ssm("N 64, K 2, biases of the projections", 32, 2, rms_norm=False,
              ssm_cfg={"d_state": 64, "d_conv": 2, "bias": True}),
    mamba_ssm("deep", 40, 16, rms_norm=False, tie_embeddings=False),
    mamba_ssm("wide", 384, 4, rms_norm=False, tie_embeddings=False),
    transformers("tied head", 64, 3),
    transformers("untied head, biases of the projections", 72, 2, tie_word_embeddings=False,
                 use_bias=True),
    transformers("bf16, 3 files", 64, 4, BF16 | {"shards": 3}),
    transformers("N 32, R 11, K 3, vocabulary 300, .bin", 56, 2, {"format": "bin"},
                 state_size=32, time_step_rank=11, conv_kernel=3, vocab_size=300),
    transformers("no bias of the convolution, eps 1e-3", 64, 2, use_conv_bias=False,
                 layer_norm_epsilon=1e-3),
]


def write(case, folder, seed):
    """Writes the checkpoint as its library would; returns the model it holds, in float32."""
    torch.manual_seed(seed)
    model = peers.build(case.config)
    peers.randomise(model, seed)
    model = model.to(case.dtype)
    tensors = model.state_dict()
    folder.mkdir(parents=True)
    if peers.is_transformers(case.config):
        model.config.save_pretrained(folder)
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        (folder / "config.json").write_text(json.dumps(case.config))
    for old, new in case.rename:
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    stem, save = "pytorch_model", save_bin
    if case.format == "safetensors":
        stem, save = "model", save_safetensors
    if case.shards == 1:
        save(tensors, folder / f"{stem}.{case.format}")
    else:
        names, places = list(tensors), {}
        for i in range(case.shards):
            file = f"{stem}-{i + 1:05}-of-{case.shards:05}.{case.format}"
            part = names[i :: case.shards]
            save({name: tensors[name] for name in part}, folder / file)
            places.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}.{case.format}.index.json").write_text(json.dumps(index))
    return model.float().eval()


def save_bin(tensors, path):
    torch.save(tensors, path)


def save_safetensors(tensors, path):
    from safetensors.torch import save_file

    # Clones: the format has no tensors that share their memory, as a tied head does.
    save_file({name: t.clone() for name, t in tensors.items()}, path, {"format": "pt"})


class Program:
    """The program under test."""

    def __init__(self, path):
        self.path = path

    def run(self, *arguments):
        line = [self.path, *map(str, arguments)]
        result = subprocess.run(line, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(line)}: exit code {result.returncode}\n{result.stderr}")

    def logits(self, checkpoint, data, folder, *flags):
        text, out = folder / "bytes", folder / "logits.npy"
        text.write_bytes(data)
        self.run("logits", "--checkpoint", checkpoint, "--bytes", text, "--out", out,
                 "--device", "cpu", *flags)
        return numpy.load(out)


def difference(ours, theirs):
    """Largest absolute difference; rows that pad a vocabulary are theirs alone."""
    assert ours.dtype == numpy.float32 and len(ours) == len(theirs), (ours.dtype, ours.shape)
    return float(numpy.abs(ours - theirs[:, : ours.shape[1]]).max())


def check(case, index, program, work, data):
    """The numbers of one row of the table."""
    folder = work / f"{index:02}"
    shutil.rmtree(folder, ignore_errors=True)
    model = write(case, folder / "theirs", seed=index)
    imported = folder / "ours"
    program.run("import", "--from", folder / "theirs", "--out", imported)

    forward, scale = [], 0.0
    for length in LENGTHS:
        text = data[:length]
        theirs = peers.logits(model, text)
        ours = program.logits(imported, text, folder)
        assert ours.shape[1] == case.config["vocab_size"], ours.shape
        forward.append(difference(ours, theirs))
        scale = max(scale, float(numpy.abs(theirs).max()))

    text = data[:STEPS]
    whole = peers.logits(model, text)
    stepped = program.logits(imported, text, folder, "--piece", "1")
    steps = difference(stepped, whole)
    own_steps = None
    if not peers.is_transformers(case.config):
        theirs = peers.stepwise(model, text[:THEIR_STEPS])
        own_steps = difference(stepped[:THEIR_STEPS], theirs)

    exported = folder / "exported"
    form = "transformers" if peers.is_transformers(case.config) else "mamba-ssm"
    program.run("export", "--checkpoint", imported, "--format", form, "--out", exported)
    again = peers.logits(peers.load(exported), text)
    equal = numpy.array_equal(again[:, : whole.shape[1]], whole[:, : again.shape[1]])
    shutil.rmtree(folder)
    return forward, steps, own_steps, scale, equal


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = Program(options.program)
    data = numpy.random.default_rng(4740).integers(0, peers.BYTES, max(LENGTHS), numpy.uint8)
    data = data.tobytes()
    header = [f"L = {length}" for length in LENGTHS] + [
        f"{STEPS} single steps", f"beside {THEIR_STEPS} of theirs", "largest logit", "round trip"
    ]
    print("| written by | checkpoint | D × layers | " + " | ".join(header) + " |")
    print("| --- | --- | --- |" + " --- |" * len(header))
    failed = []
    for index, case in enumerate(CASES):
        forward, steps, own_steps, scale, equal = check(
            case, index, program, options.work, data
        )
        numbers = forward + [steps] + ([] if own_steps is None else [own_steps])
        cells = [f"{it:.1e}" for it in forward + [steps]]
        cells.append("" if own_steps is None else f"{own_steps:.1e}")
        cells += [f"{scale:.1f}", "equal" if equal else "**differs**"]
        by = "transformers" if peers.is_transformers(case.config) else "mamba_ssm"
        width, depth = (case.config[key] for key in SIZE[by])
        print(f"| {by} | {case.name} | {width} × {depth} | " + " | ".join(cells) + " |", flush=True)
        if max(numbers) > TOLERANCE or not equal:
            failed.append(case.name)
    if failed:
        sys.exit(f"above {TOLERANCE:g}, or not the same after a round trip: {', '.join(failed)}")


if __name__ == "__main__":
    main()
