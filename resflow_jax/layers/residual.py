"""The residual block y = x + g(x), and a stack of equal blocks run as one scan.

g alternates activations and Lipschitz affine layers,

    g = h_n o phi o ... o phi o h_1 (o phi with pre-activation),   Lip(g) <= prod_i c_i * Lip(phi)^n < 1

(Chen et al. 2019, arXiv 1906.02735, section 3.2 and appendix E; pre-activation as in He et al.
2016). log-det and inverse are those of `functional.logdet` and `functional.inverse`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.activations import Activation
from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.iteration import InverseStatus, Solver
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.logdet import residual
from resflow_jax.layers.bijector import Bijector, Chain, Forward, join_diagnostics, join_status, solved
from resflow_jax.layers.lipschitz import LipschitzLinear

Array = jax.Array
Weights = tuple[list[tuple[Array, Array]], list[dict[str, Array]]]


class ResidualBlock(Bijector):
    """y = x + g(x) with g a chain of Lipschitz layers and activations.

    Cost in evaluations of g: one for the map; that of the estimator for the log-det; about
    log(tolerance) / log(Lip(g)) for the inverse.

    Attributes:
      lipschitz: the bound on Lip(g) that its layers and activations promise.
    """

    blocks = 1

    def __init__(
        self,
        linear_maps: Sequence[LinearMap],
        activation: Activation,
        coefficient: float,
        *,
        preactivation: bool,
        rngs: nnx.Rngs,
    ):
        """coefficient: bound on each layer's norm; preactivation: whether g starts with the activation."""
        self.linears = nnx.List([LipschitzLinear(m, coefficient, rngs=rngs) for m in linear_maps])
        self.activation = activation
        self.activation_params = nnx.List(
            nnx.Dict({name: nnx.Param(jnp.asarray(value, float)) for name, value in activation.initial})
            for _ in linear_maps[not preactivation :]
        )
        self.lipschitz = coefficient ** len(self.linears) * activation.lipschitz ** len(self.activation_params)

    def weights(self) -> Weights:
        """Normalised kernels and biases, and the activations' parameters: what `apply` takes."""
        activations = [{name: param[...] for name, param in params.items()} for params in self.activation_params]
        return [linear.weights() for linear in self.linears], activations

    def apply(self, weights: Weights, x: Array) -> Array:
        """The contraction g with given weights; depends on no parameter of the block itself."""
        linears, activations = weights
        if len(activations) == len(linears):
            x = self.activation(activations[0], x)
        x = self.linears[0].apply(linears[0], x)
        between = activations[len(activations) - len(linears) + 1 :]
        for layer, linear, params in zip(self.linears[1:], linears[1:], between, strict=True):
            x = layer.apply(linear, self.activation(params, x))
        return x

    def g(self, x: Array) -> Array:
        """The contraction g(x)."""
        return self.apply(self.weights(), x)

    def __call__(self, x: Array) -> Array:
        return x + self.g(x)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        # g takes the raw state and normalises it: the backward pass keeps no normalised copy.
        graphdef, state = nnx.split(self)
        y, log_det, diagnostics = residual(
            lambda state, x: nnx.merge(graphdef, state).g(x),
            state,
            x,
            key=key,
            estimator=jax.tree.map(lambda rows: rows[0], estimator),
            lipschitz=self.lipschitz,
            return_diagnostics=True,
        )
        return y, log_det, [jax.tree.map(lambda leaf: leaf[None], diagnostics)]

    def inverse(self, y: Array, solver: Solver) -> tuple[Array, InverseStatus]:
        return residual_inverse(self.apply, self.weights(), y, solver=solver, return_status=True)


class ResidualStack(Bijector):
    """Equal chains (a residual block and the ActNorms behind it), one after the other, as one scan.

    Their parameters are stacked on a leading axis, so program size and compile time do not grow
    with the depth.
    """

    def __init__(self, make_step: Callable[[nnx.Rngs], Chain], depth: int, *, rngs: nnx.Rngs):
        check_count("depth", depth, 1)
        self.depth = depth
        self.steps = nnx.vmap(make_step)(rngs.split(depth))
        self.blocks = depth * self.steps.blocks

    def _scan(self, body, carry, xs=None, *, reverse: bool = False):
        """Scans body(step, carry, x) -> (carry, out) over the steps."""
        graphdef, stacked = nnx.split(self.steps)

        def apply(carry, inputs):
            state, x = inputs
            return body(nnx.merge(graphdef, state), carry, x)

        return jax.lax.scan(apply, carry, (stacked, xs), reverse=reverse)

    def __call__(self, x: Array) -> Array:
        return self._scan(lambda step, x, _: (step(x), None), x)[0]

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        keys = None if key is None else jax.random.split(key, self.depth)
        estimators = jax.tree.map(lambda rows: rows.reshape(self.depth, -1, *rows.shape[1:]), estimator)

        def body(step, x, inputs):
            x, log_det, diagnostics = step.forward(x, *inputs)
            return x, (log_det, join_diagnostics(diagnostics))

        x, (log_dets, diagnostics) = self._scan(body, x, (keys, estimators))
        return x, jnp.sum(log_dets, axis=0), [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), diagnostics)]

    def inverse(self, y: Array, solver: Solver) -> tuple[Array, InverseStatus]:
        def body(step, carry, _):
            y, status = carry
            x, new = step.inverse(y, solver)
            return (x, join_status(status, new)), None

        return self._scan(body, (y, solved(y)), reverse=True)[0]

    def initialize(self, x: Array) -> Array:
        def body(step, x, _):
            x = step.initialize(x)
            return x, nnx.state(step)

        x, stacked = self._scan(body, x)
        nnx.update(self.steps, stacked)
        return x
