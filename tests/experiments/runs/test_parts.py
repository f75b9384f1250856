"""A batch in parts over devices."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.runs.parts import number_of_parts, over_parts
from resflow_jax import Exact, ResidualFlow, VectorFlowConfig

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_are_put_together_in_order(parts):
    """Each part passes through the whole flow on its own; as many devices work as there are parts."""
    flow = ResidualFlow(VectorFlowConfig(2, 1, (4,)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 2))

    def of_part(flow, part):
        return *flow.forward(part, estimator=Exact()), part.mean(0, keepdims=True)

    z, log_det, mean = over_parts(of_part, flow)(x.reshape(parts, -1, 2))
    np.testing.assert_allclose(z, flow(x), rtol=1e-12)
    np.testing.assert_allclose(log_det, flow.forward(x, estimator=Exact())[1], rtol=1e-12)
    np.testing.assert_allclose(mean, x.reshape(parts, -1, 2).mean(1), rtol=1e-12)
    assert len(z.sharding.device_set) == parts


@pytest.mark.parametrize(
    ("batch_size", "largest", "expected"),
    [(64, 8, 8), (64, 64, 8), (64, 5, 16), (12, 3, 6), (18, 8, 6), (11, 8, 11), (7, 8, 7), (1, 1, 1), (2, 8, 2)],
)
def test_number_of_parts(batch_size, largest, expected):
    """Equal parts, for as many of the eight devices as can share the batch, none larger than asked."""
    assert number_of_parts(batch_size, largest) == expected


def test_multiples(monkeypatch):
    """The size of a part is one where that is possible."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (number_of_parts(1000, 128), number_of_parts(1000, 128, 4)) == (8, 10)
    assert number_of_parts(1001, 128, 4) == number_of_parts(1001, 128) == 11


def test_as_many_devices_as_divide_the_batch(monkeypatch):
    """64 images on 6 cores: 4 of them work, and of 12 cores 8."""
    for devices, expected in ((6, 4), (12, 8), (5, 4), (1, 1)):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert number_of_parts(64, 64) == expected
