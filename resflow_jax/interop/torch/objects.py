"""What a PyTorch checkpoint may hold, and what is made of it: plain data, numpy arrays and stubs.

A pickle names functions and classes, and says what to call them with. A name is only looked up in the tables below;
it is never imported, and nothing of the file is called:

  - a tensor or a parameter becomes a numpy array;
  - OrderedDict, set, frozenset, bytes, argparse.Namespace, numpy's numbers, torch.Size (a tuple) and torch's dtypes
    (numpy's) become what they are;
  - a class or a function of `resflows` (`lib`, before it was renamed) or `torch.nn`, and a torch.device, become a
    `Stub`: what the file says of it, without any behaviour;
  - every other name is refused.

An attribute can be given only to an object that was made for this file: a stub, a namespace, or an OrderedDict (its
`_metadata`). So nothing of a file outlives what was read from it.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resflow_jax.interop.torch.storages import DTYPES, STORAGES, Refused, Storage, brief

_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray"}
_STUBBED = ("resflows", "lib", "torch.nn")  # the authors' package was named lib until 2023


@dataclass(eq=False)
class Stub:
    """An object of a class that is not imported, or that class or function itself: only what the file says of it.

    Attributes:
      module: where its class is defined.
      name: the name of its class.
      args: what its class is called with; None if the class or the function itself is meant.
      state: its attributes, as a rule a dict; None if it has none.
      items: what was appended to it, a pair of key and value each if it is a mapping; None if nothing was.
    """

    module: str
    name: str
    args: tuple | None = field(default=(), repr=False)
    state: Any = field(default=None, repr=False)
    items: list | None = field(default=None, repr=False)


def look_up(module: Any, name: Any) -> Stub | np.dtype:
    """What stands for a name in the file: a dtype, or the stub of a class or function itself."""
    if type(module) is not str or type(name) is not str:
        raise Refused(f"expected names of classes and functions, got {brief(module)} and {brief(name)}")
    module = _NAMES.get(module, module)
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if (module, name) not in _NAMED and not _is_stubbed(module, name):
        raise Refused(
            f"refused to build '{module}.{name}': expected plain data, tensors, and classes of {' and '.join(_STUBBED)}"
        )
    return Stub(module, name, args=None)


def _is_stubbed(module: str, name: str) -> bool:
    parts = [*module.split("."), name]
    is_plain = all(part.isidentifier() and not part.startswith("__") for part in parts)
    return is_plain and f"{module}.".startswith(tuple(f"{top}." for top in _STUBBED))


def build(target: Any, args: Any) -> Any:
    """What the file makes by calling a function or a class."""
    if not _is_stub(target, itself=True) or type(args) is not tuple:
        raise Refused(f"expected a class or a function and a tuple of arguments, got {brief(target)} and {brief(args)}")
    builder = _BUILDERS.get((target.module, target.name))
    return builder(*args) if builder else Stub(target.module, target.name, args)


def size_of(made: Any) -> int:
    """About how many bytes an object takes that was made by a call."""
    if isinstance(made, np.ndarray):
        return made.nbytes
    if isinstance(made, tuple | set | frozenset | OrderedDict):
        return 64 * len(made)
    return len(made) if type(made) is bytes else 0


def set_state(instance: Any, state: Any) -> None:
    """Gives an object its attributes, if it can have any."""
    if _is_stub(instance, itself=False):
        instance.state = state
    elif type(instance) is argparse.Namespace and type(state) is dict and all(type(key) is str for key in state):
        vars(instance).update(state)
    elif type(instance) is OrderedDict and type(state) is dict and state.keys() == {"_metadata"}:
        instance._metadata = state["_metadata"]  # of a state_dict: the versions of its modules
    elif not (isinstance(instance, np.dtype) and type(state) is tuple and state[1] in ("<", "|")):
        raise Refused(f"expected an object that has attributes, got {brief(instance)} to set {brief(state)}")


def extend(instance: Any, items: list) -> None:
    """Appends to a list or a stub."""
    if type(instance) is list:
        instance.extend(items)
    elif _is_stub(instance, itself=False):
        instance.items = instance.items or []
        instance.items.extend(items)
    else:
        raise Refused(f"expected a list to append to, got {brief(instance)}")


def update(instance: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Sets items of a dict, or notes them in a stub."""
    if type(instance) in (dict, OrderedDict):
        instance.update((check_key(key), value) for key, value in pairs)
    elif _is_stub(instance, itself=False):
        extend(instance, pairs)
    else:
        raise Refused(f"expected a dict to set items of, got {brief(instance)}")


def add(instance: Any, elements: list) -> None:
    """Adds to a set."""
    if type(instance) is not set:
        raise Refused(f"expected a set to add to, got {brief(instance)}")
    instance.update(map(check_key, elements))


