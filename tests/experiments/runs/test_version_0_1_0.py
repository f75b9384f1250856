"""Runs, checkpoints and saved flows of version 0.1.0 still load, and give what they gave then.

They were written in float32, before checkpoints and files had checksums.
"""

import shutil

import numpy as np
import pytest

import resflow_jax as rf
from experiments.runs.saved import saved_flow
from tests.paths import FIXTURES

OLD = FIXTURES / "version_0_1_0"


@pytest.fixture(scope="module")
def expected():
    with np.load(OLD / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", ["composed", "vector", "image"])
def test_saved_flows(name, expected):
    """A flow of layers and flows of configs."""
    flow = rf.load(OLD / f"{name}.safetensors")
    log_prob = flow.log_prob(expected[f"{name}.x"], estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, expected[f"{name}.log_prob"], rtol=2e-5)


def test_a_run(expected, tmp_path):
    """Its config and its checkpoint, which has no checksums."""
    shutil.unpack_archive(OLD / "run.zip", tmp_path)
    found = saved_flow(tmp_path)
    assert found.step == expected["run.step"]
    log_prob = found.flow.log_prob(expected["run.x"], estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, expected["run.log_prob"], rtol=2e-4)
