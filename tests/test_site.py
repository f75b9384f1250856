"""The site: its reference has every public name, and docstrings with formulas become reST that means the same."""

import importlib
import inspect
import re

import pytest

import resflow_jax as rf
from tests.paths import ROOT

SITE = ROOT / ".site"


def load(name):
    """A module of the folder of the site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE, DOCSTRINGS, BUILD = load("reference"), load("docstrings"), load("build")


def test_every_public_name_has_one_place():
    names = [name for topic in REFERENCE.TOPICS.values() for name in topic.names.split()]
    modules = {"interop", *REFERENCE.MODULES} & set(rf.__all__)
    assert sorted(names) == sorted(set(names))
    assert {*names, *modules} == set(rf.__all__)


def test_every_name_of_public_modules():
    assert {name.partition(".")[2] for name in REFERENCE.MODULES if name.startswith("interop.")} == set(
        rf.interop.__all__
    )
    assert set(REFERENCE.MODULES["training"].names.split()) == set(rf.training.__all__)


@pytest.mark.parametrize("name", sorted(REFERENCE.MODULES.keys() - {"training"}))
def test_every_name_of_a_module(name):
    """What a module defines or gives another name, but not what it merely imports."""
    needed = {"interop.distrax": "distrax", "interop.flowjax": "flowjax", "interop.numpyro": "numpyro"}
    if name in needed:
        pytest.importorskip(needed[name])
    module = importlib.import_module(f"resflow_jax.{name}")
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }
    listed = set(REFERENCE.MODULES[name].names.split())
    assert defined <= listed and all(hasattr(module, key) for key in listed)


def test_pages(tmp_path):
    """Each page names what it documents, by a directive that fits."""
    REFERENCE.write(tmp_path)
    pages = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert pages.keys() == REFERENCE.TOPICS.keys() | REFERENCE.MODULES.keys()
    flow = re.search(r"autoclass:: Flow\n   :members:\n   :inherited-members: (.*)\n\n", pages["flows"])[1].split(", ")
    private = [base.__name__ for base in rf.Flow.__mro__ if "sample" in vars(base) and base is not rf.Flow]
    assert "Module" in flow and not set(private) & set(flow)
    assert ":inherited-members: Flow, " in pages["flows"].partition("autoclass:: ResidualFlow")[2]
    assert ".. autofunction:: residual\n" in pages["functional"]
    assert ".. py:data:: Estimator\n\n   Any of :py:obj:`Exact`" in pages["estimators"]
    assert "``lipswish``" in pages["contractions"]
    assert pages["interop.stateless"].startswith("interop.stateless\n=") and "automodule" in pages["interop.stateless"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log|det J| of [*shape, 3] and W_", r"log\|det J\| of [\*shape, 3] and W\_"),
        ("see `Flow.forward`, `rf.Exact()`s", r"see :py:obj:`Flow.forward`, ``rf.Exact()``\ s"),
        ("see `f(x,\n  y)` there", "see ``f(x, y)`` there"),
        ("of\n\n    a = |b|\n\ntext", "of\n\n.. code-block:: text\n\n    a = |b|\n\ntext"),
        ("of\n\n    a = b * c\n", "of\n\n.. code-block:: python\n\n    a = b * c\n"),
        ("Args:\n  f: f.\n  g: |g|\n\n    and more", "Args:\n  f: \\f.\n  g: \\|g\\|\n\n    and more"),
        ("Returns:\n  (a, b): a [*n]\n  and b", ":returns: (a, b): a [\\*n]\n  and b"),
        ("Example:\n  >>> 2 * 3\n  6", "Example:\n  >>> 2 * 3\n  6"),
        ("Example:\n  a = 2 * 3", "Example:\n  .. code-block:: python\n\n      a = 2 * 3"),
        (">>> 2 * 3\n6\n\nx * y", ">>> 2 * 3\n6\n\nx \\* y"),
    ],
)
def test_docstrings(text, expected):
    converted = "\n".join(DOCSTRINGS.convert(text.split("\n")))
    assert converted.strip().replace("\n\n\n", "\n\n") == expected.strip()


def test_links(tmp_path):
    """Links to folders go to their pages, those to code to copies, those to pages, guides and addresses stay."""
    page = tmp_path / "experiments" / "README.md"
    links = (
        "[x](../tests) [`y`](guides/) [z](guides#part) [f](../tests/paths.py) [g](guides/table.py) [p](README.md#a) "
        "[h](https://a.b/a) [i](#a) ![j](guides) [out](../../../a)"
    )
    expected = (
        "x [`y`](guides/README.md) [z](guides/README.md#part) [f](../tests/paths.py.txt) [g](guides/table.py) "
        "[p](README.md#a) [h](https://a.b/a) [i](#a) ![j](guides) [out](../../../a)"
    )
    assert BUILD.LINK.sub(lambda link: BUILD._as_on_site(link, page, tmp_path), links) == expected
    assert (tmp_path / "tests" / "paths.py.txt").read_bytes() == (ROOT / "tests" / "paths.py").read_bytes()


def test_index_lists_every_guide_and_page():
    listed = (SITE / "index.md").read_text().split("\n")
    guides = [f"experiments/guides/{path.stem}" for path in (ROOT / "experiments" / "guides").glob("*.py")]
    pages = [f"reference/{name}" for name in REFERENCE.TOPICS.keys() | REFERENCE.MODULES.keys()]
    assert {*guides, *pages} <= set(listed)


def test_signature_of_a_module_of_flax():
    """The metaclass of Flax hides the arguments."""
    pytest.importorskip("sphinx")
    arguments, _ = DOCSTRINGS.signature(None, "class", "resflow_jax.Flow", rf.Flow, None, "(*args)", None)
    assert re.sub(r"~[\w.]*\.", "", arguments).startswith("(bijector: Bijector, base: Any = None, *, event_shape")
    assert DOCSTRINGS.signature(None, "class", "resflow_jax.Exact", rf.Exact, None, "(chunk_size)", None) is None
