"""Flows of zuko and normflows: densities by a dense Jacobian, inverses, training as that of our own flows."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch", reason="needs the extra bench")
pytest.importorskip("zuko", reason="needs the extra bench")
pytest.importorskip("normflows", reason="needs the extra bench")

import torch

from experiments.studies.comparison.datasets import config_of, task_for
from experiments.studies.comparison.jobs import Job
from experiments.studies.comparison.making import made
from experiments.studies.comparison.torch_contender import Loss, TorchModel, bias_corrected
from experiments.studies.comparison.torch_flows import NormflowsGlow, Transform, ZukoFlow, flow_of
from resflow_jax.training.step import optax_promotion

IMAGES, VECTORS = (4, 4, 1), (3,)


def make(kind, shape, alpha):
    """A flow with random parameters in float64, and points of its data."""
    torch.manual_seed(0)
    x = torch.rand(5, *shape, dtype=torch.float64) if len(shape) == 3 else torch.randn(5, *shape, dtype=torch.float64)
    if kind == "glow":
        flow = NormflowsGlow(Transform(shape, alpha).double(), hidden=4, blocks=2).double()
    else:
        flow = ZukoFlow(kind, Transform(shape, alpha, x).double(), (8, 8), transforms=2).double()
    with torch.no_grad():
        flow(x)
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow, x


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize(
    ("kind", "shape", "alpha"),
    [
        ("nsf", VECTORS, None),
        ("maf", VECTORS, None),
        ("nsf", IMAGES, 0.05),
        ("maf", IMAGES, 1e-6),
        ("glow", IMAGES, 0.05),
        ("glow", (4, 4, 3), None),
    ],
)
def test_log_densities(kind, shape, alpha):
    """log N(z) + log|det dz/dx| of the whole map from x to z, and back to x."""
    flow, x = make(kind, shape, alpha)

    def latent(x):
        z = flow.latent(x[None])
        return torch.cat([part.flatten() for part in z]) if isinstance(z, list) else z.flatten()

    for n in range(2):
        z, jacobian = latent(x[n]), torch.autograd.functional.jacobian(latent, x[n])
        log_det = torch.linalg.slogdet(jacobian.reshape(len(z), -1)).logabsdet
        expected = -0.5 * (z**2).sum() - 0.5 * len(z) * math.log(2 * math.pi) + log_det
        torch.testing.assert_close(flow(x)[n], expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(flow.inverse(flow.latent(x)), x, rtol=1e-6, atol=1e-6)
        assert flow.sample(7).shape == (7, *shape)


def test_the_transform_standardises():
    """The elements of the logit, by the examples that it is given."""
    x = torch.rand(50, 2, 2, 1, dtype=torch.float64)
    u, _ = Transform((2, 2, 1), 0.05, x).double()(x)
    torch.testing.assert_close(u.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(u.std(0), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_average_is_that_of_optax():
    """With its bias correction, whatever the first parameters were."""
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    averaged, update = [torch.from_numpy(values[0].copy())], bias_corrected(0.9)
    for number, value in enumerate(values[1:], 1):
        update(averaged, [torch.from_numpy(value)], torch.tensor(number))
    ema = optax.ema(0.9)
    state = ema.init(jnp.zeros(3, jnp.float32))
    with optax_promotion():
        for value in values:
            expected, state = ema.update(jnp.asarray(value), state)
    np.testing.assert_allclose(averaged[0].numpy(), expected, rtol=1e-5)


def test_bits_per_dim():
    """Of a uniform density on [0, 1]^D: log2 of the number of levels."""

    def uniform(x):
        assert ((x >= 0) & (x <= 1)).all()
        return torch.zeros(len(x))

    task = task_for("digits", config_of("digits"))
    scores = TorchModel(task, Loss(task), uniform).scores(task.splits.test[:130], 0, 2)
    assert scores.shape == (2, 130)
    np.testing.assert_allclose(scores, math.log2(task.splits.levels), rtol=1e-6)
    vectors = task_for("moons", config_of("moons"))
    scores = TorchModel(vectors, Loss(vectors), lambda x: x[:, 0]).scores(vectors.splits.test[:9], 0, 1)
    np.testing.assert_allclose(scores[0], vectors.splits.test[:9, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "data", "width", "parameters"),
    [
        ("zuko_nsf", "digits", 1, 2_303_680),
        ("normflows_glow", "digits", 0.5, 301_184),
        ("zuko_nsf", "rings", 1, 36_710),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_sizes(model, data, width, parameters):
    config = config_of(data)
    shape = (3, 8, 8, 1) if data == "digits" else (3, 2)
    flow = flow_of(model, config, np.random.default_rng(0).uniform(size=shape), width)
    assert sum(parameter.numel() for parameter in flow.parameters() if parameter.requires_grad) == parameters


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("model", ["zuko_maf", "normflows_glow"])
def test_a_small_run(model):
    """Two updates on images, then all figures and some samples."""
    job = Job("digits", model, 0, 0.01, 1.0, 1e-3, is_search=False, small=True)
    found, arrays = made(job)
    assert found["error"] is None and found["steps"] == 2 and found["skipped"] == 0
    assert 1 < found["test"] < 5 and found["parameters"] > 0 and found["reconstruction"] < 1e-3
    assert found["sample_seconds"] > 0 and found["log_prob_1"] > 0 and found["unconverged"] == 0
    assert arrays["samples"].shape == (20, 8, 8, 1) and arrays["data"].shape == (8, 8, 8, 1)
    assert made(replace(job, is_search=True))[1] is None
