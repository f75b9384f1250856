"""Samples of a trained flow, and interpolations between images in its latent space.

    python -m experiments.sample RUN_DIR [--number N] [--temperature T] [--seed S] [--format png npz]
        [--interpolate I J] [--workdir OUT]

RUN_DIR is the work directory of an `experiments.density` run, finished or still running. A sample is x = f^-1(T e) with
e from N(0, I), clipped to [0, 1] and quantised to the levels of the data; sample n depends on the seed, on n and on
nothing else. `--interpolate` takes the numbers of two test images x and y, and goes from f(x) to f(y) along a great
circle (White 2016, arXiv 1609.04468):

    z(t) = (sin((1 - t) a) f(x) + sin(t a) f(y)) / sin(a),    a the angle between f(x) and f(y)

so that latents in between are about as long as those of images; on the straight line they would be too short. The
ends are the reconstructions f^-1(f(x)) and f^-1(f(y)).

Under OUT, by default RUN_DIR/sampling, it writes samples.png (a grid of the first 64); with `--format png`
samples/00000.png, 00001.png, ..., in place of those of an earlier call; with `--format npz` samples.npz, whose array
`images` is uint8 [N, H, W, C] in 0..255, as programs that compute the FID read it; by default both; and
interpolation.png. Of a flow of vectors samples.png shows the samples beside data, and samples.npz has the array
`vectors`, floats [N, D]. Solves that did not converge are counted and named in the closing table; their samples are
written all the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from experiments import pictures
from experiments.images import ImageTask
from experiments.parts import over_parts
from experiments.run import devices_for, print_table, use_all_cores, use_compilation_cache, use_xla_flags
from experiments.saved import SavedFlow, Weights, saved_flow
from experiments.vectors import VectorTask
from resflow_jax import ImageFlowConfig, ResidualFlow
from resflow_jax.functional.checks import check_count

Array = jax.Array

SHOWN = 64  # samples in the grid
FRAMES = 11  # of an interpolation


@dataclass(frozen=True)
class SampleConfig:
    """One run of `python -m experiments.sample`.

    Attributes:
      run_dir: work directory of a run of `experiments.density`.
      weights: of the best validation, or of the latest checkpoint.
      number: of samples.
      temperature: deviation of the latents; 1 for samples of the flow's density, less for more typical images.
      seed: of the latents.
      batch_size: samples at once, shared by all devices.
      format: files of samples beside the grid; of vectors there are no PNG files.
      interpolate: numbers of two test images to interpolate between.
      workdir: where everything is written; by default RUN_DIR/sampling.
      data: where the data of the run have been moved to, if they have.
    """

    run_dir: tyro.conf.Positional[Path]
    weights: Weights = "best"
    number: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    format: tuple[Literal["png", "npz"], ...] = ("png", "npz")
    interpolate: tuple[int, int] | None = None
    workdir: Path | None = None
    data: Path | None = None

    def __post_init__(self):
        check_count("number", self.number, 1)
        check_drawing(self.temperature, self.seed, self.batch_size)


def check_drawing(temperature: float, seed: int, batch_size: int) -> None:
    """Raises ValueError unless samples can be drawn so."""
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    check_count("seed", seed, 0)
    check_count("batch_size", batch_size, 1)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    run(tyro.cli(SampleConfig, args=arguments, prog="python -m experiments.sample", description=__doc__))


def run(config: SampleConfig) -> np.ndarray:
    """Draws, writes and prints; returns the samples, bytes [N, H, W, C] or vectors [N, D]."""
    use_compilation_cache()
    saved = saved_flow(config.run_dir, config.weights, config.data)
    if isinstance(saved.task, ImageTask) and saved.task.splits.shape[-1] > 4 and "png" in config.format:
        raise ValueError(f"format: expected npz alone for images of {saved.task.splits.shape[-1]} channels")
    pair = None if config.interpolate is None else chosen_images(saved, config.interpolate)
    workdir = config.workdir or config.run_dir / "sampling"
    workdir.mkdir(parents=True, exist_ok=True)
    decode = decoder(saved.flow, config.batch_size)

    samples, converged = drawn_samples(decode, saved, config.number, config.seed, config.temperature)
    if isinstance(saved.task, ImageTask):
        write_images(workdir, samples, config)
    else:
        write_vectors(workdir, samples, saved.task, config)
    rows = {
        "samples": f"{len(samples)} at temperature {config.temperature:g}, weights of step {saved.step}",
        "their solves": convergence(converged),
    }
    if pair is not None:
        frames, converged = interpolation(decode, saved.flow, pair)
        t = [f"{n / (FRAMES - 1):g}" for n in range(FRAMES)]
        title = "spherical interpolation of latents, from test image {} to {}".format(*config.interpolate)
        pictures.save_strip(workdir / "interpolation.png", frames, t, title)
        rows["interpolation"] = "{} to {}, spherical".format(*config.interpolate)
        rows["its solves"] = convergence(converged)
    print_table({**rows, "written to": str(workdir)})
    return samples


def chosen_images(saved: SavedFlow, indices: tuple[int, int]) -> Array:
    """The test images of these numbers, in [0, 1].

    Raises:
      ValueError: if there is none of such a number, or the run is not on images.
    """
    if not isinstance(saved.task, ImageTask):
        raise ValueError(f"interpolate: expected a run on images, got one on vectors ({saved.task.name})")
    test = saved.task.splits.test
    for index in indices:
        if not 0 <= index < len(test):
            raise ValueError(f"interpolate: expected numbers of test images, 0..{len(test) - 1}, got {index}")
    return saved.task.inputs(test[np.array(indices)])


Latents = Callable[[Array], Array]  # from numbers [B] to the latents z [B, D] of these numbers
Decode = Callable[[Latents, int], Iterator[tuple[np.ndarray, np.ndarray]]]


def decoder(flow: ResidualFlow, batch_size: int) -> Decode:
    """A function of latents and how many, N: f^-1(z), images clipped to [0, 1], and whether each converged, in batches.

    All batches have the same size, of which the last is cut to what is missing: the inverse is compiled once.
    """

    def solve(flow: ResidualFlow, z: Array) -> tuple[Array, Array]:
        x, status = flow.inverse(z, return_status=True)
        x = jnp.clip(x, 0, 1) if isinstance(flow.config, ImageFlowConfig) else x
        return x, status.converged.all(axis=0)

    solve_parts = over_parts(solve, flow)

    def decode(latents: Latents, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in tqdm(range(0, number, batch_size), unit="batch", disable=None, leave=False):
            z = latents(jnp.minimum(first + jnp.arange(batch_size), number - 1))
            found = jax.device_get(solve_parts(z.reshape(devices_for(batch_size), -1, flow.dim)))
            x, converged = (leaf[: number - first] for leaf in found)
            yield x, converged

    return decode


def drawn_samples(
    decode: Decode, saved: SavedFlow, number: int, seed: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Samples, bytes [N, H, W, C] or vectors [N, D], and whether the solve of each converged."""
    batches = decode(normal_latents(saved.flow, seed, temperature), number)
    if isinstance(saved.task, ImageTask):
        batches = ((to_bytes(x, saved.task.splits.levels), converged) for x, converged in batches)
    samples, converged = map(np.concatenate, zip(*batches, strict=True))
    return samples, converged


