"""Image data: fixed splits, dequantisation, images that stay on disk, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.data import embedded, images


def test_digits_are_split_once_and_for_all():
    """1797 digits in three parts that are always the same and never overlap."""
    data = embedded.load_digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1347, 150, 300]
    assert data.shape == (8, 8, 1) and data.levels == 17
    again = embedded.load_digits()
    np.testing.assert_array_equal(data.test, again.test)
    every = np.concatenate([data.train, data.validation, data.test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    assert sorted(map(bytes, every)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))


def test_dequantisation_is_uniform_in_each_cell():
    """x is in [k/L, (k+1)/L] and is uniform there."""
    levels = jnp.full((100, 10, 10, 1), 16, jnp.uint8)
    x = images.dequantize(levels, jax.random.key(0), 17)
    assert x.min() >= 16 / 17 and x.max() <= 1
    noise = np.sort(np.asarray(17 * x - 16).ravel())
    assert np.abs(noise - np.linspace(0, 1, noise.size)).max() < 1.63 / noise.size**0.5  # Kolmogorov, 1 %
    np.testing.assert_allclose(images.to_unit_interval(np.asarray([0, 16]), 17), [0.5 / 17, 16.5 / 17])


def test_highest_bits_are_kept():
    """256 levels become 2^bits, each from equally many neighbours; other numbers of bits are refused."""
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(images.reduce_bits(pixels, 5), np.repeat(np.arange(32), 8))
    np.testing.assert_array_equal(images.reduce_bits(pixels, 8), pixels)
    assert images.reduce_bits(pixels, 1).dtype == np.uint8
    for bits in (0, 9, 2.5):
        with pytest.raises(ValueError, match="bits: expected"):
            images.reduce_bits(pixels, bits)


@pytest.mark.parametrize(("size", "channels", "bits"), [(16, 3, 8), (28, 1, 8), (128, 3, 5)])
def test_photographs_are_split_by_region(size, channels, bits):
    """Crops of the asked shape and bits; no pixel of the photographs is in two splits."""
    from sklearn.datasets import load_sample_images

    data = embedded.load_photographs(size, channels, bits=bits)
    assert data.shape == (size, size, channels) and data.levels == 2**bits
    assert len(data.train) > len(data.test) > 1 and len(data.validation) > 1
    if size == 16:  # as they are: every crop is a piece of its region, columns 0:448, 448:512 and 512:640
        for split, (left, right) in {"train": (0, 448), "validation": (448, 512), "test": (512, 640)}.items():
            regions = [photograph[:, left:right] for photograph in load_sample_images().images]
            stride = 8 if split == "train" else 16
            pieces = {
                region[i : i + 16, j : j + 16].tobytes()
                for region in regions
                for i in range(0, 427 - 15, stride)
                for j in range(0, right - left - 15, stride)
            }
            assert {image.tobytes() for image in getattr(data, split)} == pieces
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        embedded.load_photographs(16, 2)


def test_stored_images_are_like_an_array():
    """Length, shape, one image, slices and lists of indices; an image of another shape is refused."""
    array = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 1), np.uint8)
    rows = np.asarray([6, 2, 3, 5])
    stored = images.StoredImages(lambda numbers: array[numbers], rows)
    assert len(stored) == 4 and stored.shape == (4, 2, 3, 1) and stored.dtype == np.uint8
    np.testing.assert_array_equal(stored[1], array[2])
    np.testing.assert_array_equal(stored[1:3], array[[2, 3]])
    np.testing.assert_array_equal(stored[np.asarray([3, 0])], array[[5, 6]])
    np.testing.assert_array_equal(stored[:0], array[:0])
    ragged = images.StoredImages(lambda n: np.zeros((len(n), 2, 2 + int(n.max()), 1), np.uint8), np.arange(3))
    with pytest.raises(ValueError, match=r"images: expected shape \(2, 2, 1\) like the first image, got \(2, 4, 1\)"):
        ragged[2]
    splits = images.ImageSplits(stored, stored, array, levels=256)
    assert splits.shape == (2, 3, 1)


@pytest.mark.parametrize(
    "function", [lambda x: images.dequantize(x, jax.random.key(0), 17), lambda x: images.to_unit_interval(x, 17)]
)
def test_only_pixels_become_numbers(function):
    """Floats are refused, also under jit: they would be taken for levels. So are integers beyond the levels."""
    with pytest.raises(ValueError, match=r"images: expected integer pixels in 0..16, got dtype float"):
        jax.jit(function)(jnp.zeros((1, 2, 2, 1)))
    for pixel in (-1, 17):
        outside = jnp.full((1, 2, 2, 1), pixel)
        of_constant = partial(function, outside)
        for call in (of_constant, jax.jit(of_constant)):
            with pytest.raises(ValueError, match=rf"images: expected pixels in 0..16, got {pixel}..{pixel}"):
                call()
        assert jax.jit(function)(outside).shape == outside.shape


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"train: expected images \[N, H, W, C\]"),
        (np.zeros((0, 8, 8, 1), np.uint8), "train: expected images .* with N > 0"),
        (np.zeros((2, 8, 8, 1)), "train: expected integer pixels in 0..16, got dtype float64"),
        (np.full((2, 8, 8, 1), 17, np.uint8), r"train: expected pixels in 0..16, got 17..17"),
        (np.full((2, 8, 8, 1), -1), r"train: expected pixels in 0..16, got -1..-1"),
    ],
)
def test_bad_images_are_named(array, message):
    """Arrays that are not quantised images are refused on entry."""
    good = np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match=message):
        images.ImageSplits(array, good, good, levels=17)


def test_splits_of_different_shapes():
    """All splits have images of one shape."""
    good, other = np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"test: expected images \(8, 8, 1\), got \(8, 8, 3\)"):
        images.ImageSplits(good, good, other, levels=17)


def test_images_of_jax_with_256_levels():
    """256 is no uint8: it must not wrap to 0."""
    pixels = jnp.asarray(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    images.check_quantized("images", pixels, 256)
    with pytest.raises(ValueError, match=r"images: expected pixels in 0\.\.254, got 0\.\.255"):
        images.check_quantized("images", pixels, 255)
