"""What a trained flow is worth: bits/dim, reconstruction, certificate, and whether it tells other images apart.

    python -m experiments.evaluate RUN_DIR [--images N] [--draws K] [--exact] [--other DATASET ...] [--workdir OUT]

RUN_DIR is the work directory of an `experiments.density` run, finished or still running. Without further settings the
bits/dim of the test split are those that the run itself printed. `--exact` takes the log-det of dense Jacobians in
place of an estimate: for few images.

Out-of-distribution detection (Nalisnick et al. 2019, arXiv 1810.09136): images of another data set should have a lower
likelihood, that is more bits/dim, than test images. The AUROC is the probability that of one image each the other set's
has more, ties counted half; 0.5 is chance, and below it the flow finds the other images likelier than its own. Other
sets are looked for where the run's was; crops of "photographs" are always there. Where none is named, the test images
themselves are taken with their pixels permuted, in one fixed order: alike but for where their pixels lie.

Under OUT, by default RUN_DIR/evaluation, it writes evaluation.json, scores.npz (bits/dim of every image, means over
draws) and histograms.png.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.metrics import roc_auc_score

from experiments import density, pictures
from experiments.parts import over_parts
from experiments.run import (
    as_json,
    certificate_rows,
    data_mesh,
    devices_for,
    print_table,
    use_all_cores,
    use_compilation_cache,
    use_xla_flags,
    write_atomically,
)
from experiments.saved import SavedFlow, Weights, saved_flow
from resflow_jax import Estimate, Exact, ResidualFlow, certify
from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.checks import check_count
from resflow_jax.training.likelihood import image_bits_per_dim

Array = jax.Array

RECONSTRUCTED = 64  # test images
BATCH_SIZE = 100  # that of the run: the noise goes by it
EXACT_BATCH_SIZE = 4  # images of which dense Jacobians are held at once
PERMUTED = "permuted"


@dataclass(frozen=True)
class EvaluateConfig:
    """One run of `python -m experiments.evaluate`.

    Attributes:
      run_dir: work directory of a run of `experiments.density`.
      weights: of the lowest validation bits/dim, or of the latest checkpoint.
      images: at most so many of a test split; by default as many as the run evaluates.
      draws: dequantisations an image; by default the run's.
      exact: log-dets of dense Jacobians, in place of the run's estimator; the number of images is to be given with it.
      other: names of other data sets of images of the same shape.
      workdir: where everything is written; by default RUN_DIR/evaluation.
    """

    run_dir: tyro.conf.Positional[Path]
    weights: Weights = "best"
    images: int | None = None
    draws: int | None = None
    exact: bool = False
    other: tuple[str, ...] = ()
    workdir: Path | None = None

    def __post_init__(self):
        if self.images is not None:
            check_count("images", self.images, 2)
        if self.draws is not None:
            check_count("draws", self.draws, 1)
        if self.exact and self.images is None:
            raise ValueError("images: expected a number beside exact, each image being so dear; got None")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    run(tyro.cli(EvaluateConfig, args=arguments, prog="python -m experiments.evaluate", description=__doc__))


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, draws and prints; returns what evaluation.json holds."""
    use_compilation_cache()
    saved = saved_flow(config.run_dir, config.weights)
    settings, data = saved.config.evaluation, saved.data
    test = data.test[: config.images or settings.images]
    others = other_images(saved, config.other, len(test)) if config.other else {PERMUTED: permuted(test)}
    workdir = config.workdir or config.run_dir / "evaluation"
    workdir.mkdir(parents=True, exist_ok=True)

    estimator = Exact() if config.exact else settings.estimator
    draws = config.draws or settings.draws

    def scores_of(images: np.ndarray) -> np.ndarray:
        return image_bits_per_dim(
            saved.flow,
            images,
            jax.random.key(saved.config.seed + 2),  # that of the run, so that its figures come back
            levels=data.levels,
            estimator=estimator,
            draws=draws,
            batch_size=EXACT_BATCH_SIZE if config.exact else BATCH_SIZE,
            mesh=data_mesh(jax.device_count()),
        )

    scores = {"test": scores_of(test)} | {name: scores_of(images) for name, images in others.items()}
    means = {name: draws_of.mean(axis=0) for name, draws_of in scores.items()}
    error, unconverged = reconstruction(saved.flow, to_unit_interval(test[:RECONSTRUCTED], data.levels))
    certificate = certify(saved.flow)
    result = {
        "run": str(config.run_dir),
        "weights": config.weights,
        "step": saved.step,
        "estimator": as_json(estimator),
        "draws": draws,
        "test": summary(scores["test"]),
        "reconstruction": {"images": len(test[:RECONSTRUCTED]), "error": error, "unconverged": unconverged},
        "certificate": certificate.as_dict(),
        "other": {name: {"auroc": auroc(means["test"], means[name]), **summary(scores[name])} for name in others},
    }
    write_atomically(workdir / "evaluation.json", json.dumps(as_json(result), indent=2) + "\n")
    np.savez(workdir / "scores.npz", **means)
    draw(workdir, saved.config.data.name, means, result)
    print_table({**rows(result), **certificate_rows(certificate), "written to": str(workdir)})
    return result


