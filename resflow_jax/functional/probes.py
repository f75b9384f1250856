"""Random probes v with E[v v^T] = I, for the trace estimate tr(A) = E[v^T A v] (Hutchinson 1990).

Hadamard probes are Rademacher probes that depend on each other: one of them determines the others. Row n of a
Hadamard matrix has the signs (-1)^popcount(n & c_j) for the code c_j of element j. The probe of example n is this row
times signs that the batch shares: so each probe alone has the distribution of a Rademacher probe. Over 2^q examples
with all codes below 2^q, the mean of v v^T is exactly the identity. Then the part of A that the examples have in common
contributes no noise to the mean of the batch. Over fewer examples, 2^p, the mean of v_j v_k is exactly zero unless the
last p bits of c_j and c_k are equal. The codes of neighbours differ in these bits, where J of a convolution is large
(probing: Bekas, Kokiopoulou & Saad 2007, doi 10.1016/j.apnum.2007.01.003; Stathopoulos, Laeuchli & Orginos 2013, arXiv
1302.4018, for the bits of positions in turn).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.batch_axes import example_numbers, shared_and_example_keys, whole_batch_size
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.primitives.random_words import random_words

Array = jax.Array

PROBES = ("rademacher", "gaussian", "orthogonal", "hadamard")


def seed_keys(probe: str, probes: int, key: Array, x: Array) -> tuple[Array, Array]:
    """A PRNG key for draws that all examples share, and what `draw_seeds` takes for each example, [B, ...].

    The latter are independent keys, except for Hadamard probes, which depend on the example's number in the batch:
    there they are the bits of the probes, uint32 [B, words].

    Args:
      probe: one of `PROBES`.
      probes: number of probes for each example.
      key: PRNG key.
      x: floats [B, ...], the batch or a device's part of it.
    """
    shared_key, keys = shared_and_example_keys(key, x)
    if probe != "hadamard":
        return shared_key, keys
    own_key = jax.random.fold_in(shared_key, 3)
    codes, size = _codes(x.shape[1:])
    numbers, total = example_numbers(x), whole_batch_size(x)
    rows = numbers[:, None] * probes + jnp.arange(probes, dtype=jnp.int32)[None]
    parity = lax.population_count(rows[:, :, None] & jnp.asarray(codes)[None, None]).astype(jnp.uint32) & 1
    words = -(-codes.size // 32)

    def shared(key: Array) -> Array:
        return _bits(random_words(key, words), codes.size)

    def of_rows(number: Array) -> Array:
        return jnp.where(number == 0, shared(own_key), shared(jax.random.fold_in(own_key, number)))

    if total is not None and total * probes <= size:
        signs = shared(own_key)[None, None]
    else:  # every `size` rows have signs of their own
        signs = jax.vmap(jax.vmap(of_rows))(rows // size)
    return shared_key, _words((parity ^ signs).reshape(x.shape[0], -1))


def _codes(event: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """A code for each element of an event, int32 [D], and the power of two that all are below.

    The lowest bits are those of the channel, the last axis; then come those of the other axes in turn, lowest first.
    """
    event = event or (1,)
    *others, channels = np.indices(event).reshape(len(event), math.prod(event))
    widths = [(n - 1).bit_length() for n in event]
    bits = [channels >> n & 1 for n in range(widths[-1])]
    for n in range(max(widths[:-1], default=0)):
        bits += [
            axis >> n & 1 for axis, width in zip(reversed(others), reversed(widths[:-1]), strict=True) if n < width
        ]
    return sum((bit << n for n, bit in enumerate(bits)), 0 * channels).astype(np.int32), 1 << len(bits)


def draw_seeds(probe: str, probes: int, keys: Array, x: Array) -> Array:
    """The seeds [B, ...] from which `make_probes` makes the probes of each example of x [B, ...].

    For Rademacher probes they are random bits, so that the backward pass need not draw them again. For other probes the
    seeds are the keys.

    Args:
      probe: one of `PROBES`.
      probes: number of probes for each example.
      keys: keys from `seed_keys`, [B, ...].
      x: floats [B, ...], for their shape.
    """
    if probe != "rademacher":
        return keys
    words = -(-probes * math.prod(x.shape[1:]) // 32)
    return jax.vmap(lambda key: random_words(key, words))(keys)


def make_probes(probe: str, probes: int, seeds: Array, x: Array) -> Array:
    """Makes `probes` probes v for each example of x [B, ...]: [probes * B, ...] in x's dtype, batch after batch.

    Orthogonal probes are columns of a random rotation, times sqrt(D): the mean of v v^T over D of them is exactly the
    identity, so D of them give the exact trace.

    Args:
      probe: one of `PROBES`.
      probes: number of probes for each example.
      seeds: [B, ...], of `draw_seeds`.
      x: floats [B, ...], for their shape and dtype.

    Raises:
      ValueError: for more orthogonal probes than dimensions D.
    """
    event = x.shape[1:]
    dim = math.prod(event)
    if probe == "orthogonal" and probes > dim:
        raise ValueError(f"probes: expected at most {dim} orthogonal probes in {dim} dimensions, got {probes}")

    def make(seed):
        if probe in ("rademacher", "hadamard"):
            return _signs(seed, probes * dim, x.dtype).reshape(probes, *event)
        if probe == "gaussian":
            return jax.random.normal(seed, (probes, *event), x.dtype)
        # LAPACK has no 16-bit floats
        columns = jnp.linalg.qr(jax.random.normal(seed, (dim, probes), wide_dtype(x.dtype)))[0]
        return (math.sqrt(dim) * columns.T.reshape(probes, *event)).astype(x.dtype)

    return jax.vmap(make, out_axes=1)(seeds).reshape(probes * x.shape[0], *event)


def _signs(words: Array, count: int, dtype: np.dtype) -> Array:
    """Signs +-1 [count], one for each random bit. Each 32-bit word gives 32 signs."""
    return (2 * _bits(words, count).astype(jnp.int32) - 1).astype(dtype)


def _bits(words: Array, count: int) -> Array:
    """The first bits of 32-bit words, uint32 [count]."""
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return bits.reshape(-1)[:count]


def _words(bits: Array) -> Array:
    """The words [B, words] whose first bits are these, uint32 [B, count]."""
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % 32))).reshape(bits.shape[0], -1, 32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32)[None, None], axis=-1, dtype=jnp.uint32)
