"""Checkpoints of the authors' PyTorch implementation (rtqichen/residual-flows), read and written without PyTorch.

The files of `train_img.py` and `train_toy.py` hold a state_dict, the options and, for images, exponential moving
averages of the parameters. See `interop.torch.files` for the format and why reading it is safe, `interop.torch.config`
for the options, and `interop.torch.layout` for the tensors.
"""

import argparse
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import check_choice, check_path, check_type, error_text, names_text, shown
from resflow_jax.functional.norms import with_copies
from resflow_jax.interop.torch.config import args_from_config, config_from_args
from resflow_jax.interop.torch.files import read_torch_file
from resflow_jax.interop.torch.layout import entries
from resflow_jax.interop.torch.objects import Stub
from resflow_jax.interop.torch.options import is_toy
from resflow_jax.interop.torch.places import Canvas, Entry, Ignored, Norm
from resflow_jax.interop.torch.storages import brief
from resflow_jax.interop.torch.writer import write_torch_file
from resflow_jax.layers.lipschitz import LipschitzLinear, map_linears
from resflow_jax.models.bases import StandardNormal
from resflow_jax.models.config import FlowConfig, ImageFlowConfig, VectorFlowConfig, has_mixed_norms
from resflow_jax.models.least_arrays import abstract_flow, check_numbers
from resflow_jax.models.residual_flow import ResidualFlow

Array = np.ndarray


def load_torch_checkpoint(
    path: str | Path,
    weights: Literal["ema", "raw"] | None = None,
    norms: Literal["converged", "stored"] = "converged",
) -> ResidualFlow:
    """Reads the flow in a checkpoint of the authors' PyTorch implementation, in JAX's default float dtype.

    Images are [B, H, W, C]. What the original's script does to them before the model (padding, the first squeeze) is
    part of the flow. z has the order of all flows here: each part is flattened in the order H, W, C, where the original
    has C, H, W. Nothing in the file is executed, and torch is not needed.

    Cost: the power iterations of `norms="converged"`, at most 20000 for each layer.

    Args:
      path: a file that `train_img.py` or `train_toy.py` wrote, in torch's present format or the one before 1.6.
      weights: "ema" for the exponential moving averages, which the original evaluates, or "raw". By default the
        averages if the file has them.
      norms: "converged" runs the power iteration of every layer to convergence, from the stored vectors and, for norms
        of other orders than 2, also from random starts; this gives a valid flow. "stored" keeps the vectors of the file
        and reproduces the map of the original. The raw weights may then exceed their coefficient, and the flow need not
        be invertible.

    Returns:
      A `ResidualFlow`. A model with parts that only the original has, such as a classifier, is a `TorchFlow`, which has
      `logits`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is not a checkpoint, or is truncated; for an object in it that is neither a tensor nor
        a container, by its name; for an option that this library does not support; for tensors that are missing, left
        over, of another shape than the options say, or not finite; for weights="ema" if the file has no averages.

    Source: Chen et al. (2019), arXiv 1906.02735, and its code, github.com/rtqichen/residual-flows.

    Example:
      >>> config = rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,), preactivation="all")
      >>> rf.save_torch_checkpoint(rf.ResidualFlow(config, rngs=nnx.Rngs(0)), "toy.pth")
      >>> rf.load_torch_checkpoint("toy.pth").event_shape
      (2,)
    """
    check_choice("weights", weights, (None, "ema", "raw"))
    check_choice("norms", norms, ("converged", "stored"))
    check_path(path)
    path = Path(path)
    content = read_torch_file(path)
    try:
        return flow_of(content, weights, norms)
    except ValueError as error:
        raise ValueError(f"{path}: {error_text(error)}") from error


