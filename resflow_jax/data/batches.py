"""Training batches by grain: shuffled by a seed, a part a process, read ahead, resumed at any step."""

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
    """What is done to each image at random whenever it is drawn.

    Attributes:
      flip: mirror left and right, half of the time.
      crop: shift by up to so many pixels in each direction, the image continued by reflection; 0 for none.
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


class Batches:
    """The batches of a run: those of step 0, 1, ..., each a function of the settings and the step alone.

    Every epoch visits the rows in an order of its own, without end; a batch may span two epochs.
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
    ):
        """Of every batch, cut in so many equal parts for as many processes, that of number `part`.

        Args:
          rows: images [N, H, W, C], vectors [N, D], or whatever else has a length and is indexed by numbers.
          seed: of the order, and of the augmentation.
          batch_size: rows of a whole batch.
          augmentation: of images, if any.
          part: which part is read.
          parts: how many there are.

        Raises:
          ValueError: for a batch larger than the number of rows, or that cannot be cut in equal parts; for an
            augmentation of what are not images.
        """
        import grain

        if not 0 < batch_size <= len(rows):
            raise ValueError(
                f"batch_size: expected between 1 and {len(rows)}, the number of training examples, got {batch_size}"
            )
        if batch_size % parts:
            raise ValueError(f"batch_size: expected a multiple of {parts} parts, got {batch_size}")
        dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
        if augmentation is not None and (augmentation.flip or augmentation.crop):
            if len(rows.shape) != 4:
                raise ValueError(f"augmentation: expected images [N, H, W, C] to augment, got shape {rows.shape}")
            dataset = dataset.random_map(augmentation)
        self._dataset = dataset.batch(batch_size // parts, drop_remainder=True)[part::parts]

    def __getitem__(self, step: int) -> np.ndarray:
        """The part of the batch of a step, [batch_size / parts, ...] of the rows' type."""
        return self._dataset[step]

    def starting_at(self, step: int, *, threads: int = 2, ahead: int = 4, workers: int = 0) -> Iterator[np.ndarray]:
        """The batches from that of `step` on, the same however they are read.

        Args:
          step: of the first batch.
          threads: that read, in each worker if there are any.
          ahead: number of batches that are read ahead at most, by each worker if there are any.
          workers: processes that read, each every so many-th batch; 0 for this one alone. Every worker has its copy
            of rows in memory and imports the main module, which must start its work under
            `if __name__ == "__main__":`. They end when the iterator is closed by its close() or deleted.
        """
        import grain

        check_count("workers", workers, 0)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        dataset = self._dataset[step:].to_iter_dataset(options)
        if not workers:
            return iter(dataset)
        batches = _read_by_workers(dataset, workers)
        atexit.register(_close, weakref.ref(batches))  # once modules are torn down it is too late for grain
        return batches


def _read_by_workers(dataset: Any, workers: int) -> Iterator[np.ndarray]:
    """The elements of grain's IterDataset, read by so many processes until the generator is closed."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks a flag of absl, which programs without absl.app never parse
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers), _set_up_worker)
    with closing(iter(dataset)) as iterator:
        for batch in iterator:
            yield np.array(batch)  # out of the shared memory, which JAX may keep for as long as its array


def _close(reference: weakref.ref) -> None:
    batches = reference()
    if batches is not None:
        batches.close()


def _set_up_worker(worker: int, workers: int) -> None:
    """Called first in every worker, which ends with the run, not before, and leaves accelerators to it."""
    import jax

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a run, which may go on for a while
    threading.Thread(target=_end_with_run, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")


def _end_with_run() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
