"""Every guide runs with a few steps, as it is written, and leaves a picture; it opens as a notebook."""

import os
import re

import jax
import pytest

from tests.paths import ROOT

GUIDES = {path.stem: path for path in sorted((ROOT / "experiments" / "guides").glob("*.py"))}
MARKDOWN, CODE = "# %% [markdown]", "# %%"
CONSTANTS = re.compile(r"^(STEPS[A-Z, ]*) = ([\d, ]+)$", re.MULTILINE)
SMALL = {
    "STEPS": 10,
    "BLOCKS": 1,
    "DENSE": 0,
    "FIELDS": 4,
    "PAIRS": 200,
    "RANKED": 8,
    "SAMPLES": 16,
    "SWEEPS": 10,
    "TRAIN": 1797 - 128,
    "WARMUP": 4,
}


def cells(text):
    """(marker, lines) of every cell."""
    parts = re.split(r"^(# %%.*)$", text, flags=re.MULTILINE)
    assert parts[0] == "", "a guide starts with a cell"
    return [(marker, body.strip("\n").split("\n")) for marker, body in zip(parts[1::2], parts[2::2], strict=True)]


def in_small(text):
    """The guide with small constants."""
    assert len(CONSTANTS.findall(text)) == 1, "one line of constants, STEPS first"

    def small(line):
        names, numbers = line[1].split(", "), line[2].split(", ")
        values = (str(SMALL.get(name, number)) for name, number in zip(names, numbers, strict=True))
        return f"{line[1]} = {', '.join(values)}"

    return CONSTANTS.sub(small, text)


def test_guides():
    """All that were promised are there."""
    tasks = {"table", "images", "conditional", "sets", "lattice", "inside", "devices", "certificates", "pytorch"}
    assert GUIDES.keys() == tasks
    page = (ROOT / "experiments" / "guides" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.py\)", page)) == tasks


@pytest.mark.parametrize("name", GUIDES)
def test_cells(name):
    """Cells of text, which starts with a title, and cells of code that are complete, in turn."""
    text = GUIDES[name].read_text()
    assert len(text.splitlines()) <= 150
    found = cells(text)
    assert found[0][0] == MARKDOWN and found[0][1][0].startswith("# # ")
    assert {marker for marker, _ in found} == {MARKDOWN, CODE}
    for marker, lines in found:
        if marker == MARKDOWN:
            assert all(line.startswith("# ") or line in ("#", "") for line in lines), lines
        else:
            compile("\n".join(lines), name, "exec")
    assert found[-1][0] == CODE and found[-1][1][-1] == f'figure.savefig("{name}.png", dpi=120)'


@pytest.mark.parametrize("name", GUIDES)
def test_notebook(name):
    """jupytext, where it is installed, finds the same cells."""
    jupytext = pytest.importorskip("jupytext")
    text = GUIDES[name].read_text()
    kinds = {MARKDOWN: "markdown", CODE: "code"}
    notebook = jupytext.reads(text, fmt="py:percent")
    assert [cell.cell_type for cell in notebook.cells] == [kinds[marker] for marker, _ in cells(text)]


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.filterwarnings("ignore:length. Poisson:RuntimeWarning")  # the papers' law, which a guide shows
def test_guide(name, tmp_path, monkeypatch):
    """It runs as a user runs it, but for its sizes, in JAX's default modes."""
    if name == "inside":
        pytest.importorskip("distrax")
        pytest.importorskip("numpyro")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what a guide sets is not for other tests
    code = compile(in_small(GUIDES[name].read_text()), GUIDES[name], "exec")
    modes = jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with modes[0], modes[1], modes[2]:
        exec(code, {"__name__": "guide"})
    picture = pyplot.imread(tmp_path / f"{name}.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 900 and picture[..., :3].std() > 0.05
    pyplot.close("all")
