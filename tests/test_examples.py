"""The page of examples: each runs with fewer steps, in float32 and plain modes, and none is longer than 25 lines."""

import re
from pathlib import Path

import jax
import pytest

PAGE = (Path(__file__).parent.parent / ".github" / "EXAMPLES.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
IMPORTS = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
LOOP = SECTIONS.pop("A training loop")
# What is printed is finite after a few steps, too.
FEWER = {
    "steps=100": "steps=5",
    "steps=30": "steps=5",
    "size=(30, 64)": "size=(5, 64)",
    "num_warmup=50, num_samples=50": "num_warmup=5, num_samples=5",
}


@pytest.fixture(autouse=True)
def as_a_user(tmp_path, monkeypatch):
    """An own directory, and JAX as it is by default."""
    monkeypatch.chdir(tmp_path)
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def test_page():
    """All examples that a composed flow must be able to do are there."""
    assert len(SECTIONS) == 11 and PAGE.count("```python") == len(SECTIONS) + 2
    for name, code in (SECTIONS | {"loop": LOOP}).items():
        assert len(code.splitlines()) <= 25, name
    assert all(many in PAGE for many in FEWER)


@pytest.mark.parametrize("name", SECTIONS)
def test_example(name):
    """It runs, and what it prints is finite."""
    if "flowjax" in name:
        pytest.importorskip("flowjax")
    if "NumPyro" in name:
        pytest.importorskip("numpyro")
    shown = []
    code = IMPORTS + LOOP + SECTIONS[name]
    for many, few in FEWER.items():
        code = code.replace(many, few)
    exec(
        compile(code, f"example {name}", "exec"), {"print": lambda *values: shown.extend(values), "__name__": "example"}
    )
    for value in shown:
        if isinstance(value, float | jax.Array):
            assert jax.numpy.isfinite(value).all(), value
