"""Reads the text of an optimised HLO module, `compiled.as_text()`: its computations, and how often loops turn.

A line of a computation is

    %name = TYPE opcode(OPERANDS), attributes

where TYPE is an array, as f32[64,8]{1,0:T(8,128)S(1)}, or a tuple of them. T(8,128) is the tile in which the array lies
in memory, so that its two fastest dimensions are padded to multiples of 8 and 128. S(1) is the memory that it lies in:
on TPUs no S is HBM, S(1) is VMEM, and other numbers are memories of scalars and semaphores, or of the host.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

HBM, VMEM = 0, 1
STARTS, ENDS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'  # targets of the custom calls of such fusions

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Shape(NamedTuple):
    """An array type: kind of numbers ("f32"), sides, tile ((8, 128) or ()), order of dimensions, and memory."""

    kind: str
    sides: tuple[int, ...]
    tile: tuple[int, ...] = ()
    fastest_first: tuple[int, ...] = ()
    memory: int = HBM

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self._bytes(self.sides)

    @property
    def stored(self) -> int:
        """Bytes in memory, with the padding of tiles."""
        sides = [self.sides[n] for n in reversed(self.fastest_first)] or list(self.sides)
        for n, tile in enumerate(reversed(self.tile[-len(sides) :] if sides else ()), 1):
            sides[-n] = math.ceil(sides[-n] / tile) * tile
        return self._bytes(sides)

    def _bytes(self, sides) -> int:
        bits = _BITS[self.kind] if self.kind in _BITS else int(re.search(r"\d+", self.kind)[0])
        return math.ceil(bits * math.prod(sides) / 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      opcode: as "dot", "fusion", "while".
      shapes: the arrays of the result; several of a tuple.
      inside: the text in parentheses: names of operands, the value of a constant, the number of a parameter.
      attributes: the text after it.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    inside: str
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(_NAME.findall(self.inside))

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by the attribute that names them."""
        found = _CALLED.findall(self.attributes)
        return {key: tuple(name for name in re.findall(r"[\w.\-]+", names)) for key, names in found}

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of all computations that it calls."""
        return tuple(name for names in self.called.values() for name in names)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute, without braces, or None."""
        found = re.search(rf"(?:^|[ ,]){name}=(?:\{{([^}}]*)\}}|([^, ]+))", self.attributes)
        return found and (found[2] if found[1] is None else found[1])


@dataclass
class Computation:
    """A computation: its instructions by name, in order, and the name of the one that is its result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(one.inside): one.name for one in self.instructions.values() if one.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have each instruction as an operand."""
        users = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for name in dict.fromkeys(one.operands):
                users[name].append(one)
        return users

    def continues(self, one: Instruction) -> bool:
        """Whether this is a later part of a collective that another fusion has started, as TPU programs have them."""
        started = any(user.attribute("custom_call_target") == STARTS for user in self.users[one.name])
        return "chain_id=" in one.attributes and not started

    def shapes_of(self, one: Instruction) -> list[Shape]:
        """The arrays of all operands of an instruction."""
        return [shape for name in one.operands for shape in self[name].shapes]


