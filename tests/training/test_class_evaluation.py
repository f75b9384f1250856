"""Evaluation of classifiers: logits of a data set in batches and on devices, and the calibration of probabilities."""

import jax
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.class_evaluation import calibration_error, class_logits
from resflow_jax.training.forms import on_all_devices

IMAGES = np.random.default_rng(0).integers(0, 4, (5, 2, 2, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def flow():
    block = rf.UnconstrainedBlock((2, 2, 1), 2, rngs=nnx.Rngs(0))
    return rf.Classifier(block, rf.PooledHead((2, 2, 1), 3, rngs=nnx.Rngs(1)))


def test_batches_and_devices(flow):
    """The logits of the middles of the cells, in order, however the images are divided."""
    expected = flow.logits((IMAGES + 0.5) / 4)
    mesh = rf.training.make_mesh(devices=jax.devices()[:2])
    for options in ({}, {"batch_size": 2}, {"mesh": mesh}, {"mesh": mesh, "batch_size": 3}):
        found = class_logits(flow, IMAGES, levels=4, **options)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    whole = on_all_devices(nnx.state(flow), mesh)
    found = class_logits(nnx.merge(nnx.graphdef(flow), whole), IMAGES, levels=4, mesh=mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[:0], {}, "images: expected images .* with N > 0"),
        (IMAGES / 4, {}, "images: expected integer pixels"),
        (IMAGES, {"levels": 2}, r"images: expected pixels in 0..1"),
        (IMAGES[:, :1], {}, r"images: expected images \(2, 2, 1\), those of the flow, got \(1, 2, 1\)"),
        (IMAGES.tolist(), {}, "images: expected an array of integers"),
        (IMAGES, {"levels": 0}, "levels: expected an integer of at least 1"),
        (IMAGES, {"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        (IMAGES, {"mesh": "x"}, "mesh: expected Mesh, got str"),
        (IMAGES, {"flow": rf.Flow(rf.ActNorm((1,)), event_shape=(2, 2, 1))}, "flow: expected a flow with class logits"),
    ],
)
def test_bad_images(flow, images, options, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=f"^{message}"):
        class_logits(**{"flow": flow, "images": images, **options})


def slow_calibration_error(probabilities, labels, bins):
    """Bin by bin."""
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for n in range(bins):
        inside = [i for i, c in enumerate(confidence) if n / bins < c <= (n + 1) / bins]
        if inside:
            accuracy = np.mean([predicted[i] == labels[i] for i in inside])
            total += len(inside) / len(labels) * abs(accuracy - np.mean(confidence[inside]))
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error(bins):
    """That of a loop over bins, for random probabilities and for some that are zero and one."""
    rng = np.random.default_rng(0)
    probabilities = np.concatenate([rng.dirichlet(np.full(3, 0.5), 200), np.eye(3), np.full((1, 3), 1 / 3)])
    labels = rng.integers(0, 3, len(probabilities))
    expected = slow_calibration_error(probabilities, labels, bins)
    np.testing.assert_allclose(calibration_error(probabilities, labels, bins), expected, rtol=1e-12)
    assert expected > 0.1


def test_perfect_calibration():
    """Three of four examples with the probability 3/4 are right."""
    probabilities = np.full((4, 2), 0.25)
    probabilities[:, 1] = 0.75
    assert calibration_error(probabilities, np.array([1, 1, 0, 1])) == 0
    assert calibration_error(np.eye(2), np.array([0, 1])) == 0


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "message"),
    [
        (
            np.ones(3),
            np.ones(3, int),
            15,
            r"labels: expected \[N\] with probabilities \[N, K\], N > 0, got \(3,\) with \(3,\)",
        ),
        (np.ones((3, 2)), np.ones(2, int), 15, r"labels: expected \[N\] .* got \(2,\) with \(3, 2\)"),
        (np.ones((3, 2)), np.ones(3, int), 0, "bins: expected an integer of at least 1, got 0"),
        (np.ones((0, 2)), np.ones(0, int), 15, r"labels: expected \[N\] .* N > 0, got \(0,\) with \(0, 2\)"),
        (np.full((1, 2), 2.0), np.ones(1, int), 15, r"probabilities: expected numbers in \[0, 1\], got 2.0..2.0"),
        (np.full((1, 2), np.nan), np.ones(1, int), 15, r"probabilities: expected numbers in \[0, 1\], got nan..nan"),
    ],
)
def test_bad_probabilities(probabilities, labels, bins, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=message):
        calibration_error(probabilities, labels, bins)
