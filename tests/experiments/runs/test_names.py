"""Names of files and classes as text: no control characters on a terminal, no mathematics in a picture, no markup."""

import csv

import numpy as np
import pytest

from experiments.runs import pictures
from experiments.runs.likelihoods import typicality_csv
from experiments.runs.names import printable, without_math
from experiments.runs.report import write_report
from experiments.runs.tables import print_table
from resflow_jax import Certificate

NAMES = ["US$ and $_{x$", "$\\frac{$", "a$b", "\x1b[31mred", "\udcff.npy", "new\nline", "<b>bold</b>"]


def test_printable():
    assert printable("a\x1b[2Jb\udcff") == "a\\x1b[2Jb\\udcff"
    assert printable("a\nb\tc") == "a\\nb\\tc" and printable("a\nb", keep="\n") == "a\nb"
    assert printable("Zürich 東京 $x$") == "Zürich 東京 $x$"
    assert without_math("US$ and $x$") == "US\\$ and \\$x\\$"


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_pictures(name, tmp_path):
    """Titles and names of classes with any characters."""
    points = np.random.default_rng(0).normal(size=(20, 2))
    pictures.save_scatter(tmp_path / "scatter.png", points, points, name)
    pictures.save_confusion(tmp_path / "confusion.png", np.array([0, 1]), np.array([0, 1]), [name, "b"], name)
    pictures.save_histograms(tmp_path / "histograms.png", {"log p": {name: points[:, 0]}}, name)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_report(name, tmp_path, capsys):
    """It has no tag of the name, and can be written and printed."""
    write_report(tmp_path / "report.html", name, {name: name}, {}, {}, Certificate((), 1.0, 1.0), {"path": name})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in page and ("&lt;b&gt;" in page) == ("<b>" in name)
    print_table({"data": name})
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a,b.npy", 'quo"te', "new\nline"])
def test_a_csv_file(name):
    """It has six cells in each line, and the name as it is."""
    scores = {name: np.array([-1.0, -np.inf])}
    text = typicality_csv(scores, {name: {"score": scores[name], "p_value": scores[name], "quantile": scores[name]}})
    head, *rows = csv.reader(text.splitlines(keepends=True))
    assert head == ["set", "example", "likelihood", "score", "p_value", "quantile"]
    assert [row[:3] for row in rows] == [[name, "0", "-1"], [name, "1", "-inf"]] and {len(row) for row in rows} == {6}


def test_scores_that_are_not_finite(tmp_path, monkeypatch):
    """Are left out of a histogram, and counted in its legend; all of a set may be so."""
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    sets = {"data": np.linspace(0, 1, 9), "far": np.array([0.5, -np.inf, np.nan]), "farthest": np.full(2, np.inf)}
    pictures.save_histograms(tmp_path / "histograms.png", {"log p": sets}, "title")
    labels = [text.get_text() for text in seen[0].axes[0].get_legend().get_texts()]
    assert labels == ["data", "far (2 not finite)", "farthest (2 not finite)"]
