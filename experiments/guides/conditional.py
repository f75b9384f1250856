# %% [markdown]
# # Conditional inference
#
# A conditional flow p(theta | y) learns the posterior of a simulator from simulated pairs (theta, y) alone, for all
# observations at once. The simulator is an oscillator with damping, whose position is measured twelve times with
# noise; its posterior can be had on a grid, so the flow can be judged.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import resflow_jax as rf

STEPS, BLOCKS, PAIRS, RANKED = 2000, 6, 20000, 500

# %% [markdown]
# ## Simulator and prior
#
# theta is frequency and damping, uniform in a box. The noise has the deviation 0.2.

# %%
LOW, HIGH, NOISE = jnp.array([0.5, 0.0]), jnp.array([2.5, 1.0]), 0.2
TIMES = jnp.linspace(0.25, 5.0, 12)


def positions(theta):
    frequency, damping = theta[..., :1], theta[..., 1:]
    return jnp.exp(-damping * TIMES) * jnp.cos(frequency * TIMES)


def simulate(key, number):
    prior_key, noise_key = jax.random.split(key)
    theta = jax.random.uniform(prior_key, (number, 2), minval=LOW, maxval=HIGH)
    return theta, positions(theta) + NOISE * jax.random.normal(noise_key, (number, len(TIMES)))


theta, y = simulate(jax.random.key(0), PAIRS)

# %% [markdown]
# ## A conditional flow in a box
#
# `Bounded` takes the box to the plane, so samples stay in it. Each g(theta; y) is a contraction in theta for every y:
# a free network of y gives each linear layer a shift and a gate of modulus at most 1. The certificate holds for all
# y.


# %%
def layer(rngs):
    g = rf.LipschitzMLP(2, (64, 64), condition_dim=len(TIMES), rngs=rngs)
    return rf.Chain([rf.ResidualBlock(g), rf.ActNorm((2,))])


box = rf.Bounded(low=LOW, high=HIGH)
flow = rf.Flow(rf.Chain([box, rf.ActNorm((2,)), rf.ResidualStack(layer, BLOCKS, rngs=nnx.Rngs(0))]))
flow, history = rf.fit(flow, theta, condition=y, steps=STEPS, learning_rate=3e-3)
print(history)
print("certified for every y:", rf.certify(flow).is_certified)

# %% [markdown]
# ## Beside the exact posterior
#
# On a grid the likelihood of every theta is known. Three new observations, and the mean log-densities over more:
# their difference is the mean KL divergence from the exact posterior to the flow.

# %%
sides = [jnp.linspace(low, high, 120) for low, high in zip(LOW, HIGH, strict=True)]
grid = jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1)
cell = jnp.prod((HIGH - LOW) / 119)


def exact_log_posterior(theta, y):
    """log p(theta | y), by a sum over the grid for the evidence."""

    def log_likelihood(theta):
        return -0.5 * (((positions(theta) - y) / NOISE) ** 2).sum(axis=-1)

    return log_likelihood(theta) - jax.nn.logsumexp(log_likelihood(grid)) - jnp.log(cell)


true_theta, observed = simulate(jax.random.key(1), RANKED)
log_q = flow.log_prob(true_theta, condition=observed, estimator=rf.Exact())
log_p = jax.lax.map(lambda pair: exact_log_posterior(*pair), (true_theta, observed))
print(f"log p(theta | y): exact {log_p.mean():.3f}, flow {log_q.mean():.3f} nats")

# %% [markdown]
# ## Ranks
#
# Where the posterior is right, the rank of the true parameter among posterior samples is uniform, whatever the
# observation (simulation-based calibration, Talts et al. 2018). `sample` takes one condition for all samples or one
# for each.

# %%
each = jnp.broadcast_to(observed, (63, *observed.shape))
draws = flow.sample(jax.random.key(2), (63, RANKED), condition=each)
ranks = (draws < true_theta).sum(axis=0)

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
for n, axis in enumerate(axes[:3]):
    density = jnp.exp(exact_log_posterior(grid, observed[n]))
    levels = density.max() * np.array([0.05, 0.2, 0.5, 0.8])
    axis.contour(*sides, density.T, levels=levels, colors="black", linewidths=1)
    samples = flow.sample(jax.random.key(3), 1000, condition=observed[n])
    axis.scatter(*samples.T, s=2, alpha=0.4, color="tab:red")
    axis.scatter(*true_theta[n], marker="*", s=120, color="tab:blue", zorder=3)
    axis.set(xlabel="frequency", ylabel="damping", title="exact (lines), flow (dots), truth")
axes[3].hist(np.asarray(ranks), bins=np.arange(0, 65, 8), label=["frequency", "damping"])
axes[3].axhline(RANKED / 8, color="gray", linestyle=":")
axes[3].set(xlabel="rank of the true parameter", title="uniform if calibrated")
axes[3].legend(loc="lower center", framealpha=1)
figure.savefig("conditional.png", dpi=120)
