"""The Frechet distance between samples of a flow and its data, by torch-fidelity.

    python -m experiments.fid RUN_DIR [--number N] [--against train|test] [--features inception|pixels]
        [--inception-weights PATH] [--temperature T] [--seed S] [--weights best|latest] [--workdir OUT]

RUN_DIR is the work directory of a run of `experiments.density`, or of `experiments.classify` with a density, finished
or still running. The distance is that of Heusel et al. 2017 (arXiv 1706.08500, eq. 6) between Gaussians with the means
m, n and covariances A, B of features:

    d^2 = |m - n|^2 + tr(A + B - 2 (A B)^(1/2))

With `--features inception` it is the FID: the features are the 2048 of that paper's Inception network, whose weights
(91 MB) torch-fidelity downloads on first use. Without a network, name a file of them with --inception-weights PATH.
With `--features pixels` the features are means of pixels, in [0, 1], on an 8 by 8 grid in each channel. They need no
download and capture only colours and rough shapes. Grey images are repeated to three channels for both, and so count
three times in the distance of pixels. The samples are those of `experiments.sample` with the same seed and temperature;
the images are a random subset of the training or test split.

The distance is biased, usually upwards, and more so for fewer images (Binkowski et al. 2018, arXiv 1801.01401). Compare
only figures from equal numbers of images. With no more images than features the covariances are singular; the closing
table then says so. The floor is the distance between equal numbers of training and test images; a perfect flow would
reach about this value. It uses fewer images than asked for only where a split has fewer.

Under OUT, by default RUN_DIR/fid, it writes fid.json. Needs `pip install 'resflow_jax[fid]'`.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.sampling import check_drawing, convergence, decoder, drawn_samples, image_splits, to_bytes
from experiments.runs.saved import MovedData, Weights, saved_flow
from experiments.runs.tables import print_table
from experiments.runs.tiny_run import TINY_RUN, make_if_missing
from experiments.runs.workdir import write_atomically
from resflow_jax.data.images import Images, ImageSplits, to_unit_interval
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.io.config_json import as_json

Split = Literal["train", "test"]
Features = Literal["inception", "pixels"]

GRID = 8  # means of pixels per side
DIMENSIONS = {"inception": 2048, "pixels": 3 * GRID**2}
KINDS = {"train": "training", "test": "test"}  # of images, in words


@dataclass(frozen=True)
class FidConfig:
    """One run of `python -m experiments.fid`.

    Attributes:
      run_dir: work directory of a run of `experiments.density`, or of `experiments.classify` with a density.
      weights: "best" uses the weights of the best validation, "latest" those of the latest checkpoint.
      number: number of samples and of images, or all images of a smaller split; by default that of the test images.
      against: split of the images that samples are compared with.
      features: features of the Inception network, or means of pixels.
      inception_weights: file of torch-fidelity's weights of the Inception network, used instead of a download. It is a
        pickle, which can run any code.
      temperature: standard deviation of the latents. 1 samples the flow's density; less gives more typical images.
      seed: random seed of the latents, and of the choice of images.
      batch_size: samples per batch, divided among all devices.
      workdir: directory that everything is written to; by default RUN_DIR/fid.
      data: present place of the run's data, if they have been moved.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    weights: Weights = "best"
    number: int | None = None
    against: Split = "train"
    features: Features = "inception"
    inception_weights: Path | None = None
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    workdir: Path | None = None
    data: MovedData = MovedData()

    def __post_init__(self):
        if self.number is not None:
            check_count("number", self.number, 2)  # the fewest with a covariance
        check_choice("against", self.against, get_args(Split))
        check_choice("features", self.features, get_args(Features))
        if self.inception_weights is not None:
            if self.features != "inception":
                raise ValueError(f"inception_weights: expected None with {self.features}, got a path")
            if not self.inception_weights.is_file():
                raise ValueError(f"inception_weights: expected a file, got {self.inception_weights}")
        check_drawing(self.temperature, self.seed, self.batch_size)

    @property
    def out(self) -> Path:
        """The directory that is written to."""
        return self.workdir or self.run_dir / "fid"


def tiny(config: FidConfig) -> FidConfig:
    """Eight samples of a tiny run, compared by means of pixels, which need no download."""
    return replace(config, run_dir=TINY_RUN, number=8, features="pixels")


