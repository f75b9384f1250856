"""Training batches by grain: shuffled by a seed, divided among processes, read ahead, resumable at any step."""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from resflow_jax.data.images import StoredImages
from resflow_jax.functional.checks import check_count


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image, drawn anew whenever the image is read.

    Attributes:
      flip: whether to mirror the image left to right with probability 1/2.
      crop: largest shift in pixels in each direction, with reflection at the border; 0 for no shift.
    """

    flip: bool = False
    crop: int = 0

    def __post_init__(self):
        check_count("crop", self.crop, 0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self.crop:
            row, column = rng.integers(0, 2 * self.crop + 1, 2)
            padded = np.pad(image, ((self.crop, self.crop), (self.crop, self.crop), (0, 0)), mode="reflect")
            image = padded[row : row + image.shape[0], column : column + image.shape[1]]
        return image


@dataclass(frozen=True)
class _LabelledRows:
    """A sequence of pairs of a row and its label."""

    rows: np.ndarray | StoredImages
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        return self.rows[index], self.labels[index]


@dataclass(frozen=True)
class _AugmentationOfFirst:
    """Changes the image of a pair and leaves its label."""

    augmentation: Augmentation

    def __call__(self, pair: tuple[np.ndarray, np.int32], rng: np.random.Generator) -> tuple[np.ndarray, np.int32]:
        image, label = pair
        return self.augmentation(image, rng), label


Batch = np.ndarray | tuple[np.ndarray, np.ndarray]


class Batches:
    """The batches of step 0, 1, 2, ..., without end. Each depends only on the settings and the step.

    Every epoch visits all rows in a new random order. A batch may span two epochs. With labels, a batch is a pair: the
    rows, which are those of a batch without labels, and their labels.

    Example:
      >>> from resflow_jax.data.batches import Batches
      >>> batches = Batches(np.arange(10), seed=0, batch_size=5)
      >>> sorted([*batches[0].tolist(), *batches[1].tolist()])   # two batches are an epoch
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
      >>> rows, labels = Batches(np.arange(10), seed=0, batch_size=5, labels=np.arange(10) % 2)[0]
      >>> np.array_equal(labels, rows % 2)
      True
    """

    def __init__(
        self,
        rows: np.ndarray | StoredImages,
        *,
        seed: int,
        batch_size: int,
        augmentation: Augmentation | None = None,
        part: int = 0,
        parts: int = 1,
        labels: np.ndarray | None = None,
    ):
        """Divides every batch into `parts` equal parts, one for each process, and reads part number `part`.

        Args:
          rows: images [N, H, W, C], vectors [N, D], or any sequence that is indexed by integers.
          seed: seed of the order and of the augmentation.
          batch_size: number of rows of a whole batch.
          augmentation: changes of images, or None.
          part: number of the part that this process reads, from 0.
          parts: number of parts.
          labels: integers [N], one for each row, or None. They may be -1 for rows of an unknown class.

        Raises:
          ValueError: if the batch is larger than the number of rows or not divisible by `parts`, for an augmentation of
            rows that are not images, or for labels that are not integers [N].
        """
        import grain

        if not 0 < batch_size <= len(rows):
            raise ValueError(
                f"batch_size: expected between 1 and {len(rows)}, the number of training examples, got {batch_size}"
            )
        if batch_size % parts:
            raise ValueError(f"batch_size: expected a multiple of {parts} parts, got {batch_size}")
        source = rows if labels is None else _LabelledRows(rows, _as_labels(labels, len(rows)))
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        if augmentation is not None and (augmentation.flip or augmentation.crop):
            if len(rows.shape) != 4:
                raise ValueError(f"augmentation: expected images [N, H, W, C] to augment, got shape {rows.shape}")
            dataset = dataset.random_map(augmentation if labels is None else _AugmentationOfFirst(augmentation))
        self._dataset = dataset.batch(batch_size // parts, drop_remainder=True)[part::parts]

    def __getitem__(self, step: int) -> Batch:
        """This process's part of the batch of a step, [batch_size / parts, ...] in the dtype of the rows.

        With labels, the pair of this array and of int32 labels [batch_size / parts].
        """
        return self._dataset[step]

    def starting_at(self, step: int, *, threads: int = 2, ahead: int = 4, workers: int = 0) -> Iterator[Batch]:
        """Iterates over the batches from `step` on. The settings below affect the speed, not the batches.

        Args:
          step: number of the first batch.
          threads: number of reading threads in each reading process.
          ahead: largest number of batches that each reading process reads ahead.
          workers: number of worker processes, which take turns reading batches; 0 reads in this process. Each worker
            has a copy of the rows in memory and imports the main module, which must start its work under
            `if __name__ == "__main__":`. Workers end when the iterator is deleted, or closed by its close().
        """
        import grain

        check_count("workers", workers, 0)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        dataset = self._dataset[step:].to_iter_dataset(options)
        if not workers:
            return iter(dataset)
        batches = _read_by_workers(dataset, workers)
        atexit.register(_close, weakref.ref(batches))  # grain cannot close once the interpreter unloads modules
        return batches


def _as_labels(labels: np.ndarray, number: int) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (number,):
        raise ValueError(f"labels: expected {number} integers, one for each row, got {labels.dtype} {labels.shape}")
    return labels.astype(np.int32)


def _read_by_workers(dataset: Any, workers: int) -> Iterator[Batch]:
    """Iterates over a grain IterDataset with worker processes, until the generator is closed."""
    import grain
    import jax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads an absl flag, and programs without absl.app do not parse flags
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers), _set_up_worker)
    with closing(iter(dataset)) as iterator:
        for batch in iterator:
            # copies: JAX could keep the shared memory in use as long as its arrays live
            yield jax.tree.map(np.array, batch)


def _close(reference: weakref.ref) -> None:
    batches = reference()
    if batches is not None:
        batches.close()


def _set_up_worker(worker: int, workers: int) -> None:
    """Sets up a worker: it ends when its parent process ends, not by a signal, and uses no accelerator."""
    import jax

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # terminals signal all processes; the run may need batches until it stops
    threading.Thread(target=_end_with_run, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")


def _end_with_run() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
