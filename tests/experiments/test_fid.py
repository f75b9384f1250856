"""The Frechet distance: Gaussians whose distance is known, the features, a tiny run, and bad input.

What computes a distance needs torch-fidelity; the rest runs without.
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest

from experiments import fid
from experiments.fid import FidConfig
from experiments.runs import sampling
from resflow_jax.data.images import ImageSplits
from tests.experiments import tiny


@pytest.fixture(scope="module")
def package():
    """Skips the tests that compute distances if torch-fidelity is not installed."""
    return pytest.importorskip("torch_fidelity", reason="needs the extra fid: pip install 'resflow_jax[fid]'")


def frechet(m, a, n, b):
    """|m - n|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)), by symmetric eigenvalues alone."""
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    of_product = np.linalg.eigvalsh(root @ b @ root)
    return np.sum((m - n) ** 2) + np.trace(a) + np.trace(b) - 2 * np.sum(np.sqrt(np.maximum(of_product, 0)))


def gaussian(seed, dimension):
    """A mean and a covariance that is far from diagonal."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dimension, dimension))
    return rng.normal(size=dimension), factor @ factor.T / dimension + 0.1 * np.eye(dimension)


def diagonal(seed, dimension):
    """A mean and a diagonal covariance."""
    mean, covariance = gaussian(seed, dimension)
    return mean, np.diag(np.diag(covariance))


def of_statistics(package, m, a, n, b):
    """The distance that torch-fidelity computes from means and covariances."""
    first, second = ({"mu": mean, "sigma": covariance} for mean, covariance in ((m, a), (n, b)))
    return package.metric_fid.fid_statistics_to_metric(first, second, False)[package.KEY_METRIC_FID]


@pytest.mark.parametrize("dimension", [2, 5, 40])
def test_formula_on_general_gaussians(package, dimension):
    """Covariances that do not commute, as an independent computation has it; in two dimensions also in closed form."""
    (m, a), (n, b) = gaussian(0, dimension), gaussian(1, dimension)
    assert np.abs(a @ b - b @ a).max() > 0.1
    found = of_statistics(package, m, a, n, b)
    np.testing.assert_allclose(found, frechet(m, a, n, b), rtol=1e-10)
    np.testing.assert_allclose(found, of_statistics(package, n, b, m, a), rtol=1e-10)
    if dimension == 2:  # (tr M^(1/2))^2 = tr M + 2 det(M)^(1/2)
        root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
        np.testing.assert_allclose(found, np.sum((m - n) ** 2) + np.trace(a + b) - 2 * root, rtol=1e-10)


def test_formula_on_diagonal_gaussians(package):
    """For standard deviations s, t it is |m - n|^2 + |s - t|^2; between equal Gaussians it is 0."""
    (m, a), (n, b) = diagonal(0, 6), diagonal(1, 6)
    expected = np.sum((m - n) ** 2) + np.sum((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2)
    np.testing.assert_allclose(of_statistics(package, m, a, n, b), expected, rtol=1e-10)
    np.testing.assert_allclose(of_statistics(package, m, a, n, a), np.sum((m - n) ** 2), rtol=1e-10)
    assert abs(of_statistics(package, m, a, m, a)) < 1e-10


def images_of(mean, covariance, number, seed):
    """Images [number, 2, 2, 3] of bytes, draws of a Gaussian in [0, 1], and the pixels [number, 12] in this order."""
    x = np.random.default_rng(seed).multivariate_normal(mean, covariance, number)
    images = np.rint(255 * x)
    assert images.min() >= 0 and images.max() <= 255
    return images.astype(np.uint8).reshape(-1, 2, 2, 3), images / 255


@pytest.mark.parametrize("of", [gaussian, diagonal])
def test_distance_of_large_samples(package, of):
    """Through images and features, it is that of the samples' own statistics, and near that of the Gaussians."""
    (m, a), (n, b) = ((0.5 + 0.02 * mean, 0.004 * covariance) for mean, covariance in (of(0, 12), of(1, 12)))
    (first, x), (second, y) = images_of(m, a, 10_000, 2), images_of(n, b, 8_000, 3)
    found = fid.frechet_distance(first, second, "pixels")
    sampled = frechet(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T))
    np.testing.assert_allclose(found, sampled, rtol=1e-8)
    np.testing.assert_allclose(found, frechet(m, a, n, b), rtol=0.05)


