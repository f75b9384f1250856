"""Samples of a saved run, tiny: files, reproducibility, temperature, interpolation, and bad input."""

import errno
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import sample
from experiments.runs import pictures, sampling
from experiments.sample import SampleConfig
from resflow_jax import Anderson, ResidualFlow
from resflow_jax.data.images import to_unit_interval
from tests.experiments import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that is loaded once, and whose inverse is compiled once for each size of batches."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("saved_flow", "decoder"):
            patch.setattr(sample, name, lru_cache(getattr(sample, name)))
        workdir = tmp_path_factory.mktemp("run")
        tiny.save_run(replace(tiny.DIGITS, workdir=workdir))
        yield workdir


@pytest.fixture(scope="module")
def saved(run_dir):
    return sample.saved_flow(run_dir, "best")


@pytest.fixture(scope="module")
def drawn(run_dir):
    """Five samples in batches of four, in the default place."""
    return sample.run(SampleConfig(run_dir, number=5, batch_size=4))


def test_files(run_dir, drawn):
    """All hold the samples that are returned, as bytes that stand for the levels of the data."""
    out = run_dir / "sampling"
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "samples.npz") as file:
        assert list(file) == ["images"]
        images = file["images"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, drawn)
    assert sorted(path.name for path in (out / "samples").iterdir()) == [".number", *(f"{n:05}.png" for n in range(5))]
    for n, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(out / "samples" / f"{n:05}.png")), image[..., 0])
    assert set(np.unique(images)) <= set(np.rint(np.arange(17) * 255 / 16)) and len(np.unique(images)) > 5


def test_samples_depend_on_seed_and_number_alone(run_dir, drawn, saved, tmp_path):
    """Not on how many there are, on batches or on earlier calls; they are f^-1 of the latents."""
    config = SampleConfig(run_dir, number=3, batch_size=2, format=("npz",), workdir=tmp_path)
    np.testing.assert_array_equal(sample.run(config), drawn[:3])
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["images"], drawn[:3])
    again = run_dir / "sampling" / "samples.npz", tmp_path / "again" / "samples.npz"
    sample.run(SampleConfig(run_dir, number=5, batch_size=4, workdir=tmp_path / "again"))
    assert again[0].read_bytes() == again[1].read_bytes()
    assert (sample.run(replace(config, seed=1)) != drawn[:3]).any((1, 2, 3)).all()
    z = sampling.base_latents(saved.flow, 0, 1.0)(jnp.arange(5))
    x = saved.flow.inverse(z)
    np.testing.assert_array_equal(drawn, sampling.to_bytes(np.clip(x, 0, 1), 17))


def test_temperature(run_dir, saved, tmp_path):
    """At zero every sample is f^-1(0); otherwise latents are Gaussian with that deviation."""
    config = SampleConfig(run_dir, number=3, batch_size=4, temperature=0.0, format=(), workdir=tmp_path)
    zero = sampling.to_bytes(np.clip(saved.flow.inverse(jnp.zeros((1, 64))), 0, 1), 17)
    np.testing.assert_array_equal(sample.run(config), np.tile(zero, (3, 1, 1, 1)))
    cold, hot = (sampling.base_latents(saved.flow, 0, t)(jnp.arange(400)) for t in (0.5, 2.0))
    np.testing.assert_allclose(4 * cold, hot, rtol=1e-12)
    assert abs(hot.std() - 2) < 0.05 and abs(hot.mean()) < 0.05
    assert np.abs(np.corrcoef(hot[:-1].ravel(), hot[1:].ravel())[0, 1]) < 0.05  # each has a key of its own