class Program(NamedTuple):
    """A module: its computations by name, the name of the first one to run, and the source file of stack frames."""

    computations: dict[str, Computation]
    entry: str
    files: dict[int, str]

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def source(self, one: Instruction) -> str:
        """The file with the line of Python that made the instruction; "" if the text does not say."""
        frame = _FRAME.search(one.attributes)
        return self.files.get(int(frame[1]), "") if frame else ""


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry computation, or a line of a computation cannot be read.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], Computation(header[2]))
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            one = _instruction(found[2], found[3])
            current.instructions[one.name] = one
            current.root = one.name if found[1] or not current.root else current.root
    if entry is None:
        raise ValueError(f"text: expected an HLO module with an ENTRY computation, got {text[:80]!r}")
    return Program(computations, entry, _files(text))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, after = rest[end:].strip().partition("(")
    if not after:
        raise ValueError(f"text: expected TYPE opcode(operands) after %{name} =, got {rest[:80]!r}")
    close = _closing(f"({after}", 0) - 1
    return Instruction(name, opcode, shapes_in(rest[:end]), after[: close - 1], after[close:].removeprefix(", "))


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`; parentheses in quotes do not count."""
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text[start:]):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth:
            return start + found.end()
    raise ValueError(f"text: expected a closing parenthesis, got {text[start : start + 80]!r}")


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of an HLO type, such as (f32[2,3]{1,0}, s32[])."""
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


def _shape(kind: str, sides: str, layout: str) -> Shape:
    order, _, rest = layout.partition(":")
    tile, memory = re.match(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
    return Shape(
        kind,
        _integers(sides.replace("<=", "")),
        _integers(tile[1]) if tile else (),
        _integers(order),
        int(memory[1]) if memory else HBM,
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _files(text: str) -> dict[int, str]:
    """The file of every stack frame, from the tables at the head of the text."""

    def table(name: str, pattern: str) -> dict[int, str]:
        section = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return {int(n): value for n, value in re.findall(pattern, section[1], re.MULTILINE)} if section else {}

    names = table("FileNames", r'^(\d+) "(.*)"$')
    locations = table("FileLocations", r"^(\d+) \{file_name_id=(\d+)")
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)")
    return {frame: names.get(int(locations.get(int(place), 0)), "") for frame, place in frames.items()}


def known_turns(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """The number of turns of a while loop, or None if it depends on data.

    XLA writes it beside the loop, or else it is read from a counter: the condition compares an element of the state
    with a constant, the body adds a constant to it, and it starts from a constant. TPU programs need this.
    """
    if written := _TURNS.search(loop.attributes):
        return int(written[1])
    condition, body = (program[loop.called[name][0]] for name in ("condition", "body"))
    match _value(program, condition, condition.root):
        case ("compare", ("LT" | "LE") as direction, ("element", n), int(end)):
            pass
        case _:
            return None
    start = _value(program, computation, loop.operands[0], path=n)
    match _value(program, body, body.root, path=n):
        case ("add", ("element", m), int(step)) | ("add", int(step), ("element", m)) if m == n and step > 0:
            pass
        case _:
            return None
    return max(0, math.ceil((end + (direction == "LE") - start) / step)) if isinstance(start, int) else None


def _value(
    program: Program,
    computation: Computation,
    name: str,
    arguments: list[Callable[[], Any]] | None = None,
    path: int | None = None,
    depth: int = 12,
) -> Any:
    """What an instruction computes: an integer, ("element", n) of the loop's state, ("add", a, b), ("compare", ...).

    Anything else is None.

    Args:
      program: contains the computation.
      computation: contains the instruction.
      name: that of the instruction.
      arguments: values of the parameters inside of a fusion; None where the parameter is the state of a loop.
      path: element of the result, if that is a tuple.
      depth: number of instructions to follow.
    """
    one = computation[name]
    if depth == 0:
        return None

    def operand(n: int, path: int | None = None) -> Any:
        return _value(program, computation, one.operands[n], arguments, path, depth - 1)

    match one.opcode:
        case "constant":
            return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None
        case "parameter" if arguments is not None:
            return arguments[int(one.inside)]()
        case "parameter":
            return None if path is None else ("element", path)
        case "tuple":
            return None if path is None else operand(path)
        case "get-tuple-element":
            return operand(0, int(one.attribute("index")))
        case "copy" | "copy-start" | "copy-done" | "bitcast" | "convert" | "reshape" | "opt-barrier":
            return operand(0, None if one.opcode.startswith("copy-") else path)
        case "add":
            return "add", operand(0), operand(1)
        case "compare":
            return "compare", one.attribute("direction"), operand(0), operand(1)
        case "fusion" | "call":
            inner = program[one.calls[0]]
            values = [lambda n=n: operand(n) for n in range(len(one.operands))]
            return _value(program, inner, inner.root, values, path, depth - 1)
    return None
