"""Distributions of distrax and of NumPyro as base distributions of a flow: `rf.interop.distrax.base(distribution)`.

One event of the distribution is one z. Its arrays become `Constant`, which training of the flow does not change.
"""

import copy
import inspect
import types
from typing import Any, NamedTuple

import jax

from resflow_jax.functional.checks import check_type
from resflow_jax.models.bases import ObjectBase

Array = jax.Array


class _Distrax(NamedTuple):
    distribution: Any

    def log_prob(self, z: Array) -> Array:
        return _with_own_methods(self.distribution).log_prob(z)

    def sample(self, key: Array, num_samples: int) -> Array:
        return _with_own_methods(self.distribution).sample(seed=key, sample_shape=(num_samples,))


def _with_own_methods(part: Any) -> Any:
    """A copy of an object of distrax whose attributes that are bound methods belong to its own parts.

    Some bijectors hold methods of one of their parts, for example `DiagLinear`. In a copy with other arrays, as
    `jax.jit` and `rf.load` make it, these would still be methods of the part with the first arrays.
    """
    import distrax

    if isinstance(part, list | tuple) and type(part) in (list, tuple):
        return type(part)(map(_with_own_methods, part))
    if not isinstance(part, distrax.Distribution | distrax.Bijector):
        return part
    copied = copy.copy(part)
    vars(copied).update({name: _with_own_methods(value) for name, value in vars(part).items()})
    for name, value in vars(copied).items():
        if inspect.ismethod(value):
            owners = [own for own in (copied, *vars(copied).values()) if type(own) is type(value.__self__)]
            if len(owners) == 1:
                vars(copied)[name] = types.MethodType(value.__func__, owners[0])
    return copied


class _Numpyro(NamedTuple):
    distribution: Any

    def log_prob(self, z: Array) -> Array:
        return self.distribution.log_prob(z)

    def sample(self, key: Array, num_samples: int) -> Array:
        return self.distribution.sample(key, (num_samples,))


def distrax_base(distribution: Any) -> ObjectBase:
    """Makes a base of a `distrax.Distribution` of real vectors or arrays.

    Args:
      distribution: one distribution, of batch shape (). Its event shape is the shape of z.

    Returns:
      A base for `rf.Flow(bijector, base=...)`.

    Raises:
      ValueError: for any other object, and for a batch of distributions.

    Example:
      >>> import distrax
      >>> prior = distrax.MultivariateNormalDiag(jnp.zeros(2), 3 * jnp.ones(2))
      >>> flow = rf.Flow(rf.Affine((2,)), base=rf.interop.distrax.base(prior))
      >>> flow.sample(jax.random.key(0), 5).shape
      (5, 2)
    """
    import distrax

    check_type("distribution", distribution, distrax.Distribution)
    return _base(_Distrax, distribution, "distrax.Independent(distribution, reinterpreted_batch_ndims={})")


def numpyro_base(distribution: Any) -> ObjectBase:
    """Makes a base of a `numpyro.distributions.Distribution` of real vectors or arrays.

    Args:
      distribution: one distribution, of batch shape (). Its event shape is the shape of z.

    Returns:
      A base for `rf.Flow(bijector, base=...)`.

    Raises:
      ValueError: for any other object, and for a batch of distributions.

    Example:
      >>> from numpyro.distributions import Normal
      >>> prior = Normal(jnp.zeros(2), 3.0).to_event(1)
      >>> flow = rf.Flow(rf.Affine((2,)), base=rf.interop.numpyro.base(prior))
      >>> flow.sample(jax.random.key(0), 5).shape
      (5, 2)
    """
    from numpyro.distributions import Distribution

    check_type("distribution", distribution, Distribution)
    return _base(_Numpyro, distribution, "distribution.to_event({})")


def _base(adapter: type, distribution: Any, remedy: str) -> ObjectBase:
    batch_shape = tuple(distribution.batch_shape)
    if batch_shape:
        raise ValueError(
            f"distribution: expected one distribution, of batch shape (), got batch shape {batch_shape} with events "
            f"{tuple(distribution.event_shape)}; {remedy.format(len(batch_shape))} makes one event of it"
        )
    return ObjectBase(adapter(distribution), tuple(distribution.event_shape))
