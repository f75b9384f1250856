"""Classification of images: trains a residual network, invertible or not.

    python -m experiments.classify [NAME] [--workdir DIR] [--steps N] [--batch-size B] [--seed S] ...
    python -m experiments.classify NAME_vanilla                 the same network without the bound
    python -m experiments.classify NAME_standard                a standard residual network of the same size
    python -m experiments.classify images --data.path FOLDER    your own images, one subfolder a class
    python -m experiments.classify NAME --hybrid.weight 1/D     classes and the density of x together
    python -m experiments.classify NAME --labels 100 ...        only 100 training images with a label
    python -m experiments.classify NAME --tiny                  two updates of a tiny network, no data needed

With a density (`--hybrid.weight`, for networks without padding) the loss is -log p(y | x) - weight * log p(x), and the
bits/dim are reported too. `--model.head mixture` classifies by Bayes' rule, with a normal distribution for each class.
Running the command again resumes from the last checkpoint; Ctrl-C ends a run after the current step, with a checkpoint.
Under the work directory it writes report.html, metrics.jsonl, tensorboard/, reconstructions.png, confusion.png,
curves.png, with a density samples.png, pictures during training in training/, config.json, certificate.json and
checkpoints/, for images that are read from files also data.json. The validation split chooses the checkpoint; the test
split is evaluated once, at the end. The last line is the test error in %, with its standard error.
"""

from experiments.configs.classes import CLASS_CONFIGS, CLASS_SUMMARIES
from experiments.configs.tiny import tiny
from experiments.runs.command import NamedCommand
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.own_data import fitted_to_data

COMMAND = NamedCommand(
    "experiments.classify",
    __doc__,
    CLASS_CONFIGS,
    tiny,
    first="digits",
    summaries=CLASS_SUMMARIES,
    infer=fitted_to_data,
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(launch, arguments)


if __name__ == "__main__":
    main()
