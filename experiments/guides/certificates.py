# %% [markdown]
# # Certificates and the inverse
#
# A residual block is invertible because Lip(g) < 1. This guide proves it for a trained flow, breaks it, repairs it,
# and shows what the bound is worth for the inverse: an upper bound on its error.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from sklearn.datasets import load_diabetes

import resflow_jax as rf

STEPS = 800

# %% [markdown]
# ## A trained flow
#
# Eight measurements of 442 patients.

# %%
table = load_diabetes(scaled=False).data
x = np.delete(table, [1, 7], axis=1).astype(np.float32)  # without two columns that take few values
flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=8, blocks=6, hidden=(64, 64)), rngs=nnx.Rngs(0))
flow, history = rf.fit(flow, x, steps=STEPS, batch_size=64, learning_rate=2e-3)
print(history)

# %% [markdown]
# ## The certificate
#
# Training normalises each kernel by power iteration, which knows norms from below. `certify` bounds them from above,
# in float64 on the host: layers, blocks, and the whole flow. Three layers of coefficient 0.98 promise 0.98^3 = 0.941.

# %%
report = rf.certify(flow)
print("certified:", report.is_certified, "bounds:", report.bounds.round(4))
print(f"Lip(f) <= {report.lipschitz:.1e}, Lip(f^-1) <= {report.inverse_lipschitz:.1e}")

# %% [markdown]
# ## Broken and repaired
#
# Kernels that change without `update_norms`, as by a careless step of gradient descent, may leave their bound. Here
# noise is added to all kernels. `require` names the worst block; `tighten` rescales kernels until every block keeps
# its promise.

# %%
broken = nnx.clone(flow)
rng = np.random.default_rng(0)


def with_noise(kernel):
    return kernel + 0.05 * rng.normal(size=kernel.shape).astype(kernel.dtype) if kernel.ndim == 3 else kernel


nnx.update(broken, jax.tree.map(with_noise, nnx.state(broken, nnx.Param)))
broken_report = rf.certify(broken)
try:
    broken_report.require()
except ValueError as error:
    print(error)
repaired = nnx.clone(broken)
repaired.tighten()
repaired_report = rf.certify(repaired)
print("after tighten:", repaired_report.is_certified, repaired_report.bounds.round(4))

# %% [markdown]
# ## Solvers
#
# The inverse of a block is the fixed point of x = y - g(x). `Anderson`, the default, needs fewer evaluations of g
# than plain iteration; the status has them for each example and block.

# %%
z = flow(x)
work = {}
for solver in (rf.FixedPoint, rf.Anderson, rf.Broyden):
    work[solver.__name__] = []
    for tolerance in 10.0 ** -np.arange(1, 7):
        back, status = flow.inverse(z, solver=solver(tolerance=tolerance), return_status=True)
        error = np.abs(np.asarray(back) - x).max() / np.abs(x).max()
        work[solver.__name__].append((float(status.iterations.sum(axis=0).mean()), float(error)))

# %% [markdown]
# ## The error of one block
#
# A solve that stops at x with the residual r = y - g(x) - x is within |r| / (1 - L) of the solution, for L the
# certified bound on Lip(g). Here one block is solved loosely, to compare the bound with the true error.

# %%
block = rf.Flow(rf.ResidualBlock(rf.LipschitzMLP(8, (64, 64), rngs=nnx.Rngs(1))))
points = jax.random.normal(jax.random.key(0), (200, 8))
estimates, bounds = [], []
for tolerance in (1e-1, 1e-2, 1e-3):
    solution, status = block.inverse(block(points), solver=rf.FixedPoint(tolerance=tolerance), return_status=True)
    estimates.append(jnp.linalg.norm(solution - points, axis=1))
    bounds.append(rf.certify(block).error_bounds(status)[0])
print("the bound holds:", all((bound >= error).all() for bound, error in zip(bounds, estimates, strict=True)))

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
blocks = np.arange(flow.blocks)
for shift, (name, found) in enumerate(
    {"trained": report, "with noise": broken_report, "tightened": repaired_report}.items()
):
    axes[0].bar(blocks + 0.27 * (shift - 1), found.bounds, width=0.25, label=name)
axes[0].axhline(1, color="black", linestyle=":")
axes[0].set(xlabel="block", ylabel="upper bound on Lip(g)", ylim=(0, 1.1 * broken_report.bounds.max()))
axes[0].legend(loc="lower right", framealpha=1)
for name, points_of_solver in work.items():
    axes[1].semilogy(*np.transpose(points_of_solver), "o-", label=name)
axes[1].set(xlabel="evaluations of g, all blocks", ylabel="relative error of x", title="six tolerances")
axes[1].legend()
for tolerance, error, bound in zip((1e-1, 1e-2, 1e-3), estimates, bounds, strict=True):
    axes[2].loglog(error, bound, ".", label=f"tolerance {tolerance:g}")
line = np.array([min(map(np.min, estimates)), max(map(np.max, bounds))])
axes[2].plot(line, line, color="black", linestyle=":")
axes[2].set(xlabel="true error of x, one block", ylabel="certified error")
axes[2].legend()
figure.savefig("certificates.png", dpi=120)
