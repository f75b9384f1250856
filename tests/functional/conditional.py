"""A contraction that depends on a condition of several arrays, with its dense references."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH, DIM = 4, 3


def g(params, x, condition):
    """A contraction in x of Lipschitz constant at most |scale|, for every condition; far from symmetric."""
    w, u, v, table, scale = (params[name] for name in ("w", "u", "v", "table", "scale"))
    hidden = jnp.tanh(x @ w + condition["shift"] @ v + table[condition["label"]])
    return scale * (jnp.cos(condition["gate"])[:, None] * hidden) @ u


def net(scale=0.6, *, batch=BATCH, seed=0):
    """(params, x, condition), the condition of two float arrays and an integer one."""
    rng = np.random.default_rng(seed)
    w, u = (np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(2))
    params = {"w": w, "u": u, "v": rng.normal(size=(2, DIM)), "table": rng.normal(size=(3, DIM)), "scale": scale}
    condition = {"shift": rng.normal(size=(batch, 2)), "gate": rng.uniform(-1, 1, size=batch)}
    condition["label"] = np.arange(batch) % 3
    return jax.tree.map(jnp.asarray, (params, 0.5 * rng.normal(size=(batch, DIM)), condition))


def with_label(floats, label):
    """The condition of its floats and its integers."""
    return {**floats, "label": label}


def jacobians(params, x, condition):
    """dg/dx of every example by jacfwd, [B, D, D]."""

    def one(x, condition):
        row = jax.tree.map(lambda leaf: leaf[None], condition)
        return jax.jacfwd(lambda x: g(params, x[None], row)[0])(x)

    return jax.vmap(one)(x, condition)


def dense_log_det(params, x, condition):
    """log|det(I + J)| of every example, [B]."""
    return jnp.linalg.slogdet(jnp.eye(DIM)[None] + jacobians(params, x, condition))[1]


def dense_series(terms, params, x, condition):
    """Its power series up to a number of terms, [B]."""
    j = jacobians(params, x, condition)
    power, total = jnp.broadcast_to(jnp.eye(DIM), j.shape), 0.0
    for k in range(1, terms + 1):
        power = power @ j
        total -= (-1) ** k / k * jnp.trace(power, axis1=1, axis2=2)
    return total
