"""A user's own images with their classes: each keeps its own, the images are those of load_path, errors say where."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from resflow_jax.data.files import image_shape, load_path
from resflow_jax.data.images import StoredImages
from resflow_jax.data.labelled_files import load_labelled_path
from resflow_jax.data.splits import SPLITS

NAMES = ("cat", "dog", "fox")
LABELS = np.random.default_rng(0).permutation(np.arange(40) % 3)
# image n has its class in the two highest bits of the first pixel, and n in the second
IMAGES = np.zeros((40, 2, 3, 1), np.uint8)
IMAGES[:, 0, 0, 0], IMAGES[:, 0, 1, 0] = 64 * LABELS, np.arange(40)
ROWS = {"train": slice(0, 25), "validation": slice(25, 30), "test": slice(30, 40)}


def write_folders(folder, rows=slice(None), names=NAMES):
    for image, label in zip(IMAGES[rows], LABELS[rows], strict=True):
        number = image[0, 1, 0]
        deep = folder / names[label] / f"{number % 2}"  # images may lie deeper
        deep.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(deep / f"{number:02}.png")


def write_split_folders(folder, names=NAMES):
    for split, rows in ROWS.items():
        write_folders(folder / split, rows, names)


def write_linked_folders(folder):
    write_folders(folder)
    (folder / "cat" / "more").symlink_to(folder / "dog" / "0")  # which keeps its class


def write_split_arrays(path, **others):
    labels = {f"{split}_labels": LABELS[rows] for split, rows in ROWS.items()}
    np.savez(path, **{split: IMAGES[rows, ..., 0] for split, rows in ROWS.items()} | labels | others)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder, rows=slice(None), start="train", labels=LABELS):
    folder.mkdir(exist_ok=True)
    (folder / f"{start}-images-idx3-ubyte").write_bytes(idx(IMAGES[rows, ..., 0]))
    (folder / f"{start}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[rows])))


def write_mnist(folder):
    write_idx(folder, slice(0, 30))
    write_idx(folder, slice(30, 40), start="t10k")


# writes something, the sizes of the splits, the names of the classes
GOOD = {
    "folder": (write_folders, (35, 1, 4), NAMES),
    "folders": (write_split_folders, (25, 5, 10), NAMES),
    "links": (write_linked_folders, (35, 1, 4), NAMES),
    "file.npz": (lambda path: np.savez(path, images=IMAGES, labels=LABELS), (35, 1, 4), "012"),
    "split.npz": (write_split_arrays, (25, 5, 10), "012"),
    "names.npz": (lambda path: write_split_arrays(path, names=NAMES), (25, 5, 10), NAMES),
    "more.npz": (lambda path: write_split_arrays(path, names=[*NAMES, "owl"]), (25, 5, 10), [*NAMES, "owl"]),
    "float.npz": (lambda path: np.savez(path, images=IMAGES, labels=LABELS.astype(float)), (35, 1, 4), "012"),
    "idx": (write_idx, (35, 1, 4), "012"),
    "mnist": (write_mnist, (29, 1, 10), "012"),
}


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("kind", GOOD)
def test_labels_stay_with_their_images(tmp_path, kind, bits):
    """Every label is that of its image, no image is lost, and load_path, without labels, has the same images."""
    write, sizes, names = GOOD[kind]
    write(tmp_path / kind)
    data, unlabelled = load_labelled_path(str(tmp_path / kind), bits=bits), load_path(tmp_path / kind, bits=bits)
    assert data.labels.names == tuple(names) and data.levels == 2**bits
    assert data.shape == image_shape(tmp_path / kind) == (2, 3, 1)
    found = []
    for split, size in zip(SPLITS, sizes, strict=True):
        images, labels = getattr(data.images, split), getattr(data.labels, split)
        assert len(images) == size
        np.testing.assert_array_equal(images, getattr(unlabelled, split))
        np.testing.assert_array_equal(labels, np.int32(images[:, 0, 0, 0] >> bits - 2), strict=True)
        found += images[:, 0, 1, 0].tolist()
    assert sorted(found) == [n >> 8 - bits for n in range(40)]


def test_large_folders_are_read_as_needed(tmp_path, monkeypatch):
    """The classes are those of the folders, with the images unread."""
    write_split_folders(tmp_path)
    monkeypatch.setattr("resflow_jax.data.images._IN_MEMORY", 0)
    data = load_labelled_path(tmp_path)
    for split in SPLITS:
        images, labels = getattr(data.images, split), getattr(data.labels, split)
        assert isinstance(images, StoredImages)
        np.testing.assert_array_equal(64 * labels, images[:][:, 0, 0, 0])


def test_other_splits_may_lack_classes(tmp_path):
    """The numbers of the classes are those of train."""
    write_folders(tmp_path / "train")
    write_folders(tmp_path / "test", LABELS == 2)
    data = load_labelled_path(tmp_path)
    assert set(data.labels.test) == {2} and data.labels.names == NAMES


def loose(path):
    write_folders(path)
    Image.fromarray(IMAGES[0, ..., 0]).save(path / "loose.png")


def unsorted(path):
    path.mkdir()
    Image.fromarray(IMAGES[0, ..., 0]).save(path / "a.png")


def empty(path):
    write_folders(path)
    (path / "owl").mkdir()


def linked(folder):
    write_folders(folder)
    (folder / "owl").symlink_to(folder / "cat")


def unknown(path):
    write_split_folders(path)
    write_folders(path / "test", names=("cat", "wolf", "owl"))


def without_labels(path):
    write_mnist(path)
    (path / "t10k-labels-idx1-ubyte.gz").unlink()


def images_as_labels(path):
    write_idx(path)
    (path / "train-labels-idx1-ubyte").write_bytes(idx(IMAGES[..., 0]))


def cut_labels(path):
    write_idx(path)
    (path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS)[:-3])


def fewer_labels(path):
    write_idx(path)
    (path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:39]))


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


def label(value, dtype=float):
    labels = LABELS.astype(dtype)
    labels[3:5] = value
    return labels


EXPECTED = "expected the arrays images and labels, or train and train_labels and, optionally, those of test and"
BAD = {
    "nothing": (lambda path: None, "expected a folder or a file of images with labels, found nothing at .*nothing"),
    "images.npy": (lambda path: np.save(path, IMAGES), "expected a folder or a .npz file .* got .*images.npy"),
    "unsorted": (unsorted, "expected a subfolder of images for each class in .*unsorted, got the image .*a.png"),
    "loose": (loose, "expected a subfolder of images for each class in .*loose, got the image .*loose.png"),
    "linked": (linked, "found none in .*owl, a link to a folder that is read already"),
    "empty": (empty, "expected images in the subfolder of each class, found none in .*owl"),
    "none": (lambda path: path.mkdir(), r"expected image files .* in .*none, found none"),
    "dev": (lambda path: [write_folders(path / name) for name in ("train", "dev")], "expected the folder train .* dev"),
    "inside": (
        lambda path: [write_folders(path / "all" / name) for name in ("train", "val")],
        "expected the folders of splits in .*inside itself, got train, val in .*all",
    ),
    "one": (
        lambda path: write_folders(path, LABELS == 0),
        "expected images of at least 2 classes, got the class cat in",
    ),
    "unknown": (unknown, r"the classes of .*train \(cat, dog, fox\) in every split, got owl, wolf in .*test"),
    "without": (without_labels, "expected the labels of t10k-images.* in .*t10k-labels-idx1-ubyte .*, found none"),
    "swapped": (images_as_labels, "expected an IDX file of uint8 labels, got .*train-labels-idx1-ubyte"),
    "cut": (cut_labels, "expected 40 labels in .*train-labels-idx1-ubyte, got 37"),
    "fewer": (fewer_labels, r"expected 40 integer labels, .* got uint8 \(39,\) in .*train-labels-idx1-ubyte"),
    "text.npz": (lambda path: path.write_text("hello"), "expected a .npz file of arrays, could not read .*text.npz"),
    "names.npz": (saved(a=IMAGES, labels=LABELS), f"{EXPECTED} validation, got a, labels in .*names.npz"),
    "test.npz": (saved(test=IMAGES, test_labels=LABELS), f"{EXPECTED} validation, got test, test_labels in"),
    "other.npz": (saved(images=IMAGES, labels=LABELS, a=LABELS), f"{EXPECTED} validation, got images, labels, a in"),
    "missing.npz": (saved(images=IMAGES), "expected the array labels with images, found none in .*missing.npz"),
    "half.npz": (
        saved(train=IMAGES, train_labels=LABELS, test=IMAGES),
        "expected the array test_labels with test, found none in .*half.npz",
    ),
    "images.npz": (
        saved(train=IMAGES, train_labels=LABELS, test=IMAGES * 1.0, test_labels=LABELS),
        r"expected uint8 images .* got float64 \(40, 2, 3, 1\) in test of .*images.npz",
    ),
    "size.npz": (
        saved(images=IMAGES, labels=LABELS[1:]),
        r"expected 40 integer labels, one for each image, got int64 \(39,\) in labels of .*size.npz",
    ),
    "axes.npz": (saved(images=IMAGES, labels=np.eye(3)[LABELS]), r"got float64 \(40, 3\) in labels of .*axes.npz"),
    "words.npz": (saved(images=IMAGES, labels=np.asarray(NAMES)[LABELS]), r"got <U3 \(40,\) in labels of .*words"),
    "fraction.npz": (saved(images=IMAGES, labels=label(0.5)), "got 0.5 in row 3 of labels of .*fraction.npz"),
    "nan.npz": (saved(images=IMAGES, labels=label(np.nan)), "got nan in row 3 of labels of .*nan.npz"),
    "negative.npz": (
        saved(train=IMAGES, train_labels=label(-1, int)),
        "expected labels in 0..65535, got -1 in row 3 of train_labels of .*negative.npz",
    ),
    "huge.npz": (saved(images=IMAGES, labels=label(2**40, int)), "got 1099511627776 in row 3 of labels of .*huge.npz"),
    "few.npz": (
        saved(images=IMAGES, labels=label(0, int) + 1, names=NAMES),
        "expected labels in 0..2, got 3 in row .* of labels of .*few.npz",
    ),
    "numbers.npz": (
        saved(images=IMAGES, labels=LABELS, names=np.arange(3)),
        r"expected strings \[classes\], got int64 \(3,\) in names of .*numbers.npz",
    ),
    "zero.npz": (saved(images=IMAGES, labels=0 * LABELS), "expected images of at least 2 classes, got the class 0 in"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tmp_path, name):
    """The error says what was expected, what came, and in which folder, or in which array of which file."""
    write_bad, message = BAD[name]
    write_bad(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"path: .*{message}"):
        load_labelled_path(tmp_path / name)


@pytest.mark.parametrize("kind", ["npz", "idx"])
def test_labels_that_count_from_one(tmp_path, kind):
    """The class 0 stays, without an image, with a warning that names the file."""
    if kind == "npz":
        np.savez(tmp_path / "one", images=IMAGES, labels=LABELS + 1)
    else:
        write_idx(tmp_path / "one", labels=LABELS + 1)
    path = tmp_path / ("one.npz" if kind == "npz" else "one")
    with pytest.warns(UserWarning, match=r"1 of the 4 classes 0\.\.3 have no training image in .*one.*, first class 0"):
        data = load_labelled_path(path)
    assert data.labels.names == ("0", "1", "2", "3") and data.labels.train.min() == 1
