"""Class labels: they belong to their images, wrong ones are named, and the few that are kept are equally divided."""

import numpy as np
import pytest

from resflow_jax.data.embedded import load_digits, load_labelled_digits, load_labelled_photographs, load_photographs
from resflow_jax.data.images import ImageSplits
from resflow_jax.data.labels import LabelledImages, Labels, keep_labels

GOOD = np.asarray([0, 1, 2])
NAMES = ("cat", "dog", "fox")


def test_labels():
    """Integers of any type become int32; the classes are those that have names."""
    labels = Labels(GOOD, GOOD.astype(np.uint8), GOOD[:0], NAMES)
    assert labels.classes == 3
    for found, expected in ((labels.train, GOOD), (labels.validation, GOOD), (labels.test, GOOD[:0])):
        np.testing.assert_array_equal(found, expected.astype(np.int32), strict=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"test: expected an array of integer labels \[N\], got list"),
        (np.asarray([0.0]), r"test: expected integer labels \[N\], got float64 \(1,\)"),
        (np.asarray([True]), r"test: expected integer labels \[N\], got bool \(1,\)"),
        (GOOD[:, None], r"test: expected integer labels \[N\], got int64 \(3, 1\)"),
        (np.asarray([0, 1, 3, 4]), "test: expected labels in 0..2, got 3 in row 2"),
        (np.asarray([0, -1]), "test: expected labels in 0..2, got -1 in row 1"),
        (np.asarray([2**32]), "test: expected labels in 0..2, got 4294967296 in row 0"),
    ],
)
def test_bad_labels_are_named(labels, message):
    """The error names the split and the first wrong row."""
    with pytest.raises(ValueError, match=message):
        Labels(GOOD, GOOD, labels, NAMES)


def test_one_class_is_too_few():
    """Nothing could be told apart."""
    with pytest.raises(ValueError, match=r"names: expected the names of at least 2 classes, got \('cat',\)"):
        Labels(GOOD[:1], GOOD[:1], GOOD[:1], ("cat",))


def test_every_image_has_a_label():
    """The error names the split and both numbers."""
    images = np.zeros((3, 2, 4, 1), np.uint8)
    splits = ImageSplits(images, images, images, levels=17)
    labelled = LabelledImages(splits, Labels(GOOD, GOOD, GOOD, NAMES))
    assert labelled.shape == (2, 4, 1) and labelled.levels == 17
    with pytest.raises(ValueError, match=r"labels.validation: expected 3 labels, one for each image, got 2"):
        LabelledImages(splits, Labels(GOOD, GOOD[:2], GOOD, NAMES))


def test_digits():
    """The images are those of load_digits, and each has the class that scikit-learn gives it."""
    from sklearn.datasets import load_digits as load

    source = load()
    classes = {
        image.astype(np.uint8).tobytes(): label for image, label in zip(source.images, source.target, strict=True)
    }
    digits, unlabelled = load_labelled_digits(), load_digits()
    assert digits.labels.names == tuple("0123456789") and digits.levels == 17
    for split in ("train", "validation", "test"):
        images, labels = getattr(digits.images, split), getattr(digits.labels, split)
        np.testing.assert_array_equal(images, getattr(unlabelled, split))
        assert [classes[image.tobytes()] for image in images] == labels.tolist()


def counts(kept, classes):
    return [int((kept == n).sum()) for n in range(classes)]


def test_kept_labels():
    """They are those of the rows, equally many of each class; the seed draws the rows, and more keep the same ones."""
    labels = np.random.default_rng(0).integers(0, 10, 500)
    kept = keep_labels(labels, 40, 10, seed=1)
    assert kept.dtype == np.int32 and counts(kept, 10) == [4] * 10
    known = kept >= 0
    np.testing.assert_array_equal(kept[known], labels[known])
    assert set(kept[~known]) == {-1}
    np.testing.assert_array_equal(kept, keep_labels(labels, 40, 10, seed=1))
    assert not np.array_equal(known, keep_labels(labels, 40, 10, seed=2) >= 0)
    more = keep_labels(labels, 47, 10, seed=1)
    assert sorted(counts(more, 10)) == [4] * 3 + [5] * 7
    np.testing.assert_array_equal(more[known], labels[known])
    np.testing.assert_array_equal(keep_labels(labels, 500, 10, seed=1), labels)


def test_a_class_with_few_rows_keeps_them_all():
    """The other classes share what it lacks, whether it has two rows or none."""
    labels = np.asarray([0] * 20 + [1] * 2 + [2] * 20)
    assert counts(keep_labels(labels, 12, 3, seed=0), 3) == [5, 2, 5]
    assert counts(keep_labels(labels, 12, 4, seed=0), 4) == [5, 2, 5, 0]


def test_numbers_of_labels_that_cannot_be_kept():
    """Fewer than one a class, or more than there are; and labels of more classes."""
    for number, message in ((2, "an integer of at least 3, got 2"), (31, "at most 30, the number of labels, got 31")):
        with pytest.raises(ValueError, match=f"number: expected {message}"):
            keep_labels(np.arange(30) % 3, number, 3, seed=0)
    with pytest.raises(ValueError, match=r"labels: expected labels in 0\.\.2, got 3 in row 3"):
        keep_labels(np.arange(30), 3, 3, seed=0)


@pytest.mark.parametrize(("size", "channels", "bits"), [(16, 3, 8), (8, 1, 5)])
def test_labelled_photographs(size, channels, bits):
    """The crops are those without labels; a crop has the label of the photograph that it is from."""
    from sklearn.datasets import load_sample_images

    found = load_labelled_photographs(size, channels, bits=bits)
    plain = load_photographs(size, channels, bits=bits)
    assert found.labels.names == ("temple", "flower") and found.levels == 2**bits
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(found.images, name), getattr(plain, name))
        assert set(getattr(found.labels, name)) == {0, 1}
    if channels == 3:
        photographs = load_sample_images().images
        windows = [np.lib.stride_tricks.sliding_window_view(p, (size, size, 3))[:, :, 0] for p in photographs]
        for image, label in list(zip(found.images.test, found.labels.test, strict=True))[:3]:
            is_there = [(image == part[::size, :]).all((2, 3, 4)).any() for part in windows]
            assert is_there == [label == 0, label == 1]
