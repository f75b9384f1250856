"""The density experiment end to end, tiny: its files, its promises, resuming, and bad input."""

import base64
import dataclasses
import errno
import json
import os
import signal
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from experiments import density, evaluate, sample
from experiments.configs import CONFIGS
from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig, VectorDataConfig
from experiments.configs.tiny import tiny as tiny_config
from experiments.evaluate import EvaluateConfig
from experiments.runs import launch, pictures
from experiments.runs.launch import run_config
from experiments.runs.metrics import Metrics
from experiments.runs.metrics_file import MetricsFile
from experiments.runs.setup import set_up, tightened_flow
from experiments.runs.tasks.images import load
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Task
from experiments.runs.workdir import claim_workdir, write_atomically
from experiments.sample import SampleConfig
from resflow_jax import (
    BetweenBlocks,
    Defensive,
    DenseTail,
    Estimate,
    Exact,
    ImageFlowConfig,
    ImageTransform,
    Norms,
    Padding,
    Roulette,
    Scales,
    VectorFlowConfig,
    VectorTransform,
    certify,
)
from resflow_jax.data.batches import Batches
from resflow_jax.training.checkpoints import Checkpoints
from tests.experiments.tiny import run_and_cut

TINY = dataclasses.replace(
    CONFIGS["digits"],
    model=ImageFlowConfig((8, 8, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=DenseTail(0)),
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
    return workdir, run_config(dataclasses.replace(TINY, workdir=workdir))


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
    assert certificate["is_certified"] is True and block["bound"] <= block["target_bound"] < 1
    assert {"3", "6"} >= {p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()} >= {"6"}
    assert sorted(path.name for path in (workdir / "training").iterdir()) == [
        f"{step:07}_{kind}.png" for step in (3, 6) for kind in ("reconstructions", "samples")
    ]
    assert "samples at step 3" in page and "reconstructions at step 6" in page
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


def events(workdir):
    """What TensorBoard reads: {tag: {step: value}} of numbers, and the tags of everything else."""
    numbers, others = {}, set()
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    numbers.setdefault(value.tag, {})[event.step] = value.simple_value
                else:
                    others.add(value.tag)
    return numbers, others


def test_events(finished):
    """TensorBoard shows the numbers of metrics.jsonl, the distributions of its lists, and the pictures."""
    workdir, result = finished
    numbers, others = events(workdir)
    lines = [line for line in read_metrics(workdir) if line["split"] == "train"]
    for name in ("bits_per_dim", "gradient_norm", "learning_rate", "validation_bits_per_dim"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert numbers[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert numbers["test/bits_per_dim"] == pytest.approx({max(numbers["test/bits_per_dim"]): result.mean}, rel=1e-6)
    assert others == {
        *("samples", "reconstructions", "train/lipschitz"),
        *(f"train/diagnostics/{name}" for name in lines[0]["diagnostics"]),
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The same run with its lengths fitted at every validation."""
    workdir = tmp_path_factory.mktemp("fitted")
    return workdir, run_config(dataclasses.replace(TINY, workdir=workdir, fit_lengths=True))


def test_lengths_are_fitted_between_validations(fitted):
    """The table of the law is kept in the checkpoint; before the first fit it is the default's."""
    workdir, result = fitted
    assert np.isfinite(result.mean)
    config = dataclasses.replace(TINY, workdir=workdir, fit_lengths=True)
    _, start = set_up(task_of(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        end = checkpoints.restore(6, start)
    tables = [np.asarray(state.estimator.length.table) for state in (start, end)]
    assert tables[0].shape == tables[1].shape == (1, 16) and tables[0][0, 0] == 1
    assert not np.allclose(*tables)


def test_checkpoints_hold_the_certificate_of_the_tightened_flow(finished):
    """Of the averaged weights: what is restored and tightened is what the checkpoint says, and within its promise."""
    workdir, _ = finished
    trainer, state = set_up(task_of(TINY))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        flow = tightened_flow(trainer, checkpoints.restore(6, state))
        stored = checkpoints.certificate(6)
    certificate = certify(flow)
    assert [block["bound"] for block in stored["blocks"]] == pytest.approx(certificate.bounds, rel=1e-6)
    assert all(block["bound"] <= block["target_bound"] for block in stored["blocks"])


@pytest.mark.parametrize("fit_lengths", [False, True])
def test_a_cut_run_resumes_exactly(finished, fitted, tmp_path, capsys, fit_lengths):
    """A run cut behind its first checkpoint and started again ends as the uncut one, bit for bit."""
    workdir, result = fitted if fit_lengths else finished
    config = dataclasses.replace(TINY, workdir=tmp_path, fit_lengths=fit_lengths)
    run_and_cut(config, batches=5)
    assert run_config(config) == result
    assert "resuming" in capsys.readouterr().out
    assert read_metrics(tmp_path) == read_metrics(workdir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop(finished, tmp_path, monkeypatch, capsys, number):
    """The step is finished, saved and logged, the exit status is 0; the same command ends as the uncut run did."""
    workdir, result = finished
    config = dataclasses.replace(TINY, workdir=tmp_path)
    starting_at = Batches.starting_at

    def with_signal(self, step, **options):
        for n, batch in enumerate(starting_at(self, step, **options)):
            if n == 4:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "starting_at", with_signal)
        with pytest.raises(SystemExit) as stop:
            run_config(config)
    assert not stop.value.code and signal.getsignal(number) is before
    assert "stopped at step 5 of 6; the same command goes on" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 3)
    assert run_config(config) == result
    assert "resuming" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)][:-1] == [2, 3, 4, 5, 6]
    state = set_up(task_of(TINY))[1]
    ends = []
    for directory in (workdir, tmp_path):
        with Checkpoints(directory / "checkpoints") as checkpoints:
            ends.append(checkpoints.restore(6, state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_patience(tmp_path, monkeypatch, capsys):
    """Two validations in a row without an improvement end the run; it is evaluated, and not gone on with."""
    values = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(
        Task,
        "estimate",
        lambda self, flow, split: Estimate(next(values) if split == "validation" else 9, *[0.1] * 3),
    )
    evaluation = dataclasses.replace(TINY.evaluation, every=1, patience=2)
    config = dataclasses.replace(TINY, workdir=tmp_path, evaluation=evaluation, save_every=5)
    for _ in range(2):
        assert run_config(config).mean == 9
        assert [line["step"] for line in read_metrics(tmp_path) if line["split"] == "train"] == [1, 2, 3, 4]
        assert "weights of step 2)" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)


def test_checkpoints_between_validations(tmp_path, monkeypatch):
    """Are what a run that is cut goes on from; they are never the best, and go when newer ones come."""
    config = dataclasses.replace(TINY, workdir=tmp_path, save_every=2)
    save, saved = Checkpoints.save, []
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, *rest: saved.append(int(state.step)) or save(self, state, *rest)
    )
    run_config(config)
    assert saved == [2, 3, 4, 6]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} <= {"3", "6"}


def test_a_finished_run_is_only_evaluated_again(finished, capsys):
    """The same command on a finished run trains no more, gives the same result, and repeats no line."""
    workdir, result = finished
    before = read_metrics(workdir)
    assert run_config(dataclasses.replace(TINY, workdir=workdir)) == result
    assert read_metrics(workdir) == before
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}"


def test_a_work_directory_of_another_config(finished):
    """The differences are listed and nothing is touched; more steps are allowed."""
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"(?s)workdir: .*another config.*batch_size: 16 there, 8 now.*seed: 0 there"):
        run_config(dataclasses.replace(TINY, workdir=workdir, batch_size=8, seed=3))
    assert before == ((workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text())


def test_divergence_is_reported(tmp_path):
    """A loss that stops being finite ends the run with the steps, the values and what to do."""
    config = dataclasses.replace(TINY, workdir=tmp_path, optimizer=OptimizerConfig(learning_rate=1e200, warmup=0))
    with pytest.raises(FloatingPointError, match="training diverged between steps"):
        run_config(config)
    assert all(np.isfinite(line["bits_per_dim"]) for line in read_metrics(tmp_path))


def test_command_line_overrides(monkeypatch):
    """`digits` is the default; flags reach nested fields."""
    configs = []
    monkeypatch.setattr(launch, "run_config", configs.append)
    density.main(
        ["--steps", "5", "--batch-size", "8", "--seed", "2", "--workdir", "elsewhere", "--model.blocks", "1", "2"]
    )
    density.main(["fashion_mnist", "--data.dir", "there"])
    density.main(["--tiny", "svhn", "--data.crop", "2"])
    density.main(["--tiny"])
    for arguments in (
        "digits --model.tail.blocks 0 --model.norms.orders f12f --model.data.padding.channels 2 "
        "--model.condition-dim 3 --model.between.no-actnorm --estimator.length.p 0.25",
        "celebahq256 --model.tail.blocks 2 --model.scales.no-squeeze-first --model.data.padding.scale 2",
        "vectors --model.dim 2 --model.norms.learned --model.data.mean 1 2 --model.data.std 3 4",
    ):
        density.main(arguments.split())
    digits, fashion, svhn, tiny, grouped, celebahq, vectors = configs
    assert grouped.model == dataclasses.replace(
        CONFIGS["digits"].model,
        condition_dim=3,
        data=ImageTransform(padding=Padding(2)),
        between=BetweenBlocks(actnorm=False),
        norms=Norms("f12f"),
        tail=DenseTail(0, hidden=64),
    )
    assert grouped.estimator == Roulette(Defensive(p=0.25))
    assert celebahq.model.tail == DenseTail(2) and celebahq.model.scales == Scales(factor_out=True)
    assert celebahq.model.data == ImageTransform(padding=Padding(scale=2.0), logit_alpha=0.05)
    assert vectors.model.norms == Norms(learned=True) and vectors.model.data == VectorTransform((1.0, 2.0), (3.0, 4.0))
    assert svhn == dataclasses.replace(tiny_config(CONFIGS["svhn"]), data=svhn.data)
    assert (svhn.data.name, svhn.data.crop) == ("photographs", 2)
    assert tiny == tiny_config(CONFIGS["digits"])
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
        ({"schedule": "step"}, 'milestones: expected some with the schedule "step", and none else, got .. with'),
        ({"milestones": (3,)}, "milestones: expected some with the schedule .* got .3,. with 'cosine'"),
        ({"schedule": "step", "milestones": (3, 3)}, "milestones: expected positive numbers that increase, got"),
        ({"schedule": "step", "milestones": (3,), "decay": 1.0}, r"decay: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_optimizer_settings_are_named(arguments, message):
    """Settings that cannot train name the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annealing": 7}, "annealing: expected at most 6, the number of steps, got 7"),
        ({"save_every": 0}, "save_every: expected an integer of at least 1, got 0"),
        ({"optimizer": OptimizerConfig(accumulate=7)}, "optimizer.accumulate: expected a divisor of 6, .* got 7"),
        (
            {"optimizer": OptimizerConfig(schedule="step", milestones=(2, 6))},
            "optimizer.milestones: expected numbers below 6, that of updates, got .2, 6.",
        ),
    ],
)
def test_bad_settings_of_a_run_are_named(settings, message):
    """Settings that have no effect on a run of so many steps are refused."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


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
        run_config(dataclasses.replace(TINY, workdir=tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"mine": 1}'


def test_in_float32(tmp_path):
    """Without float64, as users run it: the same promises, all in float32."""
    with jax.enable_x64(False):
        result = run_config(dataclasses.replace(TINY, workdir=tmp_path))
    assert np.isfinite(result.mean) and 2 < result.mean < 5
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 3, 4, 6, read_metrics(tmp_path)[-1]["step"]]


def test_images_of_another_shape(tmp_path):
    """A model that does not fit the data says so before anything is written."""
    model = dataclasses.replace(TINY.model, shape=(4, 4, 1))
    with pytest.raises(ValueError, match=r"model.shape: expected \(8, 8, 1\).*got \(4, 4, 1\)"):
        run_config(dataclasses.replace(TINY, model=model, workdir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_workdir_that_is_a_file(tmp_path):
    """The error names the argument and the file is left alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="workdir: expected a directory, got the file"):
        run_config(dataclasses.replace(TINY, workdir=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(tmp_path):
    """What cannot be written says which file; the one that was there stays whole, and nothing half is left."""
    path = tmp_path / "config.json"
    path.write_text("mine")
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*config\.json"):
        write_atomically(path, "new")
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    metrics = MetricsFile(tmp_path / "metrics.jsonl", keep_until=5)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        metrics.write(step=2, split="train")


def test_events_on_a_full_disk(tmp_path, monkeypatch):
    """An error that names the directory, not a run that waits for ever."""
    with Metrics(tmp_path, keep_until=0) as metrics:
        with monkeypatch.context() as patch:
            patch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
            for n in range(20):
                with pytest.raises(OSError, match=r"No space left.*tensorboard"):
                    metrics.write(step=n, split="train", bits_per_dim=3.0)
        metrics.write(step=21, split="train", lipschitz=[0.5, float("inf")], orders=[float("nan")], none=float("nan"))
    assert len(read_metrics(tmp_path)) == 21
    assert read_metrics(tmp_path)[-1]["lipschitz"] == [0.5, None]
    assert events(tmp_path)[1] == {"train/lipschitz"}


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_start_that_failed_leaves_the_directory_free(tmp_path):
    """Settings that cannot work say so before anything is written; where nothing was trained another config may run."""
    config = dataclasses.replace(TINY, workdir=tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size: expected between 1 and 1347"):
        run_config(dataclasses.replace(config, batch_size=5000))
    assert not config.workdir.exists()
    claim_workdir(config.workdir, dataclasses.replace(config, batch_size=8))
    claim_workdir(config.workdir, config)
    assert json.loads((config.workdir / "config.json").read_text())["batch_size"] == 16
    (config.workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another config.*\n.*batch_size: 16 there, 8 now"):
        claim_workdir(config.workdir, dataclasses.replace(config, batch_size=8))
    (config.workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"workdir: expected the config of a run in .*config\.json"):
        claim_workdir(config.workdir, config)


def test_fewer_steps_than_taken(finished):
    """A run cannot be made shorter than it is; its config stays."""
    before = (finished[0] / "config.json").read_text()
    with pytest.raises(ValueError, match="steps: expected at least 6, as many as taken, got 4"):
        run_config(dataclasses.replace(TINY, workdir=finished[0], steps=4))
    assert (finished[0] / "config.json").read_text() == before


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_pictures_of_any_number_of_channels(channels, tmp_path):
    """Of images that are neither grey nor in colour the first channels are shown."""
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


def test_too_few_examples_to_test_on(tmp_path):
    """No standard error can be told of one."""
    np.save(tmp_path / "few.npy", np.random.default_rng(0).normal(size=(12, 2)))
    config = dataclasses.replace(
        CONFIGS["vectors"], data=VectorDataConfig(tmp_path / "few.npy"), model=VectorFlowConfig(2), batch_size=4
    )
    with pytest.raises(ValueError, match="data: expected two or more examples to test on, got 1 in"):
        run_config(config)


def test_a_work_directory_that_cannot_be_made():
    """The error names the argument and the path."""
    with pytest.raises(OSError, match=r"workdir: could not make /proc/nowhere"):
        run_config(dataclasses.replace(TINY, workdir=Path("/proc/nowhere")))


def test_metrics_survive_a_half_written_line(tmp_path):
    """A line cut off by a crash is dropped, complete ones stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "train", "d": {"x": 1}')
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
        TINY, data=data, model=model, optimizer=optimizer, batch_size=8, workdir=tmp_path / "run"
    )
    result = run_config(config)
    assert 4 < result.mean < 7  # of random pixels of 32 levels, five bits at best
    assert load(config.data).levels == 32
    assert run_config(config) == result


def test_own_vectors(tmp_path):
    """A table with a header: trained with learned norms and a rising weight of the log-det, evaluated again, drawn."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 3)) * [1.0, 5.0, 0.1] + [0, 20, 3]
    table = "\n".join(["a,b,c", *(",".join(map(str, row)) for row in rows)])
    (tmp_path / "rows.csv").write_text(table)
    config = dataclasses.replace(
        CONFIGS["vectors"],
        data=VectorDataConfig(tmp_path / "rows.csv"),
        model=VectorFlowConfig(3, blocks=2, hidden=(4,), norms=Norms(learned=True)),
        workdir=tmp_path / "run",
        steps=4,
        annealing=2,
        batch_size=8,
        evaluation=EvaluationConfig(estimator=Exact(), draws=1, every=2),
    )
    result = run_config(config)
    assert -20 < result.mean < 0 and result.noise_stderr == 0
    lines = read_metrics(config.workdir)
    orders = [line["orders"] for line in lines if "orders" in line]
    assert np.shape(orders) == (2, 4, 2) and orders[0] != orders[1]
    assert [len(line["lipschitz"]) for line in lines if "lipschitz" in line] == [2, 2]
    assert run_config(config) == result
    with pytest.raises(ValueError, match=r"model\.dim: expected 3, that of the vectors, got 30"):
        run_config(dataclasses.replace(CONFIGS["vectors"], data=config.data, workdir=tmp_path / "other"))
    again = evaluate.run(EvaluateConfig(config.workdir, other=(str(tmp_path / "rows.csv"),)))
    assert again["test"]["log_prob"] == pytest.approx(result.mean, rel=1e-6)
    assert again["other"][str(tmp_path / "rows.csv")]["auroc"] == pytest.approx(0.5, abs=1e-9)
    samples = sample.run(SampleConfig(config.workdir, number=5, batch_size=4))
    assert samples.shape == (5, 3) and np.isfinite(samples).all()
    with np.load(config.workdir / "sampling" / "samples.npz") as file:
        np.testing.assert_array_equal(file["vectors"], samples)
    with pytest.raises(ValueError, match="interpolate: expected a run on images, got one on vectors"):
        sample.run(SampleConfig(config.workdir, interpolate=(0, 1)))
