"""The examples of the pages run as they stand, but for the number of keys, in float32 and JAX's own modes."""

import re

import jax
import numpy as np
import pytest

import resflow_jax as rf
from experiments.runs import rehearsal
from tests.paths import ROOT

FEWER = {"jax.random.split(jax.random.key(2), 2000)": "jax.random.split(jax.random.key(2), 200)"}  # means over keys
PAGES = [ROOT / "README.md", *sorted([*ROOT.glob("resflow_jax/**/README.md"), *ROOT.glob("experiments/**/README.md")])]


def run_page(path, tmp_path, monkeypatch):
    """The names after all python blocks of a page, one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "number_of_cores", lambda: 1)
    names = {}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),  # as users have it
        jax.numpy_rank_promotion("allow"),
    ):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
            for many, few in FEWER.items():
                block = block.replace(many, few)
            exec(compile(block, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_run(path, tmp_path, monkeypatch):
    names = run_page(path, tmp_path, monkeypatch)
    if path == PAGES[0]:
        exact = names["flow"].log_prob(names["test"], estimator=rf.Exact())
        assert exact.mean() > 6.2  # a full Gaussian's is 5.96
        assert names["samples"].shape == (100, 6) and np.isfinite(names["samples"]).all()
        assert names["report"].is_certified


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    """Links to files of the repository, with anchors that are headings of a page."""
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text()):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), link
        if anchor:
            assert anchor[1:] in headings(target.read_text()), (link, anchor)


def headings(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
