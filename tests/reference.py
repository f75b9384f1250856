"""Weights of two checkpoints of the PyTorch implementation, put into flows of this library.

tests/data/reference_{mnist_tiny,toy2d}.npz hold the tensors of the checkpoints under their names
("raw/..." as stored, "ema/..." the averaged parameters) and, under "expected/...", what the PyTorch
implementation computes from them in float64 (z flattened in C, H, W order). Layouts differ: their
kernels are [O, I, H, W] and [O, I], ours [H, W, I, O] and [I, O]; they flatten images as C, H, W.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.bijector import Chain
from resflow_jax.layers.elementwise import ActNorm
from resflow_jax.layers.residual import ResidualBlock, ResidualStack

CONFIGS = {
    "mnist_tiny": rf.ImageFlowConfig(shape=(8, 8, 1), blocks=(2, 2), hidden_channels=16, fc_hidden=16),
    "toy2d": rf.VectorFlowConfig(dim=2, blocks=4, hidden=(16, 16), preactivation="all", coefficient=0.9),
}
FINAL_SHAPES = {"mnist_tiny": (4, 4, 4), "toy2d": (2, 1, 1)}  # C, H, W


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint's file, floats as float64."""
    return dict(np.load(Path(__file__).parent / "data" / f"reference_{name}.npz"))


def load_flow(name: str, weights: str) -> rf.ResidualFlow:
    """The flow with the "raw" or "ema" parameters and the stored power-iteration vectors."""
    arrays = load_arrays(name)
    tensors = {k.removeprefix("raw/"): v for k, v in arrays.items() if k.startswith("raw/")}
    if weights == "ema":
        averaged = {k.removeprefix("ema/"): v for k, v in arrays.items() if k.startswith("ema/")}
        assert averaged.keys() <= tensors.keys()
        tensors |= averaged
    flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(0))
    layers = [list(names) for _, names in groupby(tensors, key=_layer_name)]
    for (module, index), names in zip(_slots(flow.scales), layers, strict=True):
        prefix = _layer_name(names[0]) + "."
        _fill(module, index, {n.removeprefix(prefix): tensors[n] for n in names}, FINAL_SHAPES[name])
    return flow


def channels_last(shape: tuple[int, int, int]) -> np.ndarray:
    """The permutation p with x_hwc = x_chw[p], for flattened images of shape C, H, W."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(1, 2, 0).ravel()


def _layer_name(tensor: str) -> str:
    """'transforms.0.chain.2.nnet.0.weight' -> 'transforms.0.chain.2'."""
    parts = tensor.split(".")
    return ".".join(parts[: parts.index("chain") + 2])


def _slots(modules) -> Iterator[tuple[nnx.Module, int | None]]:
    """Every ActNorm and residual block in order, with its index if it is part of a stack."""
    for module in modules:
        if isinstance(module, Chain):
            yield from _slots(module.bijectors)
        elif isinstance(module, ResidualStack):
            for n in range(module.depth):
                yield from ((inner, n) for inner, _ in _slots(module.steps.bijectors))
        elif isinstance(module, ActNorm | ResidualBlock):
            yield module, None


def _fill(module: nnx.Module, index: int | None, tensors: dict[str, np.ndarray], final: tuple[int, int, int]) -> None:
    def put(variable, value, shape_like=None):
        where = ... if index is None else index
        assert variable[where].shape == value.shape, (variable[where].shape, value.shape)
        variable[...] = variable[...].at[where].set(jnp.asarray(value))

    tensors = {k.removeprefix("fc_module.").removeprefix("nnet.").removeprefix("nnet."): v for k, v in tensors.items()}
    order = channels_last(final)
    if isinstance(module, ActNorm):
        flat = order if tensors["bias"].size == order.size else slice(None)
        put(module.bias, tensors["bias"][flat])
        put(module.log_scale, tensors["weight"][flat])
        return
    by_number = [
        dict((k.split(".")[1], tensors[k]) for k in names)
        for _, names in groupby(tensors, key=lambda k: k.split(".")[0])
    ]
    for params, theirs in zip(module.contraction.activation_params, [t for t in by_number if "beta" in t], strict=True):
        put(params["beta"], theirs["beta"][0])
    for linear, theirs in zip(module.contraction.linears, [t for t in by_number if "weight" in t], strict=True):
        kernel, bias, u, v = (theirs[k] for k in ("weight", "bias", "u", "v"))
        if kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)
            if kernel.shape[0] > 1:
                height, width = linear.linear_map.size
                u, v = (t.reshape(-1, height, width).transpose(1, 2, 0) for t in (u, v))
        else:
            kernel = kernel.T
            if kernel.shape[0] == order.size:
                kernel, v = kernel[order], v[order]
            if kernel.shape[1] == order.size:
                kernel, bias, u = kernel[:, order], bias[order], u[order]
        put(linear.kernel, kernel)
        put(linear.bias, bias)
        put(linear.u, u)
        put(linear.v, v)
