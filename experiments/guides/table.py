# %% [markdown]
# # Density of a table
#
# A flow learns the density of the rows of a table. Here the rows are measurements of cell nuclei; the flow is fitted
# to benign ones alone, and its log-density then tells malignant ones apart, which it has never seen.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

import resflow_jax as rf

STEPS = 1500

# %% [markdown]
# ## The table
#
# Six columns, in their own units. All are positive, and area is almost a function of radius.

# %%
table = load_breast_cancer()
columns = ["mean radius", "mean area", "mean texture", "mean smoothness", "mean compactness", "mean symmetry"]
values = table.data[:, [list(table.feature_names).index(name) for name in columns]].astype(np.float32)
is_benign = table.target == 1
benign = np.random.default_rng(0).permutation(values[is_benign])
train, validation, test = np.split(benign, [220, 270])
malignant = values[~is_benign]
print(f"{len(train)} rows to train on, {len(validation)} to validate, {len(test)} to test; {len(malignant)} malignant")

# %% [markdown]
# ## A flow whose samples are positive
#
# `Bounded` takes each column to the reals, here by a logarithm, and samples stay positive. `ActNorm` takes mean and
# deviation of each column from the first batch, so the units do not matter. Then come residual blocks, which are run
# as one scan: the program does not grow with their number.


# %%
def layer(rngs):
    return rf.Chain([rf.ResidualBlock(rf.LipschitzMLP(6, (32, 32), rngs=rngs)), rf.ActNorm((6,))])


positive = rf.Bounded(low=[0.0] * 6, high=[np.inf] * 6)
flow = rf.Flow(rf.Chain([positive, rf.ActNorm((6,)), rf.ResidualStack(layer, 6, rngs=nnx.Rngs(0))]))

# %% [markdown]
# ## Training
#
# `rf.fit` maximises the log-likelihood of the training rows by an unbiased estimate, and returns the weights that are
# best on the validation rows. With few rows this early stop is what keeps the flow from learning them by heart.

# %%
flow, history = rf.fit(flow, train, validation=validation, steps=STEPS, batch_size=64, learning_rate=2e-3)
print(history)

# %% [markdown]
# ## What it is worth
#
# The test log-likelihood, by the exact log-det, beside that of the Gaussian of the same data in logarithms: the
# density of the values themselves has the factor 1 / x of each column.

# %%
log_p = np.asarray(flow.log_prob(test, estimator=rf.Exact()))
gaussian = multivariate_normal(np.log(train).mean(axis=0), np.cov(np.log(train).T))
log_normal = gaussian.logpdf(np.log(test)) - np.log(test).sum(axis=1)
for name, scores in {"flow": log_p, "log-normal": log_normal}.items():
    print(f"{name:10} {scores.mean():.2f} +- {scores.std() / np.sqrt(len(scores)):.2f} nats a row")

log_p_malignant = np.asarray(flow.log_prob(malignant, estimator=rf.Exact()))
labels = np.repeat([0, 1], [len(test), len(malignant)])
auroc = roc_auc_score(labels, -np.concatenate([log_p, log_p_malignant]))
print(f"AUROC of -log p, benign against malignant: {auroc:.3f}")

# %% [markdown]
# ## Samples, training and scores

# %%
samples = flow.sample(jax.random.key(0), len(test))
assert jnp.all(samples > 0)
figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
for axis, (i, j) in zip(axes, [(0, 1), (3, 4)], strict=False):
    axis.scatter(test[:, i], test[:, j], s=8, label="benign test rows")
    axis.scatter(samples[:, i], samples[:, j], s=8, label="samples of the flow")
    axis.set(xlabel=columns[i], ylabel=columns[j])
axes[0].legend()
axes[2].plot(history.step, history.train, label="training")
axes[2].plot(history.step, history.validation, label="validation")
axes[2].axvline(history.best_step, color="gray", linestyle=":", label="weights that are kept")
axes[2].set(xlabel="step", ylabel="-log p, nats")
axes[2].legend()
bins = np.linspace(np.percentile(log_p_malignant, 10), log_p.max(), 40)
axes[3].hist(log_p, bins, density=True, alpha=0.6, label="benign test rows")
axes[3].hist(log_p_malignant, bins, density=True, alpha=0.6, label="malignant")
axes[3].set(xlabel="log p, nats", title=f"AUROC {auroc:.3f}")
axes[3].legend()
figure.savefig("table.png", dpi=120)