def other_images(saved: SavedFlow, names: tuple[str, ...], number: int) -> dict[str, np.ndarray]:
    """At most so many test images of each of the other data sets.

    Raises:
      ValueError: if a set's images have another shape or another number of levels than the run's.
    """
    images, own = {}, saved.data
    height, _, channels = own.shape
    for name in names:
        data = density.load(replace(saved.config.data, name=name, path=None, size=height, channels=channels))
        if (data.shape, data.levels) != (own.shape, own.levels):
            raise ValueError(
                f"other: expected images of shape {own.shape} with {own.levels} levels, like those of "
                f"{saved.config.data.name}; got shape {data.shape} with {data.levels} levels in {name}"
            )
        images[name] = data.test[:number]
    return images


def permuted(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] with their pixels in another order, the same for all; channels stay together."""
    pixels = images.reshape(len(images), -1, images.shape[-1])
    order = np.random.default_rng(0).permutation(pixels.shape[1])
    return pixels[:, order].reshape(images.shape)


def auroc(test: np.ndarray, other: np.ndarray) -> float:
    """The probability that an image of the other set has more bits/dim than a test image; ties count half."""
    labels = np.repeat([0, 1], [len(test), len(other)])
    return float(roc_auc_score(labels, np.concatenate([test, other])))


def reconstruction(flow: ResidualFlow, images: Array) -> tuple[float, int]:
    """max |x - f^-1(f(x))| over images x, and for how many of them the inverse did not converge."""

    def round_trip(flow: ResidualFlow, x: Array) -> tuple[Array, Array]:
        reconstructed, status = flow.inverse(flow(x), return_status=True)
        return reconstructed, status.converged.all(axis=0)

    parts = images.reshape(devices_for(len(images)), -1, *images.shape[1:])
    reconstructed, converged = over_parts(round_trip, flow)(parts)
    return float(jnp.max(jnp.abs(images - reconstructed))), int(jnp.sum(~converged))


def summary(scores: np.ndarray) -> dict[str, float]:
    """The figures of scores [draws, N]: how many images, mean bits/dim and its standard errors."""
    estimate = Estimate.from_scores(scores)._asdict()
    return {"images": scores.shape[1], "bits_per_dim": estimate.pop("mean"), **estimate}


def draw(workdir: Path, name: str, means: dict[str, np.ndarray], result: dict[str, Any]) -> None:
    """Histograms of the bits/dim of the images of each set."""
    labels = {"test": f"{name}, test images"}
    for other, found in result["other"].items():
        labels[other] = f"{_named(other)}: AUROC {found['auroc']:.3f}"
    pictures.save_histograms(
        workdir / "histograms.png",
        {labels[key]: values for key, values in means.items()},
        xlabel="bits/dim of an image",
        title=f"a flow trained on {name}, step {result['step']}",
    )


def rows(result: dict[str, Any]) -> dict[str, str]:
    """The lines of the closing table on likelihoods and the inverse."""
    test, found = result["test"], result["reconstruction"]
    table = {
        "test bits/dim": f"{test['bits_per_dim']:.4f} +- {test['stderr']:.4f} ({test['images']} images, "
        f"weights of step {result['step']})",
        "of which": f"{test['data_stderr']:.4f} from the choice of images, {test['noise_stderr']:.4f} from noise "
        f"({result['draws']} draws, {result['estimator']['type']})",
        "reconstruction error": f"{found['error']:.1e}, max |x - f^-1(f(x))| of {found['images']} test images"
        + (f"; {found['unconverged']} DID NOT CONVERGE" if found["unconverged"] else ""),
    }
    for name, other in result["other"].items():
        table[f"AUROC, {name}"] = (
            f"{other['auroc']:.4f}, of {_named(name)}: {other['bits_per_dim']:.4f} +- {other['stderr']:.4f} bits/dim"
        )
    return table


def _named(other: str) -> str:
    return "test images with their pixels permuted" if other == PERMUTED else f"{other}, test images"


if __name__ == "__main__":
    main()
