"""The cost of data parallelism: collectives of a step on 1, 2, 4 and 8 devices.

    python -m experiments.studies.weak_scaling [--devices 1 2 4 8] [--per-device B] [--workdir DIR]

The study takes the flow of `experiments.density digits_uniform` with a fixed number of images per device. It forces the
number of CPU devices, which may exceed the number of cores: what devices send each other does not depend on their
speed. It reads the number and bytes of the collectives from the compiled HLO of the step, for each way to run it, and
once more with parameters divided among all devices. If there is a core for each device, it also times a step.

The estimate is for the papers' CIFAR-10 flow. It divides the time of one ring all-reduce of the gradients (Patarasuk &
Yuan 2009),

    2 (n - 1) / n * bytes / bandwidth

with the network's published bandwidth per direction, by the time of the step's matrix products at 30 % of the published
peak speed, which is an assumption. Communication and computation do not overlap. Prints two tables and writes
weak_scaling.json. It takes about 5 minutes on 2 CPU cores.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.collectives import collectives
from experiments.studies.parts.competitors import (
    CASES,
    Case,
    evaluation_flops,
    make_flow,
    make_trainer,
    photograph_crops,
)
from resflow_jax import ResidualFlow, Roulette
from resflow_jax.functional.checks import check_count
from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.io.config_json import as_json
from resflow_jax.training.parallel import STRATEGIES, make_mesh
from resflow_jax.training.placement import Placement

EVALUATIONS = 11  # evaluations of g in a training step, forward and backward, as `experiments.benchmark` counts them
SHARE_OF_PEAK = 0.3


@dataclass(frozen=True)
class Network:
    """Published figures of accelerators and of the network between them.

    Attributes:
      flops: peak operations per second of the matrix products that JAX uses for float32.
      near: bytes per second in each direction of one device, within `group` devices.
      group: number of devices that the fast network joins.
      far: bytes per second in each direction of all links that leave a group.
      closed: smallest number of devices on which the axes of the network are rings; fewer have half of the bandwidth.
    """

    flops: float
    near: float
    group: int
    far: float
    closed: int


# NVIDIA H100 SXM: 495 TFLOP/s dense in TF32, NVLink 4 at 450 GB/s each way for 8 GPUs, eight 400 Gb/s cards a node.
# https://jax-ml.github.io/scaling-book/gpus
# TPU v5p: 459 TFLOP/s in bfloat16, ICI at 600 GB/s each way, pods of up to 8960 chips, rings from 4x4x4 on;
# https://docs.cloud.google.com/tpu/docs/v5p, https://jax-ml.github.io/scaling-book/tpus
# TPU v5e: 197 TFLOP/s in bfloat16, ICI at 200 GB/s each way, pods of 256 with 6.4 Tb/s each, rings of 16;
# https://docs.cloud.google.com/tpu/docs/v5e
NETWORKS = {
    "H100": Network(495e12, 450e9, 8, 400e9, closed=1),
    "TPU v5p": Network(459e12, 600e9, 8960, np.inf, closed=64),
    "TPU v5e": Network(197e12, 200e9, 256, 800e9, closed=256),
}


@dataclass(frozen=True)
class WeakScalingConfig:
    """The settings of the study.

    Attributes:
      devices: numbers of devices.
      per_device: number of images on each device.
      steps: number of timed steps, if there are enough cores; the median is reported.
      accelerators: numbers of devices of the estimate.
      images: images per device of the estimate.
      workdir: directory that weak_scaling.json is written to.
      small: whether to use the flow of `--tiny`.
    """

    devices: tuple[int, ...] = (1, 2, 4, 8)
    per_device: int = 32
    steps: int = 20
    accelerators: tuple[int, ...] = (8, 64, 512)
    images: int = 8
    workdir: Path = Path("runs/weak_scaling")
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        for name in ("devices", "accelerators"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected one number or more, got none")
            for number in getattr(self, name):
                check_count(name, number, 1)
        for name in ("per_device", "steps", "images"):
            check_count(name, getattr(self, name), 1)


def tiny(config: WeakScalingConfig) -> WeakScalingConfig:
    """A tiny flow on one device and two."""
    return replace(config, devices=(1, 2), per_device=2, steps=2, workdir=Path("runs/weak_scaling_tiny"), small=True)


COMMAND = Command(
    "experiments.studies.weak_scaling",
    __doc__,
    WeakScalingConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("weak_scaling.json",)),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(start, arguments)


def start(config: WeakScalingConfig) -> None:
    """Forces the largest requested number of devices, and runs."""
    use_all_cores(max(config.devices))
    use_compilation_cache()
    run(config, CASES["tiny" if config.small else "digits"])


def run(config: WeakScalingConfig, case: Case = CASES["digits"]) -> dict[str, Any]:
    """Measures and prints; returns the content of weak_scaling.json."""
    config.workdir.mkdir(parents=True, exist_ok=True)
    most = max(config.devices)
    layouts = [(number, 1, strategy, "replicated") for number in config.devices for strategy in STRATEGIES]
    layouts += [(most, 1, "jit", "full")] + [(most // 2, 2, "jit", "model")] * (most % 2 == 0)
    rows = [measure(case, config, *layout) for layout in layouts]
    print_rows(rows)
    estimates = [estimate(name, number, config.images) for name in NETWORKS for number in config.accelerators]
    print_estimates(estimates, config.images)
    result = as_json({"measured": rows, "estimated": estimates})
    write_atomically(config.workdir / "weak_scaling.json", json.dumps(result, indent=2) + "\n")
    return result


def measure(
    case: Case, config: WeakScalingConfig, data: int, model: int, strategy: str, parameters: str
) -> dict[str, Any]:
    """The collectives of a step on a number of devices, and its time if each device has a core."""
    case = replace(case, batch_size=data * config.per_device)
    images = photograph_crops(case.config.shape, case.batch_size)
    flow = make_flow(case, images)
    trainer = make_trainer(nnx.split(flow)[0])
    placement = Placement(trainer, make_mesh(data, model, jax.devices()[: data * model]), strategy, parameters)
    state = placement.place(trainer.create_state(flow, Roulette()))
    batch, key = placement.place_batch(images), jax.random.key(0)
    lowered = placement.step.lower(state, batch, key)
    step, metrics = lowered.compile(), lowered.out_info[1]
    found = collectives(step.as_text())
    seconds = None
    if data * model <= number_of_cores():
        times = []
        for _ in range(config.steps + 1):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, key))
            times.append(time.perf_counter() - began)
        seconds = float(np.median(times[1:]))
    scalars = metrics["loss"], metrics["diagnostics"]
    return {
        "devices": data * model,
        "strategy": strategy,
        "parameters": parameters,
        "number": sum(one.times for one in found),
        "bytes": sum(one.nbytes * one.times for one in found),
        "kinds": sorted({one.kind for one in found}),
        "gradient_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))),
        "scalar_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(scalars)),
        "seconds": seconds,
    }


def estimate(name: str, number: int, images: int) -> dict[str, Any]:
    """Seconds of the all-reduce of CIFAR-10 gradients on `number` devices, and of the products of a step."""
    network = NETWORKS[name]
    size, flops = _cifar10()
    # Across groups a ring uses all links of a group at once; the slower network limits it.
    near = network.near if number >= network.closed else network.near / 2
    bandwidth = near if number <= network.group else min(near, network.far)
    return {
        "accelerator": name,
        "devices": number,
        "all_reduce": 2 * (number - 1) / number * size / bandwidth,
        "products": images * EVALUATIONS * flops / (SHARE_OF_PEAK * network.flops),
    }


@cache
def _cifar10() -> tuple[int, float]:
    """Bytes of the gradients of the papers' flow, and operations of one evaluation of g in all its blocks."""
    flow = nnx.eval_shape(lambda: ResidualFlow(CASES["cifar10"].config, rngs=nnx.Rngs(0)))
    return sum(4 * leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))), evaluation_flops(flow)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints the table of the compiled steps."""
    heads = f"{'collectives':>12}{'bytes':>12}{'of gradients':>14}{'ms':>8}  kinds"
    print(f"{'devices':>8} {'strategy':<10}{'parameters':<12}{heads}")
    for row in rows:
        time_ = "" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"
        print(
            f"{row['devices']:>8} {row['strategy']:<10}{row['parameters']:<12}"
            f"{row['number']:>12.0f}{row['bytes']:>12.0f}"
            f"{row['gradient_bytes']:>14}{time_:>8}  {', '.join(row['kinds'])}"
        )


def print_estimates(rows: list[dict[str, Any]], images: int) -> None:
    """Prints the table of the estimate."""
    print(f"\nCIFAR-10 flow of the papers, {images} images a device, products at {SHARE_OF_PEAK:.0%} of the peak")
    print(f"{'':10}{'devices':>8}{'all-reduce, ms':>16}{'products, ms':>14}{'share':>8}")
    for row in rows:
        print(
            f"{row['accelerator']:<10}{row['devices']:>8}{1e3 * row['all_reduce']:>16.2f}{1e3 * row['products']:>14.2f}"
            f"{row['all_reduce'] / row['products']:>8.1%}"
        )


if __name__ == "__main__":
    main()
