"""Flows as pure functions of variables in a plain dict, as Flax Linen has them: `init` and `apply`.

    model = rf.interop.stateless.stateless(config)                        # for the config of a flow
    model = rf.interop.stateless.stateless(make_flow)                     # for any flow: make_flow(rngs) -> rf.Flow
    variables = model.init(key, x)                                        # {"params": {...}, "norms": {...}}
    log_p = model.apply(variables, "log_prob", x, key=key)                # any method of the flow
    variables, status = model.apply(variables, "update_norms")            # methods that change a flow return variables

Variables are nested dicts of arrays with string keys, by collection. "params" is what training differentiates, "norms"
are power-iteration vectors, "batch_stats" are running statistics, and "constants" are what training does not change,
such as the statistics that ActNorm took from a batch. A flow has only the collections that it needs. `jax.tree`
functions, jit, grad, vmap, optax, `flax.serialization` and orbax take them as any dict.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.checks import check_key, check_type
from resflow_jax.io.variables import Structure, Variables, flattened, split_variables
from resflow_jax.layers.module import Module
from resflow_jax.models.config import FlowConfig
from resflow_jax.models.flow import Flow
from resflow_jax.models.residual_flow import flow_from_config

Array = jax.Array

CHANGING = frozenset({"converge_norms", "initialize", "tighten", "update_norms", "update_statistics"})


@dataclass(frozen=True)
class Stateless:
    """The pure functions `init`, `apply` and `bind` of a flow, as `stateless` makes them.

    Attributes:
      source: the config of the flow, or the function that makes it.

    Example:
      >>> model = rf.interop.stateless.stateless(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)))
      >>> variables = model.init(jax.random.key(0))
      >>> model.bind(variables).event_shape
      (2,)
    """

    source: Any

    def init(self, key: Array, x: Array | None = None, condition: Array | None = None) -> Variables:
        """Returns the variables of a new flow with random parameters; its power iterations are run to convergence.

        Args:
          key: PRNG key of the parameters.
          x: batch [B, *event_shape] from which ActNorm and moving batch norm take their statistics. Without it both are
            the identity.
          condition: condition of x, as in `Flow.initialize`.

        Raises:
          ValueError: if `key` is not a PRNG key, and as `Flow.initialize` for x.
        """
        check_key("key", key)
        flow = _make(self.source, key)
        if x is not None:
            flow.initialize(x, condition)
        return split_variables(flow)

    def apply(self, variables: Variables, method: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the flow with these variables, which are not changed.

        Args:
          variables: from `init`, or from a method that changed them.
          method: name of a public method of the flow, or "__call__".
          *args: positional arguments of the method.
          **kwargs: keyword arguments of the method.

        Returns:
          What the method returns. For a method that changes the flow, the new variables: alone for "initialize",
          "update_statistics", "tighten" (which runs on the host) and any method that returns None; as
          (variables, status) for "update_norms" and "converge_norms".

        Raises:
          ValueError: for an unknown method, and for variables that are not those of this flow; the message names them.
        """
        methods = methods_of(_structure(self.source).kind)
        if method not in methods:
            raise ValueError(f"method: expected one of {', '.join(methods)}; got {method!r}")
        flow = self.bind(variables)
        result = getattr(flow, method)(*args, **kwargs)
        if result is None:
            return split_variables(flow)
        return (split_variables(flow), result) if method in CHANGING else result

    def bind(self, variables: Variables) -> Flow:
        """Returns a flow with these variables, for functions that take a flow, such as `certify`.

        Changes of the flow do not change the variables.

        Raises:
          ValueError: as `apply`.
        """
        if not isinstance(variables, Mapping):
            raise ValueError(f"variables: expected nested dicts of arrays, got {type(variables).__name__}")
        structure = _structure(self.source)
        collections = {path[0] for path in structure.leaves}
        for problem, names in (
            ("missing", collections - set(variables)),
            ("unknown", set(variables) - collections),
        ):
            if names:
                listed = ", ".join(sorted(names))
                raise ValueError(f"variables: expected those of this flow; collections {problem}: {listed}")
        return structure.filled(dict(flattened(variables)), what="variables")


def stateless(source: Any) -> Stateless:
    """Makes the pure functions `init`, `apply` and `bind` of a flow.

    Args:
      source: the config of a flow, such as a `VectorFlowConfig`; or make_flow(rngs) -> flow, a function from `nnx.Rngs`
        to any `Flow`. It must make the same structure at every call. It is traced once for the structure, and called by
        `init`.

    Returns:
      An object with the three functions.

    Raises:
      ValueError: for a source that is neither.

    Example:
      >>> model = rf.interop.stateless.stateless(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)))
      >>> variables, x = model.init(jax.random.key(0)), jnp.ones((3, 2))
      >>> def loss(params):
      ...     log_prob = model.apply({**variables, "params": params}, "log_prob", x, estimator=rf.Exact())
      ...     return -log_prob.mean()
      >>> gradient = jax.grad(loss)(variables["params"])
      >>> variables, status = model.apply(variables, "update_norms")
      >>> sorted(variables)
      ['constants', 'norms', 'params']
    """
    if not _is_config(source) and (isinstance(source, Flow) or not callable(source)):
        raise ValueError(
            f"source: expected the config of a flow, or a function make_flow(rngs), got {type(source).__name__}"
        )
    return Stateless(source)


def methods_of(kind: type[Flow]) -> tuple[str, ...]:
    """Returns the names that `Stateless.apply` takes.

    Args:
      kind: a class of flows.

    Returns:
      The names of its public methods, and "__call__".

    Example:
      >>> "log_prob" in rf.interop.stateless.methods_of(rf.Flow)
      True
    """
    own = [base for base in Flow.__mro__ if not issubclass(Module, base)]  # Module has the methods of Flax
    added = [base for base in reversed(kind.__mro__) if base not in Flow.__mro__]
    names = dict.fromkeys(name for base in (*own, *added) for name in vars(base))
    return tuple(n for n in names if (n == "__call__" or not n.startswith("_")) and callable(getattr(kind, n)))


def _is_config(source: Any) -> bool:
    """Whether `flow_from_config` knows the flow of it."""
    is_registered = flow_from_config.dispatch(type(source)) is not flow_from_config.dispatch(object)
    return isinstance(source, FlowConfig) or is_registered


def _make(source: Any, key: Array) -> Flow:
    rngs = nnx.Rngs(key)
    if _is_config(source):
        return flow_from_config(source, rngs=rngs)
    flow = source(rngs)
    check_type("make_flow", flow, Flow)
    return flow


@lru_cache(maxsize=16)
def _structure(source: Any) -> Structure:
    """The structure of the flow, found without making it."""
    return Structure.made_by(lambda: _make(source, jax.random.key(0)))
