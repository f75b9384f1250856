"""Density estimation: trains a residual flow on images, vectors or toy densities and reports its likelihood.

    python -m experiments.density [NAME] [--workdir DIR] [--steps N] [--batch-size B] [--seed S] ...
    python -m experiments.density NAME --data.path IMAGES --model.shape H W C     on your own images
    python -m experiments.density vectors --data.path FILE --model.dim D          on your own vectors
    python -m experiments.density NAME --tiny                                     two updates of a tiny flow, no data
    python -m experiments.density NAME --parallel shard_map                       devices share a batch (or jit, pmap)
    python -m experiments.density NAME --distributed.auto                         one of several processes, on a cluster

`--help` behind a name lists every setting. For images `--data.path` takes a folder of image files, a .npy or .npz file,
or IDX files; for vectors a .npy, .npz or .csv file. The same command again resumes from the last checkpoint; Ctrl-C
ends a run behind its step, with one. Under the work directory it writes report.html, with everything on one page,
metrics.jsonl, the same as TensorBoard events in tensorboard/, samples.png, reconstructions.png, curves.png, pictures
along training in training/, config.json, certificate.json and checkpoints/. The validation split chooses the
checkpoint; the test split is read once, at the end.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

import tyro

from experiments import train
from experiments.configs import (
    ablations,
    celebahq64,
    celebahq256,
    cifar10,
    cifar10_densenet,
    digits,
    digits_densenet,
    fashion_mnist,
    imagenet32,
    imagenet64,
    mnist,
    photographs,
    svhn,
    toy,
    vectors,
)
from experiments.configs.base import DensityConfig, RunConfig, VectorsConfig
from experiments.configs.toy import ToyConfig
from experiments.distributed import all_end_with_one, check_same, join
from experiments.images import ImageTask
from experiments.run import cores_for, use_all_cores, use_xla_flags
from experiments.train import Task
from experiments.vectors import ToyTask, VectorTask
from resflow_jax import Estimate

MODULES = (
    digits,
    digits_densenet,
    photographs,
    mnist,
    fashion_mnist,
    cifar10,
    cifar10_densenet,
    svhn,
    imagenet32,
    imagenet64,
    celebahq64,
    celebahq256,
    vectors,
)
_SUMMARIES = {module.__name__.rpartition(".")[2]: module.__doc__.splitlines()[0] for module in MODULES}
CONFIGS = {name: module.CONFIG for name, module in zip(_SUMMARIES, MODULES, strict=True)}
CONFIGS["fashion_mnist_small"], _SUMMARIES["fashion_mnist_small"] = fashion_mnist.SMALL, _SUMMARIES["fashion_mnist"]
for module in (ablations, toy):
    CONFIGS |= module.CONFIGS
    _SUMMARIES |= dict.fromkeys(module.CONFIGS, module.__doc__.splitlines()[0])


def main(arguments: list[str] | None = None, configs: Mapping[str, RunConfig] = CONFIGS) -> None:
    """Parses the command line, of which NAME is that of one of the configs, and runs; `digits` if none is given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    use_xla_flags()
    change = tiny if "--tiny" in arguments else lambda config: config
    arguments = [argument for argument in arguments if argument != "--tiny"]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["digits", *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in configs:
        sys.exit(f"NAME: expected one of {', '.join(configs)}; got {arguments[0]!r}")
    named = {name: (_SUMMARIES[name], change(config)) for name, config in configs.items()}
    config = tyro.extras.overridable_config_cli(
        named, args=arguments, prog="python -m experiments.density", description=__doc__
    )
    start(config)


def start(config: RunConfig) -> None:
    """Takes the devices, joins the other processes if there are any, and runs."""
    use_all_cores(cores_for_run(config))
    join(config.distributed)
    with all_end_with_one():
        run(config)


def cores_for_run(config: RunConfig) -> int:
    """As many CPU devices as the mesh has, or else as can take equal shares of a batch, in each process.

    How many processes a cluster has is not known yet: on its CPUs $JAX_NUM_CPU_DEVICES says how many devices each has.
    """
    processes = config.distributed.num_processes or 1
    if config.mesh.data is not None:
        return max(1, config.mesh.data * config.mesh.model // processes)
    shared = max(1, config.batch_size // processes)
    return max(config.mesh.model, cores_for(shared) // config.mesh.model * config.mesh.model)


def tiny(config: RunConfig) -> RunConfig:
    """A run of seconds to minutes through the same code: two updates of a tiny flow of the same kind.

    In the place of images that may not be there, crops of the embedded photographs of their shape and bits; in the
    place of your own vectors the embedded ones.
    """
    steps = 2 * config.optimizer.accumulate
    config = replace(
        config,
        workdir=config.workdir.with_name(f"{config.workdir.name}_tiny"),
        steps=steps,
        batch_size=8,
        evaluation=replace(config.evaluation, examples=8, draws=1, every=steps),
    )
    if not isinstance(config, DensityConfig):
        return replace(config, model=replace(config.model, blocks=2, hidden=(8,)))
    model = replace(
        config.model,
        blocks=(1,) * len(config.model.blocks),
        hidden_channels=8,
        tail=replace(
            config.model.tail,
            blocks=min(1, config.model.tail.blocks),
            hidden=8,
            densenet_first=8,
            densenet_growth=4,
        ),
        densenet=replace(config.model.densenet, growth=4),
    )
    height, _, channels = model.shape
    embedded = replace(config.data, name="photographs", size=height, channels=channels)
    return replace(config, data=config.data if config.data.name == "digits" else embedded, model=model)


def task_of(config: RunConfig) -> Task:
    """What a config is to learn, with its data."""
    return {DensityConfig: ImageTask, VectorsConfig: VectorTask, ToyConfig: ToyTask}[type(config)](config)


def run(config: RunConfig) -> Estimate:
    """Trains (or goes on training), evaluates, draws. Returns bits/dim of the test images, or nats of other data."""
    check_same(config)
    return train.run(config, task_of(config))


if __name__ == "__main__":
    main()
