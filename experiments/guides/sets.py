# %% [markdown]
# # A contraction of your own: sets
#
# The order of the points of a set means nothing, so a density of sets must not depend on it. This guide writes a
# contraction that treats all points alike, proves its Lipschitz constant, and trains a flow of it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import resflow_jax as rf

STEPS, BLOCKS = 2000, 10

# %% [markdown]
# ## The contraction
#
# Each point moves by itself and with the mean of all points: g(x)_i = out tanh(own x_i + mean x). A mean over points
# has norm 1 and |tanh'| <= 1, so Lip(g) <= |out| (|own| + |mean|). `LipschitzDense` keeps each layer's norm within
# its coefficient, which gives 0.98 (0.48 + 0.48) = 0.94.
#
# A subclass of `Contraction` with `lipschitz` and `__call__` is enough to train; the constant is then your statement,
# which nothing proves. With `linears` and `bound` the library proves it: `certify` bounds the norms of the layers from
# above and puts them into your formula.


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


# %% [markdown]
# ## A check on data
#
# `check_contraction` looks for two points that are mapped further apart than they were, and so can refute a constant
# that is too small; it cannot prove one.

# %%
g = SetContraction(32, nnx.Rngs(0))
points = jax.random.normal(jax.random.key(0), (256, 6, 2))
print(rf.check_contraction(lambda _, x: g(x), (), points, jax.random.key(1)))

# %% [markdown]
# ## A flow of sets
#
# Six points of a ring whose centre is random: far from independent, in any order.


# %%
def layer(rngs):
    return rf.Chain([rf.ResidualBlock(SetContraction(32, rngs)), rf.ActNorm((2,))])


rng = np.random.default_rng(0)
angle = rng.uniform(0, 2 * np.pi, (4000, 6, 1))
circle = np.concatenate([np.cos(angle), np.sin(angle)], axis=2)
sets = 2 * rng.normal(size=(4000, 1, 2)) + circle + 0.1 * rng.normal(size=(4000, 6, 2))
stack = rf.ResidualStack(layer, BLOCKS, rngs=nnx.Rngs(0))
flow = rf.Flow(rf.Chain([rf.ActNorm((2,)), stack]), rf.StandardNormal((6, 2)))
flow, history = rf.fit(flow, sets.astype(np.float32), steps=STEPS, batch_size=128)
print(history)
report = rf.certify(flow)
print("largest bound on Lip(g):", report.bounds.max(), "blocks not proved:", report.unproved)

# %% [markdown]
# ## What it has learned
#
# Sets in another order are as likely. Points of one set stay together, as those of the data do; the ring itself is
# learned less sharply, for a point sees the others by their mean alone.

# %%
x = jnp.asarray(sets[:8], jnp.float32)
change = flow.log_prob(x[:, ::-1], estimator=rf.Exact()) - flow.log_prob(x, estimator=rf.Exact())
print(f"log p of sets in reversed order differs by {jnp.abs(change).max():.1e} nats")

samples = flow.sample(jax.random.key(2), 2000)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
for axis, examples, title in [(axes[0], sets, "eight sets"), (axes[1], samples, "eight sets of the flow")]:
    for points in examples[:8]:
        axis.scatter(*points.T, s=14)
    axis.set(title=title, xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
for examples, label in [(sets, "data"), (samples, "flow")]:
    spread = np.linalg.norm(examples - examples.mean(axis=1, keepdims=True), axis=2).ravel()
    axes[2].hist(spread, np.linspace(0, 3, 60), density=True, alpha=0.6, label=label)
axes[2].set(title="distance from the mean of the set")
axes[2].legend()
figure.savefig("sets.png", dpi=120)
