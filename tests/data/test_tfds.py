"""Image sets of TensorFlow Datasets: their splits, their labels, and what an error says about a damaged one."""

from types import SimpleNamespace

import numpy as np
import pytest

from resflow_jax.data import images, tfds
from resflow_jax.data.splits import SPLITS
from tests.paths import SHARED


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
    """The prepared data set is read without TensorFlow: 60000 + 10000 images, the last 5000 validate.

    Two of three test images are nearest to the mean of the training images of their own class.
    """
    data = tfds.load_labelled_tfds("fashion_mnist", str(SHARED / "tfds"))
    images, labels = data.images, data.labels
    assert images.train.shape == (55000, 28, 28, 1) and len(images.validation) == 5000 and len(images.test) == 10000
    assert images.levels == 256 and images.train.dtype == np.uint8
    assert 70 < images.train.mean() < 76
    assert labels.names[0] == "T-shirt/top" and np.bincount(labels.test).tolist() == [1000] * 10
    means = np.stack([images.train[labels.train == n].mean(0).ravel() for n in range(10)])
    for pixels, own in ((images.validation, labels.validation), (images.test, labels.test)):
        distances = (means**2).sum(1) - pixels.reshape(-1, 784) @ (2 * means.T)
        assert np.mean(distances.argmin(1) == own) > 0.65


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


@pytest.mark.parametrize(
    ("number", "validation"), [(2, 1), (40, 4), (5000, 500), (19999, 1999), (20000, 5000), (50000, 5000)]
)
def test_images_that_validate_by_default(number, validation):
    """5000 of large sets, as in published splits, and a tenth of small ones, from the end."""
    labels = np.arange(number)
    parts = tfds._by_split({"train": labels, "test": labels}, lambda source: source, None)
    np.testing.assert_array_equal(parts["validation"], labels[-validation:])
    np.testing.assert_array_equal(parts["train"], labels[:-validation])
    np.testing.assert_array_equal(parts["test"], labels)


def prepare(data_dir, feature="image", shape=(4, 4, 3), dtype=np.uint8, splits=("train", "test"), label=None):
    """The folder of the data set "tiny", prepared by TFDS: 12 examples in every split; example n is filled with n.

    A side None is 4 or 5. With a feature for labels, the label of example n is n % 3.
    """
    import tensorflow_datasets

    class Tiny(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):  # TFDS writes its own feature of images by TensorFlow
            array = tensorflow_datasets.features.Tensor(shape=shape, dtype=dtype)
            features = {feature: array} if label is None else {feature: array, "label": label}
            return self.dataset_info_from_configs(features=tensorflow_datasets.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for n in range(12):
                example = {feature: np.full([4 + n % 2 if side is None else side for side in shape], n, dtype)}
                yield n, example if label is None else example | {"label": np.full(label.shape, n % 3, label.np_dtype)}

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


NAMES = ("cat", "dog", "fox")


def feature(kind, **settings):
    import tensorflow_datasets

    return getattr(tensorflow_datasets.features, kind)(**settings)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation"), ("train",)])
def test_labels_stay_with_their_images(tmp_path, monkeypatch, splits, lazily):
    """In every split, read in chunks; the images are those without labels."""
    prepare(tmp_path, splits=splits, label=feature("ClassLabel", names=NAMES))
    monkeypatch.setattr(tfds, "_CHUNK", 5)
    if lazily:
        monkeypatch.setattr(images, "_IN_MEMORY", 0)
    data, unlabelled = (load("tiny", tmp_path, validation=2) for load in (tfds.load_labelled_tfds, tfds.load_tfds))
    assert data.labels.names == NAMES and data.levels == 256
    for split in SPLITS:
        found = getattr(data.images, split)
        assert isinstance(found, images.StoredImages) is lazily
        np.testing.assert_array_equal(found[:], getattr(unlabelled, split)[:])
        np.testing.assert_array_equal(getattr(data.labels, split), np.int32(found[:][:, 0, 0, 0] % 3), strict=True)


def test_classes_without_names(tmp_path):
    """They are as many as the data set says, or else as its labels need."""
    features = {"0123": feature("ClassLabel", num_classes=4), "012": feature("Tensor", shape=(), dtype=np.int32)}
    for names, label in features.items():
        prepare(tmp_path / names, label=label)
        assert tfds.load_labelled_tfds("tiny", tmp_path / names, validation=2).labels.names == tuple(names)


@pytest.mark.parametrize("label", [None, {"shape": (2,), "dtype": np.int64}, {"shape": (), "dtype": np.float32}])
def test_a_data_set_without_labels_is_named(tmp_path, label):
    """Several labels of an image, and floats, are no classes."""
    prepare(tmp_path, label=None if label is None else feature("Tensor", **label))
    message = r"name: expected a data set with labels, with the feature 'label' of one integer; got .*image.* of 'tiny'"
    with pytest.raises(ValueError, match=message):
        tfds.load_labelled_tfds("tiny", tmp_path, validation=2)


def test_damaged_labels_say_how_to_prepare_them(tmp_path, monkeypatch):
    """An error of the second reading, which takes the labels, has the same remedy."""
    prepare(tmp_path, label=feature("ClassLabel", num_classes=3))
    monkeypatch.setattr("tensorflow_datasets.decode.SkipDecoding.decode_example_np", lambda self, value: 1 / 0)
    with pytest.raises(ValueError, match=r"data_dir: expected 'tiny' .*division by zero.*`tfds build tiny"):
        tfds.load_labelled_tfds("tiny", tmp_path, validation=2)
