"""A flow of a config, a composed one, and their files."""

import pytest
from flax import nnx

import resflow_jax as rf
from tests.interop.flows import make_flow
from tests.io.flows import conditional_flow, perturbed


@pytest.fixture(scope="session")
def flow():
    return make_flow()


@pytest.fixture(scope="session")
def composed():
    return perturbed(conditional_flow(nnx.Rngs(0)))


@pytest.fixture
def path(flow, tmp_path):
    rf.save(tmp_path / "flow.safetensors", flow)
    return tmp_path / "flow.safetensors"


@pytest.fixture
def composed_path(composed, tmp_path):
    rf.save(tmp_path / "flow.safetensors", composed)
    return tmp_path / "flow.safetensors"
