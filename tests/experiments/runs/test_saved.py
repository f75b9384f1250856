"""Runs read back from their work directories: every config, the chosen weights, and directories that hold none."""

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from experiments.configs import CONFIGS
from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig
from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import HybridConfig
from experiments.runs import saved
from experiments.runs.saved import MovedData, saved_config, saved_flow
from experiments.runs.setup import set_up, tightened_flow
from experiments.runs.tasks.of_config import task_of
from experiments.runs.workdir import claim_workdir
from experiments.studies.parts import trained
from experiments.studies.parts.trained import trained_flow, trained_runs
from resflow_jax import (
    Defensive,
    DenseTail,
    Dequantization,
    Exact,
    Geometric,
    ImageFlowConfig,
    ImageTransform,
    Norms,
    Poisson,
    Roulette,
    Truncated,
    certify,
)
from resflow_jax.io.config_json import FORMAT_VERSION, as_json
from resflow_jax.training import make_mesh
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.parallel import state_shardings
from tests.experiments import tiny
from tests.paths import FIXTURES

OLD = FIXTURES / "before_compositions"

UNUSUAL = replace(
    tiny.DIGITS,
    data=DataConfig("elsewhere", path=Path("images"), dir="there"),
    model=ImageFlowConfig(
        (8, 8, 3),
        blocks=(1, 2),
        data=ImageTransform(logit_alpha=None, mean=(0.5, 0, 0.25), std=(1, 1, 0.5)),
        norms=Norms("f12f"),
    ),
    estimator=Truncated(7, probe="gaussian", probes=2),
    optimizer=OptimizerConfig(clip=math.inf),
    evaluation=EvaluationConfig(estimator=Exact(chunk_size=3)),
)
CONFIGS = {
    **CONFIGS,
    **{f"classify {name}": config for name, config in CLASS_CONFIGS.items()},
    "classify few labels": replace(CLASS_CONFIGS["digits"], hybrid=HybridConfig("1/D"), labels=20),
    "unusual": UNUSUAL,
    **{
        type(law).__name__: replace(tiny.DIGITS, estimator=Roulette(law, exact_terms=2, minres_steps=0))
        for law in (Geometric(0.4), Poisson(1.5), Defensive(lipschitz=0.9))
    },
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The work directory of a run."""
    workdir = tmp_path_factory.mktemp("run")
    tiny.save_run(replace(tiny.DIGITS, workdir=workdir))
    return workdir


def write(directory, config):
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name, tmp_path):
    """A run's config is read back equal and with the same types, except for the present place of the run."""
    claim_workdir(tmp_path, CONFIGS[name])
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION
    config = saved_config(tmp_path)
    assert config == replace(CONFIGS[name], workdir=tmp_path)
    assert repr(config) == repr(replace(CONFIGS[name], workdir=tmp_path))
    assert hash(config.model) == hash(CONFIGS[name].model)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """A flat config is read as a config of today; settings that did not exist yet have their defaults."""
    with zipfile.ZipFile(OLD / "run.zip") as archive:
        archive.extractall(tmp_path)
    config = saved_config(tmp_path)
    assert config.model == ImageFlowConfig(
        (8, 8, 1), blocks=(1, 1), hidden_channels=4, kernels=(3, 3), tail=DenseTail(1, hidden=4)
    )
    assert (config.workdir, config.steps, config.batch_size, config.evaluation.examples) == (tmp_path, 2, 8, 20)
    old = Roulette(Defensive(), exact_terms=0, probe="rademacher", subsample=1)  # the default of then
    assert config.estimator == old and config.data == DataConfig("digits")
    for changed, message in (
        (
            replace(config, model=replace(config.model, tail=DenseTail(2, hidden=4))),
            "model.tail.blocks: 1 there, 2 now",
        ),
        (replace(config, model=replace(config.model, condition_dim=3)), "model.condition_dim: None there, 3 now"),
    ):
        with pytest.raises(ValueError, match=rf"another config.*\n  {message}$"):
            claim_workdir(tmp_path, changed)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "fc_blocks" in written["model"]
    del written["save_every"]
    write(tmp_path, written)
    claim_workdir(tmp_path, config)
    assert saved_config(tmp_path) == config
    assert "fc_blocks" not in (tmp_path / "config.json").read_text()


def edited(*path, **fields):
    """The JSON of a tiny run with fields of a nested dict set, or removed where they are None."""
    config = as_json(tiny.DIGITS)
    inner = config
    for name in path:
        inner = inner[name]
    for name, value in fields.items():
        inner[name] = value
        if value is None:
            del inner[name]
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "Expecting"),
        ("\N{SNOWMAN}", "Expecting value"),
        ("3", "config: expected RunConfig, got 3"),
        (edited(type="BiasConfig"), "config.type: expected one of DensityConfig, .*; got 'BiasConfig'"),
        (
            edited(type="DataConfig"),
            r"expected the fields of DataConfig, got others \(missing: name; unknown: annealing, batch_size, ",
        ),
        (as_json(DataConfig("digits")), "config: expected RunConfig, got DataConfig"),
        (edited("model", type=None), "config.model.type: expected one of .*; got None"),
        (edited("model", depth=3), r"config.model: .* ImageFlowConfig, got others \(unknown: depth\)"),
        (edited("model", shape=None), r"config.model: .*ImageFlowConfig, got others \(missing: shape\)"),
        (edited("estimator", "length", type="Zipf"), "config.estimator.length.type: .*; got 'Zipf'"),
        (
            edited(estimator=as_json(Poisson())),
            "config.estimator: expected Exact or Truncated or Roulette or CustomEstimator, got Poisson",
        ),
        (edited("model", blocks=["one"]), r"config.model.blocks\[0\]: expected int, got 'one'"),
        (edited(steps="many"), "config.steps: expected int, got 'many'"),
        (edited(fit_lengths=1), "config.fit_lengths: expected bool, got 1"),
        (edited(steps=True), "config.steps: expected int, got True"),
        (edited("estimator", probe="coin"), "config.estimator.probe: expected .*rademacher.*, got 'coin'"),
        (edited(steps=0), "steps: expected an integer of at least 1, got 0"),
    ],
)
def test_damaged_configs_are_named(config, message, tmp_path):
    """The error names the file, the field, what was expected and what came."""
    write(tmp_path, config)
    with pytest.raises(ValueError, match=rf"config\.json: expected the config of a run.*{message}"):
        saved_config(tmp_path)


