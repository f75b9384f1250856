"""The density experiment end to end, tiny: its files, its promises, resuming, and bad input."""

import base64
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import density, train
from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig
from experiments.images import load
from experiments.run import MetricsFile
from resflow_jax import ImageFlowConfig, Roulette, certify
from resflow_jax.data.batches import Batches
from resflow_jax.training.checkpoints import Checkpoints

TINY = dataclasses.replace(
    density.CONFIGS["digits"],
    model=ImageFlowConfig((8, 8, 1), blocks=(1,), hidden_channels=4, fc_blocks=0, kernels=(3, 3)),
    steps=6,
    batch_size=16,
    log_every=2,
    optimizer=OptimizerConfig(warmup=2),
    evaluation=EvaluationConfig(estimator=Roulette(), draws=2, examples=30, every=3),
)


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache(tmp_path_factory):
    """Tests compile for themselves and leave the user's cache alone."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps: its work directory and result."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, density.run(dataclasses.replace(TINY, workdir=workdir))


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_files_and_metrics(finished):
    """All promised files exist; metrics have the promised fields; the test split is evaluated once."""
    workdir, result = finished
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG"), name
    assert json.loads((workdir / "config.json").read_text())["model"]["blocks"] == [1]
    page = (workdir / "report.html").read_text()
    assert f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}</h1>" in page
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert base64.b64encode((workdir / name).read_bytes()).decode() in page
    assert 'src="http' not in page and "&quot;hidden_channels&quot;: 4" in page
    certificate = json.loads((workdir / "certificate.json").read_text())
    (block,) = certificate["blocks"]
    assert certificate["is_certified"] is True and block["bound"] <= block["promised"] < 1
    assert {"3", "6"} >= {p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()} >= {"6"}
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 3, 4, 6]
    assert all(np.isfinite(line["bits_per_dim"]) for line in lines)
    assert [line["step"] for line in lines if "validation_bits_per_dim" in line] == [3, 6]
    (test,) = [line for line in lines if line["split"] == "test"]
    assert (
        tuple(test[name] for name in ("bits_per_dim", "bits_per_dim_stderr", "data_stderr", "noise_stderr")) == result
    )
    for line in lines[:-1]:
        found = line["diagnostics"]
        assert len(found["length"]) == len(found["mean"]) == len(found["second_moment"]) == 1
        assert len(found["term_norms"][0]) == 16 and found["length"][0] >= 1
    assert {line["split"] for line in lines} == {"train", "test"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The same run with its lengths fitted at every validation."""
    workdir = tmp_path_factory.mktemp("fitted")
    return workdir, density.run(dataclasses.replace(TINY, workdir=workdir, fit_lengths=True))


