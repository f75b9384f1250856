"""Evaluation: the mean likelihood of a data set under a flow, with its standard error, on any number of devices."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.functional.checks import as_host_array, check_count, check_key, check_type, shown
from resflow_jax.functional.estimators import Estimator, Exact, Roulette, check_estimator, subsampling
from resflow_jax.functional.opaque import as_tree
from resflow_jax.functional.texts import fields_text, is_number
from resflow_jax.functional.values import checked
from resflow_jax.layers.conditions import as_condition
from resflow_jax.models.flow import Flow
from resflow_jax.training.forms import batches_in_order, on_all_devices, placed
from resflow_jax.training.scores import Score, bits_per_dim_of, negative_log_prob, quantized_images
from resflow_jax.training.slices import over_slices

Array = jax.Array


class Estimate(NamedTuple):
    """A mean over examples and its standard error, split by cause: stderr^2 = data_stderr^2 + noise_stderr^2.

    Attributes:
      mean: the estimated mean, in the unit of the scores.
      stderr: its standard error.
      data_stderr: the part that comes from the choice of the examples. It is infinite for one example, and 0 if its
        estimated variance is negative.
      noise_stderr: the part that comes from dequantisation and from the estimate of the log-det, for these examples. It
        is NaN for one draw; stderr then omits the noise that all examples of a batch share.

    Example:
      >>> scores = np.array([[3.0, 5.0, 4.0], [3.2, 5.2, 4.2]])  # two draws of three examples
      >>> estimate = rf.Estimate.from_scores(scores)
      >>> round(estimate.mean, 6), round(estimate.noise_stderr, 6)
      (4.1, 0.1)
    """

    mean: float
    stderr: float
    data_stderr: float
    noise_stderr: float

    unit = ""  # unit of all four numbers, as printed

    def __repr__(self) -> str:
        if not all(is_number(field) for field in self):
            return fields_text(self)
        digits = 3
        if 0 < self.stderr < math.inf:  # two significant digits of the error
            digits = min(17, max(0, 1 - math.floor(math.log10(self.stderr))))
        data = f"{self.data_stderr:.{digits}f} from the choice of examples"
        noise = (
            "that of noise unknown" if math.isnan(self.noise_stderr) else f"{self.noise_stderr:.{digits}f} from noise"
        )
        mean = f"{self.mean:.{digits}f} +- {self.stderr:.{digits}f}"
        return f"{type(self).__name__}: {mean}{' ' * bool(self.unit)}{self.unit} ({data}, {noise})"

    @classmethod
    def from_scores(cls, scores: np.ndarray) -> "Estimate":
        """Returns the mean of scores [draws, N], as `image_bits_per_dim` gives them, by two-way analysis of variance.

        noise_stderr is computed from the variance, over draws, of the mean over examples, because the examples of a
        batch share one series length. data_stderr is computed from the remaining variance over examples. A score that
        is NaN makes the result NaN.

        Raises:
          ValueError: unless the scores are [draws, N] with at least one draw and one example.
        """
        try:
            scores = np.asarray(scores, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"scores: expected numbers [draws, N], got {shown(scores)}") from error
        if scores.ndim != 2 or scores.size == 0:
            raise ValueError(f"scores: expected [draws, N] with at least one of each, got shape {scores.shape}")
        draws, examples = scores.shape
        mean, data, noise = float(scores.mean()), math.inf, math.nan
        if examples > 1:
            data = scores.mean(axis=0).var(ddof=1)
            if draws > 1:  # an error that is common to a draw adds nothing to the variance over examples
                residuals = scores - scores.mean(axis=0)
                data = np.maximum(0, data - residuals.var(axis=1, ddof=1).sum() / (draws - 1) / draws)  # NaN stays NaN
            data = float(data) / examples
        if draws == 1:
            return cls(mean, math.sqrt(data), math.sqrt(data), noise)
        noise = float(scores.mean(axis=1).var(ddof=1)) / draws
        return cls(mean, math.sqrt(data + noise), math.sqrt(data), math.sqrt(noise))


class BitsPerDim(Estimate):
    """An `Estimate` in bits/dim."""

    unit = "bits/dim"


def evaluate_bits_per_dim(
    flow: Flow,
    images: np.ndarray,
    key: Array,
    *,
    levels: int = 256,
    estimator: Estimator | None = None,
    draws: int = 4,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    condition: np.ndarray | None = None,
) -> Estimate:
    """Returns the mean bits/dim of quantised images, each counted once, with its standard errors.

    Every image is dequantised and its log-det estimated `draws` times. The mean is unbiased for the bits/dim of the
    dequantised density, which are an upper bound on those of the integers (Theis et al. 2016, arXiv 1511.01844). See
    `Estimate.from_scores` for the standard errors, and `image_bits_per_dim` for the images one by one.

    Cost: `draws` times that of the estimator on N images.

    Args:
      flow: a flow of images [H, W, C].
      images: integers [N, H, W, C] in {0..levels-1}.
      key: PRNG key of the dequantisation and of the estimates.
      levels: number of values that a pixel can have.
      estimator: estimator of the log-det; by default `Roulette()`, whose mean over a batch has little noise for its
        cost. `Exact()` leaves only the noise of dequantisation; it takes D vjps of every block and D^2 numbers an
        image, so use a small batch size.
      draws: number of independent passes over the images, from which the noise is estimated.
      batch_size: number of images that are evaluated at once.
      mesh: devices along the axis "data" that share each batch; None for one device. The batch size is rounded up to a
        multiple of their number times the `subsample` of the estimator, so that a batch size which is such a multiple
        already gives the same result on any devices. Devices of several processes may be part of the mesh; all
        processes then make the same call and get the same result. A flow whose arrays are divided among devices (see
        `Placement.averaged_flow`) is evaluated on its own mesh.
      condition: for a conditional flow, floats [*condition_shape], one for all images, or [N, *condition_shape].

    Returns:
      The mean and its standard errors, in bits/dim.

    Raises:
      ValueError: unless the images are integers in {0..levels-1} of the flow's shape, N > 0, the condition is finite,
        and draws, levels and batch_size are at least 1.

    Example:
      >>> config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=rf.DenseTail(0))
      >>> flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
      >>> images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1))
      >>> found = rf.evaluate_bits_per_dim(flow, images, jax.random.key(0), estimator=rf.Truncated(2), draws=2)
      >>> found.stderr > 0
      True
    """
    options = {"levels": levels, "estimator": estimator, "draws": draws, "batch_size": batch_size}
    scores = image_bits_per_dim(flow, images, key, **options, mesh=mesh, condition=condition)
    return BitsPerDim.from_scores(scores)


def image_bits_per_dim(
    flow: Flow,
    images: np.ndarray,
    key: Array,
    *,
    levels: int = 256,
    estimator: Estimator | None = None,
    draws: int = 4,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    condition: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the bits/dim of each image in each draw, [draws, N].

    Arguments, cost and errors are those of `evaluate_bits_per_dim`, which returns the mean.

    Example:
      >>> from resflow_jax.training.evaluation import image_bits_per_dim
      >>> config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=rf.DenseTail(0))
      >>> flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
      >>> images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1))
      >>> image_bits_per_dim(flow, images, jax.random.key(0), estimator=rf.Truncated(2), draws=2).shape
      (2, 6)
    """
    _check_flow(flow)
    check_count("levels", levels, 1)
    estimator = Roulette() if estimator is None else estimator
    images = quantized_images("images", flow, images, levels)
    examples = _with_condition(flow, images, condition)
    return _scores(bits_per_dim_of(levels), flow, examples, key, estimator, draws, batch_size, mesh)


