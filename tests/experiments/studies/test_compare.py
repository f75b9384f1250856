"""The comparison of flows: settings, jobs and their files, tables. What a job does is tested in `comparison`."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import compare
from experiments.studies.compare import COMMAND, CompareConfig
from experiments.studies.comparison import running
from experiments.studies.comparison.contenders import MODELS
from experiments.studies.comparison.jobs import Job, found, save
from experiments.studies.comparison.running import cores, run_all
from experiments.studies.comparison.tables import search_table, summary, table
from experiments.studies.comparison.worker import STARTED

JOB = Job("digits", "nice", 0, 300.0, 1.0, 2e-3, is_search=False)


def result(job, **others):
    """What a job of a test leaves: smaller learning rates and widths are better, and later seeds are worse."""
    loss = 2 + job.learning_rate + job.width / 100 + job.seed / 10
    common = {"error": None, "validation_loss": loss, "validation_losses": [loss], "steps": 10, "parameters": 7}
    if job.is_search:
        return common | others
    figures = {
        "test": loss,
        "test_stderr": 0.01,
        "best_at": 0.5,
        "skipped": 0,
        "step_seconds": 0.02,
        "set_up_seconds": 3.0,
    }
    figures |= {"sample_seconds": 0.5, "sampled": 1000, "log_prob_1": 1e-3, "log_prob_1000": 0.1}
    return common | figures | {"reconstruction": 1e-6, "unconverged": 0} | others


@pytest.fixture
def done(monkeypatch):
    """In the place of processes: results at once; the jobs that were done."""
    jobs = []

    def run_all(missing, workdir, places, data_dir):
        while waiting := missing():
            job = waiting[0]
            jobs.append(job)
            shape = (20, 8, 8, 1) if job.data == "digits" else (20, 2)
            arrays = None if job.is_search else dict.fromkeys(("samples", "data"), np.full(shape, 0.5, np.float32))
            save(job, workdir, result(job), arrays)

    monkeypatch.setattr(compare, "run_all", run_all)
    return jobs


def test_jobs_and_what_is_done_again(tmp_path, done, capsys):
    """Three rates, two widths with the best of them, then runs of the best of all with every seed.

    A second call does what is missing, and no more.
    """
    config = CompareConfig(models=("nice",), seeds=2, workdir=tmp_path)
    document = compare.run(config)
    assert [job.is_search for job in done] == [True] * 5 + [False] * 2
    tried = [(job.width, job.learning_rate) for job in done[:5]]
    assert tried == [(1, 2e-3), (1, 6.7e-4), (1, 6e-3), (0.5, 6.7e-4), (0.25, 6.7e-4)]
    assert [(job.seed, job.width, job.learning_rate, job.seconds) for job in done[5:]] == [
        (0, 0.25, 6.7e-4, 300),
        (1, 0.25, 6.7e-4, 300),
    ]
    assert {job.seconds for job in done[:5]} == {30}
    row = document["digits"]["nice"]["summary"]
    assert row["test"] == pytest.approx(2.05317) and row["test_spread"] == pytest.approx(0.05) and row["seeds"] == 2
    assert json.loads((tmp_path / "digits" / "compare.json").read_text()) == document
    assert (tmp_path / "digits" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| nice | 2.0532 ± 0.0500 [0.0100] | 7 | 10 | 50 % | 20 | 3.0 | 0.5 | 1 | 0.1 | 1e-06 |"
        in capsys.readouterr().out
    )

    done[5].path(tmp_path).unlink()
    compare.run(config)
    assert done[7:] == [done[5]]
    compare.run(replace(config, seeds=3))
    assert [job.seed for job in done[8:]] == [2]
    compare.run(replace(config, minutes=1, seeds=1))
    assert [(job.seed, job.seconds) for job in done[9:]] == [(0, 60)]
    compare.run(replace(config, seeds=3, table_only=True, examples=9))
    assert len(done) == 10


def test_all_toy_densities(tmp_path, done, capsys):
    """A table each, one of all, and one picture with a column each; they share one search."""
    document = compare.run(CompareConfig("toy", models=("nice", "made"), seeds=1, workdir=tmp_path, minutes=1))
    assert len(document) == 8 and len(done) == 2 * 5 + 8 * 2 and set(document["rings"]) == {"nice", "made"}
    printed = capsys.readouterr().out
    assert "| model | 8gaussians | 2spirals | checkerboard |" in printed and printed.count("Search on checker") == 1
    searched = {job.data for job in done if job.is_search}
    assert searched == {"checkerboard"} and len({job.data for job in done if not job.is_search}) == 8
    assert (tmp_path / "toy" / "samples.png").exists()


def test_figures_that_are_kept(tmp_path, done, capsys):
    """In one file of all data sets; jobs in it are not done again, and those of the work directory come first."""
    store = tmp_path / "kept" / "all.json"
    config = CompareConfig(models=("nice",), seeds=1, workdir=tmp_path / "a", results=store)
    first = compare.run(config)
    compare.run(replace(config, data="moons"))
    assert list(json.loads(store.read_text())) == ["digits", "moons"]
    again = compare.run(replace(config, models=("glow",), workdir=tmp_path / "b", table_only=True))
    assert again["digits"]["nice"]["summary"] == first["digits"]["nice"]["summary"]
    assert "validation_losses" not in store.read_text()
    assert "| nice | 2.0032 [0.0100]" in capsys.readouterr().out.rpartition("digits: ")[2]
    before = len(done)
    compare.run(replace(config, seeds=2, workdir=tmp_path / "c"))
    assert [(job.seed, job.is_search) for job in done[before:]] == [(1, False)]
    old = json.loads(store.read_text())
    for one in itertools.chain(*old["digits"]["nice"].values()):
        one["job"]["config"] = "an earlier one"
    store.write_text(json.dumps(old))
    before = len(done)
    compare.run(replace(config, models=("glow",), workdir=tmp_path / "d", table_only=True))
    assert "nice on digits, which had another config" in capsys.readouterr().out
    assert json.loads(store.read_text())["digits"] == old["digits"]
    compare.run(replace(config, workdir=tmp_path / "d"))
    assert len(done[before:]) == 6 and {job.model for job in done[before:]} == {"nice"}
    for text in ("{", "3", '{"digits": 3}', '{"digits": {"nice": {"runs": [{}]}}}'):
        store.write_text(text)
        with pytest.raises(ValueError, match=r"results: expected a file that this command has written, got .*all.json"):
            compare.run(config)


@pytest.mark.parametrize(
    "others",
    [{"minutes": 1, "table_only": True}, {"minutes": 1}, {"examples": 100}, {"seeds": 1}, {"search_minutes": 0.25}],
    ids=str,
)
def test_figures_of_other_settings_are_kept(tmp_path, done, others):
    """A call with other budgets, examples or seeds adds its own jobs to the file, and its table has no others.

    The first settings then find all their jobs, in another work directory too.
    """
    store = tmp_path / "all.json"
    config = CompareConfig(models=("nice", "glow"), seeds=2, workdir=tmp_path / "a", results=store)
    first = compare.run(config)
    before = [json.dumps(one) for one in compare._all_of(json.loads(store.read_text()))]
    other = replace(config, models=("nice",), **others)
    shown = compare.run(replace(other, workdir=tmp_path / "b"))["digits"]["nice"]["runs"]
    assert all(one["job"]["seconds"] == 60 * other.minutes for one in shown)
    assert all(one["job"]["examples"] == other.examples for one in shown)
    assert len(shown) == (0 if other.table_only else other.seeds)
    after = [json.dumps(one) for one in compare._all_of(json.loads(store.read_text()))]
    assert {*before} <= {*after} and len({*after}) == len(after)
    number = len(done)
    for directory in "bc":
        again = compare.run(replace(config, workdir=tmp_path / directory))["digits"]
        assert {name: of["summary"] for name, of in again.items()} == {
            name: of["summary"] for name, of in first["digits"].items()
        }
    assert len(done) == number


def test_what_is_not_installed(tmp_path, done, monkeypatch, capsys):
    """Is left out, with a line on what to install."""
    monkeypatch.setattr(compare, "lack", lambda model: "zuko_maf needs zuko" if model == "zuko_maf" else None)
    document = compare.run(CompareConfig("moons", models=("zuko_maf", "nice"), seeds=1, workdir=tmp_path))
    assert list(document["moons"]) == ["nice"]
    assert "skipped: zuko_maf needs zuko" in capsys.readouterr().out


def test_failures_stay_in_the_table():
    """Of some seeds, of all, of a search; numbers that are not finite too."""
    search = [{"job": vars(JOB), **result(JOB)} | {"error": None}]
    runs = [{"job": vars(JOB), **result(JOB)}, {"job": vars(JOB), "error": "ended by SIGKILL"}]
    results = {
        "worse": {"search": search, "runs": [{"job": vars(JOB), **result(JOB, test=5.0, sampled=20, skipped=3)}]},
        "some": {"search": search, "runs": runs},
        "none": {"search": search, "runs": runs[1:]},
        "search": {"search": [{"job": vars(JOB), "error": "diverged"}], "runs": []},
        "infinite": {"search": search, "runs": [{"job": vars(JOB), **result(JOB, test=None, reconstruction=None)}]},
    }
    lines = table(results, "bits/dim", 1).splitlines()
    assert "| some | 2.0120 [0.0100]; 1 of 2 failed: ended by SIGKILL | 7 |" in lines[2]
    assert lines[3].startswith("| worse | 5.0000 [0.0100] | 7 | 10 (3 skipped) |") and "(from 20)" in lines[3]
    assert any(line.startswith("| none | failed: ended by SIGKILL |") for line in lines)
    assert any(line.startswith("| search | failed: diverged |") for line in lines)
    assert any(line.startswith("| infinite | not finite [0.0100]") for line in lines)
    assert table(results, "nats", -1).splitlines()[2].startswith("| worse |")
    assert summary(runs)["test_spread"] is None
    assert "width x1, learning rate 0.002: **2.0120**" in search_table(results, "bits/dim")
    assert "| search | width x1, learning rate 0.002: failed |" in search_table(results, "bits/dim")
    assert "| some (a bound) |" in table(results, "bits/dim", 1, {"some"}) and "bound" not in "".join(lines)


def test_a_search_that_fails(tmp_path):
    """One of its candidates does not matter; if all fail there are no runs."""
    (plan,) = CompareConfig(models=("nice",), workdir=tmp_path, seeds=1).plans()
    first, *others = plan.searches("nice")
    save(first, tmp_path, {"error": "diverged"})
    for job in others[:-1]:
        save(job, tmp_path, result(job))
    assert plan.chosen("nice") is None and plan.missing() == others[-1:]
    save(others[-1], tmp_path, {"error": "diverged"})
    wider = plan.searches("nice")[len(others) + 1 :]
    assert plan.missing() == wider and len(wider) == 2
    for job in wider:
        save(job, tmp_path, {"error": "diverged"})
    assert plan.chosen("nice") == others[0].candidate
    assert [job.is_search for job in plan.missing()] == [False]
    for job in others:
        save(job, tmp_path, {"error": "diverged"})
    assert plan.missing() == [] and plan.runs("nice") == []


def test_files_of_jobs(tmp_path):
    """Results of other settings do not count; what is not finite is null; a damaged file is named."""
    save(JOB, tmp_path, {"error": None, "test": np.inf, "losses": [1.0, np.nan]}, {"samples": np.zeros(2)})
    assert found(JOB, tmp_path)["test"] is None and found(JOB, tmp_path)["losses"] == [1.0, None]
    assert found(replace(JOB, width=0.5), tmp_path) is None and found(replace(JOB, seed=1), tmp_path) is None
    assert Job.from_line(JOB.as_line()) == JOB
    JOB.path(tmp_path).write_text('{"job"')
    with pytest.raises(ValueError, match=r"workdir: expected the result of a run in .*seed0_300s.json"):
        found(JOB, tmp_path)


def test_processes_that_fail(tmp_path, monkeypatch, capsys):
    """Their last words are the result, and the other jobs are done."""
    script = tmp_path / "fails"
    kill = "case $line in *seed*1,*) kill -9 $$;; esac"
    script.write_text(f"#!/bin/sh\nread line\necho {STARTED}\n{kill}\necho no memory\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(script))
    jobs = [JOB, replace(JOB, seed=1), replace(JOB, seed=2)]
    run_all(lambda: [job for job in jobs if found(job, tmp_path) is None], tmp_path, ["-", "-"])
    assert [found(job, tmp_path)["error"] for job in jobs] == ["no memory", "ended by SIGKILL", "no memory"]
    assert "digits nice seed0_300s, width x1, learning rate 0.002: no memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo ModuleNotFoundError: jax\nexit 1",
            r"could not start .*ModuleNotFoundError: jax \(its output is in .*log",
        ),
        (f"echo {STARTED}\nkill -TERM $$", "was ended, .*: ended by SIGTERM"),
    ],
    ids=["cannot start", "ended"],
)
def test_processes_without_a_result(tmp_path, monkeypatch, script, message):
    """What says nothing of a model is an error of the command, and a later call does the job."""
    path = tmp_path / "script"
    path.write_text(f"#!/bin/sh\nread line\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(path))
    with pytest.raises(RuntimeError, match=f"^digits nice seed0_300s: .*{message}"):
        run_all(lambda: [JOB], tmp_path, ["-"])
    assert found(JOB, tmp_path) is None


def test_processes_end_with_the_command(tmp_path, monkeypatch):
    """An interrupt ends them, and leaves no result."""
    script = tmp_path / "sleeps"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(script))
    started, begin = [], running._started
    monkeypatch.setattr(running, "_started", lambda *given: started.append(begin(*given)) or started[0])

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(running.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all(lambda: [JOB], tmp_path, ["-"])
    assert started[0].process.returncode is not None and found(JOB, tmp_path) is None


def test_cores(monkeypatch):
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda process: {5, 2}, raising=False)
    assert cores(None) == ["2", "5"] and cores(1) == ["2"]
    with pytest.raises(ValueError, match="parallel_runs: expected at most 2, the cores of this process, got 3"):
        cores(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "cifar"}, "data: expected one of .*got 'cifar'"),
        ({"models": ("glo",)}, "models: expected one of .*got 'glo'"),
        ({"models": ("maf",)}, "models: expected some of residual, .* for images, got 'maf'"),
        ({"data": "moons", "models": ("normflows_glow",)}, "for vectors, got 'normflows_glow'"),
        ({"minutes": 0.0}, "minutes: expected a positive number, got 0"),
        ({"search_minutes": -1.0}, "search_minutes: expected a positive number, got -1"),
        ({"seeds": 0}, "seeds: expected an integer of at least 1, got 0"),
        ({"parallel_runs": 0}, "parallel_runs: expected an integer of at least 1, got 0"),
        ({"examples": 1}, "examples: expected an integer of at least 2, got 1"),
        ({"small": True, "results": Path("all.json")}, "results: expected none with --tiny, got all.json"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**settings)


def test_the_command_line():
    """Each data set has its own budget; all models that the data allow, by default."""
    assert COMMAND.parse(["fashion_mnist"]).minutes == 20 and COMMAND.parse(["toy"]).search_minutes == 0.1
    chosen = COMMAND.parse(["diamonds", "--models", "residual", "maf", "--seeds", "2", "--table-only"])
    assert chosen.models == ("residual", "maf") and chosen.minutes == 10 and chosen.table_only
    assert {*CompareConfig().allowed, *CompareConfig("rings").allowed} == set(MODELS)
