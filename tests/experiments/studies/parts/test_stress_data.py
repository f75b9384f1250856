"""The campaign on data finds nothing, and finds a reader that loses something."""

import numpy as np
import pytest

from experiments.studies.parts import stress_data
from experiments.studies.parts.stress_data import data_campaign
from resflow_jax.data.vectors import VectorSplits


def test_nothing_is_found(tmp_path):
    """Every kind of file is tried, and read as it was given or refused."""
    rows = data_campaign(tmp_path, seconds=2.0, seed=1)
    assert len(rows) == 9 and all(row.is_good and row.tries > 0 for row in rows), rows
    assert all("files, all right" in row.found for row in rows)


def test_faults_are_found(tmp_path, monkeypatch):
    """A reader that loses a row, or rounds; and one that accepts what is wrong."""
    load = stress_data.load_vectors

    def load_less(path):
        found = load(path)
        return VectorSplits(found.train[1:], found.validation, found.test)

    def load_rounded(path):
        found = load(path)
        return VectorSplits(*(np.round(getattr(found, split), 1) for split in ("train", "validation", "test")))

    def load_anything(path):
        return VectorSplits(*[np.ones((2, 1))] * 3)

    faults = (load_less, [0, 3]), (load_rounded, [0, 5]), (load_anything, [1, 2, 4])
    for number, (reader, failing) in enumerate(faults):
        monkeypatch.setattr(stress_data, "load_vectors", reader)
        rows = data_campaign(tmp_path / str(number), seconds=1.0)
        assert not any(rows[n].is_good for n in failing), rows
        assert all(rows[n].is_good for n in (6, 7, 8))


@pytest.mark.parametrize("fault", ["", "another error"])
def test_an_error_must_name_the_file(tmp_path, fault):
    """Neither a reader without an error nor one that names another place is right."""

    def reader(path):
        if fault:
            raise ValueError(fault)

    assert "expected an error 'line 3'" in stress_data._refused(tmp_path, reader, "line 3")
