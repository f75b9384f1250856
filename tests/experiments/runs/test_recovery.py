"""What a run does about updates that are not finite: skipped and logged, rolled back, given up."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.configs.base import SafetyConfig
from experiments.runs import recovery, train
from experiments.runs.launch import run_config
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.vectors import VectorTask
from resflow_jax import BlockCertificate, Certificate
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import VECTORS, run_and_cut

pytestmark = pytest.mark.usefixtures("shared_steps")
CONFIG = dataclasses.replace(VECTORS, log_every=1, steps=8, save_every=2, safety=SafetyConfig(skips=2, rollbacks=2))


def with_bad_batches(monkeypatch, is_bad):
    """Makes the batches of a run NaN where is_bad(number of the batch, number of earlier runs over the data)."""
    whole, passes = VectorTask.batches, []

    def batches(self, step, part=0, parts=1):
        passes.append(step)
        for number, rows in enumerate(whole(self, step, part, parts), start=step):
            yield np.full_like(rows, np.nan) if is_bad(number, len(passes) - 1) else rows

    monkeypatch.setattr(VectorTask, "batches", batches)
    monkeypatch.setattr(train, "compile_programs", lambda *_: None)  # it reads a batch too
    return passes


def of_split(lines, split):
    return [line for line in lines if line["split"] == split]


def test_a_skipped_update_can_be_replayed(tmp_path, monkeypatch):
    """Its line has the number, the key and the rows of its batch; the run goes on, and its report says so."""
    with_bad_batches(monkeypatch, lambda number, passes: number == 4)
    config = dataclasses.replace(CONFIG, workdir=tmp_path)
    run_config(config)
    lines = read_metrics(tmp_path)
    (line,) = of_split(lines, "skipped")
    assert (line["step"], line["loss"], line["seed"], line["rollbacks"]) == (5, None, 0, 0)
    (batch,) = line["batches"]
    task = task_of(config)
    rows = task._batches(0, 1)[4]
    np.testing.assert_array_equal(task.splits.train[batch["rows"]], rows)
    key = jax.random.fold_in(jax.random.key(0), 4)
    assert batch["number"] == 4 and batch["key"] == jax.random.key_data(key).tolist()
    trained = of_split(lines, "train")
    assert [one["step"] for one in trained] == list(range(1, 9)) and trained[4]["log_prob"] is None
    assert "1 updates skipped, 0 rollbacks" in (tmp_path / "report.html").read_text()


def test_it_rolls_back_with_a_new_key(tmp_path, monkeypatch):
    """After two skipped updates in a row to the checkpoint before; a cut run that is resumed does the same."""
    ends = []
    for name in ("whole", "cut"):
        config = dataclasses.replace(CONFIG, workdir=tmp_path / name)
        with monkeypatch.context() as patch:
            passes = with_bad_batches(patch, lambda number, passes: number in (4, 5) and passes == 0)
            if name == "cut":  # after the rollback, before the next checkpoint
                seen = train.Recovery.roll_back

                def and_cut(self, error, seen=seen):
                    seen(self, error)
                    raise KeyboardInterrupt

                patch.setattr(train.Recovery, "roll_back", and_cut)
                with pytest.raises(KeyboardInterrupt):
                    run_config(config)
                patch.setattr(train.Recovery, "roll_back", seen)
            run_config(config)
        assert passes == [0, 4]
        lines = read_metrics(config.workdir)
        (line,) = of_split(lines, "rollback")
        assert (line["step"], line["number"]) == (4, 1) and "between steps 5 and 6: loss nan" in line["reason"]
        assert [one["step"] for one in line["skipped"]] == [5, 6] and not of_split(lines, "skipped")
        assert [one["step"] for one in of_split(lines, "train")] == list(range(1, 9))
        ends.append(lines)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_it_goes_back_to_its_start(parallel, tmp_path, monkeypatch):
    """Where nothing has been saved yet, with every form of the first state; the report counts what was dropped."""
    passes = with_bad_batches(monkeypatch, lambda number, passes: number < 2 and passes == 0)
    config = dataclasses.replace(CONFIG, workdir=tmp_path, parallel=parallel)
    run_config(config)
    assert passes == [0, 0]
    (line,) = of_split(read_metrics(tmp_path), "rollback")
    assert (line["step"], line["dropped"], len(line["skipped"])) == (0, 2, 2)
    assert "2 updates skipped, 1 rollbacks" in (tmp_path / "report.html").read_text()


def test_it_gives_up_with_a_report(tmp_path, monkeypatch):
    """After two rollbacks, the second of which goes further back, since nothing was saved in between."""
    with_bad_batches(monkeypatch, lambda number, passes: number >= 6)
    evaluation = dataclasses.replace(CONFIG.evaluation, every=4)
    config = dataclasses.replace(CONFIG, workdir=tmp_path, evaluation=evaluation)
    with pytest.raises(FloatingPointError, match=r"between steps 7 and 8: .* in a row .* Gave up after 2 rollbacks"):
        run_config(config)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in of_split(lines, "rollback")] == [4, 4]
    assert [line["number"] for line in of_split(lines, "rollback")] == [1, 2]
    assert (tmp_path / "checkpoints" / "aside" / "6").is_dir()
    report = (tmp_path / "report.html").read_text()
    assert "GAVE UP" in report and "6 updates skipped, 2 rollbacks" in report and len(of_split(lines, "test")) == 1


def test_without_skips_there_is_nothing_new(tmp_path):
    """The lines of a run that stays finite are of the splits train and test."""
    config = dataclasses.replace(CONFIG, workdir=tmp_path)
    run_and_cut(config, batches=3)
    run_config(config)
    assert {line["split"] for line in read_metrics(tmp_path)} == {"train", "test"}


def test_a_certificate_that_does_not_hold():
    """The block is named; what promises nothing is no error."""
    good = BlockCertificate(bound=0.9, target_bound=0.95, order=2.0, lipschitz=1.9, inverse_lipschitz=10.0, layers=())
    for bound in (1.5, np.nan):
        bad = dataclasses.replace(good, bound=bound)
        with pytest.raises(FloatingPointError, match=r"by step 3: expected every block certified .* of blocks 1\."):
            recovery.check_certificate(Certificate((good, bad), 2.0, np.inf), 3)
        free = dataclasses.replace(bad, target_bound=np.inf)
        recovery.check_certificate(Certificate((good, free), 2.0, np.inf), 3)
