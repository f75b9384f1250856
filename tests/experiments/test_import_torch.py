"""A checkpoint of the PyTorch implementation as a run: its flow, its settings, what goes on with it, and bad input."""

import argparse
import json
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from experiments import evaluate, import_torch, resume
from experiments.configs import CONFIGS
from experiments.configs.base import DataConfig, DensityConfig, EvaluationConfig
from experiments.configs.classification import ImportedClassifyConfig
from experiments.evaluate import EvaluateConfig
from experiments.import_torch import ImportConfig
from experiments.runs import launch
from experiments.runs.saved import saved_config, saved_flow
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.subset import subset
from experiments.runs.workdir import claim_workdir, write_atomically
from resflow_jax.data.embedded import load_digits
from resflow_jax.data.images import to_unit_interval
from resflow_jax.interop.torch.files import read_torch_file
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.interop.torch.writer import write_torch_file
from resflow_jax.io.config_json import as_json
from resflow_jax.models.residual_flow import flow_from_config
from tests.experiments import tiny
from tests.paths import FIXTURES


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run imported from a file with other averages than weights."""
    directory = tmp_path_factory.mktemp("import")
    config = replace(tiny.DIGITS.model, preactivation="all")
    raw, average = (rf.ResidualFlow(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    raw.initialize(jax.random.uniform(jax.random.key(0), (8, 8, 8, 1)))
    rf.save_torch_checkpoint(raw, directory / "model.pth", average=average)
    settings = ImportConfig(directory / "model.pth", directory / "run", data=DataConfig("digits"), steps=2)
    return import_torch.run(settings)


def test_the_flow_of_the_run_is_that_of_the_file(run_dir, capsys):
    """The flow has the averaged weights; the state that is resumed has the raw ones."""
    saved = saved_flow(run_dir)
    expected = rf.load_torch_checkpoint(run_dir.parent / "model.pth")
    x = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    np.testing.assert_allclose(saved.flow(x), expected(x), rtol=1e-6, atol=1e-6)
    assert saved.step == 0 and saved.config.model == expected.config
    raw = rf.load_torch_checkpoint(run_dir.parent / "model.pth", weights="raw")
    state = import_torch.imported_state(saved.config, raw, expected)
    for found, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(nnx.state(raw, nnx.Param)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.abs(np.asarray(raw(x) - expected(x))).max() > 0.1


def test_it_goes_on(run_dir, monkeypatch):
    """Two steps from the imported weights, by `experiments.resume`, validated and judged at the end."""
    monkeypatch.setattr(resume, "use_xla_flags", lambda: None)
    monkeypatch.setattr(launch, "use_all_cores", lambda number: None)
    judged = EvaluationConfig(estimator=rf.Roulette(), draws=1, examples=20, every=2)
    config = replace(saved_config(run_dir), evaluation=judged, batch_size=8)
    write_atomically(run_dir / "config.json", json.dumps(as_json(config)))
    with pytest.warns(RuntimeWarning, match="infinite variance"):  # the law of the authors' code, as in the file
        resume.main([str(run_dir)])
    assert (run_dir / "samples.png").exists()
    assert saved_flow(run_dir).step == 2, "the validated weights are better than imported ones, which never were"


def test_the_settings_are_those_of_the_file(tmp_path):
    """The settings of the authors' own files, for images and toys, are imported."""
    for name, data in (("mnist_tiny", DataConfig("digits")), ("toy2d", DataConfig(""))):
        path = FIXTURES / f"reference_{name}.pth"
        args = read_torch_file(path)["args"]
        flow = rf.load_torch_checkpoint(path, norms="stored")
        config = import_torch.run_config(args, flow, ImportConfig(path, tmp_path / name, data=data))
        assert config.model == flow.config and config.workdir == tmp_path / name
        if name == "toy2d":
            assert config.data == args.data and config.batch_size == args.batch_size
            assert (config.optimizer.learning_rate, config.optimizer.warmup) == (args.lr, 0)
            assert config.optimizer.schedule == "constant" and config.annealing == args.annealing_iters
        else:
            assert config.data == DataConfig("digits", bits=8)
            of_file = import_torch.run_config(args, flow, ImportConfig(path, tmp_path, data=DataConfig("", dir="here")))
            assert of_file.data == replace(CONFIGS["mnist"].data, dir="here")
            with pytest.raises(ValueError, match=r"data\.bits: expected 8, as in the file, got 5"):
                import_torch.run_config(args, flow, ImportConfig(path, tmp_path, data=DataConfig("", bits=5)))
            assert config.optimizer.learning_rate == args.lr
            assert config.batch_size == args.batchsize and config.optimizer.warmup == args.warmup_iters
            assert isinstance(config.estimator.length, rf.Poisson) and config.estimator.probe == "gaussian"
            args.annealing_iters = 20
            short = import_torch.run_config(args, flow, ImportConfig(path, tmp_path, data=data, steps=10))
            assert (short.steps, short.annealing) == (10, 10)
            with_name = import_torch.run_config(args, flow, ImportConfig(path, tmp_path))
            assert with_name.data == CONFIGS["mnist"].data


