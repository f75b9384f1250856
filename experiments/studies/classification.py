"""Compares classifiers over seeds: architectures, hybrids with a density, few labels.

    python -m experiments.studies.classification [--data digits | fashion_mnist] [--part PART] [--seeds N] ...

trains every network with N seeds, by the settings of `experiments.classify`, each in a directory of its own under
DIR/DATA/, as c0.9_seed0. Finished runs are only read, and interrupted runs are resumed. The parts:

    architectures   standard ResNet, the i-ResNet without its bound ("vanilla"), and with c = 0.9 and c = 0.5
    hybrid          -log p(y | x) - weight * log p(x) with weights 0, 1/D and 1, and with a normal distribution of the
                    features for each class (`--model.head mixture`); networks without padding
    labels          100 and 1000 labels: supervised alone, hybrid on all images, class-conditional base. All take the
                    same number of steps of the same size, which is fair and makes the supervised runs repeat their
                    images

It prints Markdown tables, means over seeds with the standard errors of the mean, and writes them to
DIR/DATA/results.json with the figures of every run, and classification.png. Figures of a part replace earlier ones of
that part only.

On digits and 2 CPU cores a run takes one to two minutes, and all three parts with three seeds two hours.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import tyro

from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import ClassifyConfig, HybridConfig
from experiments.runs.command import Command, Output
from experiments.runs.devices import cores_for, use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.tables import markdown_table
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.class_pictures import save_comparison
from experiments.studies.parts.class_runs import DATASETS, Common, measured, with_coefficient
from resflow_jax.functional.checks import check_choice, check_count

Part = Literal["all", "architectures", "hybrid", "labels"]
PARTS = get_args(Part)[1:]
Weight = float | Literal["1/D"]
# The columns of each part: the figure's name, its title, the factor it is shown with, and its format.
COLUMNS = {
    "architectures": (
        ("error", "test error in %", 1, ".2f"),
        ("cross_entropy", "cross-entropy, nats", 1, ".4f"),
        ("ece", "ECE", 1, ".4f"),
        ("radius", "certified radius (median)", 1, ".1e"),
        ("parameters", "parameters", 1, ".0f"),
        ("step_seconds", "ms a step", 1e3, ".1f"),
    ),
    "hybrid": (
        ("error", "test error in %", 1, ".2f"),
        ("bits_per_dim", "bits/dim", 1, ".3f"),
        ("cross_entropy", "cross-entropy, nats", 1, ".4f"),
        ("ece", "ECE", 1, ".4f"),
        ("auroc_classes", "AUROC, max p(y given x)", 1, ".3f"),
        ("auroc_density", "AUROC, log p(x)", 1, ".3f"),
    ),
    "labels": (("error", "test error in %", 1, ".2f"), ("cross_entropy", "cross-entropy, nats", 1, ".4f")),
}


@dataclass(frozen=True)
class ClassificationConfig:
    """One run of `python -m experiments.studies.classification`.

    Attributes:
      data: name of the images.
      part: what is compared.
      seeds: number of random seeds, from 0 on, that every network is trained with.
      labels: numbers of labels of the part "labels".
      networks: which networks of a part are compared, by the names of their directories before the seed and the number
        of labels, as c0.9 and hybrid_1_over_d; by default all.
      workdir: directory that everything is written to, under the name of the images.
      steps: number of training steps of every run; by default that of the config of the data.
      examples: maximum number of test images; by default that of the config of the data.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.classify`.
      small: whether to use the small runs of `--tiny`, and the last network of each part alone.
    """

    data: Literal[DATASETS] = "digits"
    part: Part = "all"
    seeds: int = 3
    labels: tuple[int, ...] = (100, 1000)
    networks: tuple[str, ...] = ()
    workdir: Path = Path("runs/classification")
    steps: int | None = None
    examples: int | None = None
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("data", self.data, DATASETS)
        check_choice("part", self.part, get_args(Part))
        check_count("seeds", self.seeds, 1)
        if not self.labels or list(self.labels) != sorted(set(self.labels)):
            raise ValueError(f"labels: expected some numbers in increasing order, got {self.labels}")
        if self.steps is not None:
            check_count("steps", self.steps, 1)

    @property
    def common(self) -> Common:
        """What all runs have in common."""
        options = {"steps": self.steps, "data_dir": self.data_dir, "small": self.small, "examples": self.examples}
        return Common(self.data, self.workdir / self.data, **options)


def tiny(config: ClassificationConfig) -> ClassificationConfig:
    """Two updates of one tiny network of each part."""
    return replace(config, seeds=1, labels=(20,), workdir=Path("runs/classification_tiny"), small=True)


def output(config: ClassificationConfig) -> Output:
    """The tables, the picture, and a directory for each run."""
    return Output(config.workdir / config.data, ("results.json", "classification.png", "*_seed*/"))


COMMAND = Command("experiments.studies.classification", __doc__, ClassificationConfig(), tiny, output)


class Variant(NamedTuple):
    """A network that is compared.

    Attributes:
      title: its name in tables.
      name: first part of the names of its work directories; the seed follows.
      settings: settings of its runs, except for seed, steps and directories.
    """

    title: str
    name: str
    settings: ClassifyConfig

    @property
    def network(self) -> str:
        """The name without the number of labels."""
        return self.name.partition("_labels")[0]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(start, arguments)


def start(config: ClassificationConfig) -> None:
    """Runs on as many devices as can take equal shares of a batch."""
    use_all_cores(cores_for(config.common.run(config.common.base, "").batch_size))
    run(config)


def run(config: ClassificationConfig) -> dict[str, Any]:
    """Trains the missing runs, measures, prints and draws; returns the content of results.json.

    It is written after each network: {part: {title: {"mean": {figure: value}, "stderr": {...}, "runs": {...}}}}.
    """
    use_compilation_cache()
    path = config.common.directory / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part, found in variants(config).items():
        rows = {}
        for variant in found:
            rows[variant.title] = over_seeds(config, variant)
            config.common.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(results | {part: rows}, indent=2) + "\n")
        results = results | {part: rows}
        report(config, part, rows)
    results = {part: results[part] for part in PARTS if part in results}
    save_comparison(config.common.directory / "classification.png", results, config.data)
    return results


def variants(config: ClassificationConfig) -> dict[str, list[Variant]]:
    """The networks of each part, of a small study the last; parts without any of the chosen networks are left out.

    Raises:
      ValueError: for a name that no network of these parts has.
    """
    makers = {"architectures": _architectures, "hybrid": _hybrids, "labels": _with_few_labels}
    found = {part: list(make(config)) for part, make in makers.items() if config.part in ("all", part)}
    names = dict.fromkeys(variant.network for of in found.values() for variant in of)
    if unknown := [name for name in config.networks if name not in names]:
        raise ValueError(f"networks: expected some of {', '.join(names)} for {config.part}, got {', '.join(unknown)}")
    chosen = config.networks or tuple(names)
    found = {part: [variant for variant in of if variant.network in chosen] for part, of in found.items()}
    return {part: of[-1 if config.small else 0 :] for part, of in found.items() if of}


def _architectures(config: ClassificationConfig) -> Iterator[Variant]:
    yield Variant("standard ResNet", "standard", CLASS_CONFIGS[f"{config.data}_standard"])
    yield Variant("no bound (vanilla)", "vanilla", CLASS_CONFIGS[f"{config.data}_vanilla"])
    for c in (0.9, 0.5):
        yield Variant(f"i-ResNet, c = {c}", f"c{c}", with_coefficient(config.common.base, c))


def _hybrids(config: ClassificationConfig) -> Iterator[Variant]:
    base = _with_density(config.common.base)
    alone = _alone(config.common.base, base)
    yield Variant("pooled head, weight 0", alone, base)
    yield Variant("pooled head, weight 1/D", "hybrid_1_over_d", _hybrid(base, "1/D"))
    yield Variant("pooled head, weight 1", "hybrid_1", _hybrid(base, 1.0))
    yield Variant("mixture, weight 1", "mixture_1", _by_bayes(base, 1.0))


def _with_few_labels(config: ClassificationConfig) -> Iterator[Variant]:
    base = _with_density(config.common.base)
    kinds = {
        "supervised alone": ("c0.9", base),
        "hybrid, weight 1/D": ("hybrid_1_over_d", _hybrid(base, "1/D")),
        "mixture, weight 1/D": ("mixture_1_over_d", _by_bayes(base, "1/D")),
        "mixture, weight 1": ("mixture_1", _by_bayes(base, 1.0)),
    }
    for number in config.labels:
        for title, (name, settings) in kinds.items():
            yield Variant(f"{number} labels: {title}", f"{name}_labels{number}", replace(settings, labels=number))


def over_seeds(config: ClassificationConfig, variant: Variant) -> dict[str, Any]:
    """Mean and standard error of every figure over seeds, and the figures of every run; None for what is not finite."""
    runs = {
        str(seed): measured(config.common.run(variant.settings, f"{variant.name}_seed{seed}", seed))
        for seed in range(config.seeds)
    }
    mean, stderr = {}, {}
    for name in next(iter(runs.values())):
        values = [figures[name] for figures in runs.values()]
        finite = all(value is not None for value in values)
        mean[name] = float(np.mean(values)) if finite else None
        spread = finite and len(values) > 1
        stderr[name] = float(np.std(values, ddof=1) / np.sqrt(len(values))) if spread else None
    return {"mean": mean, "stderr": stderr, "runs": runs}


def report(config: ClassificationConfig, part: str, rows: dict[str, Any]) -> None:
    """Prints the table of a part, in Markdown."""
    columns = COLUMNS[part]
    cells = [[title, *(_cell(row, *column) for column in columns)] for title, row in rows.items()]
    how = f"means over {config.seeds} seeds, ± their standard error" if config.seeds > 1 else "one seed"
    print(f"\n{config.data}, {part}: {how}\n")
    print(markdown_table(["", *(title for _, title, *_ in columns)], cells))
    noise = max(row["mean"]["error_stderr"] for row in rows.values())
    print(f"\nThe choice of the test images, the same for all, has a standard error of its own, up to {noise:.2f} %.")


def _cell(row: dict[str, Any], name: str, title: str, factor: float, form: str) -> str:
    mean, stderr = row["mean"].get(name), row["stderr"].get(name)
    if mean is None:
        return ""
    spread = "" if not stderr else f" ± {factor * stderr:{form}}"
    return f"{factor * mean:{form}}{spread}"


def _with_density(config: ClassifyConfig) -> ClassifyConfig:
    """The same network without padding, which a density of x forbids."""
    return replace(config, model=replace(config.model, padding=0))


def _alone(padded: ClassifyConfig, base: ClassifyConfig) -> str:
    """The name of the classifier without a density: that of the part "architectures" if the network is the same."""
    return "c0.9" if padded == base else "c0.9_unpadded"


def _hybrid(config: ClassifyConfig, weight: Weight) -> ClassifyConfig:
    return replace(config, hybrid=HybridConfig(weight))


def _by_bayes(config: ClassifyConfig, weight: Weight) -> ClassifyConfig:
    """The hybrid with a normal distribution of the features for each class in the place of the head."""
    model = replace(config.model, head="mixture", head_channels=None)
    return replace(config, model=model, hybrid=HybridConfig(weight))


if __name__ == "__main__":
    main()