def random_images(seed, *shape):
    """Bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_equal_images_have_no_distance(package):
    """In any order; one grey level more everywhere is a distance of 192 / 255^2."""
    images = random_images(0, 300, 8, 8, 3) // 2
    assert abs(fid.frechet_distance(images, images[::-1].copy(), "pixels")) < 1e-5
    np.testing.assert_allclose(fid.frechet_distance(images, images + 1, "pixels"), 192 / 255**2, atol=1e-5)


def test_pixels_are_means_on_a_grid(package):
    """Images twice as wide and high are as far apart; a grey image counts as three equal channels."""
    first, second = random_images(0, 60, 8, 8, 3) // 2 + 60, random_images(1, 50, 8, 8, 3) // 2
    expected = fid.frechet_distance(first, second, "pixels")
    larger, other = (images.repeat(2, axis=1).repeat(2, axis=2) for images in (first, second))
    larger[:, ::2] += 50
    larger[:, 1::2] -= 50  # means stay
    np.testing.assert_allclose(fid.frechet_distance(larger, other, "pixels"), expected, rtol=1e-6)
    larger[:, 1::2] -= 10
    assert abs(fid.frechet_distance(larger, other, "pixels") - expected) > 0.01
    x, y = (images[:, :2, :2, :1] for images in (first, second))
    in_one = [f(images.reshape(-1, 4) / 255) for images in (x, y) for f in (lambda v: v.mean(0), lambda v: np.cov(v.T))]
    np.testing.assert_allclose(fid.frechet_distance(x, y, "pixels"), 3 * frechet(*in_one), rtol=1e-6)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The work directory of a run on grey images of 17 levels."""
    workdir = tmp_path_factory.mktemp("run")
    tiny.save_run(replace(tiny.DIGITS, workdir=workdir))
    return workdir


def test_run(package, run_dir, monkeypatch, capsys):
    """What is written and printed, and that the distances are those between these images."""
    pairs, distance = [], fid.frechet_distance
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: pairs.append(args) or distance(*args))
    result = fid.run(FidConfig(run_dir, number=20, features="pixels", batch_size=20))
    assert json.loads((run_dir / "fid" / "fid.json").read_text()) == {**result, "run": str(run_dir)}
    assert result["features"] == "pixels" and result["against"] == "train" and result["step"] == 2
    assert (result["samples"], result["images"], result["floor"]["images"]) == (20, 20, 20)
    assert result["torch_fidelity"] == package.__version__ and result["unconverged"] == 0
    (train, test, *_), (samples, images, *_) = pairs
    np.testing.assert_array_equal(images, train)
    assert {part.shape for part in (train, test, samples)} == {(20, 8, 8, 1)}
    assert result["distance"] == distance(samples, images, "pixels") > result["floor"]["distance"] > 0
    assert result["floor"]["distance"] == distance(train, test, "pixels")
    saved = fid.saved_flow(run_dir)
    z = sampling.base_latents(saved.flow, 0, 1.0)(np.arange(20))
    np.testing.assert_array_equal(samples, fid.to_bytes(np.clip(saved.flow.inverse(z), 0, 1), 17))
    printed = capsys.readouterr().out
    assert "NO MORE IMAGES, 20, THAN FEATURES, 192" in printed and "20 training to as many test images" in printed
    assert "all converged" in printed and "weights of step 2" in printed


def test_chosen_images():
    """Distinct ones of the split, by the seed, as the bytes that samples of these levels are."""
    images = np.arange(16, dtype=np.uint8).reshape(-1, 1, 1, 1)
    data = ImageSplits(images, images[:1], images[:3], levels=16)
    chosen = fid.chosen_images(data, "train", 10, seed=0)
    assert chosen.dtype == np.uint8 and len(np.unique(chosen)) == 10 and (chosen % 17 == 0).all()
    np.testing.assert_array_equal(fid.chosen_images(data, "train", 10, seed=0), chosen)
    assert (fid.chosen_images(data, "train", 10, seed=1) != chosen).any()
    assert sorted(fid.chosen_images(data, "test", 10, seed=0).ravel()) == [0, 17, 34]


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_bytes_of_images_are_those_of_levels(levels):
    """Level k is k 255 / (levels - 1), rounded."""
    images = np.arange(levels, dtype=np.uint8).reshape(-1, 1, 1, 1)
    chosen = fid.chosen_images(ImageSplits(images, images, images, levels), "test", levels, seed=0)
    np.testing.assert_array_equal(np.sort(chosen.ravel()), np.rint(np.arange(levels) * 255 / (levels - 1)))


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((2, 2, 2), (9, 9), r"images of 1 or 3 channels, got shape \(2, 2, 2\)"),
        ((2, 2, 3), (9, 1), "at least 2 training and 2 test images, got 9 and 1"),
    ],
)
def test_data_that_have_no_distance(shape, numbers, message):
    """The error names what came."""
    train, test = (np.zeros((number, *shape), np.uint8) for number in numbers)
    with pytest.raises(ValueError, match=f"run_dir: expected a run on {message}"):
        fid.check_splits(ImageSplits(train, test, test, 256))


