"""Errors of classifiers whose logits are not finite, and the line of a run on its test split."""

import json

import numpy as np
import pytest

from experiments.runs.tasks.judging_classes import errors_of
from experiments.studies.parts import class_runs


def test_logits_that_are_not_finite():
    """Their largest index is 0, which would be right for images of class 0."""
    logits = np.asarray([[2.0, 1.0], [0.0, 1.0], [np.nan, np.nan], [np.inf, 1.0]])
    np.testing.assert_array_equal(errors_of(logits, np.zeros(4, int)), [0, 100, np.nan, np.nan])


def test_the_last_line_of_a_killed_run_is_incomplete(tmp_path):
    """The run is not finished then, and goes on."""
    line = json.dumps({"step": 2, "split": "test", "error": 1.0, "error_stderr": 0.5})
    path = tmp_path / "metrics.jsonl"
    assert class_runs._test_line(tmp_path) is None
    path.write_text('{"step": 1, "split": "train"}\n' + line[:20])
    with pytest.warns(UserWarning, match="line 2, the last one, is incomplete"):
        assert class_runs._test_line(tmp_path) is None
    path.write_text('{"step": 1, "split": "train"}\n' + line + "\n")
    assert class_runs.test_error(tmp_path) == [1.0, 0.5]
