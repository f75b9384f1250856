"""Draws samples of a saved flow in batches on all devices, and reports the convergence of their solves."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.runs.devices import devices_for
from experiments.runs.parts import over_parts
from experiments.runs.saved import SavedFlow
from experiments.runs.tasks.class_samples import is_mixture, of_classes
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.images import ImageTask
from experiments.runs.tasks.task import Task
from resflow_jax.data.images import ImageSplits
from resflow_jax.functional.checks import check_count
from resflow_jax.models.flow import Flow

Array = jax.Array


def check_drawing(temperature: float, seed: int, batch_size: int) -> None:
    """Raises ValueError for settings that samples cannot be drawn with."""
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    check_count("seed", seed, 0)
    check_count("batch_size", batch_size, 1)


Latents = Callable[[Array], Array]  # from numbers [B] to the latents z [B, D] of these numbers
Decode = Callable[[Latents, int], Iterator[tuple[np.ndarray, np.ndarray]]]


def decoder(flow: Flow, batch_size: int) -> Decode:
    """A function of latents and their number N that gives f^-1(z) and whether each solve converged.

    Images are clipped to [0, 1]. The inverse is computed in batches of one size, so that it is compiled once; the
    surplus of the last batch is dropped.
    """

    def solve(flow: Flow, z: Array) -> tuple[Array, Array]:
        x, status = flow.inverse(z.reshape(-1, *flow.latent_shape), return_status=True)
        x = x if flow.support is None else jnp.clip(x, *flow.support)
        return x, status.converged.all(axis=0)

    solve_parts = over_parts(solve, flow)

    def decode(latents: Latents, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in tqdm(range(0, number, batch_size), unit="batch", disable=None, leave=False):
            z = latents(jnp.minimum(first + jnp.arange(batch_size), number - 1))
            found = jax.device_get(solve_parts(z.reshape(devices_for(batch_size), -1, flow.dim)))
            x, converged = (leaf[: number - first] for leaf in found)
            yield x, converged

    return decode


def image_splits(task: Task) -> ImageSplits | None:
    """The images of a run, without labels; None for a run on vectors.

    Raises:
      ValueError: for a classifier without a density, which has no samples.
    """
    if not isinstance(task, ClassTask):
        return task.splits if isinstance(task, ImageTask) else None
    if not task.density_weight:
        raise ValueError(
            "run_dir: expected a run with a density of x, which has samples, got a classifier alone (hybrid.weight 0)"
        )
    return task.splits.images


def drawn_samples(
    decode: Decode, saved: SavedFlow, number: int, seed: int, temperature: float, label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns samples, bytes [N, H, W, C] or vectors [N, D] in the units of the data, and whether each converged."""
    images = image_splits(saved.task)
    batches = decode(base_latents(saved.flow, seed, temperature, label), number)
    if images is not None:
        batches = ((to_bytes(x, images.levels), converged) for x, converged in batches)
    samples, converged = map(np.concatenate, zip(*batches, strict=True))
    return samples if images is not None else saved.task.in_own_units(samples), converged


def base_latents(flow: Flow, seed: int, temperature: float, label: int | None = None) -> Latents:
    """Latents [B, D] of the base with its deviations times the temperature, or of one class; each has its own key.

    With a standard normal base they are T e, with e from N(0, I) and the temperature T.
    """

    @jax.jit
    def latents(n: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), n)
        if is_mixture(flow) and label is None:
            z = jax.vmap(lambda key: flow.base.sample(key, 1, None, temperature)[0])(keys)
            return z.reshape(-1, flow.dim)
        noise = jax.vmap(lambda key: jax.random.normal(key, (flow.dim,), flow.dtype))(keys)
        if label is None:
            return temperature * noise
        z = of_classes(flow.base, jnp.full(n.shape, label), noise.reshape(-1, *flow.latent_shape), temperature)
        return z.reshape(-1, flow.dim)

    return latents


def to_bytes(images: np.ndarray, levels: int) -> np.ndarray:
    """Quantises images in [0, 1] to `levels` levels, evenly spread over 0..255, as uint8."""
    quantized = np.minimum(np.floor(images * levels), levels - 1)
    return np.rint(quantized * (255 / (levels - 1))).astype(np.uint8)


def convergence(converged: np.ndarray) -> str:
    """The text of a closing table on solves: all converged, or how many did not, with the numbers of the first ten."""
    failed = np.flatnonzero(~converged)
    if not len(failed):
        return "all converged"
    named = ", ".join(f"{n:05}" for n in failed[:10]) + (", ..." if len(failed) > 10 else "")
    return f"{len(failed)} of {len(converged)} DID NOT CONVERGE: {named}"
