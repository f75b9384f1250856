# %% [markdown]
# # Your own contraction
#
# A residual block takes any g with a Lipschitz constant below 1. This guide builds two flows that respect a symmetry: of
# a field on a periodic lattice, which any translation leaves as likely, and of sets of points, whose order means nothing.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import resflow_jax as rf
from flax import nnx

STEPS, FIELDS, SWEEPS, SET_STEPS = 600, 64, 400, 800

# %% [markdown]
# ## A field on a periodic lattice
#
# The density of a field phi on an 8x8 lattice is exp(-S(phi)) up to a constant. No samples of it are given. Convolutions
# with periodic padding commute with translations, and their norms are exact, by the Fourier transform. An `ActNorm`
# over the one channel commutes with translations too, and so the flow's density does not change under any.

# %%
SIDE, SHAPE = 8, (8, 8, 1)


def action(phi):
    """S [B] of phi [B, 8, 8, 1]: squared differences of neighbours, mass 0.5, coupling 0.25."""
    differences = sum((jnp.roll(phi, 1, axis) - phi) ** 2 for axis in (1, 2))
    return (0.5 * differences + 0.25 * phi**2 + 0.25 * phi**4).sum(axis=(1, 2, 3))


def layer(rngs):
    g = rf.LipschitzCNN(SHAPE, hidden=(16,), kernels=(3, 3), padding="periodic", rngs=rngs)
    return rf.Chain([rf.ResidualBlock(g), rf.ActNorm((1,))])


lattice_flow = rf.Flow(rf.ResidualStack(layer, 6, rngs=nnx.Rngs(0)), rf.StandardNormal(SHAPE))

# %% [markdown]
# ## A loop of pure functions
#
# The flow learns from its own samples: E[log p(phi) + S(phi)] is the KL divergence from the flow to the target, up to a
# constant, and `sample_and_log_prob` is differentiable. The loop is written with `nnx.split` and `nnx.merge`: the state of
# a flow is its parameters and the rest, which are power-iteration vectors and constants.

# %%
graphdef, params, rest = nnx.split(lattice_flow, nnx.Param, ...)
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
lattice_flow = nnx.merge(graphdef, params, rest)
lattice_flow.tighten()
print(f"KL up to a constant: {value:.3f} nats; certified: {rf.certify(lattice_flow).is_certified}")

# %% [markdown]
# ## Weights make it exact
#
# Samples with weights exp(-S) / p give the target's averages. The weights need the exact log-det: an estimate of log p is
# unbiased, but its exponential is not. The effective sample size says how good the flow is. The correlation of two columns at a distance is compared with a long Metropolis chain, which updates the fields of one colour
# of the checkerboard at a time.

# %%
phi, log_p = lattice_flow.sample_and_log_prob(jax.random.key(STEPS), 8 * FIELDS, estimator=rf.Exact())
weights = jax.nn.softmax(-action(phi) - log_p)
print(f"effective sample size: {1 / (weights**2).sum() / len(phi):.0%}")
shifted = lattice_flow.log_prob(jnp.roll(phi[:8], 3, axis=1), estimator=rf.Exact())
difference = jnp.abs(shifted - lattice_flow.log_prob(phi[:8], estimator=rf.Exact())).max()
print(f"log p of shifted fields differs by {difference:.1e} nats")


def correlation(phi):
    """Of the means of columns at distances 0..7: [B, 8]."""
    columns = phi[..., 0].mean(axis=1)
    return jnp.stack([(columns * jnp.roll(columns, distance, axis=1)).mean(axis=1) for distance in range(SIDE)], axis=1)


