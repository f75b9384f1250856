# %% [markdown]
# # Inside NumPyro and distrax
#
# A trained flow is a distribution of NumPyro and a bijector of distrax. This guide learns a prior from examples,
# conditions it on a noisy measurement by NUTS, and changes the units of x by a bijector of distrax.

# %%
import distrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import optax
from flax import nnx
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import TransformReparam
from sklearn.datasets import make_moons

import resflow_jax as rf

STEPS, BLOCKS, WARMUP, SAMPLES = 1500, 8, 300, 1000

# %% [markdown]
# ## A prior from examples
#
# Two half circles in the plane. No formula of this prior is given, only examples of it. The loop is written out here:
# `rf.fit` does the same with validation and early stopping.

# %%
x = make_moons(4000, noise=0.1, random_state=0)[0].astype(np.float32)
flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=BLOCKS, hidden=(32, 32)), rngs=nnx.Rngs(0))
flow.initialize(x)  # ActNorm from data
optimizer = nnx.Optimizer(flow, optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)), wrt=nnx.Param)


@nnx.jit
def train_step(flow, optimizer, x, key):
    loss, grads = nnx.value_and_grad(lambda flow: -flow.log_prob(x, key=key).mean())(flow)
    optimizer.update(flow, grads)
    flow.update_norms()  # one advance of the power iterations: keeps every block a contraction
    return loss


rng = np.random.default_rng(0)
for n in range(STEPS):
    loss = train_step(flow, optimizer, x[rng.integers(len(x), size=256)], jax.random.key(n))
flow.converge_norms()
print(f"-log p: {loss:.3f} nats")

# %% [markdown]
# ## NumPyro: a posterior
#
# x is drawn from the flow, and the sum of its elements is measured with noise. `FlowDistribution` takes the flow as
# it is now. In two dimensions the exact log-det costs two products, so `rf.Exact()` is the right estimator; a
# stochastic one takes a key, which stays the same for the life of the distribution.
#
# With `TransformReparam` NUTS walks on z, where the prior is a standard normal density. It then needs the way from z
# to x but no log-det, and passes more easily between the two half circles.

# %%
prior = rf.interop.numpyro.FlowDistribution(flow, estimator=rf.Exact())


def model(total):
    x = numpyro.sample("x", prior)
    numpyro.sample("total", numpyro.distributions.Normal(x.sum(), 0.1), obs=total)


on_z = numpyro.handlers.reparam(model, config={"x": TransformReparam()})
kernel = MCMC(NUTS(on_z), num_warmup=WARMUP, num_samples=SAMPLES, progress_bar=False)
kernel.run(jax.random.key(0), jnp.asarray(0.3))
posterior = kernel.get_samples()["x"]
print("x1 + x2 in the posterior:", posterior.sum(axis=1).mean(), "+-", posterior.sum(axis=1).std())

# %% [markdown]
# ## The same posterior by weights
#
# The likelihood is cheap, so importance weights on samples of the prior give the posterior too. NUTS has to agree.

# %%
draws = flow.sample(jax.random.key(1), 4 * SAMPLES)
weights = jax.nn.softmax(-0.5 * ((0.3 - draws.sum(axis=1)) / 0.1) ** 2)
print("mean by NUTS", posterior.mean(axis=0), "by weights", weights @ draws)

# %% [markdown]
# ## distrax: other units
#
# In distrax, forward is the direction of sampling, from z to x. The bijector composes with others: here x is scaled
# to another unit. The distribution's `log_prob` is differentiable, in parameters too: make the bijector inside of the
# loss to train through it.

# %%
bijector = rf.interop.distrax.bijector(flow, estimator=rf.Exact())
to_millimetres = distrax.Block(distrax.ScalarAffine(0.0, 1000.0), 1)
base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
scaled = distrax.Transformed(base, distrax.Chain([to_millimetres, bijector]))
millimetres = scaled.sample(seed=jax.random.key(2), sample_shape=(SAMPLES,))
change = scaled.log_prob(1000 * x[:100]) - flow.log_prob(x[:100], estimator=rf.Exact())
print("change of log p:", change.mean(), "expected", -2 * np.log(1000.0))

# %% [markdown]
# ## Prior and posterior

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
axes[0].scatter(*x[:1500].T, s=3, alpha=0.5)
axes[0].set(title="Examples of the prior")
axes[1].scatter(*draws[:1500].T, s=3, alpha=0.2, color="tab:gray", label="prior (flow)")
axes[1].scatter(*posterior.T, s=3, alpha=0.5, color="tab:red", label="posterior (NUTS)")
axes[1].set(title="Given that x1 + x2 is about 0.3")
axes[1].legend(loc="lower left", markerscale=3)
axes[2].scatter(*millimetres.T, s=3, alpha=0.5, color="tab:green")
axes[2].set(title="Samples of distrax, in millimetres")
figure.savefig("inside.png", dpi=120)
