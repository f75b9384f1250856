"""Results that a study has kept."""

import json

import pytest

from experiments.studies.parts.kept import kept


def test_kept(tmp_path):
    """The result of the same settings; a file of others, or of something else, is named and stays."""
    path = tmp_path / "run.json"
    assert kept(path, {"a": 1}, "result") is None
    path.write_text(json.dumps({"job": {"seeds": [1, 2]}, "config": "x", "result": 0.5}))
    assert kept(path, {"job": {"seeds": (1, 2)}, "config": "x"}, "result") == 0.5
    for settings in ({"job": {"seeds": (1, 3)}, "config": "x"}, {"job": {"seeds": (1, 2)}, "config": "y"}):
        with pytest.raises(ValueError, match=r"workdir: expected .*run.json to be of the same settings, got another"):
            kept(path, settings, "result")
    for text in ("[]", "{", '{"job": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"workdir: expected .*run.json to be a file of this command"):
            kept(path, {"job": 1}, "result")
