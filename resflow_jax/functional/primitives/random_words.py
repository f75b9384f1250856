"""Random bits of a key without a draw."""

import jax
import jax.numpy as jnp

Array = jax.Array


def random_words(key: Array, count: int) -> Array:
    """Random bits, uint32 [count], from a key of "threefry2x32" that is random itself, as `jax.random.fold_in` returns.

    Where they suffice, they are the words of the key: that compiles faster than a draw. Then nothing else may use these
    words, but keys may be folded from the key.
    """
    own = jax.random.key_data(key)
    return own[:count] if count <= own.size else jax.random.bits(key, (count,), jnp.uint32)