COMMAND = Command(
    "experiments.fid",
    __doc__,
    FidConfig(tyro.MISSING),
    tiny,
    output=lambda config: Output(config.out, ("fid.json",)),
    renamed={"--data": "--data.path PATH for files of your own, --data.dir DIR for TensorFlow data sets"},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    COMMAND.call(run, arguments)


def run(config: FidConfig) -> dict[str, Any]:
    """Draws, measures and prints; returns the content of fid.json."""
    package = needed_package()
    use_compilation_cache()
    make_if_missing(config.run_dir)
    saved = saved_flow(config.run_dir, config.weights, config.data)
    data = image_splits(saved.task)
    if data is None:
        raise ValueError(f"run_dir: expected a run on images, got one on vectors ({saved.task.name})")
    check_splits(data)
    number = config.number or len(data.test)
    chosen = {split: chosen_images(data, split, number, config.seed) for split in get_args(Split)}
    workdir = config.out
    workdir.mkdir(parents=True, exist_ok=True)

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return frechet_distance(first, second, config.features, config.inception_weights)

    in_floor = min(map(len, chosen.values()))
    floor = distance(chosen["train"][:in_floor], chosen["test"][:in_floor])  # first, so that errors show early
    decode = decoder(saved.flow, config.batch_size)
    samples, converged = drawn_samples(decode, saved, number, config.seed, config.temperature)
    images = chosen[config.against]
    result = {
        "run": config.run_dir,
        "weights": config.weights,
        "step": saved.step,
        "temperature": config.temperature,
        "seed": config.seed,
        "features": config.features,
        "against": config.against,
        "distance": distance(samples, images),
        "samples": len(samples),
        "unconverged": int(np.sum(~converged)),
        "images": len(images),
        "floor": {"distance": floor, "images": in_floor},
        "torch_fidelity": package.__version__,
    }
    write_atomically(workdir / "fid.json", json.dumps(as_json(result), indent=2) + "\n")
    print_table({**rows(result), "their solves": convergence(converged)})
    return result


def needed_package() -> Any:
    """Imports and returns the package torch-fidelity.

    Raises:
      ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(f"the distance needs the extra fid, pip install 'resflow_jax[fid]': {error}") from error
    return torch_fidelity


def check_splits(data: ImageSplits) -> None:
    """Checks that torch-fidelity can take the images, and that there are enough of them.

    Raises:
      ValueError: if they are neither grey nor RGB, or a split has fewer than the two images that a covariance needs.
    """
    if data.shape[-1] not in (1, 3):
        raise ValueError(f"run_dir: expected a run on images of 1 or 3 channels, got shape {data.shape}")
    if min(len(data.train), len(data.test)) < 2:
        raise ValueError(
            f"run_dir: expected a run on at least 2 training and 2 test images, got {len(data.train)} and "
            f"{len(data.test)}"
        )


def chosen_images(data: ImageSplits, split: Split, number: int, seed: int) -> np.ndarray:
    """`number` images of a split, or all if it has fewer, in random order; as bytes like those of samples."""
    images: Images = getattr(data, split)
    rows = np.random.default_rng(seed).permutation(len(images))[:number]
    of_level = to_bytes(np.asarray(to_unit_interval(np.arange(data.levels), data.levels)), data.levels)
    return of_level[images[rows]]


def frechet_distance(
    first: np.ndarray, second: np.ndarray, features: Features, inception_weights: Path | None = None
) -> float:
    """The distance d^2 of eq. 6 between two sets of images, uint8 [N, H, W, 1 or 3].

    Raises:
      OSError: if the weights of the Inception network were neither given nor could be fetched.
    """
    package = needed_package()
    import torch

    def dataset(images: np.ndarray) -> torch.utils.data.Dataset:
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        return torch.utils.data.Subset(channels_first, range(len(images)))  # items are images, not tuples of one

    try:
        found = package.calculate_metrics(
            input1=dataset(first),
            input2=dataset(second),
            fid=True,
            feature_extractor="inception-v3-compat" if features == "inception" else registered_pixels(),
            feature_extractor_weights_path=None if inception_weights is None else str(inception_weights),
            cuda=torch.cuda.is_available(),
            save_cpu_ram=True,  # no worker processes: a process that runs JAX must not be forked
            verbose=sys.stderr.isatty(),
        )
    except OSError as error:
        if inception_weights is not None:
            raise
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        raise OSError(
            f"inception_weights: expected a file where the weights cannot be fetched, got None; download "
            f"{URL_INCEPTION_V3} and name it, --inception-weights PATH. Fetching said: {error}"
        ) from error
    return found[package.KEY_METRIC_FID]


@cache
def registered_pixels() -> str:
    """Registers the means of pixels, computed in float64, with torch-fidelity; returns their name there."""
    import torch

    package, name = needed_package(), "pixels"

    class Pixels(package.FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **kwargs: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (name,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return name

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            grid = [min(GRID, side) for side in images.shape[2:]]  # a smaller image has one pixel per cell
            return (torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, grid).flatten(1),)

    package.register_feature_extractor(name, Pixels)
    return name


def rows(result: dict[str, Any]) -> dict[str, str]:
    """The lines of the closing table on distances."""
    floor, dimension = result["floor"], DIMENSIONS[result["features"]]
    fewest = min(result["samples"], result["images"])
    bias = "upwards, the more the fewer images: compare at equal numbers"
    if fewest <= dimension:
        bias += f"; NO MORE IMAGES, {fewest}, THAN FEATURES, {dimension}: singular covariances"
    return {
        "Frechet distance": f"{result['distance']:.4g} of {result['features']}, {result['samples']} samples to "
        f"{result['images']} {KINDS[result['against']]} images",
        "floor": f"{floor['distance']:.4g}, {floor['images']} training to as many test images",
        "bias": bias,
        "samples": f"at temperature {result['temperature']:g}, weights of step {result['step']}",
    }


if __name__ == "__main__":
    main()
