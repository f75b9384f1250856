"""Flows as pure functions of variables in a plain dict, as Flax Linen has them: `init` and `apply`.

    model = rf.interop.stateless.stateless(config)                        # of a `ResidualFlow`
    model = rf.interop.stateless.stateless(make_flow)                     # of any flow: make_flow(rngs) -> rf.Flow
    variables = model.init(key, x)                                        # {"params": {...}, "norms": {...}}
    log_p = model.apply(variables, "log_prob", x, key=key)                # any method of the flow
    variables, status = model.apply(variables, "update_norms")            # those that change a flow return variables

Variables are nested dicts of arrays with string keys, by collection: "params", which training differentiates; "norms",
power-iteration vectors; "batch_stats", running statistics; "constants", which training leaves alone, of data among
them what ActNorm took from a batch. A flow has the collections that it needs. They pass through `jax.tree` functions,
jit, grad, vmap, optax, `flax.serialization` and orbax as any dict does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.checks import check_key, check_type
from resflow_jax.io.variables import Structure, Variables, flattened, split_variables
from resflow_jax.models.config import FlowConfig
from resflow_jax.models.flow import Flow
from resflow_jax.models.residual_flow import flow_from_config

Array = jax.Array
MakeFlow = Callable[[nnx.Rngs], Flow]

CHANGING = frozenset({"converge_norms", "initialize", "tighten", "update_norms", "update_statistics"})


@dataclass(frozen=True)
class Stateless:
    """The flow of a config, or of a function that makes it, as pure functions; see the module's head."""

    source: FlowConfig | MakeFlow

    def init(self, key: Array, x: Array | None = None, condition: Array | None = None) -> Variables:
        """Variables of a new flow: as it is made, random, its norms iterated to convergence.

        Args:
          key: PRNG key of the parameters.
          x: batch [B, *event_shape] from which ActNorm and moving batch norm take their statistics; without it they are
            the identity.
          condition: with x, as of `Flow.initialize`.
        """
        check_key("key", key)
        flow = _make(self.source, key)
        if x is not None:
            flow.initialize(x, condition)
        return split_variables(flow)

    def apply(self, variables: Variables, method: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the flow with these variables, which stay as they are.

        Returns:
          What the method returns. Of a method that changes the flow, the new variables: alone from "initialize",
          "update_statistics" and "tighten" (which runs on the host), and from any method that returns None; as
          (variables, status) from "update_norms" and "converge_norms".

        Raises:
          ValueError: for an unknown method, and for variables that are not those of this flow: the message names them.
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
        """A flow with these variables, for what takes a flow, as `certify`; its changes do not reach them.

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


def stateless(source: FlowConfig | MakeFlow) -> Stateless:
    """The pure functions `init`, `apply` and `bind` of a flow.

    Args:
      source: the config of a `ResidualFlow`; or make_flow(rngs) -> flow, a function of `nnx.Rngs` to any `Flow`, which
        must make the same structure at every call. It is traced once for the structure, and called by `init`.

    Raises:
      ValueError: for a source that is neither.
    """
    if not isinstance(source, FlowConfig) and (isinstance(source, Flow) or not callable(source)):
        raise ValueError(
            f"source: expected the config of a flow, or a function make_flow(rngs), got {type(source).__name__}"
        )
    return Stateless(source)


def methods_of(kind: type[Flow]) -> tuple[str, ...]:
    """The public methods of a class of flows, and `__call__`."""
    bases = [base for base in kind.__mro__ if issubclass(base, Flow)]
    names = dict.fromkeys(name for base in reversed(bases) for name in vars(base))
    return tuple(n for n in names if (n == "__call__" or not n.startswith("_")) and callable(getattr(kind, n)))


def _make(source: FlowConfig | MakeFlow, key: Array) -> Flow:
    rngs = nnx.Rngs(key)
    if is_dataclass(source):
        return flow_from_config(source, rngs=rngs)
    flow = source(rngs)
    check_type("make_flow", flow, Flow)
    return flow


@lru_cache(maxsize=16)
def _structure(source: FlowConfig | MakeFlow) -> Structure:
    """What the flow is made of, without making it."""
    return Structure.made_by(lambda: _make(source, jax.random.key(0)))
