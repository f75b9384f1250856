"""Density estimation: trains a residual flow on images, vectors or toy densities.

    python -m experiments.density [NAME] [--workdir DIR] [--steps N] [--batch-size B] [--seed S] ...
    python -m experiments.density images --data.path FOLDER     on your own images
    python -m experiments.density vectors --data.path TABLE     on your own vectors
    python -m experiments.density NAME --tiny                   two updates of a tiny flow, no data needed
    python -m experiments.density NAME --model glow             another kind of flow, in the place of a residual flow
    python -m experiments.density NAME --estimator exact        the exact log-det (or roulette, truncated)
    python -m experiments.density NAME --parallel shard_map     devices share a batch (or jit, pmap)
    python -m experiments.density NAME --distributed.auto       one of several processes, on a cluster

The likelihood of images is in bits/dim, that of vectors in nats: the natural logarithm of the density of a vector.
`--data.path` takes a folder of image files, a .npy or .npz file, or IDX files for images; for vectors it takes a .npy,
.npz or .csv file. The flow gets its input size from these data. Running the command again resumes from the last
checkpoint; Ctrl-C ends a run after the current step, with a checkpoint. Under the work directory it writes report.html,
with everything on one page, metrics.jsonl, the same metrics as TensorBoard events in tensorboard/, samples.png,
reconstructions.png, curves.png, pictures during training in training/, config.json, certificate.json and checkpoints/;
for data that are read from files also data.json, by which it notices later that they have changed. The validation
split chooses the checkpoint; the test split is evaluated once, at the end.
"""

from experiments.configs import CONFIGS, SUMMARIES
from experiments.configs.tiny import tiny
from experiments.runs.command import NamedCommand
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.own_data import fitted_to_data

COMMAND = NamedCommand(
    "experiments.density", __doc__, CONFIGS, tiny, first="digits", summaries=SUMMARIES, infer=fitted_to_data
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(launch, arguments)


if __name__ == "__main__":
    main()
