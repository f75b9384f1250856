"""Pictures of images."""

import numpy as np
import pytest
from PIL import Image

from experiments.runs import pictures


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_pictures_of_any_number_of_channels(channels, tmp_path):
    """The first channels are shown of images that are neither grey nor in colour."""
    images = np.full((3, 4, 5, channels), np.nan)
    images[:, 0] = np.linspace(0, 1, channels)
    pictures.save_grid(tmp_path / "grid.png", images, 2)
    pictures.save_images(tmp_path / "images.png", {"a": np.nan_to_num(images)}, 2)
    pictures.save_strip(tmp_path / "strip.png", np.nan_to_num(images), "abc", "title")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    zoom = 600 // 11
    assert grid.shape == (11 * zoom, 13 * zoom) if channels < 3 else (11 * zoom, 13 * zoom, 3)
    last = grid[zoom + 1, zoom + 1] if channels < 3 else grid[zoom + 1, zoom + 1, 2]
    assert last == round(255 * (0 if channels < 3 else 2 / (channels - 1)))
