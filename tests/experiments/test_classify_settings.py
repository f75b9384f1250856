"""Settings of `experiments.classify`: every config, batches of few labels, the fit to data, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import resflow_jax as rf
from experiments import classify
from experiments.configs.base import DataConfig
from experiments.configs.classes import CLASS_CONFIGS, CLASS_SUMMARIES
from experiments.configs.classification import ClassifyConfig, HybridConfig, ImportedClassifyConfig
from experiments.configs.tiny import tiny
from experiments.runs.devices import own_mesh
from experiments.runs.launch import files_of
from experiments.runs.own_data import _fitted_classifier
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.labelled import Rows, load_labelled
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.models.residual_flow import flow_from_config

DIGITS = CLASS_CONFIGS["digits"]
FEW = replace(DIGITS, hybrid=HybridConfig("1/D"), labels=20, batch_size=8)


@pytest.mark.parametrize("name", CLASS_CONFIGS)
def test_every_config_and_its_tiny_mode(name):
    """Each has a summary and a network; the tiny one has the same shape and kind, and data that are at hand."""
    config, small = CLASS_CONFIGS[name], tiny(CLASS_CONFIGS[name])
    assert CLASS_SUMMARIES[name] and config == classify.COMMAND.parse([name])
    assert small == classify.COMMAND.parse([name, "--tiny"]) and small.steps == 2
    flow = nnx.eval_shape(lambda: flow_from_config(small.model, rngs=nnx.Rngs(0)))
    assert flow.event_shape == config.model.shape and flow.classes == small.model.classes
    kind = ("architecture", "coefficient", "padding", "head", "squeeze_first", "shape")
    assert [getattr(small.model, field) for field in kind] == [getattr(config.model, field) for field in kind]
    splits = load_labelled(replace(small.data, path=None))
    assert splits.shape == small.model.shape and len(splits.names) == small.model.classes


def test_no_two_runs_write_to_the_same_place():
    """The three networks of each data set differ in the bound and the architecture alone."""
    assert len({config.workdir for config in CLASS_CONFIGS.values()}) == len(CLASS_CONFIGS) == 18
    for name, found in (("vanilla", ("invertible", None)), ("standard", ("standard", None))):
        model = CLASS_CONFIGS[f"mnist_{name}"].model
        assert (model.architecture, model.coefficient) == found
        assert replace(CLASS_CONFIGS["mnist"].model, architecture=found[0], coefficient=None) == model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--model.padding 3 --hybrid.weight 1",
            "hybrid.weight: expected 0 for model.padding 3: .* not a bijection, got 1",
        ),
        ("_vanilla --hybrid.weight 1/D", "expected 0 for model.coefficient None: the blocks need not be bijections"),
        ("--model.head mixture --model.head-channels None", "expected a positive number with model.head 'mixture'"),
        ("--dropout 0.1 --hybrid.weight 1", "dropout: expected 0 beside hybrid.weight 1.0, got 0.1"),
        ("_standard --model.blocks 1 1", r"model.blocks: expected two or more in a stage of .* got \(1, 1\)"),
        ("--dropout 1", r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ("--hybrid.weight=-1", "hybrid.weight: expected 0, a positive number or '1/D', got -1"),
        ("--labels 0", "labels: expected an integer of at least 1, got 0"),
        ("--annealing 10", "annealing: expected 0 for a classifier"),
        ("--fit-lengths", "fit_lengths: expected False without a density"),
    ],
)
def test_settings_that_exclude_each_other(arguments, message, capsys):
    """They are refused before anything is read, with the reason."""
    kind = arguments.partition(" ")[0] if arguments.startswith("_") else ""
    with pytest.raises(SystemExit):
        classify.COMMAND.call(print, [f"digits{kind}", *arguments.removeprefix(kind).split()])
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", "".join(capsys.readouterr())).split())
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": replace(DIGITS.model, classes=5)}, r"model\.classes: expected 10, the classes of the data, got 5"),
        (
            {"model": replace(DIGITS.model, shape=(8, 8, 3))},
            r"model\.shape: expected \(8, 8, 1\), the shape of the images",
        ),
        ({"labels": 1348}, "labels: expected a number from 10, one for each class, to 1347, .* got 1348"),
        ({"labels": 9}, "labels: expected a number from 10"),
        ({"data": DataConfig("images")}, "data.path: expected a folder or a file of images"),
        ({"hybrid": HybridConfig(1.0), "labels": 20, "batch_size": 7}, "batch_size: expected an even number"),
    ],
)
def test_settings_that_do_not_fit_the_data(settings, message):
    """They are refused before a flow is made."""
    with pytest.raises(ValueError, match=message):
        ClassTask(replace(DIGITS, **settings))


def test_an_imported_flow_needs_a_classifier():
    """And it has no dropout."""
    settings = {name: getattr(DIGITS, name) for name in ("data", "workdir")}
    with pytest.raises(ValueError, match=r"model\.classes: expected a flow with a classifier, got 0 classes"):
        ImportedClassifyConfig(**settings, model=TorchImageConfig((8, 8, 1)))
    with pytest.raises(ValueError, match="dropout: expected 0 for an imported flow"):
        ImportedClassifyConfig(**settings, model=TorchImageConfig((8, 8, 1), classes=10), dropout=0.1)


def test_files_are_those_of_the_kind_of_run():
    """Only a run with a density has samples."""
    assert "samples.png" not in files_of(ClassTask(DIGITS)) and "confusion.png" in files_of(ClassTask(DIGITS))
    assert "samples.png" in files_of(ClassTask(FEW))


def test_half_of_each_batch_has_labels():
    """Labelled and unlabelled images take turns; the labelled ones are 20, two of each class."""
    task = ClassTask(FEW)
    seen = {}
    for (images, labels), _ in zip(task.batches(0), range(12), strict=False):
        assert images.shape == (8, 8, 8, 1) and (labels[1::2] == -1).all() and (labels[::2] >= 0).all()
        seen |= {image.tobytes(): label for image, label in zip(images[::2], labels[::2], strict=True)}
    assert len(seen) == 20 and (np.bincount(list(seen.values())) == 2).all()
    train = {image.tobytes(): label for image, label in zip(*task.splits.train, strict=True)}
    assert all(train[image] == label for image, label in seen.items())


def test_without_a_density_all_of_a_batch_has_labels():
    """The same twenty images, repeated where a batch has more."""
    task = ClassTask(replace(FEW, hybrid=HybridConfig(), batch_size=32))
    images, labels = next(task.batches(0))
    assert images.shape == (32, 8, 8, 1) and (labels >= 0).all()
    assert len({image.tobytes() for image in images}) <= 20


@pytest.mark.parametrize("config", [DIGITS, FEW], ids=["all labels", "few labels"])
def test_parts_of_batches_join(config):
    """The batches of two processes are the halves of those of one, also from a later step on."""
    task = ClassTask(replace(config, batch_size=8))
    for step in (0, 3):
        whole = next(task.batches(step))
        parts = [next(task.batches(step, part, 2)) for part in range(2)]
        for n in range(2):
            np.testing.assert_array_equal(np.concatenate([part[n] for part in parts]), whole[n])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((28, 28, 1), (True, (4, 4))),
        ((32, 32, 3), (True, (4, 4))),
        ((12, 12, 1), (True, (4, 4))),
        ((14, 14, 3), (False, (4, 4))),
        ((7, 7, 1), (False, (4,))),
        ((16, 7, 1), (False, (4,))),
    ],
)
def test_networks_for_images_of_any_size(shape, expected):
    """As many stages as the sides can be halved for; the first squeeze goes first."""
    model = _fitted_classifier(CLASS_CONFIGS["images"].model, shape, 3)
    assert (model.squeeze_first, model.blocks) == expected
    assert (model.shape, model.classes, len(model.hidden_channels)) == (shape, 3, len(model.blocks))
    of_cifar = _fitted_classifier(CLASS_CONFIGS["cifar10"].model, shape, 3)
    assert not of_cifar.squeeze_first and len(of_cifar.blocks) == min(
        3, 1 + {28: 2, 32: 5, 12: 2, 14: 1}.get(shape[1], 0)
    )


def test_images_of_your_own(tmp_path, capsys):
    """A folder with a subfolder for each class gives shape and classes; other folders and labels are refused."""
    for n in range(12):
        folder = tmp_path / "good" / "abc"[n % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 12, 3), 20 * n, np.uint8)).save(folder / f"{n}.png")
    config = classify.COMMAND.parse(["images", "--data.path", str(tmp_path / "good"), "--seed", "3"])
    assert (config.model.shape, config.model.classes) == ((8, 12, 3), 3) and config.seed == 3
    task = ClassTask(replace(config, batch_size=4))
    assert task.splits.names == ("a", "b", "c") and isinstance(task.splits.train[:2], Rows)
    small = classify.COMMAND.parse(["images", "--tiny", "--data.path", str(tmp_path / "good")])
    assert (small.model.shape, small.model.classes, small.data.path) == ((8, 12, 3), 3, Path(tmp_path / "good"))

    np.savez(tmp_path / "bad.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, -1, 0]))
    for path, message in (
        (tmp_path / "bad.npz", "path: expected labels in 0.."),
        (tmp_path / "good" / "a", "expected a subfolder of images for each class"),
        (tmp_path / "nowhere", "found nothing"),
    ):
        with pytest.raises(SystemExit):
            classify.COMMAND.call(print, ["images", "--data.path", str(path)])
        assert message in capsys.readouterr().err
    given = classify.COMMAND.parse(["images", "--data.path", str(tmp_path / "good"), "--model.classes", "5"])
    with pytest.raises(ValueError, match=r"model\.classes: expected 3, the classes of the data, got 5"):
        ClassTask(given)


def test_weights_of_the_density():
    """1/D is one over the number of values of an image."""
    assert [HybridConfig(weight).of_dim(64) for weight in (0.0, 1.0, "1/D")] == [0, 1, 1 / 64]
    assert ClassTask(FEW).density_weight == 1 / 64
    config = classify.COMMAND.parse(["digits", "--hybrid.weight", "1/D"])
    assert isinstance(config, ClassifyConfig) and config.hybrid.weight == "1/D"
    assert classify.COMMAND.parse(["digits", "--hybrid.weight", "0.5"]).hybrid.weight == 0.5
    mixture = ["--model.head", "mixture", "--model.head-channels", "None", "--hybrid.weight", "1"]
    assert isinstance(classify.COMMAND.parse(["digits", *mixture]).model, rf.ClassifierConfig)


def test_a_process_draws_on_its_own(monkeypatch):
    """Where others have some of the devices, what one process computes alone uses one device."""
    assert own_mesh().size == jax.device_count()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert own_mesh() is None
