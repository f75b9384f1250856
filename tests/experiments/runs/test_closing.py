"""The end of a run, where an example or a file is odd."""

import dataclasses

import numpy as np
import pytest

from experiments.runs.closing import along_training
from experiments.runs.launch import run_config
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.vectors import VectorTask
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import VECTORS

pytestmark = pytest.mark.usefixtures("shared_steps")


def test_a_test_example_without_a_finite_likelihood(tmp_path, monkeypatch):
    """The run ends with its report, which counts such examples; repeated, too."""
    scores = VectorTask.scores

    def with_one(self, flow, examples, *arguments):
        found = np.array(scores(self, flow, examples, *arguments))
        if np.array_equal(examples, subset(self.splits.test, len(examples))):
            found[:, 3] = -np.inf
        return found

    monkeypatch.setattr(VectorTask, "scores", with_one)
    config = dataclasses.replace(VECTORS, workdir=tmp_path)
    for _ in range(2):
        assert run_config(config).mean == -np.inf
        assert "(8 examples, 1 of them not finite, weights of step 2)" in (tmp_path / "report.html").read_text()
        (line,) = (line for line in read_metrics(tmp_path) if line["split"] == "test")
        assert line["log_prob"] is None


def test_other_files_beside_the_pictures_of_training(tmp_path):
    """Are left out; pictures are in the order of their steps, at most as many of each kind."""
    (tmp_path / "training").mkdir()
    steps = (200, 3, 10000000, 40)
    drawn = [f"{step:07}_{kind}.png" for step in steps for kind in ("samples", "reconstructions")]
    for name in (*drawn, "._0000200_samples.png", "notes.png", "my_notes.png", "0000200_samples.png.7-a.tmp"):
        (tmp_path / "training" / name).touch()
    found = along_training(tmp_path, at_most=3)
    assert list(found) == [
        f"{kind} at step {step}" for kind in ("samples", "reconstructions") for step in (3, 200, 10000000)
    ]
    assert found["samples at step 200"] == tmp_path / "training" / "0000200_samples.png"
