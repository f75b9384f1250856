"""Contractions of every kind, with kernels so large that the normalisation matters.

Functions here also make their norms outdated, and compute their parts in NumPy.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.vector_norms import dual_map
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.densenet import DenseNetOfMaps
from resflow_jax.layers.lipschitz import deferred_norms, learned_order
from resflow_jax.layers.normalization import MovingCentering
from tests.functional.contractions import dense_matrix

DENSE = [DenseMap(4, 6), DenseMap(6, 4)]
WIDENING = [DenseMap(8, 3), DenseMap(6, 4)]  # after activations that double the channels
CONV = [ConvMap((3, 2), 2, 3), ConvMap((3, 2), 3, 4, 1), ConvMap((3, 2), 4, 2)]
INF = np.inf


def layered(maps=DENSE, activation="lipswish", preactivation=False, norms=None, coefficient=0.9, centering=False):
    options = {"preactivation": preactivation, "norms": norms, "centering": centering}
    return lambda rngs: Layered(maps, get_activation(activation), coefficient, **options, rngs=rngs)


def dense_net(first, dense, last, activation="clipswish"):
    return lambda rngs: DenseNetOfMaps(first, dense, last, get_activation(activation), 0.9, rngs=rngs)


def learned(rngs):
    """Orders moved away from 2, to about 2.9 and 1.3, the last that of the first."""
    orders = [learned_order(), learned_order()]
    orders[0][...] += 0.6
    orders[1][...] -= 1.5
    return layered(norms=[*orders, orders[0]])(rngs)


# name: (constructor from rngs, shape of one example)
CONTRACTIONS = {
    "elementwise": (layered(), (4,)),
    "elementwise, preactivation": (layered(preactivation=True, activation="elu"), (4,)),
    "clipswish": (layered([DenseMap(4, 3), DenseMap(6, 4)], "clipswish"), (4,)),
    "clipswish, preactivation": (layered(WIDENING, "clipswish", preactivation=True), (4,)),
    "orders 121, cpila": (layered(WIDENING, "cpila", preactivation=True, norms=[1.0, 2.0, 1.0]), (4,)),
    "maxmin": (layered(activation="maxmin"), (4,)),
    "fullsort, preactivation, centred": (layered(activation="fullsort", preactivation=True, centering=True), (4,)),
    "identity": (layered([DenseMap(4, 4)], "identity"), (4,)),
    "convolutions": (layered(CONV, preactivation=True), (3, 2, 2)),
    "one 1x1 convolution": (layered([ConvMap((3, 2), 2, 2, 1)]), (3, 2, 2)),
    "DenseNet": (dense_net(None, [DenseMap(4, 2), DenseMap(8, 2)], DenseMap(12, 4)), (4,)),
    "DenseNet after a layer": (dense_net(DenseMap(4, 3), [DenseMap(3, 2)], DenseMap(5, 4), "lipswish"), (4,)),
    "convolutional DenseNet": (dense_net(None, [ConvMap((3, 2), 2, 2)], ConvMap((3, 2), 6, 2, 1)), (3, 2, 2)),
    "orders f12f": (layered([DenseMap(4, 6), DenseMap(6, 5), DenseMap(5, 4)], norms=[INF, 1.0, 2.0, INF]), (4,)),
    "orders 1.5 3 1.5": (layered(norms=[1.5, 3.0, 1.5], preactivation=True), (4,)),
    "orders 121, clipswish": (layered(WIDENING, "clipswish", preactivation=True, norms=[1.0, 2.0, 1.0]), (4,)),
    "orders 222f": (layered(CONV, norms=[2.0, 2.0, 2.0, INF]), (3, 2, 2)),
    "orders 32": (layered([ConvMap((3, 2), 2, 2, 1)], norms=[3.0, 2.0]), (3, 2, 2)),
    "learned orders": (learned, (4,)),
}


def make(name, scale=4.0):
    """A contraction whose parameters are away from their start, its norms converged; and x [40, ...]."""
    contraction, x = _made(name, scale)
    return nnx.clone(contraction), x


@cache
def _made(name, scale):
    constructor, shape = CONTRACTIONS[name]
    with deferred_norms():  # of other kernels
        contraction = constructor(nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for linear in contraction.linears:
        linear.kernel[...] = scale * linear.kernel[...]
        linear.bias[...] += rng.normal(size=linear.bias.shape)
        linear.search_norm(8)
        linear.update_norm(1e-10, 1e-8, 2000)
    for params in contraction.activation_params:
        for param in params.values():
            param[...] += rng.normal()
    scramble_centers(contraction, rng)
    if isinstance(contraction, DenseNetOfMaps):
        contraction.concatenation[...] += 2 * rng.normal(size=contraction.concatenation.shape)
    return contraction, jnp.asarray(rng.normal(size=(40, *shape)))


def scramble_centers(contraction, rng):
    """Biases and means of a centred contraction as after some training."""
    for _, center in nnx.iter_modules(contraction):
        if isinstance(center, MovingCentering):
            center.bias[...] += rng.normal(size=center.bias.shape)
            center.mean[...] += rng.normal(size=center.mean.shape)


def spoil(linear):
    """Power-iteration vectors as after a leap of the parameters: v is random, and u fits it."""
    domain, codomain = linear.orders()
    v = jax.random.normal(jax.random.key(3), linear.v.shape, linear.v.dtype)
    v = v / dual_map(v, domain)[1]
    linear.v[...] = v
    linear.u[...] = dual_map(linear.linear_map.matvec(linear.kernel[...], v), codomain)[0]


def apply(contraction, x):
    """g(x) of a contraction."""
    return contraction.apply(contraction.weights(), x)


def numpy_lipswish(x, beta):
    return x / (1 + np.exp(-np.log1p(np.exp(beta)) * x)) / 1.1


def numpy_activation(name, x, beta):
    if name == "lipswish":
        return numpy_lipswish(x, beta)
    return np.concatenate([numpy_lipswish(x, beta), numpy_lipswish(-x, beta)], axis=-1) / 1.004


def numpy_affine(linear, x):
    """The layer by its dense matrix, divided by its largest singular value where that exceeds 0.9."""
    matrix = dense_matrix(linear.linear_map, linear.kernel[...])
    if linear.linear_map.copies > 1:
        matrix = np.kron(np.eye(linear.linear_map.copies), matrix)
    matrix = matrix * min(1, 0.9 / np.linalg.norm(matrix, 2))
    y = (x.reshape(len(x), -1) @ matrix.T).reshape(*x.shape[:-1], -1)
    return y + np.asarray(linear.bias[...])