def test_runs_on_vectors_are_refused(monkeypatch, tmp_path):
    """The error comes before anything is written."""
    monkeypatch.setattr(fid, "needed_package", lambda: None)
    monkeypatch.setattr(fid, "saved_flow", lambda *_: SimpleNamespace(task=SimpleNamespace(name="power")))
    with pytest.raises(ValueError, match=r"run_dir: expected a run on images, got one on vectors \(power\)"):
        fid.run(FidConfig(tmp_path))
    assert not (tmp_path / "fid").exists()


def test_few_images_are_pointed_out():
    """As many as features are too few: their covariance has one rank less."""
    result = {"distance": 1.0, "features": "inception", "against": "test", "temperature": 1.0, "step": 7}
    result |= {"images": 2048, "samples": 5000, "floor": {"distance": 0.5, "images": 2048}}
    assert "NO MORE IMAGES, 2048, THAN FEATURES, 2048" in fid.rows(result)["bias"]
    assert "NO MORE" not in fid.rows({**result, "images": 2049})["bias"]


def test_missing_package(monkeypatch, tmp_path):
    """The error comes before anything is read, and says how to install it."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"needs the extra fid, pip install 'resflow_jax\[fid\]'"):
        fid.run(FidConfig(tmp_path))


def test_weights_that_cannot_be_fetched(package, monkeypatch):
    """The message has where they are and how to give them."""

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(package.feature_extractor_inceptionv3, "load_state_dict_from_url", fail)
    images = random_images(0, 2, 8, 8, 3)
    with pytest.raises(OSError, match=r"https://.*\.pth and name it, --inception-weights PATH.*no network"):
        fid.frechet_distance(images, images, "inception")


def test_weights_from_a_file(package, monkeypatch, tmp_path):
    """They reach the Inception network; nothing is fetched."""
    asked = {}
    monkeypatch.setattr(
        package, "calculate_metrics", lambda **kwargs: asked.update(kwargs) or {package.KEY_METRIC_FID: 3.0}
    )
    images = random_images(0, 4, 8, 6, 1)
    assert fid.frechet_distance(images, images[:2], "inception", tmp_path / "weights.pth") == 3.0
    assert asked["feature_extractor_weights_path"] == str(tmp_path / "weights.pth")
    assert asked["feature_extractor"] == "inception-v3-compat" and (len(asked["input1"]), len(asked["input2"])) == (
        4,
        2,
    )
    np.testing.assert_array_equal(asked["input1"][3], np.repeat(images[3].transpose(2, 0, 1), 3, axis=0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"number": 1}, "number: expected an integer of at least 2, got 1"),
        ({"against": "validation"}, "against: expected one of train, test; got 'validation'"),
        ({"features": "vgg"}, "features: expected one of inception, pixels; got 'vgg'"),
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message, tmp_path):
    """Each is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        FidConfig(tmp_path, **setting)


def test_weights_that_are_not_there(tmp_path):
    """Neither a missing file nor weights of a network that is not used."""
    with pytest.raises(ValueError, match=r"inception_weights: expected a file, got .*none\.pth"):
        FidConfig(tmp_path, inception_weights=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="inception_weights: expected None with pixels"):
        FidConfig(tmp_path, features="pixels", inception_weights=tmp_path)


def test_command_line(monkeypatch, tmp_path, capsys):
    """The run's directory stands by itself; the settings reach the config; other features are refused."""
    configs = []
    monkeypatch.setattr(fid, "run", configs.append)
    for name in ("use_xla_flags", "use_all_cores"):
        monkeypatch.setattr(fid, name, lambda: None)
    weights = tmp_path / "weights.pth"
    weights.touch()
    fid.main([str(tmp_path), "--number", "9", "--against", "test", "--features", "pixels", "--temperature", "0.7"])
    fid.main([str(tmp_path), "--inception-weights", str(weights), "--seed", "3", "--weights", "latest"])
    assert configs[0] == FidConfig(tmp_path, number=9, against="test", features="pixels", temperature=0.7)
    assert configs[1] == FidConfig(tmp_path, inception_weights=weights, seed=3, weights="latest")
    with pytest.raises(SystemExit):
        fid.main([str(tmp_path), "--features", "vgg"])
    assert "vgg" in capsys.readouterr().err
