"""Pictures of images."""

import errno
from pathlib import Path

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


def test_pictures_are_written_as_wholes(tmp_path, monkeypatch):
    """An error leaves those that were there, drawn by either library, and names them."""
    images = np.zeros((2, 4, 4, 1))
    writers = {
        "grid.png": lambda path: pictures.save_grid(path, images, 2),
        "figure.png": lambda path: pictures.save_images(path, {"a": images}, 2),
    }

    def full(image, path, *arguments, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, write in writers.items():
        (tmp_path / name).write_bytes(b"earlier")
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", full)
            with pytest.raises(OSError, match=rf"could not write it, earlier files are intact.*{name}"):
                write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"earlier"
    assert {path.name for path in tmp_path.iterdir()} == {*writers}


@pytest.mark.parametrize("names", [("temple", "a flower with a long name"), tuple(map(str, range(100)))])
def test_confusion_of_few_and_of_many_classes(names, tmp_path):
    """Names and numbers are written where there is room for them."""
    labels = np.arange(300) % len(names)
    pictures.save_confusion(tmp_path / "confusion.png", labels, (labels * 7) % len(names), names, "images")
    assert np.asarray(Image.open(tmp_path / "confusion.png")).shape[:2] == (780, 832)


@pytest.mark.parametrize(("number", "error"), [(0, 20.0), (1, 20.0), (30, 20.0), (30, None)])
def test_curves_with_a_panel_for_the_loss(number, error, tmp_path):
    """Also of a run that has logged nothing yet, or one line, or whose test error is not finite."""
    lines = [{"step": n, "split": "train", "loss": 2.0 - n / 30, "validation_error": 50.0 - n} for n in range(number)]
    test = {"step": number, "split": "test", "error": error, "error_stderr": error and 1.0}
    names = {"metric": "error", "trained": "loss", "label": "error in %", "unit": "nats", "title": "digits"}
    pictures.save_curves(tmp_path / "curves.png", [*lines, test], **names)
    assert np.asarray(Image.open(tmp_path / "curves.png")).shape[:2] == (780, 910)
