"""An interpreter of the pickles in PyTorch checkpoints that cannot call anything.

A pickle is a program for a machine with a stack and a memo. `pickle.Unpickler` runs it with real functions and classes,
so that its safety depends on every object that it can reach. Here `pickletools` parses the instructions, which executes
nothing. The few instructions that torch.save writes (protocols 1 to 5) act on plain data. Names, calls and attributes
go to `interop.torch.objects`, which makes inert objects of them. Any other instruction is refused.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from resflow_jax.interop.torch.objects import (
    add,
    build,
    check_key,
    extend,
    look_up,
    set_state,
    size_of,
    size_of_arguments,
    update,
)
from resflow_jax.interop.torch.storages import Refused, brief

_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BITS = 2**13  # of an integer
_EMPTY_BYTES = 64  # of an empty list
_EMPTY_SET_BYTES = 216
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def interpret(file: BinaryIO, limit: int, load_persistent: Callable[[Any], Any] | None = None) -> Any:
    """Returns the object of the pickle at the position of a file. The position is then the end of the pickle.

    Args:
      file: an open file.
      limit: about how many bytes the objects may take that calls make; a small file may repeat them.
      load_persistent: from a reference to the object outside of the pickle; None if there are none.

    Raises:
      Refused: if the pickle names an object that is not allowed, has an instruction that torch.save does not write, or
        is damaged.
    """
    machine = _Machine(limit, load_persistent)
    try:
        for instruction, argument, _ in pickletools.genops(file):
            machine.run(instruction.name, argument)
        return machine.result()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"expected a whole pickle, got a damaged one ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(self, limit: int, load_persistent: Callable[[Any], Any] | None) -> None:
        self.left = limit
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Runs one instruction."""
        stack = self.stack
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > _BITS:
                raise Refused(f"expected integers of at most {_BITS} bits, got one of {argument.bit_length()}")
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _EMPTY:
            self._spend(_EMPTY_SET_BYTES if name == "EMPTY_SET" else _EMPTY_BYTES)
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            self._run_other(name, argument)

    def _run_other(self, name: str, argument: Any) -> None:
        """Runs an instruction that reads the memo, makes objects, or changes the one on top of the stack."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "MARK":
                self._spend(_EMPTY_BYTES)
                self.below.append(self.stack)
                self.stack = []
            case "POP":
                self._pop(1)
            case "POP_MARK":
                self._pop_to_mark()
            case "TUPLE":
                elements = self._pop_to_mark()
                self.stack.append(tuple(elements))
            case "FROZENSET":
                elements = self._pop_to_mark()
                self.stack.append(frozenset(map(check_key, elements)))
            case "APPEND":
                items = self._pop(1)
                extend(self.stack[-1], items)
            case "APPENDS":
                items = self._pop_to_mark()
                extend(self.stack[-1], items)
            case "SETITEM":
                pair = self._pop(2)
                update(self.stack[-1], [tuple(pair)])
            case "SETITEMS":
                items = self._pop_to_mark()
                update(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))
            case "ADDITEMS":
                elements = self._pop_to_mark()
                add(self.stack[-1], elements)
            case "GLOBAL":
                self.stack.append(look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(look_up(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                target, args = self._pop(2)
                self._spend(size_of_arguments(args))
                made = build(target, args)
                self._spend(size_of(made))
                self.stack.append(made)
            case "BUILD":
                (state,) = self._pop(1)
                self._spend(size_of(state))
                set_state(self.stack[-1], state)
            case "BINPERSID" if self.load_persistent is not None:
                self.stack.append(self.load_persistent(*self._pop(1)))
            case _:
                raise Refused(f"expected a pickle as torch.save writes it, got {name} {brief(argument)} in it")

    def result(self) -> Any:
        """The only object that is left."""
        (value,) = self.stack
        if self.below:
            raise Refused("expected a whole pickle, got one with a mark that is left")
        return value

    def _spend(self, size: int) -> None:
        """Counts the memory and the work that the file asks for."""
        self.left -= size
        if self.left < 0:
            raise Refused("expected objects about as large as the file, got some that grow without end")

    def _pop(self, number: int) -> list[Any]:
        if number > len(self.stack):
            raise Refused(f"expected a whole pickle, got one that lacks {number - len(self.stack)} objects")
        popped = self.stack[-number:]
        del self.stack[-number:]
        return popped

    def _pop_to_mark(self) -> list[Any]:
        popped, self.stack = self.stack, self.below.pop()
        return popped
