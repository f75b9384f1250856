"""Files are short, and imports point one way: from what trains down to the functions on arrays."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "resflow_jax"
INTERNALS = "resflow_jax.functional.primitives.jax_internals"  # the one module that may use JAX's undocumented parts
# ... of each part: the other parts that its modules may import
BELOW = {
    "functional": set(),
    "layers": {"functional"},
    "models": {"functional", "layers"},
    "data": {"functional"},
    "interop": {"functional", "layers", "models", "io"},
    "io": {"functional", "layers", "models", "interop"},  # configs of flows of PyTorch are read and written too
    "training": {"functional", "layers", "models", "data", "io"},
    "plot": {"functional", "models", "training"},
}
# Files above the limit, with their length: such a file may only become shorter.
LONGER = {
    "resflow_jax/functional/norm_bounds.py": 411,
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# pytest reads conftest.py, and no module imports it
MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "conftest.py"}


def imported(tree: ast.AST) -> Iterator[str]:
    """All modules that a file imports, inside of functions too, with the names from them: "a.b" and "a.b.name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


IMPORTS = {module: set(imported(ast.parse(path.read_text()))) for module, path in MODULES.items()}


def part_of(module: str) -> str:
    """The part of the package that contains a module; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def modules_below(module: str) -> set[str]:
    """The modules that a module imports; of a package and a module in it the latter."""
    found = IMPORTS[module] & set(MODULES) - {module}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("top", ["resflow_jax", "experiments", "tests"])
def test_no_file_is_long(top):
    """At most 400 lines."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sorted((ROOT / top).rglob("*.py"))
    }
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > LONGER.get(name, 400)}


def test_what_is_no_longer_long():
    """A file that has become short has no exception any more."""
    assert not [name for name in LONGER if len((ROOT / name).read_text().splitlines()) <= 400]


def test_every_part_has_its_place():
    """A new folder of the package needs a place in the order."""
    assert {part_of(module) for module in MODULES} == {"", *BELOW}


@pytest.mark.parametrize("part", BELOW)
def test_imports_point_down(part):
    """No module imports a part that stands above its own, nor experiments or tests, nor the whole package."""
    allowed = {part, *BELOW[part]}
    for module in MODULES:
        if part_of(module) != part:
            continue
        for name in IMPORTS[module]:
            top = name.split(".")[0]
            assert top not in ("experiments", "tests"), f"{module} imports {name}"
            if top == "resflow_jax" and name != "resflow_jax":
                assert part_of(name) in allowed, f"{module} imports {name}"
        assert "resflow_jax" not in modules_below(module), f"{module} imports the whole package"


def test_no_imports_in_a_circle():
    """Every module can be imported first; an import inside of a function counts as well."""
    finished, open_ = set(), []

    def visit(module):
        assert module not in open_, " imports ".join([*open_[open_.index(module) :], module])
        if module in finished:
            return
        open_.append(module)
        for below in sorted(modules_below(module)):
            visit(below)
        finished.add(open_.pop())

    for module in MODULES:
        visit(module)
    assert finished == set(MODULES)


def test_one_file_uses_what_jax_does_not_document():
    """A new release of JAX can break that one only."""
    private = ("jax._src", "jax.extend", "jax.interpreters")
    found = {
        module for module, names in IMPORTS.items() if any(f"{name}.".startswith(p) for p in private for name in names)
    }
    assert found == {INTERNALS}
    for module, path in MODULES.items():
        dotted = {
            ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert module == INTERNALS or not [name for name in dotted if name in private], module
