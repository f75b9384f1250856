"""Units of vectors: differences far from zero are kept, and what float32 would lose is named."""

import numpy as np
import pytest

from resflow_jax.data.units import in_own_units, rounded_columns, shifted, units_of, warn_if_rounded

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("scale", "offset"), [(1e6, 1e9), (3600, 1.7e9), (1e-12, 5.0), (1e20, -1e25), (1e-6, 0.0)])
def test_differences_are_kept(scale, offset):
    """The standardised column is that of the same numbers in another unit, to the rounding of float32."""
    x = RNG.normal(size=(200, 1))
    own = x * scale + offset
    kept = (own - offset) / scale  # what float64 itself keeps
    units = units_of(own, "here")
    y = (shifted(own, units.shift).astype(np.float64) - units.mean[0]) / units.std[0]
    np.testing.assert_allclose(y, (kept - kept.mean()) / kept.std(), atol=2e-5)
    back = in_own_units(shifted(own, units.shift), units.shift)
    np.testing.assert_allclose(back, own, rtol=0, atol=1e-4 * scale + np.spacing(abs(offset)))
    assert not rounded_columns(own, units.shift)


def test_columns_near_zero_stay():
    """Without a column far from zero nothing is shifted; else only such columns are."""
    x = RNG.normal(size=(50, 2)) * [1.0, 5.0] + [3.0, -20.0]
    units = units_of(x, "here")
    assert units.shift is None and shifted(x.astype(np.float32), None) is not None
    np.testing.assert_allclose(units.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(units.std, x.std(0), rtol=1e-5)
    far = units_of(x + np.asarray([0, 1e6]), "here")
    assert far.shift[0] == 0 and far.shift[1] != 0 and abs(far.mean[1]) < 5
    assert in_own_units(x, None) is x


@pytest.mark.parametrize("scale", [1e160, 1e308])
def test_squares_do_not_overflow(scale):
    """The std is too large for float32, and not infinite."""
    with pytest.raises(ValueError, match=rf"between 1e-30 and 1e\+30, got 2\.9\d*e\+{round(np.log10(scale)) - 1}"):
        units_of(np.linspace(-0.5, 0.5, 40)[:, None] * scale, "here")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            [[1.0, 3.0], [2.0, 3.0]],
            r"columns that vary, got 3\.0 in every training row of column 2 of here",
        ),
        ([[1.0, 3.0]], "at least 2 vectors to train on, got 1 of here"),
        ([[1e-40, 0.0], [2e-40, 1.0]], r"between 1e-30 and 1e\+30, got 5e-41 in column 1 of here; take another unit"),
    ],
)
def test_columns_without_a_density_are_named(columns, message):
    """A constant, and a unit that float32 cannot hold."""
    with pytest.raises(ValueError, match=f"path: expected .*{message}"):
        units_of(np.asarray(columns), "here")


def test_rounded_columns():
    """Float32 columns are not rounded again; constants lose nothing."""
    x = RNG.normal(size=(60, 3)) + np.asarray([0, 1e5, 7])
    x[:, 2] = 1e9 + 1
    assert rounded_columns(x, None) == [1]
    assert rounded_columns(x.astype(np.float32), None) == []
    assert rounded_columns(x, (0.0, 1e5, 0.0)) == []
    assert rounded_columns(x, (1e5, 1e5, 0.0)) == [0]
    with pytest.raises(ValueError, match=r"data\.shift: expected 3 numbers, one for each column, got 2"):
        rounded_columns(x, (0.0, 1.0))


def test_events_that_are_rounded():
    """The warning names the element, far from zero or below the range of float32; others are silent."""
    x = RNG.normal(size=(60, 3, 2))
    warn_if_rounded("x", x)
    for change in (lambda a: a + 1e5, lambda a: a * 1e-42, lambda a: a * 1e39):
        other = x.copy()
        other[:, 1, 0] = change(other[:, 1, 0])
        with pytest.warns(UserWarning, match=r"x: float32 rounds x\[:, 1, 0\] to more than 1/4096 of its standard"):
            warn_if_rounded("x", other)


def test_numbers_beyond_float32_are_named():
    """A number that becomes infinite is an error, not an infinity."""
    with pytest.raises(ValueError, match=r"path: expected numbers within float32, got 1e\+39 in column 2"):
        shifted(np.asarray([[0.0, 1.0], [1.0, 1e39]]), None)
