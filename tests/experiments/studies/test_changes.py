"""The study of changes: the way from one config to another, a tiny run with its files, and the table."""

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.studies import changes
from experiments.studies.changes import ChangesConfig
from experiments.studies.comparison.training import Trained
from experiments.studies.parts import change_run
from experiments.studies.parts.change_run import Job, made
from experiments.studies.parts.config_changes import CHANGES, variants_of, without
from resflow_jax.io.config_json import as_json


@pytest.mark.parametrize("data", CHANGES)
def test_the_way_ends_with_the_shipped_config(data):
    """In all settings but the number of steps; it begins with the uniform one, and each change has an effect."""
    variants = variants_of(data)
    assert variants[0].config == CONFIGS[f"{data}_uniform"]
    last, shipped = variants[-1].config, CONFIGS[data]
    assert as_json(replace(last, steps=shipped.steps, workdir=shipped.workdir)) == as_json(shipped)
    assert len({json.dumps(as_json(variant.config)) for variant in variants}) == len(CHANGES[data]) + 1


@pytest.mark.parametrize("data", CHANGES)
def test_all_changes_but_one(data):
    """Without the last one it is the config before; without the first, only the width of the networks differs."""
    variants, number = variants_of(data), len(CHANGES[data])
    assert without(data, number).config == variants[-2].config
    found, shipped = without(data, 1), variants[-1].config
    assert found.title == "without: half of the width"
    model = replace(found.config.model, hidden_channels=shipped.model.hidden_channels, tail=shipped.model.tail)
    assert found.config.model.hidden_channels == 2 * shipped.model.hidden_channels
    assert replace(found.config, model=model) == shipped


