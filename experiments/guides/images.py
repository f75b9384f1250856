# %% [markdown]
# # Images
#
# A multi-scale flow learns 8x8 digits of 17 grey levels: bits/dim, samples, reconstructions, and paths between two
# images. `python -m experiments.density digits` trains a larger flow of the same kind, with checkpoints and a report.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import resflow_jax as rf

STEPS, BLOCKS, DENSE, TRAIN, LEVELS = 600, 3, 2, 1500, 17

# %% [markdown]
# ## Data
#
# Images are integers [N, H, W, C]. A density needs real numbers: with `levels=17`, `rf.fit` adds uniform noise anew
# at every step and divides by 17, so that x lies in [0, 1]. Bits/dim of these x bound those of the integers from
# above.

# %%
digits = np.random.default_rng(0).permutation(load_digits().images.astype(np.uint8)[..., None])
train, test = digits[:TRAIN], digits[TRAIN:]

# %% [markdown]
# ## The flow
#
# A logit takes [0, 1] to the reals; then come two scales of convolutional residual blocks with a 2x2 squeeze between
# them, and dense blocks on the flattened image. `certify` says what the blocks are bounded by.

# %%
config = rf.ImageFlowConfig(
    shape=(8, 8, 1), blocks=(BLOCKS, BLOCKS), hidden_channels=32, tail=rf.DenseTail(blocks=DENSE, hidden=64)
)
flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
flow, history = rf.fit(flow, train, levels=LEVELS, steps=STEPS, batch_size=64, learning_rate=3e-3, ema=0.99)
print(history)

# %% [markdown]
# ## Bits/dim
#
# The standard error has two parts: the choice of test images, and the noise of dequantisation and log-dets.

# %%
estimate = rf.evaluate_bits_per_dim(flow, test, jax.random.key(0), levels=LEVELS, draws=2)
print("test bits/dim:", estimate)
print("largest bound on Lip(g):", rf.certify(flow).bounds.max())

# %% [markdown]
# ## Samples, reconstructions, paths
#
# Samples are the inverse of draws of z; a lower temperature draws z closer to 0. Reconstructions are f^-1(f(x)),
# which is x up to the tolerance of the solver. A path between two images is a line between their z, at constant
# length.

# %%
samples = flow.sample(jax.random.key(1), 16, temperature=0.8)
x = (jnp.asarray(test[:16]) + 0.5) / LEVELS
z = flow(x)
reconstructions, status = flow.inverse(z, return_status=True)
print(
    "max |x - f^-1(f(x))|:", jnp.abs(x - reconstructions).max(), "evaluations of g a block:", status.iterations.mean()
)

share = jnp.linspace(0, 1, 16)[:, None]
line = (1 - share) * z[0] + share * z[1]
length = (1 - share) * jnp.linalg.norm(z[0]) + share * jnp.linalg.norm(z[1])
path = flow.inverse(line * length / jnp.linalg.norm(line, axis=1, keepdims=True))

# %%
rows = {"test images": x, "reconstructed": reconstructions, "samples": samples, "from first to second": path}
figure, axes = plt.subplots(len(rows), 16, figsize=(11, 3.2), layout="constrained")
for line_of_axes, (name, images) in zip(axes, rows.items(), strict=True):
    line_of_axes[0].set_ylabel(name, rotation=0, horizontalalignment="right", verticalalignment="center")
    for axis, image in zip(line_of_axes, images, strict=True):
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
figure.savefig("images.png", dpi=120)
