"""The models that are compared: which data they are for, what they need, and the settings that are tried for each.

    residual                                     the residual flow of the shipped config of the data
    nice, real_nvp, glow, flow_pp, neural_spline our coupling flows, as `--model` of `experiments.density`
    made, maf                                    our autoregressive flows, of vectors
    ffjord                                       our continuous flow, through diffrax
    zuko_nsf, zuko_maf                           autoregressive flows of zuko; images are flattened
    normflows_glow                               Glow of normflows, of images

The search tries three learning rates with the widths that ship, and then two other widths with the best of them, each
for a short time.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from experiments.configs.base import DensityConfig, RunConfig
from experiments.runs.models import IMAGES, LEARNING_RATE, VECTORS
from resflow_jax import (
    AutoregressiveFlowConfig,
    Exact,
    ImageFlowConfig,
    ImageTransform,
    ResNetConditioner,
    Roulette,
    VectorFlowConfig,
)
from resflow_jax.io.config_json import as_json

WITNESSES = ("zuko_nsf", "zuko_maf", "normflows_glow")
ON_IMAGES = (*IMAGES, *WITNESSES)
ON_VECTORS = (*VECTORS, *WITNESSES[:2])
MODELS = tuple(dict.fromkeys((*IMAGES, *VECTORS, *WITNESSES)))
_NEEDS = {
    "ffjord": ("diffrax", "diffrax"),
    "zuko_nsf": ("zuko", "bench"),
    "zuko_maf": ("zuko", "bench"),
    "normflows_glow": ("normflows", "bench"),
}


@dataclass(frozen=True)
class Candidate:
    """Settings that the search tries.

    Attributes:
      width: factor on the widths of all networks.
      learning_rate: peak learning rate.
    """

    width: float
    learning_rate: float

    def __str__(self) -> str:
        return f"width x{self.width:g}, learning rate {self.learning_rate:g}"


def models_for(config: RunConfig) -> tuple[str, ...]:
    """The models for the data of a config."""
    return ON_IMAGES if isinstance(config, DensityConfig) else ON_VECTORS


def lack(model: str) -> str | None:
    """What has to be installed for a model, in words; None if nothing is missing."""
    package, extra = _NEEDS.get(model, (None, None))
    if package is None or find_spec(package) is not None:
        return None
    return f"{model} needs {package}: pip install resflow_jax[{extra}]"


def with_rates(model: str, config: RunConfig) -> tuple[Candidate, ...]:
    """The learning rate that ships, a third of it, and three times it, with the widths that ship."""
    base = config.optimizer.learning_rate
    base = base if model == "residual" else min(LEARNING_RATE, base)
    return tuple(Candidate(1.0, float(f"{rate:.2g}")) for rate in (base, base / 3, 3 * base))


def with_widths(best: Candidate, config: RunConfig) -> tuple[Candidate, ...]:
    """The best of `with_rates` with other widths: on images a half and a quarter, on vectors double and four times.

    Networks of images are made for longer runs on more cores, those of vectors are small.
    """
    widths = (0.5, 0.25) if isinstance(config, DensityConfig) else (2.0, 4.0)
    return tuple(replace(best, width=width) for width in widths)


def gives_bound(model: str, config: RunConfig) -> bool:
    """Whether the log p of a model is a lower bound, by a variational dequantisation of images."""
    is_own = model in models_for(config) and not is_witness(model)
    return is_own and _is_variational(VECTORS[model](config.model))


def _is_variational(model: Any) -> bool:
    data = getattr(model, "data", None)
    return isinstance(data, ImageTransform) and data.dequantization.couplings > 0


def packages(model: str) -> tuple[str, ...]:
    """The packages that a model needs besides those of this library."""
    return _NEEDS[model][:1] if model in _NEEDS else ()


def is_witness(model: str) -> bool:
    """Whether a model comes from a library in PyTorch."""
    return model in WITNESSES


def with_contender(config: RunConfig, model: str, candidate: Candidate, seed: int) -> RunConfig:
    """The config of a run of one of our models; of a witness the config with the residual flow, for its data.

    The estimator of the config is that of its residual flow. Others take `Roulette()` in its place, unless it is exact.
    """
    optimizer = replace(config.optimizer, learning_rate=candidate.learning_rate)
    flow = config.model if is_witness(model) else widened(VECTORS[model](config.model), candidate.width)
    estimator = config.estimator if model == "residual" or isinstance(config.estimator, Exact) else Roulette()
    return replace(config, model=flow, optimizer=optimizer, estimator=estimator, seed=seed)


def fingerprint(model: str, config: RunConfig) -> str:
    """A hash of the settings of a model and its training that neither a `Candidate` nor a job sets.

    Results with another fingerprint are of an earlier config, and are not used. Of a witness it has only data and
    training, since its sizes are in `torch_flows`.
    """
    run = with_contender(config, model, Candidate(1.0, 1.0), 0)
    flow = getattr(run.model.data, "logit_alpha", None) if is_witness(model) else run.model
    settings = {"model": flow, "estimator": run.estimator, "optimizer": run.optimizer, "batch_size": run.batch_size}
    return hash_of(settings)


def hash_of(settings: Any) -> str:
    """A short hash of settings, as of a config."""
    return hashlib.sha256(json.dumps(as_json(settings), sort_keys=True).encode()).hexdigest()[:16]


def widened(model: Any, factor: float) -> Any:
    """The same flow with the widths of its networks times a factor."""

    def times(widths: Any) -> Any:
        if isinstance(widths, int):
            return max(1, round(factor * widths))
        return tuple(times(width) for width in widths)

    if _is_variational(model):
        noise = replace(model.data.dequantization, width=times(model.data.dequantization.width))
        model = replace(model, data=replace(model.data, dequantization=noise))
    match model:
        case ImageFlowConfig():
            tail = replace(model.tail, hidden=times(model.tail.hidden))
            return replace(model, hidden_channels=times(model.hidden_channels), tail=tail)
        case VectorFlowConfig() | AutoregressiveFlowConfig():
            return replace(model, hidden=times(model.hidden))
    network = model.conditioner
    name = "width" if isinstance(network, ResNetConditioner) else "hidden"
    return replace(model, conditioner=replace(network, **{name: times(getattr(network, name))}))