@pytest.mark.parametrize("directory", ["", "nowhere", "config.json"])
def test_a_directory_that_holds_no_run(directory, tmp_path):
    """The directory is empty, missing, or a file."""
    if directory == "config.json":
        write(tmp_path, "{}")
    with pytest.raises(FileNotFoundError, match=r"run_dir: expected the work directory of a run, got .*config\.json"):
        saved_flow(tmp_path / directory)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("makes_directory", [False, True])
def test_a_run_without_a_checkpoint(makes_directory, tmp_path):
    """Before the first validation there is nothing to load; nothing is written."""
    write(tmp_path, as_json(tiny.DIGITS))
    if makes_directory:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"run_dir: expected a run with a checkpoint.*written at step 2"):
        saved_flow(tmp_path)
    assert (tmp_path / "checkpoints").exists() == makes_directory


def test_the_best_and_the_latest_weights(run_dir, tmp_path):
    """The flow of a moved run is averaged, tightened and of the requested step; its certificate is the saved one."""
    workdir = tmp_path / "moved"
    shutil.copytree(run_dir, workdir)
    config = saved_config(workdir)
    trainer, state = set_up(task_of(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        best = checkpoints.restore(2, state)
        latest = best._replace(step=best.step + 1, ema=best.ema._replace(ema=optax.tree.scale(1.5, best.ema.ema)))
        checkpoints.save(latest, 99.0, certify(tightened_flow(trainer, latest)))
    for weights, expected in (("best", best), ("latest", latest)):
        run = saved_flow(workdir, weights)
        assert run.step == int(expected.step) == {"best": 2, "latest": 3}[weights]
        assert run.config == replace(tiny.DIGITS, workdir=workdir) and run.task.splits.shape == (8, 8, 1)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            bounds = [block["bound"] for block in checkpoints.certificate(run.step)["blocks"]]
        np.testing.assert_allclose(certify(run.flow).bounds, bounds, rtol=1e-9)
        kernels = nnx.state(tightened_flow(trainer, expected), nnx.Param)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(run.flow, nnx.Param), kernels)
    biases = [
        jax.tree.leaves(nnx.state(saved_flow(workdir, weights).flow, nnx.Param)) for weights in ("best", "latest")
    ]
    assert any(not np.allclose(a, b) for a, b in zip(*biases, strict=True))


def test_other_weights_are_refused(run_dir):
    """Only two kinds of weights exist."""
    with pytest.raises(ValueError, match="weights: expected one of best, latest; got 'first'"):
        saved_flow(run_dir, "first")


def test_an_unvalidated_checkpoint_is_the_latest_alone(tmp_path):
    """A run that was stopped early has no best weights; the message names the weights that it has."""
    tiny.save_run(replace(tiny.DIGITS, workdir=tmp_path), loss=None)
    with pytest.raises(
        FileNotFoundError, match=r"weights: expected a validated checkpoint, the only one in .* is of step 2"
    ):
        saved_flow(tmp_path)
    assert saved_flow(tmp_path, "latest").step == 2


def test_data_that_were_moved():
    """Moved data are found by their new path or directory; embedded data cannot be moved."""
    assert saved._moved(DataConfig("own", path=Path("old")), MovedData(path=Path("new"))).path == Path("new")
    assert saved._moved(DataConfig("mnist", dir="old"), MovedData(dir=Path("new"))).dir == "new"
    for config in ("vectors", "rings"):
        with pytest.raises(ValueError, match=r"data\.path: expected a run on files of your own"):
            saved._moved(CONFIGS[config].data, MovedData(path=Path("new")))
        with pytest.raises(ValueError, match=r"data\.dir: expected a run on a TensorFlow data set"):
            saved._moved(CONFIGS[config].data, MovedData(dir=Path("new")))
    own, prepared = DataConfig("own", Path("old")), DataConfig("mnist")
    for old, moved in ((prepared, MovedData(path=Path("new"))), (own, MovedData(dir=Path("new")))):
        with pytest.raises(ValueError, match="expected a run on"):
            saved._moved(old, moved)
    assert saved._moved(CONFIGS["rings"].data, MovedData()) == "rings"


def test_studies_take_a_given_run_as_it_was_made(run_dir, tmp_path, monkeypatch):
    """Not with the settings that they would have trained it with."""
    (config,) = trained_runs(["digits"], {"digits": run_dir}, tmp_path)
    assert config == replace(tiny.DIGITS, workdir=run_dir) and config.model != CONFIGS["digits"].model
    own = replace(config.model.data, dequantization=Dequantization(1, 4))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="digits: expected a run with a uniform dequ"):
        patch.setattr(trained, "saved_config", lambda _: replace(config, model=replace(config.model, data=own)))
        list(trained_runs(["digits"], {"digits": run_dir}, tmp_path))
    with pytest.raises(ValueError, match=r"fashion_mnist: expected a run on these images, got .* with one on digits"):
        list(trained_runs(["fashion_mnist"], {"fashion_mnist": run_dir}, tmp_path))
    for other, name in ((CONFIGS["rings"], "rings"), (CONFIGS["vectors"], ""), (CLASS_CONFIGS["digits"], "digits")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"digits: expected .* with one on {name}"):
            patch.setattr(trained, "saved_config", lambda _, other=other: other)
            list(trained_runs(["digits"], {"digits": run_dir}, tmp_path))
    kernels, expected = (nnx.state(flow, nnx.Param) for flow in (trained_flow(config), saved_flow(run_dir).flow))
    jax.tree.map(np.testing.assert_array_equal, kernels, expected)


