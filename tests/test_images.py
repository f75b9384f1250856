"""Image data: fixed splits, dequantisation, batches that depend on their arguments alone, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.data import images

SHARED = Path(__file__).parents[2] / "shared" / "tfds"


def test_digits_are_split_once_and_for_all():
    """1797 digits in three parts that are always the same and never overlap."""
    data = images.load_digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1347, 150, 300]
    assert data.shape == (8, 8, 1) and data.levels == 17
    again = images.load_digits()
    np.testing.assert_array_equal(data.test, again.test)
    every = np.concatenate([data.train, data.validation, data.test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    assert sorted(map(bytes, every)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))


def test_dequantisation_is_uniform_in_each_cell():
    """x lies in [k/L, (k+1)/L] and is uniform there."""
    levels = jnp.full((100, 10, 10, 1), 16, jnp.uint8)
    x = images.dequantize(levels, jax.random.key(0), 17)
    assert x.min() >= 16 / 17 and x.max() <= 1
    noise = np.sort(np.asarray(17 * x - 16).ravel())
    assert np.abs(noise - np.linspace(0, 1, noise.size)).max() < 1.63 / noise.size**0.5  # Kolmogorov, 1 %
    np.testing.assert_allclose(images.to_unit_interval(np.asarray([0, 16]), 17), [0.5 / 17, 16.5 / 17])


def test_epochs_visit_every_image_once():
    """The batches of an epoch are disjoint; epochs and seeds differ; a step gives the same batch again."""
    epoch = np.concatenate([images.epoch_batch(3, step, 10, 3) for step in range(3)])
    assert len(set(epoch)) == 9
    np.testing.assert_array_equal(images.epoch_batch(3, 1, 10, 3), epoch[3:6])
    assert not np.array_equal(images.epoch_batch(3, 3, 10, 3), epoch[:3])
    assert not np.array_equal(images.epoch_batch(4, 0, 10, 3), epoch[:3])
    with pytest.raises(ValueError, match="batch_size: expected between 1 and 10"):
        images.epoch_batch(0, 0, 10, 11)


def test_only_integers_are_dequantised():
    """Floats are refused, also under jit: they would be taken for levels."""
    with pytest.raises(ValueError, match=r"images: expected integer pixels in 0..16, got dtype float"):
        jax.jit(lambda x: images.dequantize(x, jax.random.key(0), 17))(jnp.zeros((1, 2, 2, 1)))


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
    """What is not a set of quantised images is refused at the boundary."""
    good = np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match=message):
        images.ImageSplits(array, good, good, levels=17)


def test_splits_of_different_shapes():
    """All splits have images of one shape."""
    good, other = np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"test: expected images \(8, 8, 1\), got \(8, 8, 3\)"):
        images.ImageSplits(good, good, other, levels=17)


def test_a_missing_data_set_says_how_to_prepare_it(tmp_path):
    """The error names the directory searched and the command to run."""
    with pytest.raises(FileNotFoundError, match=r"data_dir: .*tfds build fashion_mnist --data_dir"):
        images.load_tfds("fashion_mnist", str(tmp_path))


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
    """$TFDS_DATA_DIR is searched first."""
    (tmp_path / "fashion_mnist").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert images.find_data_dir("fashion_mnist") == tmp_path


@pytest.mark.skipif(not (SHARED / "fashion_mnist").is_dir(), reason=f"no prepared fashion_mnist in {SHARED}")
def test_fashion_mnist_through_tfds():
    """The prepared data set is read without TensorFlow: 60000 + 10000 images, the last 5000 validate."""
    data = images.load_tfds("fashion_mnist", str(SHARED))
    assert data.train.shape == (55000, 28, 28, 1) and len(data.validation) == 5000 and len(data.test) == 10000
    assert data.levels == 256 and data.train.dtype == np.uint8
    assert 70 < data.train.mean() < 76
