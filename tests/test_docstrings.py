"""Every public name explains itself: a summary, what it takes, gives and raises, and an example that runs.

The examples themselves are doctests, which pytest runs (see resflow_jax/conftest.py).
"""

import inspect
from dataclasses import fields, is_dataclass

import pytest

import resflow_jax as rf

BRIDGES = ("distrax", "flowjax", "numpyro", "stateless")
# Values without a docstring: a dictionary and a union of types.
PLAIN = {"ACTIVATIONS", "Estimator"}


def public_names() -> dict[str, object]:
    """Every documented object by its name as a user writes it after `rf.`."""
    found = {name: getattr(rf, name) for name in rf.__all__ if name not in PLAIN}
    return found | {f"training.{name}": getattr(rf.training, name) for name in rf.training.__all__}


def bridge_names(bridge: str) -> dict[str, object]:
    """The public classes and functions that a bridge defines."""
    module = getattr(rf.interop, bridge)
    return {
        f"interop.{bridge}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
    }


def lacking(value: object) -> list[str]:
    """What the docstring of a public object lacks."""
    text = inspect.getdoc(value) if not isinstance(value, type) else vars(value).get("__doc__")
    if not text:
        return ["a docstring"]
    found = [] if ">>>" in text else ["an example with >>>"]
    if inspect.isfunction(value):
        found += [f"the section {section}" for section in ("Args", "Returns") if not has_section(text, section, value)]
    return found + [f"the argument {name}" for name in settings(value) if name not in words(text)]


def has_section(text: str, section: str, function: object) -> bool:
    """Whether the section is there, or there is nothing to say in it."""
    signature = inspect.signature(function)
    needless = signature.return_annotation in (None, "None") if section == "Returns" else not signature.parameters
    return needless or f"{section}:" in text


def settings(value: object) -> list[str]:
    """What a docstring has to explain: arguments of a function, fields that a dataclass adds, or those of a tuple."""
    if inspect.isfunction(value):
        return [name for name in inspect.signature(value).parameters if name != "self"]
    if isinstance(value, type) and is_dataclass(value):
        own = inspect.get_annotations(value)
        return [field.name for field in fields(value) if field.init and field.name in own]
    return list(getattr(value, "_fields", ()))


def words(text: str) -> set[str]:
    """The identifiers in a text."""
    return set("".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split())


@pytest.mark.parametrize("name", public_names())
def test_public_name(name):
    """Its docstring is complete."""
    assert lacking(public_names()[name]) == []


@pytest.mark.parametrize("bridge", BRIDGES)
def test_bridge(bridge):
    """The docstrings of a bridge are complete too."""
    if bridge != "stateless":
        pytest.importorskip(bridge)
    for name, value in bridge_names(bridge).items():
        assert lacking(value) == [], name