@jax.jit
def metropolis(phi, key):
    """One sweep over a batch of chains, and the correlation of each."""
    red = (jnp.indices((SIDE, SIDE)).sum(axis=0) % 2)[..., None]
    for colour, subkey in zip((red, 1 - red), jax.random.split(key), strict=True):
        step_key, accept_key = jax.random.split(subkey)
        proposal = phi + colour * jax.random.uniform(step_key, phi.shape, minval=-1.5, maxval=1.5)
        neighbours = sum(jnp.roll(phi, shift, axis) for shift in (1, -1) for axis in (1, 2))
        energy = lambda x, others=neighbours: 2.25 * x**2 + 0.25 * x**4 - x * others  # of one site
        accepted = jnp.log(jax.random.uniform(accept_key, phi.shape)) < energy(phi) - energy(proposal)
        phi = jnp.where(accepted, proposal, phi)
    return phi, correlation(phi).mean(axis=0)


_, chain = jax.lax.scan(metropolis, jnp.zeros((64, *SHAPE)), jax.random.split(jax.random.key(0), SWEEPS))
chain = chain[SWEEPS // 5 :]

# %% [markdown]
# ## Sets of points
#
# Six points on a ring whose centre and radius are random. Each point moves by itself and with the mean of all: a mean has
# norm 1, so Lip(g) <= |out| (|own| + |mean|), as |tanh'| <= 1. With `linears` and `bound` the library can prove it: it takes
# upper bounds on the norms of the layers, and puts them into this formula.


# %%
class SetContraction(rf.Contraction):
    """g(x) = out tanh(own x_i + mean of all x), for sets x [B, points, 2]."""

    lipschitz = 0.95

    def __init__(self, width, rngs):
        self.own = rf.LipschitzDense(2, width, 0.48, rngs=rngs)
        self.mean = rf.LipschitzDense(2, width, 0.48, rngs=rngs)
        self.out = rf.LipschitzDense(width, 2, 0.98, rngs=rngs)
        self.linears = nnx.List([self.own, self.mean, self.out])

    def __call__(self, x, condition=None):
        centre = jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
        return self.out(jnp.tanh(self.own(x) + self.mean(centre)))

    def bound(self, norms, orders):
        own, mean, out = norms
        return out * (own + mean)


def set_layer(rngs):
    return rf.Chain([rf.ResidualBlock(SetContraction(32, rngs)), rf.ActNorm((2,))])


rng = np.random.default_rng(0)
angle = rng.uniform(0, 2 * np.pi, (4000, 6, 1))
circle = np.concatenate([np.cos(angle), np.sin(angle)], axis=2)
sets = 2 * rng.normal(size=(4000, 1, 2)) + circle + 0.1 * rng.normal(size=(4000, 6, 2))
stack = rf.ResidualStack(set_layer, 10, rngs=nnx.Rngs(0))
set_flow = rf.Flow(rf.Chain([rf.ActNorm((2,)), stack]), rf.StandardNormal((6, 2)))
set_flow, history = rf.fit(set_flow, sets.astype(np.float32), steps=SET_STEPS, batch_size=128)
print(history)
print("largest bound on Lip(g):", rf.certify(set_flow).bounds.max())

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
image = axes[0].imshow(phi[0, ..., 0])
figure.colorbar(image, ax=axes[0])
axes[0].set(title="a field of the flow", xticks=[], yticks=[])
distances = np.arange(SIDE)
axes[1].errorbar(distances, chain.mean(axis=0), chain.std(axis=0) / np.sqrt(len(chain) / 10), label="Metropolis")
axes[1].plot(distances, correlation(phi).mean(axis=0), "x", label="flow")
axes[1].plot(distances, weights @ correlation(phi), "o", fillstyle="none", label="flow with weights")
axes[1].set(xlabel="distance", title="correlation of columns")
axes[1].legend()
for axis, examples, title in [(axes[2], sets, "sets"), (axes[3], set_flow.sample(jax.random.key(1), 8), "samples of sets")]:
    for points in examples[:8]:
        axis.scatter(*points.T, s=12)
    axis.set(title=title, xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
figure.savefig("contraction.png", dpi=120)