def vector_log_prob(
    flow: Flow,
    x: np.ndarray,
    key: Array,
    *,
    estimator: Estimator | None = None,
    draws: int = 1,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
    condition: np.ndarray | None = None,
) -> np.ndarray:
    """Returns log p(x) in nats of each example in each draw of the estimate, [draws, N].

    Args:
      flow: a flow.
      x: floats [N, *event_shape], usually vectors [N, D].
      key: PRNG key of the estimates.
      estimator: estimator of the log-det; by default `Exact()`, which has no noise.
      draws: number of independent estimates of each log p(x).
      batch_size: number of examples that are evaluated at once.
      mesh: devices that share each batch, as in `evaluate_bits_per_dim`.
      condition: for a conditional flow, floats [*condition_shape], one for all examples, or [N, *condition_shape].

    Cost: `draws` times that of the estimator on N examples.

    Raises:
      ValueError: unless x is finite and [N, *event_shape] with N > 0, the condition is finite, and draws and batch_size
        are at least 1.

    Example:
      >>> from resflow_jax.training.evaluation import vector_log_prob
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> vector_log_prob(flow, np.ones((5, 2)), jax.random.key(0)).shape
      (1, 5)
    """
    _check_flow(flow)
    estimator = Exact() if estimator is None else estimator
    x = as_host_array("x", x, "a float array [N, D]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected a float array [N, D], got dtype {x.dtype}")
    if x.ndim != 1 + len(flow.event_shape) or len(x) == 0:
        expected = "vectors [N, D]" if len(flow.event_shape) == 1 else f"events [N, {str(flow.event_shape)[1:-1]}]"
        raise ValueError(f"x: expected {expected} with N > 0, got shape {x.shape}")
    _check_finite(flow, "x", x)
    examples = _with_condition(flow, x, condition)
    return -_scores(negative_log_prob, flow, examples, key, estimator, draws, batch_size, mesh)


