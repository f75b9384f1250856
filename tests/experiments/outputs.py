"""Reads what a run has written: metrics.jsonl, and the events that TensorBoard reads."""

import json
import struct

from tensorboardX.proto import event_pb2


def read_metrics(workdir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """What TensorBoard reads: {tag: {step: value}} of numbers, and the tags of everything else."""
    numbers, others = {}, set()
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    numbers.setdefault(value.tag, {})[event.step] = value.simple_value
                else:
                    others.add(value.tag)
    return numbers, others
