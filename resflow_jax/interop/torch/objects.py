"""The objects that a PyTorch checkpoint may have, and what is made of them: plain data, NumPy arrays and stubs.

A pickle names functions and classes, and their arguments. Names are only looked up in the tables below. They are never
imported, and nothing in the file is called:

  - A tensor or a parameter becomes a NumPy array.
  - OrderedDict, set, frozenset, bytes, argparse.Namespace and NumPy's numbers become such objects, torch.Size a tuple,
    and torch's dtypes those of NumPy.
  - A class or a function of `resflows` (formerly `lib`) or `torch.nn`, and a torch.device, become a `Stub`, which has
    what the file says of it and no behaviour.
  - Every other name is refused.

Only objects that were made for the file can get attributes: a stub, a namespace, or an OrderedDict (its `_metadata`).
So a file changes nothing but the objects that are read from it.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resflow_jax.interop.torch.storages import DTYPES, STORAGES, Refused, Storage, brief

_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray"}
_LONGEST_NAME = 1000  # characters
_KEY_PARTS = 8
_TUPLES = 256  # most keys of a dict with a tuple as key
_OBJECT = 200  # bytes of an object without its elements
_STUBBED = ("resflows", "lib", "torch.nn")  # the authors' package was named lib until 2023


@dataclass(eq=False)
class Stub:
    """An object of a class that is not imported, or the class or function itself, as the file describes it.

    Attributes:
      module: module of its class.
      name: name of its class.
      args: arguments of its class; None for the class or the function itself.
      state: its attributes, usually a dict; None if it has none.
      items: the items that were appended to it, pairs (key, value) for a mapping; None if there were none.
    """

    module: str
    name: str
    args: tuple | None = field(default=(), repr=False)
    state: Any = field(default=None, repr=False)
    items: list | None = field(default=None, repr=False)


def look_up(module: Any, name: Any) -> Stub | np.dtype:
    """Returns what a name in the file stands for: a dtype, or the stub of a class or function itself."""
    if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_NAME:
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
    """Returns what the file makes by calling a function or a class."""
    if not _is_stub(target, itself=True) or type(args) is not tuple:
        raise Refused(f"expected a class or a function and a tuple of arguments, got {brief(target)} and {brief(args)}")
    builder = _BUILDERS.get((target.module, target.name))
    return builder(*args) if builder else Stub(target.module, target.name, args)


def size_of(made: Any) -> int:
    """Returns about how many bytes an object takes that a call made, or work on it."""
    if isinstance(made, np.ndarray):
        return made.nbytes + _OBJECT
    if isinstance(made, tuple | set | frozenset | dict):
        return _OBJECT + 64 * len(made)
    return len(made) if type(made) is bytes else _OBJECT


def size_of_arguments(args: Any) -> int:
    """Returns about how much work a call is that reads all elements of its arguments."""
    return sum(64 * len(arg) for arg in args if type(arg) in (list, tuple)) if type(args) is tuple else 0


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
    """Appends items to a list or a stub."""
    if type(instance) is list:
        instance.extend(items)
    elif _is_stub(instance, itself=False):
        instance.items = instance.items or []
        instance.items.extend(items)
    else:
        raise Refused(f"expected a list to append to, got {brief(instance)}")


def update(instance: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Sets items of a dict, or adds them to those of a stub."""
    if type(instance) in (dict, OrderedDict):
        for key, value in pairs:
            instance[_check_new(key, instance)] = value
    elif _is_stub(instance, itself=False):
        extend(instance, pairs)
    else:
        raise Refused(f"expected a dict to set items of, got {brief(instance)}")


def add(instance: Any, elements: list) -> None:
    """Adds elements to a set."""
    if type(instance) is not set:
        raise Refused(f"expected a set to add to, got {brief(instance)}")
    for element in elements:
        instance.add(_check_new(check_key(element), instance))


def check_key(key: Any) -> Any:
    """Returns a key of a dict or an element of a set: a scalar, a stub or a short tuple of these, not nested further.

    A file could choose long numbers and tuples so that looking them up takes very long.
    """
    parts = key if type(key) is tuple else (key,)
    if len(parts) > _KEY_PARTS or not all(isinstance(part, str | bytes | int | float | Stub | None) for part in parts):
        raise Refused(f"expected keys that are strings, numbers or tuples of these, got {brief(key)}")
    if any(isinstance(part, int) and abs(part) >= 2**60 for part in parts):
        raise Refused(f"expected keys that are numbers below 2^60, got {brief(key)}")
    return key


def _check_new(key: Any, known: dict | set) -> Any:
    """Returns a key that is to be added; a dict must not have it already, and few of its keys may be tuples."""
    if isinstance(known, dict) and check_key(key) in known:
        raise Refused(f"expected every key of a dict once, got {brief(key)} twice")
    if type(key) is tuple and len(known) >= _TUPLES:
        raise Refused(f"expected at most {_TUPLES} keys together with a tuple, got more")
    return key


def persistent(storages: dict[str, Storage], limit: int) -> Callable[[Any], Storage | Stub]:
    """Returns the loader of objects outside of a pickle. It adds storages of `limit` bytes in total to the dict."""
    total = 0

    def load(reference: Any) -> Storage | Stub:
        match reference:
            case ("module", Stub() as definition, _, _):  # the source code of the class is part of the reference
                return definition
            case ("storage", Stub() as kind, str(key), _, int(length), *view) if view in ([], [None]):
                storage = _storage(kind, length)
            case _:
                raise Refused(f"expected a storage, got a reference to {brief(reference)}")
        if not 0 <= storage.nbytes <= limit:
            raise Refused(f"expected storages no longer than the {limit} bytes of the file, got {storage.nbytes} bytes")
        if key not in storages:
            nonlocal total
            total += storage.nbytes
            if total > limit:
                raise Refused(f"expected storages no longer than the {limit} bytes of the file in total, got {total}")
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
    """Whether a value is a stub: of a class or function itself, or else of an object."""
    return isinstance(value, Stub) and (value.args is None) is itself


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    return _tensor_v3(storage, offset, size, stride, False, None, getattr(storage, "dtype", None))


def _tensor_v2(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, flags: Any = None) -> Any:
    return _tensor_v3(storage, offset, size, stride, grad, hooks, getattr(storage, "dtype", None), flags)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> np.ndarray:
    """The array of a tensor. Gradients and hooks do not matter; flags, as for a negated view, are refused."""
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
    made = set()
    add(made, list(_elements(elements)))
    return made


def _frozenset(elements: Any = ()) -> frozenset:
    return frozenset(_set(elements))


def _size(elements: Any = ()) -> tuple:
    return tuple(_elements(elements))


def _elements(elements: Any) -> list | tuple:
    if type(elements) not in (list, tuple):
        raise Refused(f"expected a list of elements, got {brief(elements)}")
    return elements


def _bytes() -> bytes:
    """Protocol 2 calls `bytes` for empty bytes alone."""
    return b""


def _encode(text: Any, encoding: Any) -> bytes:
    """For all other bytes, protocol 2 encodes a text with one character for each byte."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused(f"expected bytes as latin1 text, got {brief(text)} as {brief(encoding)}")
    return text.encode("latin1")


def _reconstructor(target: Any, base: Any, state: Any) -> Any:
    """The function by which protocols 0 and 1 make an object."""
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
