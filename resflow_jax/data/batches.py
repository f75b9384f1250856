"""Training batches by grain: shuffled by a seed, a share a process, read ahead, resumed at any step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resflow_jax.data.images import Images
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

    Every epoch visits the images in an order of its own, without end; a batch may span two epochs.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        batch_size: int,
        augmentation: Augmentation | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        """Of `processes` that read the same images, this is number `process`; batch_size is that of all together.

        Raises:
          ValueError: for a batch larger than the number of images, or that the processes cannot share equally.
        """
        import grain

        if not 0 < batch_size <= len(images):
            raise ValueError(
                f"batch_size: expected between 1 and {len(images)}, the number of training images, got {batch_size}"
            )
        if batch_size % processes:
            raise ValueError(f"batch_size: expected a multiple of {processes} processes, got {batch_size}")
        dataset = grain.MapDataset.source(images).seed(seed).shuffle().repeat()
        if augmentation is not None and (augmentation.flip or augmentation.crop):
            dataset = dataset.random_map(augmentation)
        self._dataset = dataset[process::processes].batch(batch_size // processes, drop_remainder=True)

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of a step, uint8 [batch_size / processes, H, W, C]."""
        return self._dataset[step]

    def starting_at(self, step: int, *, threads: int = 2, ahead: int = 4) -> Iterator[np.ndarray]:
        """The batches from that of `step` on, read by so many threads, at most so many batches ahead."""
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(self._dataset[step:].to_iter_dataset(options))