def normal_latents(flow: ResidualFlow, seed: int, temperature: float) -> Latents:
    """Draws of T N(0, I), each with a key of its own."""

    @jax.jit
    def latents(n: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), n)
        return temperature * jax.vmap(lambda key: jax.random.normal(key, (flow.dim,), flow.dtype))(keys)

    return latents


def interpolation(decode: Decode, flow: ResidualFlow, pair: Array) -> tuple[np.ndarray, np.ndarray]:
    """Images from the first of a pair to the second, [FRAMES, H, W, C], and whether each solve converged."""
    start, end = flow(pair)
    batches = decode(lambda n: spherical(start, end, n / (FRAMES - 1)), FRAMES)
    frames, converged = map(np.concatenate, zip(*batches, strict=True))
    return frames, converged


def spherical(start: Array, end: Array, t: Array) -> Array:
    """The points [B, D] at t [B] of a great circle from start [D] to end [D], which are those at t = 0 and 1.

    Where these are parallel and no circle is singled out, of the straight line.
    """
    cosine = jnp.vdot(start, end) / jnp.maximum(jnp.linalg.norm(start) * jnp.linalg.norm(end), 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    is_line = jnp.sin(angle) < 1e-4
    sine = jnp.where(is_line, 1, jnp.sin(angle))
    weights = [jnp.where(is_line, s, jnp.sin(s * angle) / sine)[:, None] for s in (1 - t, t)]
    return weights[0] * start[None] + weights[1] * end[None]


def to_bytes(images: np.ndarray, levels: int) -> np.ndarray:
    """Images in [0, 1] quantised to so many levels, these spread evenly over 0..255: uint8."""
    quantized = np.minimum(np.floor(images * levels), levels - 1)
    return np.rint(quantized * (255 / (levels - 1))).astype(np.uint8)


def write_vectors(workdir: Path, samples: np.ndarray, task: VectorTask, config: SampleConfig) -> None:
    """The picture, and the file that the config may ask for."""
    title = f"{task.name}: data and samples at temperature {config.temperature:g}"
    pictures.save_scatter(workdir / "samples.png", task.splits.train[: len(samples)], samples, title)
    if "npz" in config.format:
        np.savez(workdir / "samples.npz", vectors=samples)


def write_images(workdir: Path, samples: np.ndarray, config: SampleConfig) -> None:
    """The grid, and the files that the config asks for."""
    title = f"samples at temperature {config.temperature:g}"
    pictures.save_images(workdir / "samples.png", {title: samples[:SHOWN] / 255}, columns=8)
    if "npz" in config.format:
        np.savez(workdir / "samples.npz", images=samples)
    if "png" in config.format:
        directory = workdir / "samples"
        directory.mkdir(exist_ok=True)
        for earlier in directory.glob("*.png"):
            if earlier.stem.isdigit():
                earlier.unlink()
        for n, image in enumerate(samples):
            gray = image.shape[-1] == 1
            Image.fromarray(image.squeeze(-1) if gray else image).save(directory / f"{n:05}.png")


def convergence(converged: np.ndarray) -> str:
    """What a closing table says of solves: whether all converged, or how many did not and the first of them."""
    failed = np.flatnonzero(~converged)
    if not len(failed):
        return "all converged"
    named = ", ".join(f"{n:05}" for n in failed[:10]) + (", ..." if len(failed) > 10 else "")
    return f"{len(failed)} of {len(converged)} DID NOT CONVERGE: {named}"


if __name__ == "__main__":
    main()
