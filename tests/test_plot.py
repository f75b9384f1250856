"""Pictures show the given data on the given Axes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx
from scipy.stats import multivariate_normal

import resflow_jax as rf

NORMAL = rf.Flow(rf.Affine((2,)))  # the identity: a standard normal distribution
IMAGES = np.random.default_rng(0).uniform(size=(5, 3, 2, 1))
LOSSES = np.array([9.0, 2.0, 1.5, 1.75])
HISTORY = rf.History(np.array([2, 4, 6, 7]), LOSSES + 1, LOSSES, np.arange(4.0), 6, "steps", 256, (2, 2, 1))


@pytest.fixture
def ax():
    figure, found = plt.subplots()
    yield found
    plt.close(figure)


def test_samples_of_images(ax):
    """Tiles in rows, with a margin; values outside of [0, 1] are clipped, what is no number is grey."""
    images = IMAGES.copy()
    images[0, 0, 0], images[0, 0, 1], images[0, 1, 0] = np.nan, 2.0, -1.0
    assert rf.plot.samples(images, ax) is ax
    shown = ax.images[0].get_array()
    assert shown.shape == (2 * 4 + 1, 3 * 3 + 1)  # three columns
    assert shown[1, 1] == 0.5 and shown[1, 2] == 1 and shown[2, 1] == 0
    np.testing.assert_array_equal(shown[5:8, 4:6], IMAGES[4, ..., 0])
    assert (shown[::4] == 0.5).all() and ax.images[0].get_clim() == (0, 1)
    rf.plot.samples(jnp.asarray(IMAGES), ax, columns=5, cmap="viridis")
    assert ax.images[1].get_array().shape == (5, 16) and ax.images[1].get_cmap().name == "viridis"


def test_samples_of_vectors(ax):
    """Two elements of each that is finite; single numbers as a histogram."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    x[0, 1] = np.nan
    rf.plot.samples(x, ax, elements=(2, 0), label="data")
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), x[1:, [2, 0]])
    assert ax.lines[0].get_label() == "data" and (ax.get_xlabel(), ax.get_ylabel()) == ("element 2", "element 0")
    rf.plot.samples(x[1:, :1], ax, bins=5)
    assert len(ax.patches) == 5
    np.testing.assert_allclose(sum(patch.get_height() * patch.get_width() for patch in ax.patches), 1)


def test_samples_of_a_flow():
    """They are those of its `sample`, on the current Axes."""
    plt.figure()  # tests of other files may have left another one
    ax = rf.plot.samples(NORMAL, number=7, key=3)
    assert ax is plt.gca()
    np.testing.assert_allclose(ax.lines[0].get_xydata(), NORMAL.sample(jax.random.key(3), 7))
    plt.close()


def test_density(ax):
    """Its values are those of the density at the cells' midpoints, the first row at the bottom."""
    rf.plot.density(NORMAL, ax, box=((-1, 2), (0, 4)), cells=3)
    image = ax.images[0]
    assert image.get_extent() == [-1, 2, 0, 4] and image.origin == "lower"
    middles = np.array([[[a, b] for a in (-0.5, 0.5, 1.5)] for b in np.array([2, 6, 10]) / 3])
    np.testing.assert_allclose(image.get_array(), multivariate_normal.pdf(middles, np.zeros(2)), rtol=1e-12)


def test_density_around_samples(ax):
    """The box holds nearly all of the mass; a condition and options are passed on."""
    rngs = nnx.Rngs(0)
    block = rf.ResidualBlock(rf.LipschitzMLP(2, (4,), condition_dim=1, rngs=rngs))
    flow = rf.Flow(rf.Chain([rf.Affine((2,)), block]))
    rf.plot.density(flow, ax, cells=40, condition=jnp.asarray([2.0]), cmap="magma")
    image = ax.images[0]
    left, right, bottom, top = image.get_extent()
    assert abs(image.get_array().mean() * (right - left) * (top - bottom) - 1) < 0.02
    assert image.get_cmap().name == "magma"
    own = flow.log_prob(jnp.asarray([[left, bottom]]) + 0, condition=jnp.asarray([2.0]), estimator=rf.Exact())
    assert np.exp(own[0]) < image.get_array().max() / 50