def test_a_file_with_a_classifier_becomes_a_run_of_one(tmp_path):
    """The weight of the density is that of the file's task; the config is read back; other classes are named."""
    path = FIXTURES / "torch_hybrid.pth"
    flow = rf.load_torch_checkpoint(path, "raw", norms="stored")
    args = read_torch_file(path)["args"]
    weights = {}
    for task, scale_dim in (("hybrid", False), ("hybrid", True), ("classification", False)):
        args.task, args.scale_dim = task, scale_dim
        config = import_torch.run_config(args, flow, ImportConfig(path, tmp_path / "run"))
        weights[task, scale_dim] = config.hybrid.weight
        assert type(config) is ImportedClassifyConfig and import_torch.has_density(config) == (task == "hybrid")
    assert weights == {("hybrid", False): 1.0, ("hybrid", True): "1/D", ("classification", False): 0.0}
    assert type(config.model) is TorchImageConfig and config.model.classes == 10 and config.data.name == "cifar10"
    claim_workdir(tmp_path / "run", config)
    assert saved_config(tmp_path / "run") == config
    made = nnx.eval_shape(lambda: flow_from_config(config.model, rngs=nnx.Rngs(0)))
    shapes = [jax.tree.map(jnp.shape, nnx.state(found)) for found in (made, flow)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1]) and type(made) is type(flow)
    photographs = replace(config, data=DataConfig("photographs", size=16))
    with pytest.raises(ValueError, match=r"model\.classes: expected 2, the classes of the data, got 10"):
        ClassTask(photographs)
    del args.task
    assert type(import_torch.run_config(args, flow, ImportConfig(path, tmp_path))) is DensityConfig


def test_a_classifier_is_evaluated_and_goes_on(tmp_path, monkeypatch):
    """The logits are those of the file's classifier; two steps train classes and density together."""
    small = replace(tiny.DIGITS.model, preactivation="all")
    model = TorchImageConfig(
        **{f.name: getattr(small, f.name) for f in fields(small) if f.name != "block"},
        classes=10,
        classifier_channels=3,
    )
    flow = flow_from_config(model, rngs=nnx.Rngs(0))
    flow.initialize(jax.random.uniform(jax.random.key(0), (8, 8, 8, 1)))
    rf.save_torch_checkpoint(flow, tmp_path / "model.pth")
    settings = ImportConfig(tmp_path / "model.pth", tmp_path / "run", data=DataConfig("digits"), steps=2)
    run_dir = import_torch.run(settings)
    config = saved_config(run_dir)
    assert config.hybrid.weight == 1.0 and config.model.classes == 10
    judged = EvaluationConfig(estimator=rf.Truncated(2), draws=1, examples=20, every=2)
    config = replace(config, evaluation=judged, estimator=rf.Truncated(2), batch_size=8)
    write_atomically(run_dir / "config.json", json.dumps(as_json(config)))
    found = evaluate.run(EvaluateConfig(run_dir))
    images = subset(load_digits().test, 20)
    expected = rf.load_torch_checkpoint(tmp_path / "model.pth").logits(to_unit_interval(images, 17))
    with np.load(run_dir / "evaluation" / "scores.npz") as scores:
        np.testing.assert_allclose(scores["test_logits"], expected, rtol=1e-5, atol=1e-6)
    assert found["step"] == 0 and found["robustness"] is None and np.isfinite(found["test"]["bits_per_dim"])
    monkeypatch.setattr(resume, "use_xla_flags", lambda: None)
    monkeypatch.setattr(launch, "use_all_cores", lambda number: None)
    resume.main([str(run_dir)])
    assert (run_dir / "samples.png").exists() and (run_dir / "confusion.png").exists()
    assert saved_flow(run_dir).step == 2


def test_bad_input(run_dir, tmp_path, monkeypatch, capsys):
    """A directory that holds a run stays as it is; nothing is written for a file that is no checkpoint."""
    with pytest.raises(FileExistsError, match=r"workdir: expected a directory without a run, got .* with checkpoints"):
        import_torch.run(ImportConfig(run_dir.parent / "model.pth", run_dir))
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pth"):
        import_torch.run(ImportConfig(tmp_path / "text.pth", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    args = argparse.Namespace(task="hybrid", wd=0.0, dropout=0.1, optimizer="rmsprop", scheduler=False)
    assert import_torch.not_carried_over(args) == ["dropout=0.1", "optimizer=rmsprop"]
    args.annealing_iters = 7
    assert "annealing_iters=7" in import_torch.not_carried_over(args)
    args.task = "density"
    assert "annealing_iters=7" not in import_torch.not_carried_over(args)
    with pytest.raises(ValueError, match="steps: expected"):
        ImportConfig(tmp_path / "text.pth", tmp_path / "run", steps=0)
    monkeypatch.setattr(resume, "use_xla_flags", lambda: None)
    with pytest.raises(SystemExit):
        resume.main([str(tmp_path)])
    assert "error: run_dir: expected the work directory of a run" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="expected the work directory of a run"):
        resume.main([str(tmp_path), "--debug"])


NESTED = [[[1] * 10] * 10] * 10


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, NESTED) for option in ("wd", "lr", "optimizer", "task", "scheduler", "warmup_iters", "dropout")),
        ("wd", np.zeros(3, np.float32)),
        ("lr", float("nan")),
        ("batchsize", 2**100),
        ("update_freq", 1.5),
    ],
)
def test_options_of_training(option, value, tmp_path):
    """They are checked before anything is written."""
    content = read_torch_file(FIXTURES / "reference_toy2d.pth")
    setattr(content["args"], option, value)
    write_torch_file(tmp_path / "model.pth", content)
    with pytest.raises(ValueError, match=rf"model\.pth: {option}: expected"):
        import_torch.run(ImportConfig(tmp_path / "model.pth", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
