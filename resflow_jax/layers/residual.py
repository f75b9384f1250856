"""The residual block y = x + g(x), and a stack of equal blocks run as one scan.

g is a `Contraction`; log-det and inverse are those of `functional.logdet` and
`functional.inverse`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import Bijector, Chain, Forward, Inverse, join_blocks
from resflow_jax.layers.contraction import Contraction

Array = jax.Array


class ResidualBlock(Bijector):
    """y = x + g(x) with a contraction g.

    Cost in evaluations of g: one for the map; that of the estimator for the log-det; that of the
    solver for the inverse, about log(tolerance) / log(Lip(g)) for the fixed-point iteration.
    """

    blocks = 1
    takes_noise = True

    def __init__(self, contraction: Contraction):
        self.contraction = contraction

    def g(self, x: Array) -> Array:
        """The contraction g(x)."""
        return self.contraction.apply(self.contraction.weights(), x)

    def __call__(self, x: Array) -> Array:
        return x + self.g(x)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        graphdef, state = nnx.split(self.contraction)
        y, log_det, diagnostics = residual(
            self.contraction.apply,
            state,
            x,
            key=key,
            estimator=jax.tree.map(lambda rows: rows[0], estimator),
            lipschitz=self.contraction.promised if self.contraction.is_closed else None,
            prepare=lambda state: nnx.merge(graphdef, state).weights(),
            chunk_size=self.contraction.chunk_size,
            return_diagnostics=True,
        )
        return y, log_det, [jax.tree.map(lambda leaf: leaf[None], diagnostics)]

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        g, weights = self.contraction.apply, self.contraction.weights()
        x, status = residual_inverse(g, weights, y, solver=solver, return_status=True)
        return x, [jax.tree.map(lambda leaf: leaf[None], status)]

    def initialize(self, x: Array) -> Array:
        self.contraction.move_statistics(x, share=1.0)
        return self(x)

    def update_statistics(self, x: Array) -> Array:
        self.contraction.move_statistics(x)
        return self(x)


class ResidualStack(Bijector):
    """Equal chains (a residual block and the layers behind it), one after the other, as one scan.

    Their parameters are stacked on a leading axis, so program size and compile time do not grow
    with the depth.
    """

    def __init__(self, make_step: Callable[[nnx.Rngs], Chain], depth: int, *, rngs: nnx.Rngs):
        check_count("depth", depth, 1)
        self.depth = depth
        self.steps = nnx.vmap(make_step)(rngs.split(depth))
        self.blocks = depth * self.steps.blocks
        self.takes_noise = self.steps.takes_noise

    def unstacked(self) -> list[Chain]:
        """The chains one by one, as copies."""
        graphdef, stacked = nnx.split(self.steps)
        return [nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], stacked)) for n in range(self.depth)]

    def restack(self, chains: list[Chain]) -> None:
        """Takes over the state of the chains, as from `unstacked`, in place."""
        nnx.update(self.steps, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, chains)))

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
        keys = None if key is None or not self.takes_noise else jax.random.split(key, self.depth)
        estimators = jax.tree.map(lambda rows: rows.reshape(self.depth, -1, *rows.shape[1:]), estimator)

        def body(step, x, inputs):
            x, log_det, diagnostics = step.forward(x, *inputs)
            return x, (log_det, join_blocks(diagnostics))

        x, (log_dets, diagnostics) = self._scan(body, x, (keys, estimators))
        return x, jnp.sum(log_dets, axis=0), [_merge_leading(diagnostics)]

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        def body(step, y, _):
            x, status = step.inverse(y, solver)
            return x, join_blocks(status)

        x, status = self._scan(body, y, reverse=True)
        return x, [_merge_leading(status)]

    def initialize(self, x: Array) -> Array:
        return self._changing(lambda step, x: step.initialize(x), x)

    def update_statistics(self, x: Array) -> Array:
        return self._changing(lambda step, x: step.update_statistics(x), x)

    def _changing(self, apply: Callable[[Chain, Array], Array], x: Array) -> Array:
        """Runs x through apply(step, x) of every step, and keeps what that changes in the steps."""

        def body(step, x, _):
            x = apply(step, x)
            return x, nnx.state(step)

        x, stacked = self._scan(body, x)
        nnx.update(self.steps, stacked)
        return x


def _merge_leading(tree):
    """Leaves [steps, blocks of a step, ...] as [blocks, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
