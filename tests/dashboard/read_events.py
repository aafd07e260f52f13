"""Compares an event folder, read by TensorBoard itself, with the metrics.jsonl it was written from.

read_events.py RUN EVENTS
"""

import json
import math
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import (
    COMPRESSED_HISTOGRAMS, HISTOGRAMS, SCALARS, TENSORS, EventAccumulator)


def in_effect(path):
    """Records without those that a later resume or rollback supersedes."""
    records = []
    for line in open(path, encoding="utf-8"):
        record = json.loads(line)
        if record["kind"] in ("resume", "rollback"):
            records = [it for it in records if it["step"] <= record["step"]]
        else:
            records.append(record)
    return records


def f32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


def main(run, events):
    everything = {SCALARS: 0, HISTOGRAMS: 0, TENSORS: 0, COMPRESSED_HISTOGRAMS: 0}
    read = EventAccumulator(events, size_guidance=everything)
    read.Reload()
    records = in_effect(f"{run}/metrics.jsonl")
    compared = 0
    for tag in read.Tags()["scalars"]:
        kind, key = tag.split("/")
        found = [(it.step, it.value) for it in read.Scalars(tag)]
        expected = [(it["step"], f32(it[key])) for it in records
                    if it["kind"] == kind and it.get(key) is not None]
        assert found == expected, (tag, found[:3], expected[:3], len(found), len(expected))
        compared += len(found)
    assert {"train/bpb", "train/grad_norm", "valid/bpb"} <= set(read.Tags()["scalars"])

    texts = {it.step: it.tensor_proto.string_val[0].decode() for it in read.Tensors("sample")}
    for it in records:
        if it["kind"] == "sample":
            whole = it["prompt"] + it["text"]
            assert texts[it["step"]] == "\n".join("    " + line for line in whole.split("\n"))
    assert read.summary_metadata["sample"].plugin_data.plugin_name == "text"

    histograms = 0
    for record in records:
        if record["kind"] != "inspect":
            continue
        for group in record["groups"]:
            of_step = [it for it in read.Histograms("weights/" + group["name"])
                       if it.step == record["step"]]
            assert len(of_step) == 1, (group["name"], record["step"], len(of_step))
            value = of_step[0].histogram_value
            assert list(value.bucket) == group["weights"]["counts"]
            assert math.isclose(value.max, group["weights"]["high"], rel_tol=1e-6)
            histograms += 1
    assert histograms > 0
    print(f"{compared} scalars, {len(texts)} texts, {histograms} histograms are what metrics.jsonl says")


main(*sys.argv[1:])
