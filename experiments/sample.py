"""Draws samples of a trained flow, and interpolates between images in latent space.

    python -m experiments.sample RUN_DIR [--number N] [--temperature T] [--seed S] [--label K] [--format png npz]
        [--interpolate I J] [--workdir OUT]

RUN_DIR is the work directory of a run of `experiments.density`, or of `experiments.classify` with a density, finished
or still running. A sample is x = f^-1(T e) with e from N(0, I), clipped to [0, 1] and quantised to the levels of the
data; the noise of sample n depends only on the seed and on n. With `--model.head mixture` of `experiments.classify` it
is x = f^-1(mean_k + T std_k e) of a random class k, or of the class `--label K`. `--interpolate` takes the numbers of
two test images x and y, and goes from f(x) to f(y) along a great circle (White 2016, arXiv 1609.04468):

    z(t) = (sin((1 - t) a) f(x) + sin(t a) f(y)) / sin(a),    a the angle between f(x) and f(y)

so that intermediate latents have about the norm of the latents of images; on the straight line their norm would be too
small. The ends are the reconstructions f^-1(f(x)) and f^-1(f(y)).

Under OUT, by default RUN_DIR/sampling, it writes samples.png (a grid of the first 64 samples) and interpolation.png.
`--format png` writes samples/00000.png, 00001.png, ... and removes those of an earlier call; `--format npz` writes
samples.npz, whose array `images` is uint8 [N, H, W, C] in 0..255, as programs that compute the FID read it; the default
is both. For a flow on vectors samples.png shows samples and data, and samples.npz has the array `vectors`, floats
[N, D]. The closing table counts and lists solves that did not converge; their samples are written too.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.runs import pictures
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.sampling import Decode, check_drawing, convergence, decoder, drawn_samples, image_splits
from experiments.runs.saved import MovedData, SavedFlow, Weights, saved_flow
from experiments.runs.tables import print_table
from experiments.runs.tasks.class_samples import is_mixture
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.vectors import VectorTask
from experiments.runs.tiny_run import TINY_RUN, make_if_missing
from experiments.runs.workdir import write_arrays, write_atomically
from resflow_jax import ResidualFlow
from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.checks import check_count

Array = jax.Array

SHOWN = 64  # samples in the grid
NUMBER = ".number"  # the file with the number of PNG files beside it
FRAMES = 11  # images of an interpolation


@dataclass(frozen=True)
class SampleConfig:
    """One run of `python -m experiments.sample`.

    Attributes:
      run_dir: work directory of a run of `experiments.density`, or of `experiments.classify` with a density.
      weights: "best" uses the weights of the best validation, "latest" those of the latest checkpoint.
      number: number of samples.
      temperature: standard deviation of the latents. 1 samples the flow's density; less gives more typical images.
      seed: random seed of the latents.
      batch_size: samples per batch, divided among all devices.
      format: file formats of the samples, in addition to the grid; vectors have no PNG files.
      label: class of all samples, by number, of a run with model.head "mixture"; by default the classes of the mixture.
      interpolate: numbers of two test images to interpolate between.
      workdir: directory that everything is written to; by default RUN_DIR/sampling.
      data: present place of the run's data, if they have been moved.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    weights: Weights = "best"
    number: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    format: tuple[Literal["png", "npz"], ...] = ("png", "npz")
    label: int | None = None
    interpolate: tuple[int, int] | None = None
    workdir: Path | None = None
    data: MovedData = MovedData()

    def __post_init__(self):
        check_count("number", self.number, 1)
        check_drawing(self.temperature, self.seed, self.batch_size)

    @property
    def out(self) -> Path:
        """The directory that is written to."""
        return self.workdir or self.run_dir / "sampling"


def tiny(config: SampleConfig) -> SampleConfig:
    """Four samples of a tiny run."""
    return replace(config, run_dir=TINY_RUN, number=4, batch_size=4)


def output(config: SampleConfig) -> Output:
    """The files that may be written."""
    pictures_of = () if config.interpolate is None else ("interpolation.png",)
    files = {"png": "samples/*.png", "npz": "samples.npz"}
    return Output(config.out, ("samples.png", *(files[kind] for kind in config.format), *pictures_of))


