"""Image data: fixed splits, dequantisation, images that stay on disk, bad input."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.data import embedded, images, tfds
from tests.paths import SHARED


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
    """Arrays that are not quantised images are refused on entry."""
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
        tfds.load_tfds("fashion_mnist", str(tmp_path))


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
    """$TFDS_DATA_DIR is searched first."""
    (tmp_path / "fashion_mnist").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tfds.find_data_dir("fashion_mnist") == tmp_path


@pytest.mark.skipif(
    not (SHARED / "tfds" / "fashion_mnist").is_dir(), reason=f"no prepared fashion_mnist in {SHARED}/tfds"
)
def test_fashion_mnist_through_tfds():
    """The prepared data set is read without TensorFlow: 60000 + 10000 images, the last 5000 validate."""
    data = tfds.load_tfds("fashion_mnist", str(SHARED / "tfds"))
    assert data.train.shape == (55000, 28, 28, 1) and len(data.validation) == 5000 and len(data.test) == 10000
    assert data.levels == 256 and data.train.dtype == np.uint8
    assert 70 < data.train.mean() < 76


class Source:
    """What `tensorflow_datasets.data_source` gives for a split."""

    def __init__(self, array):
        self.array, self.read = array, []
        feature = SimpleNamespace(np_dtype=array.dtype, shape=array.shape[1:])
        self.dataset_info = SimpleNamespace(features={"image": feature})

    def __len__(self):
        return len(self.array)

    def __getitems__(self, numbers):
        self.read += numbers
        return [{"image": self.array[n]} for n in numbers]


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("splits", [("train", "test", "extra"), ("train", "validation"), ("train",)])
def test_splits_of_tfds(tmp_path, monkeypatch, splits, lazily):
    """The end of train validates; the test split is "test", else "validation", else the end of train; 5 bits."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 256, (40, 4, 4, 3), np.uint8) for name in splits}
    sources = {name: Source(array) for name, array in arrays.items()}
    (tmp_path / "some" / "64").mkdir(parents=True)
    monkeypatch.setattr("tensorflow_datasets.data_source", lambda name, data_dir, download: sources)
    if lazily:
        monkeypatch.setattr(images, "_IN_MEMORY", 0)
    data = tfds.load_tfds("some/64", tmp_path, bits=5, validation=6)
    rest = arrays["train"] if len(splits) > 1 else arrays["train"][:-4]
    np.testing.assert_array_equal(data.train[:], rest[:-6] >> 3)
    np.testing.assert_array_equal(data.validation[:], rest[-6:] >> 3)
    np.testing.assert_array_equal(data.test[:], (arrays[splits[1]] if len(splits) > 1 else arrays["train"][-4:]) >> 3)
    assert data.levels == 32
    assert isinstance(data.train, images.StoredImages) is lazily
    with pytest.raises(ValueError, match="validation: expected between 1 and"):
        tfds.load_tfds("some/64", tmp_path, validation=40)


def prepare(data_dir, feature="image", shape=(4, 4, 3), dtype=np.uint8, splits=("train", "test")):
    """The folder of the data set "tiny", prepared by TFDS: 12 examples in every split; example n is filled with n.

    A side None is 4 or 5.
    """
    import tensorflow_datasets

    class Tiny(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):  # TFDS writes its own feature of images by TensorFlow
            array = tensorflow_datasets.features.Tensor(shape=shape, dtype=dtype)
            return self.dataset_info_from_configs(features=tensorflow_datasets.features.FeaturesDict({feature: array}))

        def _split_generators(self, manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for n in range(12):
                yield n, {feature: np.full([4 + n % 2 if side is None else side for side in shape], n, dtype)}

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir / "tiny" / "1.0.0"


def test_a_prepared_data_set(tmp_path):
    """What TFDS has prepared is read, each example once."""
    prepare(tmp_path)
    data = tfds.load_tfds("tiny", tmp_path, validation=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 2, 12)
    assert sorted(data.test[:, 0, 0, 0]) == list(range(12))


DAMAGE = {
    "no JSON": ("dataset_info.json", lambda data: b"{", "Failed to load JSON"),
    "no information": ("dataset_info.json", None, "Could not read dataset info"),
    "short": ("tiny-train.array_record-00000-of-00001", lambda data: data[:100], "ArrayRecord file should be"),
    "no file": ("tiny-train.array_record-00000-of-00001", None, "No such file"),
    "tfrecord": (
        "dataset_info.json",
        lambda data: data.replace(b"array_record", b"tfrecord"),
        "file format FileFormat.TFRECORD is not supported",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_data_set_that_cannot_be_read_says_how_to_prepare_it(tmp_path, name):
    """A damaged one, and one in another format: the error names it, what is wrong, and the command to run."""
    file, damage, reason = DAMAGE[name]
    path = prepare(tmp_path) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    message = rf"data_dir: expected 'tiny' .*{tmp_path}/tiny \(.*{reason}.*`tfds build tiny .*array_record`"
    with pytest.raises(ValueError, match=message):
        tfds.load_tfds("tiny", tmp_path, validation=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"feature": "n"}, r"feature 'image' of uint8 .*; got the features {'n': Tensor\(shape=\(4, 4, 3\), .* 'tiny'"),
        ({"dtype": np.float32}, r"got the features {'image': Tensor\(shape=\(4, 4, 3\), dtype=float32\)} of 'tiny'"),
        ({"shape": (4,)}, r"got the features {'image': Tensor\(shape=\(4,\), dtype=uint8\)} of 'tiny'"),
        ({"shape": (None, 4, 3)}, r"expected images of one shape, got \(4, 4, 3\) and \(5, 4, 3\) in 'tiny'"),
        ({"splits": ("test",)}, "expected a data set with the split 'train', got test in 'tiny'"),
    ],
)
def test_a_data_set_of_other_things_is_named(tmp_path, content, message):
    """No images, images of other types and shapes, and no training images are refused."""
    prepare(tmp_path, **content)
    with pytest.raises(ValueError, match=f"name: .*{message}"):
        tfds.load_tfds("tiny", tmp_path, validation=2)