def _check_flow(flow: Flow) -> None:
    """Raises ValueError for what has not the methods of a flow."""
    if isinstance(flow, type) or not hasattr(flow, "log_prob"):
        raise ValueError(f"flow: expected a Flow, got {flow!r}")


def _with_condition(flow: Flow, x: Any, condition: Any) -> Any:
    """The examples alone, or a pair of the examples and the condition of each."""
    shape = getattr(flow, "condition_shape", None)
    given, condition = condition, as_condition(condition, shape, x.shape[:1])
    if condition is None:
        return x
    _check_finite(flow, "condition", given)
    return x, np.asarray(condition)


def _check_finite(flow: Flow, name: str, values: Any) -> None:
    """Raises ValueError for values that are not finite in the dtype of the flow."""
    with checked(name, values, getattr(flow, "dtype", jnp.result_type(float))):
        pass


def _scores(
    score: Score,
    flow: Flow,
    examples: Any,
    key: Array,
    estimator: Estimator,
    draws: int,
    batch_size: int,
    mesh: Mesh | None,
) -> np.ndarray:
    """The score of each example in each draw, [draws, N]. The examples are x [N, ...], or a pair (x, condition)."""
    check_key("key", key)
    check_estimator(estimator)
    check_count("draws", draws, 1)
    check_count("batch_size", batch_size, 1)
    if mesh is not None:
        check_type("mesh", mesh, Mesh)
    count = len(jax.tree.leaves(examples)[0])
    estimator = as_tree(estimator)
    flow, mesh, is_whole = placed(flow, mesh)
    if mesh is not None:
        key, estimator = on_all_devices((key, estimator), mesh)
    unit = (1 if mesh is None else mesh.size) * subsampling(estimator)  # each device has whole parts
    batch_size = unit * -(-min(batch_size, count) // unit)
    batches = -(-count // batch_size)

    scores = np.zeros((draws, batches * batch_size))
    for draw, draw_key in enumerate(jax.random.split(key, draws)):
        keys = jax.random.split(draw_key, batches)
        parts = [
            _batch_scores(flow, batch, subkey, estimator, score, mesh, is_whole)
            for subkey, batch in zip(keys, batches_in_order(examples, batch_size, mesh), strict=True)
        ]
        scores[draw] = np.concatenate(jax.device_get(parts))
    return scores[:, :count]


@partial(jax.jit, static_argnames=("score", "mesh", "is_whole"))
def _batch_scores(
    flow: Flow, batch: Any, key: Array, estimator: Estimator, score: Score, mesh: Mesh | None, is_whole: bool
) -> Array:
    """The scores of one draw of a batch, [B]. If the flow is divided, the compiler divides the products with it."""

    def scores(flow, batch, key, estimator):
        return score(flow, batch, key, estimator)[1]

    if mesh is None:
        return scores(flow, batch, key, estimator)
    whole, slices = PartitionSpec(), PartitionSpec("data")
    if is_whole:
        scores = over_slices(scores, nnx.graphdef(flow), mesh, (whole, slices, whole, whole), slices)
    found = scores(flow, batch, key, estimator)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, whole))  # every process reads it
