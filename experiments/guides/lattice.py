# %% [markdown]
# # A periodic lattice
#
# Each block's g may be any network with a Lipschitz constant below 1, so it may respect a symmetry. Here the density
# of a field on a periodic lattice does not change under translations. It is known up to a constant, and no samples of
# it are given: the flow learns from its own.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import resflow_jax as rf

STEPS, FIELDS, SWEEPS = 600, 64, 400

# %% [markdown]
# ## The target and the flow
#
# The density of a field phi on an 8x8 lattice is exp(-S(phi)) up to a constant. No samples of it are given.
# Convolutions with periodic padding commute with translations, and their norms are exact, by the Fourier transform.
# An `ActNorm` over the one channel commutes with translations too, and so the flow's density does not change under
# any.

# %%
SIDE, SHAPE = 8, (8, 8, 1)


def action(phi):
    """S [B] of phi [B, 8, 8, 1]: squared differences of neighbours, mass 0.5, coupling 0.25."""
    differences = sum((jnp.roll(phi, 1, axis) - phi) ** 2 for axis in (1, 2))
    return (0.5 * differences + 0.25 * phi**2 + 0.25 * phi**4).sum(axis=(1, 2, 3))


def layer(rngs):
    g = rf.LipschitzCNN(SHAPE, hidden=(16,), kernels=(3, 3), padding="periodic", rngs=rngs)
    return rf.Chain([rf.ResidualBlock(g), rf.ActNorm((1,))])


flow = rf.Flow(rf.ResidualStack(layer, 6, rngs=nnx.Rngs(0)), rf.StandardNormal(SHAPE))

# %% [markdown]
# ## A loop of pure functions
#
# The flow learns from its own samples: E[log p(phi) + S(phi)] is the KL divergence from the flow to the target, up to
# a constant, and `sample_and_log_prob` is differentiable. The loop is written with `nnx.split` and `nnx.merge`: the
# state of a flow is its parameters and the rest, which are power-iteration vectors and constants.

# %%
graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)))


@jax.jit
def train_step(params, rest, opt_state, key):
    def loss(params):
        phi, log_p = nnx.merge(graphdef, params, rest).sample_and_log_prob(key, FIELDS)
        return (log_p + action(phi)).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    flow = nnx.merge(graphdef, optax.apply_updates(params, updates), rest)
    flow.update_norms()  # after every change of parameters: keeps each block a contraction
    _, params, rest = nnx.split(flow, nnx.Param, ...)
    return params, rest, opt_state, value


opt_state = optimizer.init(params)
for n in range(STEPS):
    params, rest, opt_state, value = train_step(params, rest, opt_state, jax.random.key(n))
flow = nnx.merge(graphdef, params, rest)
flow.tighten()
print(f"KL up to a constant: {value:.3f} nats; certified: {rf.certify(flow).is_certified}")

# %% [markdown]
# ## Weights make it exact
#
# Samples with weights exp(-S) / p give the target's averages. The weights need the exact log-det: an estimate of log
# p is unbiased, its exponential is not. The effective sample size says how good the flow is. The correlation of two
# columns at a distance is compared with a long Metropolis chain, which updates the sites of one colour of the
# checkerboard at a time.

# %%
phi, log_p = flow.sample_and_log_prob(jax.random.key(STEPS), 32 * FIELDS, estimator=rf.Exact())
weights = jax.nn.softmax(-action(phi) - log_p)
print(f"effective sample size: {1 / (weights**2).sum() / len(phi):.0%}")
shifted = flow.log_prob(jnp.roll(phi[:8], 3, axis=1), estimator=rf.Exact())
difference = jnp.abs(shifted - flow.log_prob(phi[:8], estimator=rf.Exact())).max()
print(f"log p of shifted fields differs by {difference:.1e} nats")


def correlation(phi):
    """Of the means of columns at distances 0..7: [B, 8]."""
    columns = phi[..., 0].mean(axis=1)
    return jnp.stack([(columns * jnp.roll(columns, distance, axis=1)).mean(axis=1) for distance in range(SIDE)], axis=1)


def site_action(phi, neighbours):
    """What of S depends on one site."""
    return 2.25 * phi**2 + 0.25 * phi**4 - phi * neighbours


@jax.jit
def metropolis(phi, key):
    """One sweep over a batch of chains, and the correlation of each."""
    red = (jnp.indices((SIDE, SIDE)).sum(axis=0) % 2)[..., None]
    for colour, subkey in zip((red, 1 - red), jax.random.split(key), strict=True):
        step_key, accept_key = jax.random.split(subkey)
        proposal = phi + colour * jax.random.uniform(step_key, phi.shape, minval=-1.5, maxval=1.5)
        neighbours = sum(jnp.roll(phi, shift, axis) for shift in (1, -1) for axis in (1, 2))
        gain = site_action(phi, neighbours) - site_action(proposal, neighbours)
        accepted = jnp.log(jax.random.uniform(accept_key, phi.shape)) < gain
        phi = jnp.where(accepted, proposal, phi)
    return phi, correlation(phi).mean(axis=0)


_, chain = jax.lax.scan(metropolis, jnp.zeros((64, *SHAPE)), jax.random.split(jax.random.key(0), SWEEPS))
chain = chain[SWEEPS // 5 :]

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
limits = {"vmin": -1.2, "vmax": 1.2, "cmap": "RdBu"}
left.imshow(phi[0, ..., 0], **limits)
left.set(title="a field drawn from the flow", xticks=[], yticks=[])
image = middle.imshow(jnp.roll(phi[0, ..., 0], (3, 2), (0, 1)), **limits)
middle.set(title="as likely: the same, shifted", xticks=[], yticks=[])
figure.colorbar(image, ax=middle)
distances = np.arange(SIDE)
right.errorbar(distances, chain.mean(axis=0), chain.std(axis=0) / np.sqrt(len(chain) / 10), label="Metropolis")
right.plot(distances, correlation(phi).mean(axis=0), "x", label="flow")
right.plot(distances, weights @ correlation(phi), "o", fillstyle="none", label="flow with weights")
right.set(xlabel="distance", title="correlation of columns")
right.legend()
figure.savefig("lattice.png", dpi=120)
