"""The toy densities: samples of the promised form, in the promised places."""

import numpy as np
import pytest

from resflow_jax.data.toy import TOY_DENSITIES, sample_toy


@pytest.mark.parametrize("name", TOY_DENSITIES)
@pytest.mark.parametrize("number", [1, 2, 7, 4000])
def test_samples_have_the_promised_form(name, number):
    points = sample_toy(name, number, np.random.default_rng(0))
    assert points.shape == (number, 2)
    assert points.dtype == np.float32
    assert np.isfinite(points).all()
    assert np.abs(points).max() < 5.5


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_samples_are_a_function_of_the_generator(name):
    rng = np.random.default_rng(3)
    first, second = sample_toy(name, 100, rng), sample_toy(name, 100, rng)
    np.testing.assert_array_equal(first, sample_toy(name, 100, np.random.default_rng(3)))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_the_scale_is_that_of_the_plane_around_the_origin(name):
    points = sample_toy(name, 20000, np.random.default_rng(0))
    assert np.abs(points.mean(0)).max() < 0.6
    assert 0.9 < points.std(0).min() < points.std(0).max() < 2.6


def test_eight_gaussians_have_eight_equal_modes():
    """Every point belongs to one of eight centres, each with an eighth of them, spread by sqrt(1/8)."""
    points = sample_toy("8gaussians", 40000, np.random.default_rng(0))
    angle = np.arange(8) * np.pi / 4
    centres = np.sqrt(8) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    offsets = points[:, None] - centres
    nearest = np.argmin(np.linalg.norm(offsets, axis=-1), axis=1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=8) / 40000, 1 / 8, atol=0.01)
    np.testing.assert_allclose(offsets[np.arange(40000), nearest].std(), np.sqrt(1 / 8), rtol=0.03)


def test_checkerboard_is_uniform_on_the_eight_dark_squares():
    points = sample_toy("checkerboard", 40000, np.random.default_rng(0))
    column, row = np.floor((points + 4) / 2).astype(int).T
    assert ((column - row) % 2 == 0).all()
    share = np.bincount(4 * column + row, minlength=16) / 40000
    np.testing.assert_allclose(share[share > 0], 1 / 8, atol=0.01)
    assert np.count_nonzero(share) == 8


@pytest.mark.parametrize("name, radii", [("rings", [0.75, 1.5, 2.25, 3.0]), ("circles", [1.5, 3.0])])
def test_circles_have_their_radii(name, radii):
    radius = np.linalg.norm(sample_toy(name, 40000, np.random.default_rng(0)), axis=1)
    nearest = np.argmin(np.abs(radius[:, None] - radii), axis=1)
    for n, expected in enumerate(radii):
        np.testing.assert_allclose(radius[nearest == n].mean(), expected, atol=0.04)
        np.testing.assert_allclose((nearest == n).mean(), 1 / len(radii), atol=0.02)


def test_pinwheel_repeats_after_a_fifth_of_a_turn():
    """Turned by 72 degrees it is the same density: the mean of exp(5 i angle) is far from 0, those before are 0."""
    points = sample_toy("pinwheel", 40000, np.random.default_rng(0))
    angle = np.arctan2(points[:, 1], points[:, 0])
    moments = [abs(np.exp(1j * k * angle).mean()) for k in range(1, 6)]
    assert max(moments[:4]) < 0.02
    assert moments[4] > 0.1


def test_two_spirals_mirror_each_other():
    """Angle and radius agree along an arm: r = angle / 3 modulo half a turn."""
    points = sample_toy("2spirals", 4000, np.random.default_rng(0)).astype(float)
    radius = np.linalg.norm(points, axis=1)
    away = radius > 1
    phase = np.arctan2(points[away, 1], points[away, 0]) - 3 * radius[away]
    assert np.cos(2 * phase).mean() > 0.7


def test_bad_arguments_of_the_sampler_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"name: expected one of 8gaussians.*; got 'spiral'"):
        sample_toy("spiral", 10, rng)
    with pytest.raises(ValueError, match="number: expected an integer of at least 1, got 0"):
        sample_toy("moons", 0, rng)
