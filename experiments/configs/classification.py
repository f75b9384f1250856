"""The settings of a run of `python -m experiments.classify`."""

from dataclasses import dataclass
from typing import Literal

from experiments.configs.base import DataConfig, RunConfig
from resflow_jax import ClassifierConfig
from resflow_jax.functional.checks import check_count
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.layers.without_log_det import WithoutLogDet


@dataclass(frozen=True)
class HybridConfig:
    """The density of x beside the classes: loss = -log p(y | x) - weight * log p(x), in nats.

    Attributes:
      weight: weight of log p(x): 0 for a classifier alone, 1 for the joint density, "1/D" for one over the number of
        values of an image. A positive weight needs a model without padding and with a coefficient.
    """

    weight: float | Literal["1/D"] = 0.0

    def __post_init__(self):
        if self.weight != "1/D" and (isinstance(self.weight, str) or not 0 <= self.weight < float("inf")):
            raise ValueError(f"hybrid.weight: expected 0, a positive number or '1/D', got {self.weight!r}")

    def of_dim(self, dim: int) -> float:
        """The weight for images of `dim` values."""
        return 1 / dim if self.weight == "1/D" else self.weight


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """One run of `python -m experiments.classify`.

    Without a density the settings of estimators and `evaluation.draws` change nothing. `annealing` stays 0: the loss
    has a weight of log p(x) as a whole, in `hybrid`.

    Attributes:
      data: the images, with labels.
      model: the network.
      hybrid: weight of the density of x in the loss.
      dropout: probability with which an element of a residual branch is set to zero in training; 0 beside a density.
      labels: number of training images whose labels are used, equally many of each class; None for all. With a density
        half of each batch has labels and half is drawn from all images; without, the others are not used.
    """

    data: DataConfig
    model: ClassifierConfig
    hybrid: HybridConfig = HybridConfig()
    dropout: float = 0.0
    labels: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.annealing:
            raise ValueError(
                f"annealing: expected 0 for a classifier, whose loss has hybrid.weight, got {self.annealing}"
            )
        if self.fit_lengths and not self.hybrid.weight:
            raise ValueError("fit_lengths: expected False without a density (hybrid.weight 0), got True")
        WithoutLogDet(self.dropout)  # checks it
        if self.dropout and self.hybrid.weight:
            raise ValueError(f"dropout: expected 0 beside hybrid.weight {self.hybrid.weight}, got {self.dropout}")
        if self.labels is not None:
            check_count("labels", self.labels, 1)
        if isinstance(self.model, ClassifierConfig):
            if self.hybrid.weight and not self.model.has_density:
                raise ValueError(
                    f"hybrid.weight: expected 0 for model.{self.model.no_density}, got {self.hybrid.weight}"
                )
            if self.model.architecture == "standard" and max(self.model.blocks) == 1:
                raise ValueError(
                    "model.blocks: expected two or more in a stage of the standard architecture, got "
                    f"{self.model.blocks}"
                )
            if self.model.head == "mixture" and not self.hybrid.weight:
                raise ValueError("hybrid.weight: expected a positive number with model.head 'mixture', got 0")


@dataclass(frozen=True, kw_only=True)
class ImportedClassifyConfig(ClassifyConfig):
    """The run of an imported file with a classifier; see `experiments.import_torch`.

    Attributes:
      model: the flow with its classifier.
    """

    model: TorchImageConfig

    def __post_init__(self):
        super().__post_init__()
        if not self.model.classes:
            raise ValueError("model.classes: expected a flow with a classifier, got 0 classes")
        if self.dropout:
            raise ValueError(f"dropout: expected 0 for an imported flow, which has none, got {self.dropout}")