def test_ends_of_an_interpolation_are_the_reconstructions(run_dir, saved, tmp_path, monkeypatch, capsys):
    """In eleven frames, decoded in batches; the middle is f^-1 of the middle of the great circle."""
    strips = []
    monkeypatch.setattr(pictures, "save_strip", lambda path, *strip: strips.append((path, *strip)))
    config = SampleConfig(run_dir, number=1, batch_size=4, interpolate=(2, 7), format=(), workdir=tmp_path)
    sample.run(config)
    ((path, frames, labels, title),) = strips
    assert path == tmp_path / "interpolation.png" and "spherical" in title and "2 to 7" in title
    assert frames.shape == (11, 8, 8, 1) and (labels[0], labels[5], labels[-1]) == ("0", "0.5", "1")
    pair = to_unit_interval(saved.task.splits.test[np.array([2, 7])], 17)
    np.testing.assert_allclose(frames[[0, -1]], pair, atol=1e-9)
    z = np.asarray(saved.flow(pair))
    np.testing.assert_allclose(frames[[0, -1]], saved.flow.inverse(jnp.asarray(z)), atol=1e-12)
    cosine = z[0] @ z[1] / np.linalg.norm(z[0]) / np.linalg.norm(z[1])
    middle = (z[0] + z[1]) / np.sqrt(2 * (1 + cosine))
    np.testing.assert_allclose(frames[5], np.clip(saved.flow.inverse(jnp.asarray(middle)[None])[0], 0, 1), atol=1e-9)
    assert "2 to 7, spherical" in capsys.readouterr().out