COMMAND = Command(
    "experiments.sample",
    __doc__,
    SampleConfig(tyro.MISSING),
    tiny,
    output,
    renamed={"--data": "--data.path PATH for files of your own, --data.dir DIR for TensorFlow data sets"},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    COMMAND.call(run, arguments)


def run(config: SampleConfig) -> np.ndarray:
    """Draws, writes and prints; returns the samples, bytes [N, H, W, C] or vectors [N, D]."""
    use_compilation_cache()
    make_if_missing(config.run_dir)
    saved = saved_flow(config.run_dir, config.weights, config.data)
    images = image_splits(saved.task)
    if images is not None and images.shape[-1] > 4 and "png" in config.format:
        raise ValueError(f"format: expected npz alone for images of {images.shape[-1]} channels")
    check_label(saved, config.label)
    pair = None if config.interpolate is None else chosen_images(saved, config.interpolate)
    workdir = config.out
    workdir.mkdir(parents=True, exist_ok=True)
    earlier_number(workdir, config)  # raises before anything is drawn
    decode = decoder(saved.flow, config.batch_size)

    samples, converged = drawn_samples(decode, saved, config.number, config.seed, config.temperature, config.label)
    if images is not None:
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
    print_table(rows)
    return samples


def chosen_images(saved: SavedFlow, indices: tuple[int, int]) -> Array:
    """The test images with these numbers, in [0, 1].

    Raises:
      ValueError: if there is no image with such a number, or the run is not on images.
    """
    images = image_splits(saved.task)
    if images is None:
        raise ValueError(f"interpolate: expected a run on images, got one on vectors ({saved.task.name})")
    test = images.test
    for index in indices:
        if not 0 <= index < len(test):
            raise ValueError(f"interpolate: expected numbers of test images, 0..{len(test) - 1}, got {index}")
    return to_unit_interval(test[np.array(indices)], images.levels)


def check_label(saved: SavedFlow, label: int | None) -> None:
    """Raises ValueError for a label that the flow of a run has no component for."""
    if label is None:
        return
    if not is_mixture(saved.flow):
        raise ValueError(f"label: expected a run with model.head 'mixture', got {label} for a run without")
    if not 0 <= label < saved.flow.base.components:
        raise ValueError(f"label: expected a class in 0..{saved.flow.base.components - 1}, got {label}")


def interpolation(decode: Decode, flow: ResidualFlow, pair: Array) -> tuple[np.ndarray, np.ndarray]:
    """Images from the first of a pair to the second, [FRAMES, H, W, C], and whether each solve converged."""
    start, end = flow(pair).reshape(2, flow.dim)
    batches = decode(lambda n: spherical(start, end, n / (FRAMES - 1)), FRAMES)
    frames, converged = map(np.concatenate, zip(*batches, strict=True))
    return frames, converged


def spherical(start: Array, end: Array, t: Array) -> Array:
    """The points [B, D] at t [B] on a great circle from start [D], at t = 0, to end [D], at t = 1.

    If start and end are parallel, which does not determine a circle, the points are on the straight line.
    """
    cosine = jnp.vdot(start, end) / jnp.maximum(jnp.linalg.norm(start) * jnp.linalg.norm(end), 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    is_line = jnp.sin(angle) < 1e-4
    sine = jnp.where(is_line, 1, jnp.sin(angle))
    weights = [jnp.where(is_line, s, jnp.sin(s * angle) / sine)[:, None] for s in (1 - t, t)]
    return weights[0] * start[None] + weights[1] * end[None]


def write_vectors(workdir: Path, samples: np.ndarray, task: VectorTask, config: SampleConfig) -> None:
    """Writes the picture, and samples.npz if the config asks for it."""
    title = f"{task.name}: data and samples at temperature {config.temperature:g}"
    data = task.in_own_units(subset(task.splits.train, len(samples)))
    pictures.save_scatter(workdir / "samples.png", data, samples, title)
    if "npz" in config.format:
        write_arrays(workdir / "samples.npz", vectors=samples)


def earlier_number(workdir: Path, config: SampleConfig) -> int:
    """The number of PNG files that an earlier call wrote.

    Raises:
      FileExistsError: if files of the same names are there that no call of this command has written.
    """
    directory = workdir / "samples"
    text = (directory / NUMBER).read_text().strip() if (directory / NUMBER).exists() else ""
    earlier = int(text) if text.isdecimal() else 0
    taken = next((path for n in range(earlier, config.number) if (path := directory / f"{n:05}.png").exists()), None)
    if "png" in config.format and taken is not None:
        raise FileExistsError(
            f"workdir: expected one without pictures of these names, got {taken}; name another --workdir, or remove "
            f"{directory} if an earlier version wrote it"
        )
    return earlier


def write_images(workdir: Path, samples: np.ndarray, config: SampleConfig) -> None:
    """Writes the grid, and the files that the config asks for."""
    title = f"samples at temperature {config.temperature:g}"
    pictures.save_images(workdir / "samples.png", {title: samples[:SHOWN] / 255}, columns=8)
    if "npz" in config.format:
        write_arrays(workdir / "samples.npz", images=samples)
    if "png" in config.format:
        directory, earlier = workdir / "samples", earlier_number(workdir, config)
        directory.mkdir(exist_ok=True)
        write_atomically(directory / NUMBER, f"{max(earlier, len(samples))}\n")
        for n, image in enumerate(samples):
            pictures.save_png(directory / f"{n:05}.png", image)
        for n in range(len(samples), earlier):
            (directory / f"{n:05}.png").unlink(missing_ok=True)
        write_atomically(directory / NUMBER, f"{len(samples)}\n")


if __name__ == "__main__":
    main()