SCORES = np.array([[1.0, 2.0, 3.0]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command without any training: its config, results, and the jobs that it would do."""
    config, jobs = replace(changes.tiny(ChangesConfig()), parallel_runs=1), []
    config = replace(config, workdir=tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            changes, "_done", lambda job, core: jobs.append(job) or {"bits_per_dim": 3.0 + job.seed, "steps": 2}
        )
        found = changes.run(config), changes.run(config)
    return config, found, jobs


def test_a_run(finished):
    """Each config is trained with each seed, and validated; a second command only reads the files."""
    config, (found, again), jobs = finished
    assert found == again and [(job.change, job.seed) for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    results = [result for of_config in found.values() for result in of_config]
    assert results == [{"bits_per_dim": 3.0 + seed, "steps": 2} for seed in (0, 1, 0, 1)]
    directory = config.workdir / "digits"
    assert json.loads((directory / "changes.json").read_text()) == found
    document = json.loads((directory / "change1_seed0.json").read_text())
    assert document["job"] == asdict(jobs[2]) and document["result"] == results[2]


def test_changes_left_out(finished, monkeypatch, capsys):
    """The shipped config, and without each of the changes; differences are from the first line."""
    jobs = []
    config = replace(finished[0], without=(3, 1))
    monkeypatch.setattr(
        changes, "_done", lambda job, core: jobs.append(job) or {"bits_per_dim": float(job.change), "steps": 2}
    )
    found = changes.run(config)
    titles = list(found)
    assert titles[0] == "`digits`" and titles[2] == "without: half of the width"
    last = len(CHANGES["digits"])
    kinds = [(last, False), (3, True), (1, True)]
    assert [(job.change, job.without, job.seed) for job in jobs] == [(*kind, seed) for kind in kinds for seed in (0, 1)]
    directory = config.workdir / "digits"
    assert json.loads((directory / "without.json").read_text()) == found
    assert json.loads((directory / "without3_seed1.json").read_text())["job"] == asdict(jobs[3])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"| {1 - last:.3f} ± 0.000 |")


def test_files_of_an_earlier_config(finished, monkeypatch):
    """They are no results of the present one, and are not replaced."""
    config, _, _ = finished
    monkeypatch.setattr(changes, "fingerprint", lambda job: "another")
    with pytest.raises(ValueError, match=r"change0_seed0.json to be of the same settings, got another config"):
        changes.run(config)


def test_table():
    """Means with their standard errors; differences are taken seed by seed."""
    runs = {
        "first": [{"bits_per_dim": bits, "steps": 10} for bits in (3.0, 3.2)],
        "second": [{"bits_per_dim": bits, "steps": 21} for bits in (2.9, 3.1)],
        "third": [{"bits_per_dim": bits, "steps": 10} for bits in (2.0, 2.0)],
    }
    lines = [
        "| first | 10 | 3.100 ± 0.100 |  |",
        "| second | 21 | 3.000 ± 0.100 | -0.100 ± 0.000 |",
        "| third | 10 | 2.000 ± 0.000 | -1.000 ± 0.100 |",
    ]
    assert changes.table(runs, "above").splitlines()[2:] == lines
    lines[-1] = "| third | 10 | 2.000 ± 0.000 | -1.100 ± 0.100 |"
    assert changes.table(runs, "first").splitlines()[2:] == lines


def test_a_process_that_fails(monkeypatch):
    """The error has its last words; the process gets the job and its core."""

    def run(command, *, input, env, **options):
        assert command[1:] == ["-m", "experiments.studies.parts.change_run", "1"] and env["OMP_NUM_THREADS"] == "1"
        assert Job(**json.loads(input)) == job
        return subprocess.CompletedProcess(command, 1, "", "words\nValueError: the last\n")

    job = Job("digits", 2, 5, 1.0, 8)
    monkeypatch.setattr(changes.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=re.escape("change2_seed5: expected a process that trains, got: ValueError")):
        changes._done(job, "1")


def test_a_process(monkeypatch, capsys):
    """It reads a job, keeps to one core, and prints its result alone."""
    kept = []
    monkeypatch.setattr(change_run, "keep_to", kept.append)
    monkeypatch.setattr(change_run, "end_with_parent", lambda: None)
    monkeypatch.setattr(change_run, "made", lambda job: print("aside") or {"seed": job.seed})
    monkeypatch.setattr(sys, "argv", ["change_run", "3"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(Job("digits", 0, 7, 1.0, 8))) + "\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    change_run.main()
    assert json.loads(capsys.readouterr().out) == {"seed": 7} and kept == ["3"]


def test_a_training(monkeypatch):
    """It has the budget, rate and images of its job; a validation is the mean over images."""
    given = {}

    def train(contender, batches, clock, rate, validate, **options):
        given.update(options, config=contender.task.config, seconds=clock.seconds, rate=rate, batch=next(batches))
        model = type("Model", (), {"scores": lambda _, images, seed, draws: given.update(images=images) or SCORES})
        given["loss"] = validate(model())
        return Trained(model, 2.5, 1.0, 4, 0, 10.0, 12.0, [])

    monkeypatch.setattr(change_run, "train", train)
    job = Job("digits", 2, 3, 7.0, 8, small=True)
    assert made(job) == {"bits_per_dim": 2.5, "steps": 4, "step_seconds": 0.5}
    assert given["config"] == job.config() and given["config"].seed == 3 and given["rate"] == 0.03
    assert given["seconds"] == 7.0 and not given["set_up_counts"] and given["at_least"] == 2
    assert len(given["images"]) == 8 and given["loss"] == 2.0 and len(given["batch"]) == given["config"].batch_size


def test_no_finite_validation(monkeypatch):
    """It is an error, no result."""
    trained = Trained(None, np.inf, 0.0, 4, 0, 0.0, 1.0, [])
    monkeypatch.setattr(change_run, "train", lambda *_, **__: trained)
    with pytest.raises(FloatingPointError, match=r"job: expected a finite validation, got none in 4 steps"):
        change_run.made(Job("digits", 0, 0, 1.0, 8, small=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (1, 1)}, "seeds: expected two or more different numbers"),
        ({"seconds": 0}, "seconds: "),
        ({"validated": 0}, "validated: "),
        ({"without": (9,)}, "without: expected different numbers from 1 to 6"),
        ({"without": (2, 2)}, "without: expected different numbers"),
        ({"parallel_runs": 10**6}, "parallel_runs: expected at most"),
    ],
)
def test_bad_settings(settings, message):
    """Each is named before anything runs."""
    with pytest.raises(ValueError, match=message):
        ChangesConfig(**settings)


def test_standard_error():
    """Of a mean: the deviation over the root of the number."""
    assert changes._mean(np.array([1.0, 2.0, 3.0])) == "2.000 ± 0.577"
