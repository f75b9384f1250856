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

from experiments.configs import CONFIGS
from experiments.runs.command import named_config
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    arguments = sys.argv[1:] if arguments is None else arguments
    program = "python -m experiments.density"
    launch(named_config(arguments, CONFIGS, prog=program, description=__doc__, default="digits"))


if __name__ == "__main__":
    main()
