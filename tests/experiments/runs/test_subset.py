"""Parts of splits that stand for the whole: rows of sorted files are not taken from the beginning."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.runs.tasks.labelled import Rows
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.subset import subset, subset_rows
from resflow_jax.data.images import StoredImages

LABELS = np.repeat(np.arange(10), 20)  # as the files of folders of classes are sorted
IMAGES = np.broadcast_to(LABELS[:, None, None, None], (200, 2, 2, 1)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["array", "stored", "rows"])
def test_a_part_has_all_classes(kind):
    stored = StoredImages(lambda rows: IMAGES[rows], np.arange(200))
    examples = {"array": IMAGES, "stored": stored, "rows": Rows(IMAGES, LABELS)}[kind]
    part = subset(examples, 100)
    images = part.images if kind == "rows" else part
    values = images[:, 0, 0, 0]
    assert len(values) == 100 and set(values) == set(range(10)) and (np.diff(values.astype(int)) >= 0).all()
    if kind == "rows":
        np.testing.assert_array_equal(part.labels, values)
    np.testing.assert_array_equal(values, LABELS[subset_rows(200, 100)])


@pytest.mark.parametrize("number", [200, 10000])
def test_the_whole(number):
    np.testing.assert_array_equal(subset(IMAGES, number), IMAGES)
    np.testing.assert_array_equal(subset_rows(200, number), np.arange(200))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluation_of_a_table_in_order(tmp_path, split, monkeypatch):
    """A table that is sorted by its first column: the examples that are scored are spread over its range."""
    np.savetxt(
        tmp_path / "rows.csv", np.c_[np.arange(2000) / 2000, np.zeros(2000)], "%.6f", ",", header="a,b", comments=""
    )
    config = CONFIGS["vectors"]
    model = replace(config.model, dim=2)
    config = replace(config, model=model, data=replace(config.data, path=tmp_path / "rows.csv"))
    task = task_of(replace(config, evaluation=replace(config.evaluation, examples=40)))
    scored = []
    monkeypatch.setattr(task, "scores", lambda flow, examples, *_: scored.append(examples) or np.zeros((1, 40)))
    task.split_scores(None, split)
    first = np.asarray(scored[0])[:, 0]
    assert len(first) == 40
    assert abs(first.mean() - np.asarray(task.splits.train)[:, 0].mean()) < 0.2
    assert first.min() < 0.15 and first.max() > 0.85