def test_the_box_holds_all_points_with_a_margin():
    """15 % on every side."""
    low, high = rf.plot.box_around(np.array([[0.0, -1.0], [2.0, 1.0]]), np.array([[1.0, 3.0]]))
    np.testing.assert_allclose(low, [-0.3, -1.6])
    np.testing.assert_allclose(high, [2.3, 3.6])


def test_curves(ax):
    """Both losses against the step, the best marked, the first twentieth out of the way; in bits/dim too."""
    rf.plot.curves(HISTORY, ax, alpha=0.5)
    train, validation, best = ax.lines
    np.testing.assert_array_equal(train.get_xydata().T, [HISTORY.step, HISTORY.train])
    np.testing.assert_array_equal(validation.get_xydata().T, [HISTORY.step, HISTORY.validation])
    np.testing.assert_array_equal(best.get_xydata(), [[6, 1.5]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "validation", "best"]
    assert train.get_alpha() == 0.5 and ax.get_ylabel() == "-log p, nats"
    rf.plot.curves(HISTORY, ax, unit="bits/dim")
    np.testing.assert_array_equal(ax.lines[4].get_ydata(), HISTORY.validation_bits_per_dim)
    assert ax.get_ylabel() == "bits/dim"


BAD = {
    "x: expected a flow, images [N, H, W, C] or vectors [N, D], got shape (3,)": ("samples", [np.zeros(3)], {}),
    "x: expected a flow, images [N, H, W, C] or vectors [N, D], got str": ("samples", ["x"], {}),
    "x: expected floats, images in [0, 1], got dtype int64": ("samples", [np.zeros((3, 2), int)], {}),
    "x: expected a flow together with number or condition, got samples": ("samples", [IMAGES], {"number": 3}),
    "ax: expected Axes, got str": ("samples", [IMAGES, "ax"], {}),
    "columns: expected an integer of at least 1, got 0": ("samples", [IMAGES], {"columns": 0}),
    "elements: expected two numbers below 2, got (0, 2)": ("samples", [np.zeros((3, 2))], {"elements": (0, 2)}),
    "elements: expected two numbers below 2, got 1": ("samples", [np.zeros((3, 2))], {"elements": 1}),
    "key: expected a PRNG key": ("samples", [NORMAL], {"key": "key"}),
    "flow: expected Flow, got int": ("density", [3], {}),
    "flow: expected a flow of vectors of 2 elements, got events (3,)": ("density", [rf.Flow(rf.Affine((3,)))], {}),
    "cells: expected an integer of at least 1, got 0": ("density", [NORMAL], {"cells": 0}),
    "box: expected ((left, right), (bottom, top)), got (0, 1)": ("density", [NORMAL], {"box": (0, 1)}),
    "box: expected ((left, right), (bottom, top)), got ((1, 0), (0, 1))": (
        "density",
        [NORMAL],
        {"box": ((1, 0), (0, 1))},
    ),
    "history: expected History, got list": ("curves", [[1, 2]], {}),
    "unit: expected one of nats, bits/dim; got 'bits'": ("curves", [HISTORY], {"unit": "bits"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    """The error names the argument, what was expected and what came."""
    name, arguments, options = BAD[message]
    with pytest.raises(ValueError) as caught:
        getattr(rf.plot, name)(*arguments, **options)
    assert str(caught.value).startswith(message)
    plt.close("all")


def test_bits_per_dim_of_vectors(ax):
    """An error says that there are none."""
    history = rf.History(HISTORY.step, LOSSES, None, HISTORY.seconds, 7, "steps", None, (2,))
    with pytest.raises(ValueError, match=r'unit: expected "nats", since the examples are not integer images'):
        rf.plot.curves(history, ax, unit="bits/dim")
    rf.plot.curves(history, ax)
    assert len(ax.lines) == 2


def test_without_matplotlib():
    """The library does not import it; the error says how to install it."""
    program = (
        "import sys; sys.modules['matplotlib'] = None; import numpy as np, resflow_jax as rf\n"
        "try: rf.plot.samples(np.zeros((3, 2)))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("resflow_jax.plot needs the extra plot: pip install 'resflow_jax[plot]'")