def test_interpolation_is_drawn(run_dir, tmp_path):
    """The picture itself, beside no other files than the grid."""
    sample.run(SampleConfig(run_dir, number=1, batch_size=4, interpolate=(0, 0), format=(), workdir=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interpolation.png", "samples.png"]
    assert (tmp_path / "interpolation.png").read_bytes().startswith(b"\x89PNG")


def test_great_circles():
    """Ends to the last bit, constant length and speed; between parallel points a straight line."""
    t = jnp.linspace(0, 1, 5)
    start, end = jax.random.normal(jax.random.key(0), (2, 10))
    points = sample.spherical(start, end, t)
    np.testing.assert_array_equal(points[0], start)
    np.testing.assert_array_equal(points[-1], end)
    unit = sample.spherical(jnp.array([2.0, 0]), jnp.array([0, 2.0]), t)
    angle = t * np.pi / 2
    np.testing.assert_allclose(unit, 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=1e-12)
    np.testing.assert_allclose(sample.spherical(start, 3 * start, t), start[None] * (1 + 2 * t)[:, None], rtol=1e-7)
    np.testing.assert_array_equal(sample.spherical(0 * start, 0 * start, t), np.zeros((5, 10)))


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_bytes_stand_for_levels(levels):
    """Level k is the cell [k, k + 1) / L, and levels are spread over 0..255; 1 belongs to the last."""
    k = np.arange(levels)
    expected = np.rint(k * 255 / (levels - 1))
    for inside in (0.0, 0.5, 0.99):
        found = sampling.to_bytes((k + inside) / levels, levels)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
    assert sampling.to_bytes(np.ones(1), levels) == 255


def test_formats(tmp_path):
    """Only the files asked for; those of an earlier call go, other people's stay; colours are kept."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    sample.write_images(tmp_path, images, SampleConfig(tmp_path, format=("png",)))
    assert not (tmp_path / "samples.npz").exists()
    (tmp_path / "samples" / "mine.png").write_text("")
    sample.write_images(tmp_path, images[1:2], SampleConfig(tmp_path, format=("png",)))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [".number", "00000.png", "mine.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "00000.png")), images[1])


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """Pictures of an earlier call stay until those of the next one are whole; the next call knows all as its own."""
    images, config = np.zeros((3, 4, 4, 1), np.uint8), SampleConfig(tmp_path, number=3, format=("png",))
    sample.write_images(tmp_path, images, config)
    before = (tmp_path / "samples" / "00001.png").read_bytes()
    save = pictures.Image.Image.save

    def full(image, path, *arguments):
        if "00001" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pictures.Image.Image, "save", full)
        patch.setattr(pictures, "save_images", lambda *_, **__: None)
        with pytest.raises(OSError, match=r"could not write it, earlier files are intact.*00001\.png"):
            sample.write_images(tmp_path, images[:2] + 9, config)
    assert (tmp_path / "samples" / "00001.png").read_bytes() == before
    assert sample.earlier_number(tmp_path, config) == 3 and (tmp_path / "samples" / "00002.png").exists()
    sample.write_images(tmp_path, images[:2] + 9, replace(config, number=2))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [".number", "00000.png", "00001.png"]


def test_pictures_of_the_user_are_left_alone(tmp_path):
    """Of other names they stay; of a name that would be written they are an error."""
    images, config = np.zeros((2, 4, 4, 1), np.uint8), SampleConfig(tmp_path, number=2, format=("png",))
    (tmp_path / "samples").mkdir()
    for name in ("12345.png", "00001.png"):
        (tmp_path / "samples" / name).write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"workdir: expected one without pictures of these names, got .*00001\.png"
    ):
        sample.write_images(tmp_path, images, config)
    (tmp_path / "samples" / "00001.png").rename(tmp_path / "elsewhere.png")
    sample.write_images(tmp_path, images, config)
    sample.write_images(tmp_path, images[:1], config)
    (tmp_path / "samples" / "00001.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"got .*00001\.png"):
        sample.write_images(tmp_path, images, config)
    (tmp_path / "samples" / "00001.png").unlink()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [".number", "00000.png", "12345.png"]
    assert (tmp_path / "samples" / "12345.png").read_text() == "mine"


def test_unconverged_solves_are_reported(run_dir, tmp_path, monkeypatch, capsys):
    """How many and which, of samples and of interpolations; the files are written all the same."""
    inverse = ResidualFlow.inverse
    monkeypatch.setattr(
        ResidualFlow, "inverse", lambda flow, z, **kwargs: inverse(flow, z, solver=Anderson(max_iterations=1), **kwargs)
    )
    sample.run(SampleConfig(run_dir, number=3, batch_size=3, interpolate=(0, 1), format=("npz",), workdir=tmp_path))
    printed = capsys.readouterr().out
    assert "3 of 3 DID NOT CONVERGE: 00000, 00001, 00002\n" in printed and "11 of 11 DID NOT CONVERGE" in printed
    assert (tmp_path / "samples.npz").exists()


def test_what_is_said_of_convergence():
    """All, or the numbers of those that did not, the first ten."""
    assert sampling.convergence(np.ones(4, bool)) == "all converged"
    assert sampling.convergence(np.array([True, False, True, False])) == "2 of 4 DID NOT CONVERGE: 00001, 00003"
    assert sampling.convergence(np.zeros(12, bool)).endswith("00008, 00009, ...")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"number": 0}, "number: expected an integer of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message, tmp_path):
    """Each is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        SampleConfig(tmp_path, **setting)


@pytest.mark.parametrize("index", [300, -1])
def test_images_that_are_not_there(run_dir, tmp_path, index):
    """Their number is refused before anything is written."""
    with pytest.raises(ValueError, match=rf"interpolate: expected numbers of test images, 0\.\.299, got {index}"):
        sample.run(SampleConfig(run_dir, interpolate=(0, index), workdir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_command_line(monkeypatch, tmp_path, capsys):
    """The run's directory stands by itself; one or two formats; others are refused."""
    configs = []
    monkeypatch.setattr(sample, "run", configs.append)
    for name in ("use_xla_flags", "use_all_cores"):
        monkeypatch.setattr(sample, name, lambda: None)
    sample.main([str(tmp_path), "--number", "9", "--temperature", "0.7", "--seed", "3", "--format", "png"])
    sample.main([str(tmp_path), "--interpolate", "4", "5", "--workdir", "out", "--weights", "latest"])
    assert configs[0] == SampleConfig(tmp_path, number=9, temperature=0.7, seed=3, format=("png",))
    assert configs[1].interpolate == (4, 5) and configs[1].format == ("png", "npz")
    assert (str(configs[1].workdir), configs[1].weights) == ("out", "latest")
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path), "--format", "jpg"])
    assert "jpg" in capsys.readouterr().err