def test_lengths_are_fitted_between_validations(fitted):
    """The table of the law is kept in the checkpoint; before the first fit it is the default's."""
    workdir, result = fitted
    assert np.isfinite(result.mean)
    config = dataclasses.replace(TINY, workdir=workdir, fit_lengths=True)
    _, start = train.set_up(density.task_of(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        end = checkpoints.restore(6, start)
    tables = [np.asarray(state.estimator.length.table) for state in (start, end)]
    assert tables[0].shape == tables[1].shape == (1, 16) and tables[0][0, 0] == 1
    assert not np.allclose(*tables)


def test_checkpoints_hold_the_certificate_of_the_tightened_flow(finished):
    """Of the averaged weights: what is restored and tightened is what the checkpoint says, and within its promise."""
    workdir, _ = finished
    trainer, state = train.set_up(density.task_of(TINY))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        flow = train.tightened_flow(trainer, checkpoints.restore(6, state))
        stored = checkpoints.certificate(6)
    certificate = certify(flow)
    assert [block["bound"] for block in stored["blocks"]] == pytest.approx(certificate.bounds, rel=1e-6)
    assert all(block["bound"] <= block["promised"] for block in stored["blocks"])


@pytest.mark.parametrize("fit_lengths", [False, True])
def test_a_cut_run_resumes_exactly(finished, fitted, tmp_path, monkeypatch, capsys, fit_lengths):
    """A run cut behind its first checkpoint and started again ends as the uncut one, bit for bit."""
    workdir, result = fitted if fit_lengths else finished
    config = dataclasses.replace(TINY, workdir=tmp_path, fit_lengths=fit_lengths)
    starting_at = Batches.starting_at

    def cut(self, step, **options):
        yield from itertools.islice(starting_at(self, step, **options), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "starting_at", cut)
        with pytest.raises(KeyboardInterrupt):
            density.run(config)
    assert density.run(config) == result
    assert "resuming" in capsys.readouterr().out
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_a_finished_run_is_only_evaluated_again(finished, capsys):
    """The same command on a finished run trains no more, gives the same result, and repeats no line."""
    workdir, result = finished
    before = read_metrics(workdir)
    assert density.run(dataclasses.replace(TINY, workdir=workdir)) == result
    assert read_metrics(workdir) == before
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}"


def test_a_work_directory_of_another_config(finished):
    """The differences are listed and nothing is touched; more steps are allowed."""
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"(?s)workdir: .*another config.*batch_size: 16 there, 8 now.*seed: 0 there"):
        density.run(dataclasses.replace(TINY, workdir=workdir, batch_size=8, seed=3))
    assert before == ((workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text())


def test_divergence_is_reported(tmp_path):
    """A loss that stops being finite ends the run with the steps, the values and what to do."""
    config = dataclasses.replace(TINY, workdir=tmp_path, optimizer=OptimizerConfig(learning_rate=1e30, warmup=0))
    with pytest.raises(FloatingPointError, match="training diverged between steps"):
        density.run(config)
    assert all(np.isfinite(line["bits_per_dim"]) for line in read_metrics(tmp_path))


def test_command_line_overrides(monkeypatch):
    """`digits` is the default; flags reach nested fields."""
    configs = []
    monkeypatch.setattr(density, "run", configs.append)
    density.main(
        ["--steps", "5", "--batch-size", "8", "--seed", "2", "--workdir", "elsewhere", "--model.blocks", "1", "2"]
    )
    density.main(["fashion_mnist", "--data.dir", "there"])
    density.main(["--tiny", "svhn", "--data.crop", "2"])
    density.main(["--tiny"])
    digits, fashion, svhn, tiny = configs
    assert svhn == dataclasses.replace(density.tiny(density.CONFIGS["svhn"]), data=svhn.data)
    assert (svhn.data.name, svhn.data.crop) == ("photographs", 2)
    assert tiny == density.tiny(density.CONFIGS["digits"])
    assert (digits.data.name, digits.steps, digits.batch_size, digits.seed) == ("digits", 5, 8, 2)
    assert str(digits.workdir) == "elsewhere" and digits.model.blocks == (1, 2)
    assert fashion.data.name == "fashion_mnist" and fashion.data.dir == "there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"clip": float("nan")}, "clip: expected a positive number, got nan"),
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"b2": 1.0}, r"b2: expected a number in \(0, 1\), got 1.0"),
        ({"name": "lion"}, "name: expected one of adam, adamax, adamw, sgd; got 'lion'"),
        ({"schedule": "steps"}, "schedule: expected one of cosine, step, constant; got 'steps'"),
        ({"weight_decay": 0.1}, "weight_decay: expected 0, or a positive number with adamw, got 0.1"),
        ({"accumulate": 0}, "accumulate: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_optimizer_settings_are_named(arguments, message):
    """Settings that cannot train name the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps: expected an integer of at least 1, got 0"),
        (["--model.blocks", "0"], "blocks: expected an integer of at least 1, got 0"),
        (["--steps", "x"], "steps"),
        (["mnist2"], "NAME: expected one of digits, digits_densenet, photographs, mnist, fashion_mnist, cifar10,"),
        (["mnist2"], "; got 'mnist2'"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    """A bad value ends the program with a message that names it, not with a run."""
    with pytest.raises(SystemExit) as stop:
        density.main(arguments)
    printed = capsys.readouterr().err + str(stop.value)
    assert message in " ".join(printed.replace("│", " ").split())


def test_a_directory_that_is_not_of_a_run(tmp_path):
    """Metrics that no config accounts for are not overwritten."""
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="workdir: expected a new directory or that of a run"):
        density.run(dataclasses.replace(TINY, workdir=tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"mine": 1}'


def test_in_float32(tmp_path):
    """Without float64, as users run it: the same promises, all in float32."""
    with jax.enable_x64(False):
        result = density.run(dataclasses.replace(TINY, workdir=tmp_path))
    assert np.isfinite(result.mean) and 2 < result.mean < 5
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 3, 4, 6, read_metrics(tmp_path)[-1]["step"]]


def test_images_of_another_shape(tmp_path):
    """A model that does not fit the data says so before anything is written."""
    model = dataclasses.replace(TINY.model, shape=(4, 4, 1))
    with pytest.raises(ValueError, match=r"model.shape: expected \(8, 8, 1\).*got \(4, 4, 1\)"):
        density.run(dataclasses.replace(TINY, model=model, workdir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_workdir_that_is_a_file(tmp_path):
    """The error names the argument and the file is left alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="workdir: expected a directory, got the file"):
        density.run(dataclasses.replace(TINY, workdir=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_metrics_survive_a_half_written_line(tmp_path):
    """A line cut off by a crash is dropped, complete ones stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "spl')
    metrics = MetricsFile(path, keep_until=5)
    metrics.write(step=3, split="train")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_own_images(tmp_path):
    """A folder of image files, cut to five bits, mirrored and shifted: trained, evaluated, drawn, evaluated again."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{n}.png")
    data = DataConfig("own", path=tmp_path / "images", bits=5, flip=True, crop=1)
    model = dataclasses.replace(TINY.model, shape=(8, 8, 3))
    optimizer = OptimizerConfig("adamax", warmup=1, accumulate=2)
    config = dataclasses.replace(
        TINY, data=data, model=model, optimizer=optimizer, batch_size=4, workdir=tmp_path / "run"
    )
    result = density.run(config)
    assert 4 < result.mean < 7  # of random pixels of 32 levels, five bits at best
    assert load(config.data).levels == 32
    assert density.run(config) == result
