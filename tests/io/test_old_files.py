"""Files from before compositions existed are loaded, with the same outputs as then."""

import jax
import numpy as np
import pytest

import resflow_jax as rf
from resflow_jax.io.upgrades import is_old, old_names
from tests.paths import FIXTURES

OLD = FIXTURES / "before_compositions"
KEY = jax.random.key(2)


@pytest.mark.parametrize("name", ["image", "densenet", "vector"])
def test_old_files(name, monkeypatch):
    """With factor-out and a classifier; padded by noise; with mixed norms. Outputs and arrays that were not there."""
    with np.load(OLD / "expected.npz") as file:
        expected = {key.removeprefix(f"{name}."): value for key, value in file.items() if key.startswith(name)}
    draw = rf.ChannelPadding._draw
    # Keys were split for every scale, and for all five layers of the first scale; the padding is the second of them.
    of_padding = jax.random.split(jax.random.split(KEY)[0], 5)[1]
    monkeypatch.setattr(rf.ChannelPadding, "_draw", lambda self, key, x: draw(self, of_padding, x))
    flow = rf.load(OLD / f"{name}.safetensors")
    z, log_det = flow.forward(expected["x"], key=KEY, estimator=rf.Exact())
    np.testing.assert_allclose(z, expected["z"], atol=1e-9)
    np.testing.assert_allclose(log_det, expected["log_det"], atol=1e-9)
    log_prob = flow.log_prob(expected["x"], key=KEY, estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, expected["log_prob"], atol=1e-9)
    if name == "image":
        np.testing.assert_allclose(flow.logits(expected["x"]), expected["logits"], atol=1e-9)


def test_old_names():
    """Each kind of flow has its places; names that are missing or unknown are told."""
    layers = [("bijectors", "0", "kernel"), ("bijectors", "1", "bias")]
    old = {("scales", "0", *layer) for layer in layers}
    for place in (("bijector",), ("bijector", "bijectors", "0"), ("bijector", "scales", "0")):
        new = {(*place, *layer): ("scales", "0", *layer) for layer in layers}
        assert old_names(new, old) == new
        assert is_old(old) and not is_old(new)
        with pytest.raises(ValueError, match=r"got others: scales.0.bijectors.2.kernel$"):
            old_names(new, {*old, ("scales", "0", "bijectors", "2", "kernel")})
        with pytest.raises(ValueError, match=r"got others: scales.0.bijectors.1.bias$"):
            old_names(new, old - {("scales", "0", "bijectors", "1", "bias")})
