# %% [markdown]
# # Many devices
#
# One training step runs on one device or on many, and gives the same numbers to rounding. This guide trains the same
# flow of 8x8 digits in three ways, on the cores of a CPU that act as devices, and compares the losses. On GPUs and
# TPUs nothing changes but the first line, which asks for devices of the CPU.

# %%
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")  # before JAX is imported; GPUs and TPUs do not mind

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import resflow_jax as rf

STEPS, BATCH, BLOCKS = 60, 64, 2

# %% [markdown]
# ## A flow, a loss, a trainer
#
# `Trainer` is the static side of training: a loss, an optimiser of optax, the decay of the moving average. A loss
# takes a flow, a batch, a key, an estimator and the number of steps done, and returns a scalar with the diagnostics
# of the log-dets. Here a batch is images with values in [0, 1], to which noise was added.

# %%
digits = load_digits().images[..., None]
rng = np.random.default_rng(0)
images = ((digits + rng.random(digits.shape)) / 17).astype(np.float32)

config = rf.ImageFlowConfig(shape=(8, 8, 1), blocks=(BLOCKS,), hidden_channels=16, tail=rf.DenseTail(blocks=0))
flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
flow.initialize(images[:256])


def loss(flow, batch, key, estimator, step):
    log_prob, diagnostics = flow.log_prob(batch, key=key, estimator=estimator, return_diagnostics=True)
    return -log_prob.mean(), diagnostics


trainer = rf.training.Trainer(nnx.graphdef(flow), loss, optax.adam(1e-3), ema_decay=0.99)

# %% [markdown]
# ## Where state and batches lie
#
# A mesh has the axes "data", along which a batch is divided, and "model", along which kernels may be. `Placement`
# puts state and batches where the step takes them. Each example draws its noise by its number in the batch, so the
# noise does not depend on the number of devices.


# %%
def train(mesh, strategy="jit", parameters="replicated"):
    placement = rf.training.Placement(trainer, mesh, strategy, parameters=parameters)
    state = placement.place(trainer.create_state(flow, rf.Roulette()))
    batches, losses = np.random.default_rng(1), []
    for _ in range(STEPS):
        rows = batches.integers(len(images), size=BATCH)
        state, metrics = placement.step(state, placement.place_batch(images[rows]), jax.random.key(2))
        losses.append(metrics["loss"])
    return placement, state, np.array(jax.device_get(losses))


devices = jax.devices()
one, all_devices = rf.training.make_mesh(devices=devices[:1]), rf.training.make_mesh(devices=devices)
runs = {
    "one device": train(one),
    f"jit, {len(devices)} devices, parameters divided": train(all_devices, parameters="full"),
    f"shard_map, {len(devices)} devices": train(all_devices, "shard_map"),
}

# %% [markdown]
# ## The same numbers
#
# The losses agree to rounding in float32. The averaged flow comes back whole, on one device of each process, and can
# be saved, sampled and certified as any flow.

# %%
*_, reference = runs["one device"]
for name, (*_, losses) in runs.items():
    print(f"{name:35} loss {losses[-1]:.4f} nats")
placement, state, _ = runs["one device"]
averaged = placement.averaged_flow(placement.to_checkpoint(state))
averaged.tighten()
print("the averaged flow is certified:", rf.certify(averaged).is_certified)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for width, (name, (*_, losses)) in zip((7, 4, 1.5), runs.items(), strict=True):
    left.plot(np.arange(1, STEPS + 1), losses, label=name, linewidth=width)
    if name != "one device":
        difference = np.abs(losses - reference) / np.abs(reference)
        right.plot(np.arange(1, STEPS + 1), 1e7 * difference, "o" if width > 2 else ".", label=name)
left.set(xlabel="step", ylabel="loss, nats", title="Training on digits")
right.set(xlabel="step", ylabel="relative difference, 1e-7", title="Difference from one device")
left.legend()
right.legend()
figure.savefig("devices.png", dpi=120)
