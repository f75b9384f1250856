# %% [markdown]
# # From the PyTorch code
#
# Checkpoints of the authors' PyTorch implementation (`train_img.py` and `train_toy.py` of rtqichen/residual-flows)
# are read and written without PyTorch, and nothing in them is executed. This guide writes one, reads it, and goes on
# training it.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from sklearn.datasets import make_moons

import resflow_jax as rf

STEPS, BLOCKS = 1500, 8

# %% [markdown]
# ## A checkpoint
#
# A checkpoint of your own is a path: `checkpoint = "most_recent.pth"`. Here the flow of a toy density takes its
# place, in training half done. The options of the scripts have these names in a config:
#
# | option of the script | here |
# | --- | --- |
# | `--nblocks 16-16-16`, `--idim 512` | `blocks=(16, 16, 16)`, `hidden_channels=512` |
# | `--kernels 3-1-3`, `--coeff 0.98` | `kernels=(3, 1, 3)`, `coefficient=0.98` |
# | `--act swish`, `--preact` | `activation="lipswish"`, `preactivation="all_but_first"` |
# | `--vnorms 222f`, `--learn-p` | `norms=rf.Norms("222f")`, `norms=rf.Norms(learned=True)` |
# | `--actnorm`, `--batchnorm` | `between=rf.BetweenBlocks(actnorm=True, batchnorm=True)` |
# | `--factor-out`, `--squeeze-first` | `scales=rf.Scales(factor_out=True, squeeze_first=True)` |
# | `--n-exact-terms 2`, `--n-dist poisson` | `rf.Roulette(rf.Poisson(2.0), 2, minres_steps=0, probe="gaussian")` |
# | `--n-power-series 5` | `rf.Truncated(terms=5)` |
# | `--neumann-grad True`, `--mem-eff True` | the default: memory does not depend on the length of the series |

# %%
x = (2 * make_moons(4000, noise=0.05, random_state=0)[0] - [1, 0.5]).astype(np.float32)
between = rf.BetweenBlocks(first_actnorm=True)
config = rf.VectorFlowConfig(dim=2, blocks=BLOCKS, hidden=(32, 32), preactivation="all", between=between)
half_trained, _ = rf.fit(rf.ResidualFlow(config, rngs=nnx.Rngs(0)), x, steps=STEPS // 10, learning_rate=2e-3)
checkpoint = Path(tempfile.mkdtemp()) / "toy.pth"
rf.save_torch_checkpoint(half_trained, checkpoint)
print(f"{checkpoint.name}: {checkpoint.stat().st_size} bytes")

# %% [markdown]
# ## Read
#
# The config comes from the options in the file, the weights from its tensors; a tensor that is missing, left over or
# of another shape is named in an error. `weights="ema"` takes the moving averages, which image checkpoints have,
# `"raw"` the others. By default the power iterations are run to convergence, so that every block is a contraction;
# `norms="stored"` keeps the singular vectors of the file, and with them the map of the original code.

# %%
flow = rf.load_torch_checkpoint(checkpoint)
stored = rf.load_torch_checkpoint(checkpoint, norms="stored")
print(flow.config)
same = jnp.abs(stored.log_prob(x, estimator=rf.Exact()) - half_trained.log_prob(x, estimator=rf.Exact())).max()
print(f"log p of what was saved and of what was read differ by at most {same:.1e} nats")

# %% [markdown]
# ## What changes
#
# Images are [B, H, W, C] here, and each part of z is flattened in this order. The log-density is in nats; the
# scripts' loss is in bits/dim. The certificate says whether each block is invertible, which the scripts never ask.
# The papers' estimator has infinite variance for some contractions, and the library warns where it is used.

# %%
print("certified:", rf.certify(flow).is_certified, "bounds:", rf.certify(flow).bounds.round(4))
papers = rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian")
for name, estimator in {"the papers' estimator": papers, "the default": rf.Roulette()}.items():
    keys = jax.random.split(jax.random.key(0), 20)
    noise = jnp.stack([flow.log_prob(x[:200], key=key, estimator=estimator) for key in keys]).std(axis=0).mean()
    print(f"noise of log p by {name}: {noise:.3f} nats")

# %% [markdown]
# ## Go on
#
# The flow is a flow as any other. `rf.fit` sees that its ActNorm layers are set, and trains on from where it is.
# `rf.save` writes it in the library's own format, `rf.save_torch_checkpoint` back in that of the scripts. For a whole
# run there is `python -m experiments.import_torch`.

# %%
trained, history = rf.fit(flow, x, steps=STEPS, learning_rate=5e-3)
print(history)
rf.save_torch_checkpoint(trained, checkpoint.with_name("trained.pth"))

# %%
side = np.linspace(-3.5, 3.5, 120, dtype=np.float32)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
axes[0].scatter(*x[:2000].T, s=2)
axes[0].set(title="data")
for axis, found, title in [(axes[1], flow, "as read from the checkpoint"), (axes[2], trained, "trained on")]:
    log_p = np.asarray(found.log_prob(grid, estimator=rf.Exact()))
    axis.pcolormesh(side, side, np.exp(log_p).reshape(len(side), -1))
    axis.set(title=f"{title}: {log_p.max():.2f} nats at most")
for axis in axes:
    axis.set(xlim=(-3.5, 3.5), ylim=(-2.5, 2.5))
figure.savefig("pytorch.png", dpi=120)
