"""Training batches: every image once an epoch, functions of seed and step alone, parts of them, augmentation."""

import itertools
import multiprocessing
import os
import signal
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from resflow_jax.data.batches import Augmentation, Batches
from resflow_jax.data.files import load_path
from resflow_jax.data.images import StoredImages

# image n has all pixels n
IMAGES = np.broadcast_to(np.arange(10, dtype=np.uint8)[:, None, None, None], (10, 2, 3, 1))


def numbers(batch):
    return batch[:, 0, 0, 0].tolist()


def test_every_epoch_visits_every_image_once():
    """The order differs between epochs and seeds and is reproducible; a batch may span two epochs."""
    batches = Batches(IMAGES, seed=3, batch_size=4)
    drawn = list(itertools.chain(*(numbers(batches[step]) for step in range(5))))
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert numbers(Batches(IMAGES, seed=3, batch_size=4)[2]) == drawn[8:12]
    assert numbers(Batches(IMAGES, seed=4, batch_size=10)[0]) != first


@pytest.mark.parametrize("threads", [0, 2])
def test_a_run_that_is_cut_goes_on_with_the_same_batches(threads):
    """Batches from step n on, read ahead by threads, are those of an uninterrupted run, with the same randomness."""
    noisy = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    batches = Batches(noisy, seed=0, batch_size=4, augmentation=Augmentation(flip=True, crop=2))
    whole = list(itertools.islice(batches.starting_at(0, threads=threads), 9))
    rest = list(itertools.islice(batches.starting_at(4, threads=threads), 5))
    np.testing.assert_array_equal(whole[4:], rest)
    np.testing.assert_array_equal(whole[7], batches[7])


def test_worker_processes_read_the_same_batches(tmp_path, monkeypatch):
    """From a step in the middle, of an array, and of image files that are read as needed. They end with the iterator.

    An interrupt, which reaches all processes of a run, leaves them alone.
    """
    noisy = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    for n, image in enumerate(noisy):
        Image.fromarray(image).save(tmp_path / f"{n:02}.png")
    monkeypatch.setattr("resflow_jax.data.images._IN_MEMORY", 0)
    stored = load_path(tmp_path, bits=5).train
    assert isinstance(stored, StoredImages)
    for images, workers in ((noisy, 2), (stored, 1)):
        batches = Batches(images, seed=0, batch_size=4, augmentation=Augmentation(flip=True, crop=2))
        with closing(batches.starting_at(4, threads=1, workers=workers)) as iterator:
            for step, batch in enumerate(itertools.islice(iterator, 7), 4):
                np.testing.assert_array_equal(batch, batches[step], strict=True)
                if step == 6:  # every worker has begun
                    for process in multiprocessing.active_children():
                        os.kill(process.pid, signal.SIGINT)
        assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="workers: expected an integer of at least 0, got -1"):
        batches.starting_at(0, workers=-1)


def test_vectors():
    """Batches of them keep their type; they cannot be augmented like images."""
    vectors = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    batches = Batches(vectors, seed=0, batch_size=5, augmentation=Augmentation())
    epoch = np.concatenate([batches[0], batches[1]])
    assert epoch.dtype == np.float32 and sorted(map(bytes, epoch)) == sorted(map(bytes, vectors))
    with pytest.raises(ValueError, match=r"augmentation: expected images \[N, H, W, C\].*got shape \(10, 3\)"):
        Batches(vectors, seed=0, batch_size=5, augmentation=Augmentation(flip=True))


def test_parts_of_a_batch():
    """The concatenated parts are the whole batch, from any step on, also if it spans two epochs."""
    augmentation = Augmentation(flip=True)
    noisy = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 1), np.uint8)
    whole = Batches(noisy, seed=1, batch_size=6, augmentation=augmentation)
    parts = [Batches(noisy, seed=1, batch_size=6, augmentation=augmentation, part=n, parts=3) for n in range(3)]
    for step in range(4):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole[step])
    found = [next(part.starting_at(2, threads=1)) for part in parts]
    np.testing.assert_array_equal(np.concatenate(found), whole[2])
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 4 parts, got 6"):
        Batches(noisy, seed=1, batch_size=6, part=0, parts=4)


LABELS = np.arange(10) % 3  # of IMAGES