def save_torch_checkpoint(flow: ResidualFlow, path: str | Path, *, average: ResidualFlow | None = None) -> None:
    """Writes a flow as a checkpoint that the authors' PyTorch implementation and `load_torch_checkpoint` read.

    The file has the float dtype of the flow. `load_torch_checkpoint(path, norms="stored")` gives the flow back bit for
    bit, but for two things that are equal to rounding: the factors of an invertible linear layer, which are found again
    from their product, and u of 1x1 convolutions with mixed norms, which is rescaled.

    Args:
      flow: a flow whose config the options of the scripts can say.
      path: path of the file. It is replaced as a whole when everything is written.
      average: the flow with the exponential moving averages, for images; by default the same as `flow`.

    Raises:
      ValueError: for a setting of the config that the scripts have no option for, by its name; for an average of
        another config.
      OSError: if the file cannot be written.

    Example:
      >>> config = rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,), preactivation="all")
      >>> flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
      >>> rf.save_torch_checkpoint(flow, "toy.pth")
      >>> x = jnp.ones((3, 2))
      >>> bool((rf.load_torch_checkpoint("toy.pth", norms="stored")(x) == flow(x)).all())
      True
    """
    check_type("flow", flow, ResidualFlow)
    check_path(path)
    if average is not None:
        check_type("average", average, ResidualFlow)
        if not isinstance(flow.config, ImageFlowConfig):
            raise ValueError("average: expected None for a flow of vectors, whose files have no averages, got a flow")
    if type(flow.base) is not StandardNormal:
        raise ValueError(
            f"flow: expected the base N(0, I), the only one of these files, got {type(flow.base).__name__}"
        )
    args = args_from_config(flow.config)
    content: dict[str, Any] = {"args": args, "state_dict": OrderedDict(_tensors(flow))}
    if not is_toy(args):
        found = entries(_checked_average(flow, average))
        canvas = Canvas()
        shadow = {e.name: e.place.take(canvas) for e in found if e.is_parameter and e.averaged_name == e.name}
        count = sum(tensor.size for tensor in shadow.values())
        state = {"module": None, "decay": 0.999, "shadow_params": shadow, "nparams": count}
        content["ema"] = Stub("resflows.utils", "ExponentialMovingAverage", args=(), state=state)
    write_torch_file(path, content)


def _checked_average(flow: ResidualFlow, average: ResidualFlow | None) -> ResidualFlow:
    average = flow if average is None else average
    if average.config != flow.config:
        raise ValueError(f"average: expected a flow of the config {flow.config}, got {average.config}")
    return average


def _tensors(flow: ResidualFlow) -> dict[str, Array]:
    """The state_dict. Vectors of 1x1 convolutions are those of the original, which measures a single pixel."""
    flow = nnx.clone(flow)
    found = entries(flow)
    norms = Canvas()
    scales = {e.name: e.place.take(norms) for e in found if e.name.endswith(".scale")}
    _scale_vectors(flow, lambda u, copies: u * copies)
    canvas = Canvas()
    return {e.name: scales[e.name] if e.name in scales else e.place.take(canvas) for e in found}


