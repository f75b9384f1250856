"""A user's own images: every kind of file and folder gives the same images; errors name other files."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from resflow_jax.data import files
from resflow_jax.data.images import StoredImages

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 6, 4, 3), np.uint8)
GREY = COLOUR[..., :1]


def write_folder(folder, images):
    for n, image in enumerate(images):
        (folder / f"{n % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{n % 3}" / f"{n:03}.png")


def idx(images):
    return struct.pack(">HBBIII", 0, 8, 3, *images.shape[:3]) + images.tobytes()


def as_set(*arrays):
    return sorted(image.tobytes() for array in arrays for image in array)


def write(kind, path, images):
    if kind == "folder":
        write_folder(path, images)
    elif kind == "npy":
        path = path.with_suffix(".npy")
        np.save(path, images)
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, whatever=images)
    elif kind == "idx":
        path.write_bytes(idx(images))
    else:
        path = path.with_suffix(".gz")
        path.write_bytes(gzip.compress(idx(images)))
    return path


@pytest.mark.parametrize("kind", ["folder", "npy", "npz", "idx", "idx.gz"])
def test_images_without_splits(tmp_path, kind):
    """A tenth is the test split, a twentieth of the rest validates; every image is in one split; always the same."""
    images = GREY if kind.startswith("idx") else COLOUR
    path = write(kind, tmp_path / "images", images)
    data = files.load_path(path)
    assert (len(data.train), len(data.validation), len(data.test)) == (35, 1, 4) and data.levels == 256
    assert as_set(data.train, data.validation, data.test) == as_set(images)
    again = files.load_path(str(path), bits=3)
    np.testing.assert_array_equal(again.test, data.test >> 5)
    assert again.levels == 8


def test_folders_with_splits(tmp_path):
    """train, validation and test of a folder, of a .npz file, and of the files of MNIST, are taken as they are."""
    parts = {"train": GREY[:20], "validation": GREY[20:25], "test": GREY[25:]}
    for name, images in parts.items():
        write_folder(tmp_path / "folder" / name, images)
    np.savez(tmp_path / "file.npz", **{name: images[..., 0] for name, images in parts.items()})
    for path in (tmp_path / "folder", tmp_path / "file.npz"):
        data = files.load_path(path)
        for name, images in parts.items():
            assert as_set(getattr(data, name)) == as_set(images)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY[:30])))
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(idx(GREY[30:]))
    data = files.load_path(tmp_path / "mnist")
    np.testing.assert_array_equal(data.test, GREY[30:])
    assert as_set(data.train, data.validation) == as_set(GREY[:30]) and len(data.validation) == 1


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("TRAIN", "VAL", "TEST"), ("training", "testing"), ("train", "Validation", "test")]
)
def test_names_of_splits_in_any_case(tmp_path, names):
    """Folders, and arrays of a .npz file, are the splits that their names are meant for."""
    meant = {"tr": "train", "va": "validation", "te": "test"}
    parts = dict(zip(names, np.split(COLOUR, [20, 30][: len(names) - 1]), strict=True))
    for name, images in parts.items():
        write_folder(tmp_path / "folder" / name, images)
    np.savez(tmp_path / "file.npz", **parts)
    for path in (tmp_path / "folder", tmp_path / "file.npz"):
        data = files.load_path(path)
        kept = {meant[name[:2].lower()]: images for name, images in parts.items()}
        assert as_set(data.test) == as_set(kept["test"])
        if len(names) == 3:
            assert as_set(data.train) == as_set(kept["train"])
            assert as_set(data.validation) == as_set(kept["validation"])
        else:
            assert as_set(data.train, data.validation) == as_set(kept["train"])


def test_files_that_are_no_images(tmp_path):
    """Hidden files and those of operating systems are nothing; others are left out with a warning that names one."""
    write_folder(tmp_path / "plain", COLOUR)
    write_folder(tmp_path / "more", COLOUR)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "1/.cache"):
        (tmp_path / "more" / hidden).mkdir()
        (tmp_path / "more" / hidden / "000.png").write_bytes(b"no image")
    for name in ("._000.png", "0/.DS_Store", "Thumbs.db"):
        (tmp_path / "more" / name).write_bytes(b"no image")
    plain, more = files.load_path(tmp_path / "plain"), files.load_path(tmp_path / "more")
    np.testing.assert_array_equal(more.train, plain.train)
    (tmp_path / "more" / "0" / "a.heic").write_bytes(b"")
    (tmp_path / "more" / "labels.csv").write_text("")
    with pytest.warns(UserWarning, match=r"2 of the files in .*more do not have the names of images .*a\.heic"):
        again = files.load_path(tmp_path / "more")
    np.testing.assert_array_equal(again.train, plain.train)


def test_links_to_folders(tmp_path):
    """They are followed, but not to a folder that they lie in, nor to one that is visited anyway."""
    write_folder(tmp_path / "plain", COLOUR)
    (tmp_path / "linked" / "more").mkdir(parents=True)
    for name in ("0", "1"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "plain" / name)
    (tmp_path / "linked" / "more" / "2").symlink_to(tmp_path / "plain" / "2")
    (tmp_path / "linked" / "more" / "loop").symlink_to(tmp_path / "linked")
    write_folder(tmp_path / "twice", COLOUR)
    (tmp_path / "twice" / "-").symlink_to(tmp_path / "twice" / "1")
    for name, other in (("0", "2"), ("2", "0")):
        (tmp_path / "twice" / name / "-").symlink_to(tmp_path / "twice" / other)
        (tmp_path / "linked" / "more" / f"{name}again").symlink_to(tmp_path / "plain" / "0")
    plain, *others = (files.load_path(tmp_path / name) for name in ("plain", "linked", "twice"))
    for other in others:
        for name in files.SPLITS:
            np.testing.assert_array_equal(getattr(other, name), getattr(plain, name))


def test_splits_in_names_of_files(tmp_path):
    """They are no folders: the images are taken together, with a warning."""
    for n, image in enumerate(COLOUR):
        Image.fromarray(image).save(tmp_path / f"{'train' if n < 30 else 'test'}_{n:02}.png")
    with pytest.warns(UserWarning, match=r"names of the files in .* have the words test, train, and are taken"):
        data = files.load_path(tmp_path)
    assert as_set(data.train, data.validation, data.test) == as_set(COLOUR)


@pytest.mark.parametrize("kind", ["folder", "npy", "idx"])
def test_dark_images_are_named(tmp_path, kind):
    """Pixels with fewer levels than 256 would be cut, or be worth few bits."""
    path = write(kind, tmp_path / "images", GREY // 16)
    with pytest.warns(UserWarning, match=r"pixels in .*images.* are at most 15, and are taken as parts of 255"):
        files.load_path(path)


def test_labels_beside_images_are_ignored(tmp_path):
    """One file serves those who need labels and those who do not."""
    np.savez(tmp_path / "plain.npz", COLOUR)
    np.savez(tmp_path / "labelled.npz", images=COLOUR, labels=np.arange(40), names=["a", "b"])
    np.savez(tmp_path / "split.npz", train=COLOUR[:20], test=COLOUR[20:], train_labels=[1], test_labels=[1])
    plain, labelled = files.load_path(tmp_path / "plain.npz"), files.load_path(tmp_path / "labelled.npz")
    for name in files.SPLITS:
        np.testing.assert_array_equal(getattr(labelled, name), getattr(plain, name))
    np.testing.assert_array_equal(files.load_path(tmp_path / "split.npz").test, COLOUR[20:])


def test_large_folders_are_read_as_needed(tmp_path, monkeypatch):
    """The same splits, without holding the images."""
    write_folder(tmp_path, COLOUR)
    held = files.load_path(tmp_path, bits=5)
    monkeypatch.setattr("resflow_jax.data.images._IN_MEMORY", 0)
    stored = files.load_path(tmp_path, bits=5)
    for name in files.SPLITS:
        assert isinstance(getattr(stored, name), StoredImages)
        np.testing.assert_array_equal(getattr(stored, name)[:], getattr(held, name))


def broken_png(path):
    write_folder(path, COLOUR[:2])
    (path / "0" / "000.png").write_bytes(b"\x89PNG but no more")


def mixed(path):
    write_folder(path, COLOUR[:2])
    Image.fromarray(COLOUR[0][:3]).save(path / "other.png")


def deep(path):
    path.mkdir()
    Image.fromarray(GREY[0, ..., 0].astype(np.uint16) * 256).save(path / "deep.png")


def loose(path):
    folders("train", "test")(path)
    Image.fromarray(COLOUR[0]).save(path / "loose.png")


def folders(*names):
    def write(path):
        for name in names:
            write_folder(path / name, COLOUR[:3])

    return write


def damaged_npz(path):
    np.savez_compressed(path, COLOUR)
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)


BAD = {
    "dev": (
        folders("train", "dev", "test"),
        ValueError,
        "expected the folder train and, .* got dev, test, train in",
    ),
    "numbers": (
        folders("train2017", "val2017"),
        ValueError,
        "expected the folder .* got train2017, val2017 in",
    ),
    "prefix": (
        folders("mnist_test", "mnist_train"),
        ValueError,
        "expected the folder .* got mnist_test, mnist_train in",
    ),
    "twice": (folders("Train", "train"), ValueError, "expected the folder train and, .* got Train, train in"),
    "vals": (
        folders("train", "val", "Valid"),
        ValueError,
        "expected the folder train and, .* got Valid, train, val in",
    ),
    "no-train": (folders("TEST", "Val"), ValueError, "expected the folder train and, .* got TEST, Val in"),
    "letters": (folders("trainA", "testA"), ValueError, "expected the folder train and, .* got testA, trainA in"),
    "sets": (folders("TestSet", "ValSet"), ValueError, "expected the folder train and, .* got TestSet, ValSet in"),
    "deeper": (
        folders("a/train_1", "a/test_1"),
        ValueError,
        "splits in .*deeper itself, got test_1, train_1",
    ),
    "inside": (
        folders("cats/train", "cats/test", "dogs/train", "dogs/test"),
        ValueError,
        "expected the folders of splits in .*inside itself, got test, train in .*cats",
    ),
    "loose": (loose, ValueError, r"expected images only in the folders test, train, got .*loose.png"),
    "class": (folders("train", "cat"), ValueError, "expected the folder train and, .* got cat, train in"),
    "damaged.npz": (damaged_npz, ValueError, "path: expected a .npz file of arrays, could not read"),
    "empty.npz": (lambda path: path.touch(), ValueError, "path: expected a .npz file of arrays, could not read"),
    "short": (lambda path: path.write_bytes(b"\0\0\x08\x03\0\0"), ValueError, "or an IDX file of uint8 images"),
    "garbled.gz": (
        lambda path: path.write_bytes(gzip.compress(idx(GREY))[:50] + bytes(50)),
        ValueError,
        "path: could not decompress",
    ),
    "nothing": (lambda path: None, FileNotFoundError, "path: expected a folder or a file of images, found nothing at"),
    "empty": (lambda path: path.mkdir(), FileNotFoundError, r"path: expected image files \(.png, .*found none"),
    "broken.folder": (broken_png, ValueError, "path: expected an image file, could not read .*000.png"),
    "mixed": (mixed, ValueError, r"one shape, got \(6, 4, 3\) in .*000.png and \(3, 4, 3\) in .*other.png"),
    "deep": (deep, ValueError, r"path: expected images of 8 bits a pixel, got mode I.* in .*deep.png"),
    "text.npy": (
        lambda path: path.write_text("hello"),
        ValueError,
        "path: expected a .npy file of arrays, could not read",
    ),
    "text.npz": (lambda path: path.write_text("hello"), ValueError, "path: expected a .npz file of arrays, could not"),
    "float.npy": (lambda path: np.save(path, np.zeros((3, 2, 2))), ValueError, r"expected uint8 images .*float64 \(3"),
    "none.npy": (lambda path: np.save(path, COLOUR[:0]), ValueError, r"expected uint8 images .*uint8 \(0, 6"),
    "one.npy": (lambda path: np.save(path, COLOUR[:1]), ValueError, "expected at least 2 images"),
    "image.npy": (
        lambda path: np.save(path, RNG.integers(0, 256, (32, 32, 3), np.uint8)),
        ValueError,
        r"expected images \[N, H, W\], got shape \(32, 32, 3\), perhaps of one image, in .*image.npy",
    ),
    "first.npy": (
        lambda path: np.save(path, RNG.integers(0, 256, (5, 3, 8, 8), np.uint8)),
        ValueError,
        r"got shape \(5, 3, 8, 8\), perhaps \[N, C, H, W\], in .*first.npy",
    ),
    "deep.npy": (
        lambda path: np.save(path, COLOUR.astype(np.uint16)),
        ValueError,
        "expected uint8 images .* got uint16",
    ),
    "long.npy": (lambda path: np.save(path, COLOUR.astype(np.int64)), ValueError, "expected uint8 images .* got int64"),
    "bool.npy": (lambda path: np.save(path, COLOUR > 9), ValueError, "expected uint8 images .* got bool"),
    "test.npz": (lambda path: np.savez(path, test=COLOUR), ValueError, "named train, test and validation, got test in"),
    "keras.npz": (
        lambda path: np.savez(path, x_train=COLOUR, x_test=COLOUR),
        ValueError,
        "named train, test and validation, got x_train, x_test in",
    ),
    "int.idx": (
        lambda path: path.write_bytes(struct.pack(">HBBIII", 0, 12, 3, 2, 1, 1) + bytes(8)),
        ValueError,
        "or an IDX file of uint8 images",
    ),
    "names.npz": (lambda path: np.savez(path, a=COLOUR, b=COLOUR), ValueError, "named train, test and validation, got"),
    "labels.npz": (
        lambda path: np.savez(path, labels=COLOUR, train_labels=COLOUR),
        ValueError,
        "named train, test and validation, got labels, train_labels in",
    ),
    "float.npz": (
        lambda path: np.savez(path, train=COLOUR, test=COLOUR / 2),
        ValueError,
        r"expected uint8 images .* got float64 \(40, 6, 4, 3\) in test of .*float.npz",
    ),
    "idx": (lambda path: path.write_bytes(idx(GREY)[:-5]), ValueError, "path: expected 960 pixels in .*, got 955"),
    "labels": (lambda path: path.write_bytes(b"\0\0\x08\x01\0\0\0\1\5"), ValueError, "or an IDX file of uint8 images"),
    "cut.gz": (lambda path: path.write_bytes(gzip.compress(idx(GREY))[:50]), ValueError, "path: could not decompress"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_set_of_images_is_named(tmp_path, name):
    """The error says what was expected, and which file came."""
    write_bad, error, message = BAD[name]
    write_bad(tmp_path / name)
    with pytest.raises(error, match=message):
        files.load_path(tmp_path / name)
