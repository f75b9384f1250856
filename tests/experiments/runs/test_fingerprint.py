"""Data that have changed under a run are noticed by data.json, and data that were moved are recognised."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments.configs.base import DataConfig, VectorDataConfig
from experiments.runs.fingerprint import fingerprint
from experiments.runs.tasks import images, vectors
from experiments.runs.tasks.labelled import load_labelled
from experiments.runs.workdir import check_data, claim_workdir
from resflow_jax.data import images as held
from tests.experiments.tiny import TINY


def found(data, load=images.load):
    """What data are recognised by."""
    return fingerprint(SimpleNamespace(config=SimpleNamespace(data=data), splits=load(data)))


def put(folder, name, seed=0):
    """Puts an image into a folder."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)


@pytest.mark.parametrize("lazily", [False, True])
def test_folders_of_images(lazily, tmp_path, monkeypatch):
    """Another place is not noticed; another image, another order, and other pixels in memory are."""
    if lazily:
        monkeypatch.setattr(held, "_IN_MEMORY", 0)
    folder = tmp_path / "images"
    for n in range(20):
        put(folder, f"{n}.bmp", seed=n)
    data = DataConfig("images", path=folder)
    first = found(data)
    assert [first[split]["number"] for split in ("train", "validation", "test")] == [17, 1, 2]
    assert ("files" in first) is lazily
    data = dataclasses.replace(data, path=folder.rename(tmp_path / "moved"))
    assert found(data) == first == json.loads(json.dumps(first))
    put(data.path, "3.bmp", seed=99)
    changed = found(data)
    assert (changed == first) is lazily, "images that are not read are known by their names and sizes"
    (data.path / "3.bmp").rename(data.path / "last.bmp")
    assert found(data) != changed
    put(data.path, "3.bmp")
    assert found(data)["train"]["number"] == 18


def test_labels_and_vectors(tmp_path):
    """Other labels of the same images are noticed, and another number of a vector."""
    pixels, labels = np.full((40, 8, 8), 255, np.uint8), np.arange(40) % 2
    tables = []
    for name, classes in (("a", labels), ("b", 1 - labels)):
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=classes)
        tables.append(found(DataConfig("images", path=tmp_path / f"{name}.npz"), load_labelled))
    differing = {key for key in tables[0]["train"] if tables[0]["train"][key] != tables[1]["train"][key]}
    assert differing == {"sha256 of labels"}
    numbers = np.random.default_rng(0).normal(size=(40, 2))
    np.save(tmp_path / "rows.npy", numbers)
    settings = VectorDataConfig(tmp_path / "rows.npy")
    first = found(settings, vectors.load)
    np.save(tmp_path / "rows.npy", numbers * [1, 1.001])
    assert found(settings, vectors.load) != first


def test_data_of_packages():
    """They cannot change, but for rounding of machines: nothing is written."""
    for data in (DataConfig("digits"), DataConfig("photographs"), VectorDataConfig(), "rings"):
        assert fingerprint(SimpleNamespace(config=SimpleNamespace(data=data))) == {}


def test_claims_on_other_data(tmp_path):
    """A run with results goes on with its own data alone, wherever they are; the message says what differs."""
    config = dataclasses.replace(TINY, data=DataConfig("images", path=Path("old")), workdir=tmp_path)
    moved = dataclasses.replace(config, data=DataConfig("images", path=Path("new")))
    own, other = {"train": {"number": 9}}, {"train": {"number": 8}}
    claim_workdir(tmp_path, config, other)
    claim_workdir(tmp_path, config, own)  # nothing was trained on the first
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    claim_workdir(tmp_path, moved, own)
    with pytest.raises(
        ValueError, match=r"data: expected those that the run in .* got others in new; .*\n  train.number: 9 there, 8 n"
    ):
        claim_workdir(tmp_path, moved, other)
    with pytest.raises(ValueError, match=r"another config.*\n  data\.path: 'new' there, 'old' now"):
        claim_workdir(tmp_path, config)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(ValueError, match=r"data: expected .* in .*data\.json, could not read it"):
        check_data(tmp_path, moved.data, own)


def test_a_run_of_before(tmp_path):
    """Without data.json a run goes on with what is at its path, and with nothing else; the file is then written."""
    config = dataclasses.replace(TINY, data=DataConfig("images", path=Path("old")), workdir=tmp_path)
    claim_workdir(tmp_path, config)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    moved = dataclasses.replace(config, data=DataConfig("images", path=Path("new")))
    check_data(tmp_path, config.data, {"train": {"number": 9}})
    with pytest.raises(ValueError, match=r"another config.*\n  data\.path: 'old' there, 'new' now"):
        claim_workdir(tmp_path, moved, {"train": {"number": 9}})
    claim_workdir(tmp_path, config, {"train": {"number": 9}})
    assert json.loads((tmp_path / "data.json").read_text()) == {"train": {"number": 9}}