def parts_of(content: Any) -> tuple[dict[str, Array], argparse.Namespace]:
    """Returns the tensors and the options of what `read_torch_file` gave."""
    if not isinstance(content, dict) or not {"state_dict", "args"} <= content.keys():
        keys = (
            f"a dict of {', '.join(map(brief, [*content][:5]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise ValueError(f"expected a checkpoint of the training scripts with 'state_dict' and 'args', got {keys}")
    tensors, args = content["state_dict"], content["args"]
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"args: expected a namespace of options, got {type(args).__name__}")
    if not isinstance(tensors, Mapping):
        raise ValueError(f"state_dict: expected a dict of tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise ValueError(f"state_dict: expected tensors by name, got {type(tensor).__name__} for {brief(name)}")
    return dict(tensors), args


def flow_of(content: Any, weights: str | None, norms: str) -> ResidualFlow:
    """Returns the flow of what `read_torch_file` gave. Arguments and errors are those of `load_torch_checkpoint`."""
    tensors, args = parts_of(content)
    averages = _averages(content, weights)
    config = config_from_args(args, tensors)
    flow = _abstract_flow(config, tensors)
    found = entries(flow, dropout=bool(getattr(args, "dropout", 0)))
    _check_names("state_dict", {e.name for e in found}, tensors.keys())
    if averages is not None:
        _check_names("ema", {e.averaged_name for e in found if e.is_parameter}, averages.keys())
    put = {e.name: averages[e.averaged_name] if averages and e.is_parameter else tensors[e.name] for e in found}
    for entry in found:  # all of them first, so that nothing is made of another size than the file's
        if entry.shape is not None and put[entry.name].shape != entry.shape:
            raise ValueError(
                f"{entry.name}: expected shape {entry.shape}, as args say, got {shown(put[entry.name].shape)}"
            )
    check_numbers(flow, sum(tensor.size for tensor in tensors.values()))
    canvas = Canvas()
    for entry in found:
        _put(entry, canvas, put[entry.name])
        is_tied = entry.averaged_name != entry.name
        if is_tied and not np.array_equal(tensors[entry.name], tensors[entry.averaged_name]):
            raise ValueError(f"{entry.name}: expected the same number as in {entry.averaged_name}, which is tied to it")
    canvas.commit()
    _fill_unused(flow)
    _scale_vectors(flow, lambda u, copies: u / copies)
    if norms == "converged":
        _converge(flow)
    return flow


def _abstract_flow(config: FlowConfig, tensors: Mapping[str, Array]) -> ResidualFlow:
    """The flow of a config with abstract arrays. Its blocks and layers are counted before it is made."""
    number = len(tensors)
    blocks = config.blocks if isinstance(config, VectorFlowConfig) else sum(config.blocks) + config.tail.blocks
    if blocks > number:
        raise ValueError(f"nblocks: expected no more blocks than the {number} tensors of the file, got {blocks}")
    return abstract_flow(config, number)


def _averages(content: dict[str, Any], weights: str | None) -> dict[str, Array] | None:
    """The averaged parameters by name; None for the raw ones."""
    ema = content.get("ema")
    if weights == "raw" or (weights is None and ema is None):
        return None
    if ema is None:
        raise ValueError("weights: expected 'raw' for a file without averages ('ema'), got 'ema'")
    shadow = ema.state.get("shadow_params") if isinstance(ema, Stub) and isinstance(ema.state, dict) else None
    of_tensors = isinstance(shadow, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in shadow.items()
    )
    if not of_tensors:
        raise ValueError("ema: expected an object with a dict of tensors, shadow_params, got none")
    return dict(shadow)


def _check_names(what: str, expected: set[str], got: Mapping | set) -> None:
    for kind, names in (("missing", expected - set(got)), ("left over", set(got) - expected)):
        if names:
            raise ValueError(f"{what}: expected the tensors that args say, got some {kind}: {names_text(names)}")


def _put(entry: Entry, canvas: Canvas, tensor: Array) -> None:
    if not isinstance(entry.place, Ignored | Norm) and not np.isfinite(tensor).all():
        raise ValueError(f"{entry.name}: expected finite numbers, got {np.count_nonzero(~np.isfinite(tensor))} others")
    try:
        entry.place.put(canvas, tensor)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from error


def _fill_unused(flow: ResidualFlow) -> None:
    """Sets the vectors of layers whose norm has a closed form to zero, since the original has none."""

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    nnx.update(flow, jax.tree.map(zeros, nnx.state(flow)))


def _scale_vectors(flow: ResidualFlow, scale) -> None:
    """Rescales every u by the factor for the pixels of a 1x1 convolution, which sigma has here and not there."""

    def apply(layer: LipschitzLinear) -> None:
        layer.u[...] = scale(layer.u[...], with_copies(jnp.ones(()), layer.linear_map.copies, *layer.traced_orders()))

    if has_mixed_norms(flow.config) or flow.config.norms.learned:
        map_linears(flow, apply)


def _converge(flow: ResidualFlow) -> None:
    """Runs every power iteration until it changes only by rounding, or 20000 times."""
    if has_mixed_norms(flow.config) or flow.config.norms.learned:
        map_linears(flow, lambda layer: layer.search_norm())
    tolerance = 4 * float(jnp.finfo(flow.dtype).eps)
    status = flow.update_norms(tolerance=tolerance, max_iterations=20_000, restart=True)
    if not status.residual <= 1e-2:
        warnings.warn(
            f"norms: a layer is far from converged after {status.iterations} iterations; largest residual "
            f"{status.residual:.1e}",
            RuntimeWarning,
            stacklevel=4,
        )