def check_key(key: Any) -> Any:
    """A key of a dict or an element of a set: a scalar, a stub, or a tuple of these, so that no hash is nested."""
    for part in key if type(key) is tuple else (key,):
        if not isinstance(part, str | bytes | int | float | np.generic | Stub | None):
            raise Refused(f"expected keys that are strings, numbers or tuples of these, got {brief(key)}")
    return key


def persistent(storages: dict[str, Storage], limit: int) -> Callable[[Any], Storage | Stub]:
    """The loader of what lies outside of a pickle. It enters storages, of at most `limit` bytes each, into the dict."""

    def load(reference: Any) -> Storage | Stub:
        match reference:
            case ("module", Stub() as definition, _, _):  # the source of a class comes along with it
                return definition
            case ("storage", Stub() as kind, str(key), _, int(length), *view) if view in ([], [None]):
                storage = _storage(kind, length)
            case _:
                raise Refused(f"expected a storage, got a reference to {brief(reference)}")
        if not 0 <= storage.nbytes <= limit:
            raise Refused(f"expected storages no longer than the {limit} bytes of the file, got {storage.nbytes} bytes")
        known = storages.setdefault(key, storage)
        if (known.dtype, known.nbytes) != (storage.dtype, storage.nbytes):
            raise Refused(f"expected one dtype and length of storage {key!r:.80}, got {known} and {storage}")
        return known

    return load


def _storage(kind: Stub, length: int) -> Storage:
    if (kind.module, kind.name) == ("torch.storage", "UntypedStorage"):
        return Storage(None, length)
    if kind.module != "torch" or kind.name not in STORAGES:
        raise Refused(f"expected a storage of numbers, got {kind}")
    dtype = DTYPES[STORAGES[kind.name]]
    return Storage(dtype, length * dtype.itemsize)


def _is_stub(value: Any, itself: bool) -> bool:
    """A stub that is a class or a function itself, or one that is not."""
    return isinstance(value, Stub) and (value.args is None) is itself


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    return _tensor_v3(storage, offset, size, stride, False, None, getattr(storage, "dtype", None))


def _tensor_v2(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, flags: Any = None) -> Any:
    return _tensor_v3(storage, offset, size, stride, grad, hooks, getattr(storage, "dtype", None), flags)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> np.ndarray:
    """Whether it has a gradient and what hooks it has is of no use here; flags say it is, say, to be negated."""
    if type(storage) is not Storage or not isinstance(dtype, np.dtype) or storage.dtype not in (None, dtype) or flags:
        raise Refused(
            f"expected a tensor as it lies in a storage of numbers, got one of {brief(storage)} and {brief(dtype)} "
            f"with flags {brief(flags)}"
        )
    return storage.tensor(offset, size, stride, dtype)


def _parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> np.ndarray:
    if type(data) is not np.ndarray:
        raise Refused(f"expected the tensor of a parameter, got {brief(data)}")
    return data


def _ordered_dict(pairs: Any = ()) -> OrderedDict:
    made = OrderedDict()
    update(made, list(_elements(pairs)))
    return made


def _set(elements: Any = ()) -> set:
    return {check_key(element) for element in _elements(elements)}


def _frozenset(elements: Any = ()) -> frozenset:
    return frozenset(_set(elements))


def _size(elements: Any = ()) -> tuple:
    return tuple(_elements(elements))


def _elements(elements: Any) -> list | tuple:
    if type(elements) not in (list, tuple):
        raise Refused(f"expected a list of elements, got {brief(elements)}")
    return elements


def _bytes() -> bytes:
    """Protocol 2 calls `bytes` for the empty ones only."""
    return b""


def _encode(text: Any, encoding: Any) -> bytes:
    """... and encodes text that has one character a byte for all others."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused(f"expected bytes as latin1 text, got {brief(text)} as {brief(encoding)}")
    return text.encode("latin1")


def _reconstructor(target: Any, base: Any, state: Any) -> Any:
    """What protocols 0 and 1 make an object with."""
    if not _is_stub(base, itself=True) or base.name != "object" or state is not None:
        raise Refused(f"expected an object of a class without a base, got {brief(base)} and {brief(state)}")
    return build(target, ())


def _numpy_dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype:
    if type(code) is not str or code[:1] not in tuple("biufc") or not code[1:].isdecimal():
        raise Refused(f"expected a dtype of numbers, got {brief(code)}")
    return np.dtype(code)


def _numpy_number(dtype: Any, data: Any) -> np.generic:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise Refused(f"expected a number of numpy and its bytes, got {brief(dtype)} and {brief(data)}")
    return np.frombuffer(data, dtype)[0]


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "bytes"): _bytes,
    ("builtins", "frozenset"): _frozenset,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered_dict,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_number,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
}
_NAMED = {
    *_BUILDERS,
    *(("torch", name) for name in STORAGES),
    ("torch.storage", "UntypedStorage"),
    ("torch", "device"),
    ("builtins", "object"),
}
