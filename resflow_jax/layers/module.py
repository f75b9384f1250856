"""The modules of Flax NNX that layers are made of, safe under `nnx.tabulate`.

`nnx.tabulate` replaces every public method of the classes of a module by one that records its calls, and restores
them at its end. If an error ends it, it does not restore them, and every later call of a method of these classes
fails. Here only `__call__` and `apply` are recorded, which take and return arrays, and only for the copy that is
tabulated.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from flax import nnx
from flax.nnx import reprlib, summary

from resflow_jax.layers.module_texts import Parts, Shape, module_text

_RECORDED = ("__call__", "apply")


class _ModuleType(type(nnx.Module)):
    """The metaclass whose classes stay unchanged for all objects except the tabulated ones."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if getattr(getattr(value, "__code__", None), "co_filename", None) == summary.__file__:
            original = _original(value.__wrapped__)
            value = _recorded(value, original) if name in _RECORDED else original
        else:
            value = _original(value)
        if value is next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None):
            if name in vars(cls):
                super().__delattr__(name)  # an inherited method must not become an attribute of the class
            return
        super().__setattr__(name, value)


def _recorded(recording: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The method that records for the tabulated copy, and is the original for all other objects."""

    @wraps(original)
    def method(self, *args, **kwargs):
        # An earlier summary that failed may have left its method in the class; the present summary then calls it.
        is_present = getattr(type(self), original.__name__) is method
        function = recording if is_present and hasattr(self, "_nnx_tabulate_id") else original
        return function(self, *args, **kwargs)

    method.original = original
    return method


def _original(value: Any) -> Any:
    return getattr(value, "original", value)


class Module(nnx.Module, metaclass=_ModuleType):
    """`nnx.Module` with a short `repr`; see the head of this file, and `layers.module_texts`.

    A class may define `_repr_text(text)`, its text on one line, where text(part) returns the text of a module or
    setting inside; and `_repr_promise()`, the bound on its Lipschitz constant that it promises.
    """

    def _repr_parts(self, shape: Shape | None) -> Parts | None:
        """The parts that may have lines of their own, for events x of this shape; None where there are none."""
        return None

    def __repr__(self) -> str:
        return module_text(self)

    def __str__(self) -> str:
        return repr(self)

    def __nnx_repr__(self) -> Iterator[reprlib.Object]:
        """The same text inside another module of Flax."""
        yield reprlib.Object(type=repr(self), start="", end="")


class List(nnx.List, metaclass=_ModuleType):
    """`nnx.List`; see the head of this file."""


class Dict(nnx.Dict, metaclass=_ModuleType):
    """`nnx.Dict`; see the head of this file."""


class Linear(nnx.Linear, metaclass=_ModuleType):
    """`nnx.Linear`; see the head of this file."""

    def __call__(self, inputs: Any) -> Any:
        return super().__call__(inputs)