@pytest.mark.parametrize("augmentation", [None, Augmentation(flip=True, crop=1)])
def test_labels_stay_with_their_images(augmentation):
    """A batch is a pair, of the images that come without labels and of their labels, whatever else is asked."""
    images = IMAGES + np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 10  # augmentation can be seen, and n is kept
    settings = {"seed": 1, "batch_size": 6, "augmentation": augmentation}
    batches, unlabelled = Batches(images, labels=LABELS, **settings), Batches(images, **settings)
    parts = [Batches(images, labels=LABELS, part=n, parts=2, **settings) for n in range(2)]
    for step, (found, labels) in zip(range(2, 6), batches.starting_at(2), strict=False):
        np.testing.assert_array_equal(found, unlabelled[step])
        np.testing.assert_array_equal(labels, np.asarray(numbers(found), np.int32) % 10 % 3, strict=True)
        for whole, *pieces in zip((found, labels), *(part[step] for part in parts), strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert isinstance(batches[0], tuple)


def test_labels_from_a_worker_process():
    """It gives the same pairs, of arrays that own their memory."""
    batches = Batches(IMAGES, seed=0, batch_size=4, labels=LABELS, augmentation=Augmentation(flip=True))
    with closing(batches.starting_at(2, threads=1, workers=1)) as iterator:
        for step, batch in enumerate(itertools.islice(iterator, 3), 2):
            assert isinstance(batch, tuple)
            for found, expected in zip(batch, batches[step], strict=True):
                assert type(found) is np.ndarray and found.flags.owndata
                np.testing.assert_array_equal(found, expected, strict=True)


def test_labels_of_stored_images_and_unknown_ones():
    """-1 is a label too; other integer types become int32."""
    stored = StoredImages(lambda rows: IMAGES[rows], np.arange(10))
    labels = np.where(LABELS == 2, -1, LABELS).astype(np.int64)
    images, found = Batches(stored, seed=0, batch_size=10, labels=labels)[0]
    np.testing.assert_array_equal(found, labels[numbers(images)].astype(np.int32), strict=True)
    assert -1 in found


@pytest.mark.parametrize(
    ("labels", "got"),
    [(LABELS[:9], r"int64 \(9,\)"), (LABELS[:, None], r"int64 \(10, 1\)"), (LABELS / 2, r"float64 \(10,\)")],
)
def test_bad_labels(labels, got):
    """The error says how many there should be, and what came."""
    with pytest.raises(ValueError, match=f"labels: expected 10 integers, one for each row, got {got}"):
        Batches(IMAGES, seed=0, batch_size=4, labels=labels)


def test_stored_images_are_read_one_by_one():
    """Only the images of a batch are read."""
    read = []
    stored = StoredImages(lambda rows: read.append(rows.tolist()) or IMAGES[rows], np.arange(10))
    read.clear()
    batch = Batches(stored, seed=3, batch_size=4)[0]
    assert numbers(batch) == numbers(Batches(IMAGES, seed=3, batch_size=4)[0])
    assert sorted(itertools.chain(*read)) == sorted(numbers(batch))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_bad_batch_sizes(batch_size):
    """A batch size of 0, or above the number of images, is an error."""
    with pytest.raises(ValueError, match="batch_size: expected between 1 and 10, the number of training examples"):
        Batches(IMAGES, seed=0, batch_size=batch_size)


def test_augmentation():
    """Half of the images are mirrored; a shift moves the pixels by up to `crop`, continued by reflection."""
    image = np.arange(5 * 6 * 1, dtype=np.uint8).reshape(5, 6, 1)
    rng = np.random.default_rng(0)
    flipped = [np.array_equal(Augmentation(flip=True)(image, rng), image[:, ::-1]) for _ in range(400)]
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / 400**0.5
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = [padded[i : i + 5, j : j + 6].tobytes() for i in range(5) for j in range(5)]
    found = {Augmentation(crop=2)(image, rng).tobytes() for _ in range(400)}
    assert found == set(shifts) and image.tobytes() in found
    np.testing.assert_array_equal(Augmentation()(image, rng), image)
    with pytest.raises(ValueError, match="crop: expected an integer of at least 0, got -1"):
        Augmentation(crop=-1)
