"""A small flow of vectors."""

import pytest

from tests.models.flows import make


@pytest.fixture(scope="session")
def vector_flow():
    return make("vectors")
