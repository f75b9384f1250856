"""The functions whose gradients `experiments.studies.estimators` draws: linear contractions, and trained flows."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from experiments.configs.base import DensityConfig
from experiments.runs.tasks.images import load
from experiments.studies.parts.trained import trained_flow
from resflow_jax import Diagnostics, Estimator, certify, residual
from resflow_jax.data.batches import Batches
from resflow_jax.data.images import dequantize

Array = jax.Array
Gradient = Callable[[Array, Estimator], tuple[Array, Array, Diagnostics]]


class Target(NamedTuple):
    """A function whose gradients are drawn.

    Attributes:
      name: name in the table.
      gradient: (key, estimator) -> (flat gradient [P] of their mean, log-dets or log p [B], diagnostics).
      keys: number of gradients to draw.
      lipschitz: bound on the Lipschitz constants of its residual blocks.
      batch_size: number of examples that share a length.
    """

    name: str
    gradient: Gradient
    keys: int
    lipschitz: float
    batch_size: int


def spectra(dim: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Jacobians [D, D] of norm below one: {name: J}."""

    def symmetric(eigenvalues: np.ndarray) -> np.ndarray:
        q = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return (q * eigenvalues) @ q.T

    def random(norm: float) -> np.ndarray:
        j = rng.normal(size=(dim, dim))
        return norm * j / np.linalg.norm(j, 2)

    return {
        "symmetric, spectrum in [-0.9, -0.1]": symmetric(np.linspace(-0.9, -0.1, dim)),
        "saturated, half of the spectrum at -0.98": symmetric(np.where(np.arange(dim) % 2, -0.98, 0.49)),
        "symmetric, spectrum in [-0.98, 0.98]": symmetric(np.linspace(-0.98, 0.98, dim)),
        "random, norm 0.9": random(0.9),
        "random, norm 0.3": random(0.3),
        "symmetric, spectrum in [-0.9, 0.9]": symmetric(np.linspace(-0.9, 0.9, dim)),
        "symmetric, spectrum in [0.05, 0.3]": symmetric(np.linspace(0.05, 0.3, dim)),
    }


def synthetic_targets(batch_size: int, keys: int, seed: int, number: int | None) -> Iterator[Target]:
    """Targets g(x) = J x with the parameter J: the gradient with respect to J of the mean log-det of a batch.

    Args:
      batch_size: number of examples.
      keys: number of gradients to draw.
      seed: seed of the Jacobians.
      number: number of targets; None for all.
    """
    dim = 64
    chosen = spectra(dim, np.random.default_rng(seed)).items()
    for name, jacobian in islice(chosen, number):
        params, x = jnp.asarray(jacobian, float), jnp.zeros((batch_size, dim))
        lipschitz = float(np.linalg.norm(jacobian, 2)) * (1 + 1e-6)

        def gradient(
            key: Array, estimator: Estimator, params: Array = params, x: Array = x, lipschitz: float = lipschitz
        ):
            def loss(params):
                _, log_det, diagnostics = residual(
                    lambda j, x: x @ j.T,
                    params,
                    x,
                    key=key,
                    estimator=estimator,
                    lipschitz=lipschitz,
                    return_diagnostics=True,
                )
                return jnp.mean(log_det), (log_det, diagnostics)

            gradient, aux = jax.grad(loss, has_aux=True)(params)
            return gradient.ravel(), *aux

        yield Target(name, gradient, keys, lipschitz, batch_size)


def flow_target(run_config: DensityConfig, batch_size: int, keys: int, seed: int) -> Target:
    """The gradient, in all parameters, of the mean log-density of a batch of training images under a trained flow.

    Args:
      run_config: config of the run that trained the flow.
      batch_size: number of images.
      keys: number of gradients to draw.
      seed: seed of the batch and its noise.
    """
    data = load(run_config.data)
    flow = trained_flow(run_config)
    certificate = certify(flow)
    norms = certificate.norms
    print(
        f"{run_config.data.name}: layer norms {norms.min():.3f} to {norms.max():.3f}, median {np.median(norms):.3f} "
        f"(coefficient {run_config.model.coefficient})"
    )
    images = Batches(data.train, seed=seed, batch_size=batch_size)[0]
    x = dequantize(jnp.asarray(images), jax.random.key(seed), data.levels)
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    def gradient(key: Array, estimator: Estimator):
        def loss(params):
            flow = nnx.merge(graphdef, params, rest)
            log_prob, diagnostics = flow.log_prob(x, key=key, estimator=estimator, return_diagnostics=True)
            return jnp.mean(log_prob), (log_prob, diagnostics)

        gradient, aux = jax.grad(loss, has_aux=True)(params)
        return ravel_pytree(gradient)[0], *aux

    lipschitz = max(block.target_bound for block in certificate.blocks)
    return Target(f"{run_config.data.name} flow, batch {batch_size}", gradient, keys, lipschitz, batch_size)