@pytest.fixture
def old_run(tmp_path):
    """A run from before flows were compositions; its config and arrays have other names."""
    shutil.unpack_archive(OLD / "run.zip", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_of_before_compositions(old_run):
    """Its flow gives the same densities as it did then."""
    with np.load(OLD / "expected.npz") as file:
        expected = {key.removeprefix("run."): value for key, value in file.items() if key.startswith("run")}
    found = saved_flow(old_run)
    assert found.step == expected["step"]
    log_prob = found.flow.log_prob(expected["x"], estimator=Exact())
    np.testing.assert_allclose(log_prob, expected["log_prob"], rtol=1e-9)


def test_a_state_of_before_compositions(old_run):
    """Its state is restored whole or divided among devices; averages and moments are renamed; the decay is needed."""
    trainer, start = set_up(task_of(saved_config(old_run)))
    with Checkpoints(old_run / "checkpoints") as checkpoints:
        with pytest.raises(ValueError, match="ema_decay: expected the EMA decay of the run, which checkpoints of"):
            checkpoints.restore(2, start)
        state = checkpoints.restore(2, start, ema_decay=trainer.ema_decay)
        lies = state_shardings(start, make_mesh(data=4, model=2), "full")
        divided = checkpoints.restore(2, start, lies, ema_decay=trainer.ema_decay)
        chex.assert_trees_all_equal(divided, state)
        assert jax.tree.leaves(divided.params)[-1].sharding.mesh.size == 8
        old = checkpoints._manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state

    def of_first_actnorm(tree):
        return tree["bijector"]["bijectors"][0]["bijectors"][1]

    def of_first_old(tree):
        return {name: variable["value"] for name, variable in tree["scales"]["0"]["bijectors"]["1"].items()}

    moments, old_moments = state.opt_state[1][0], old["opt_state"][1][0]
    for new, before in ((moments.mu, old_moments["mu"]), (moments.nu, old_moments["nu"])):
        np.testing.assert_array_equal(of_first_actnorm(new)["shift"][...], of_first_old(before)["bias"])
        np.testing.assert_array_equal(of_first_actnorm(new)["log_scale"][...], of_first_old(before)["log_scale"])
    assert int(state.step) == int(old["step"]) == 2
    layer = of_first_old(old["params"])
    np.testing.assert_allclose(of_first_actnorm(state.params)["shift"][...], layer["bias"] * np.exp(layer["log_scale"]))
