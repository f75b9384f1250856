"""Reads from the optimised HLO of a compiled program the collectives by which its devices communicate.

A collective in loops counts once for each iteration, if their number is known. In a loop of unknown length it counts
infinitely often, so such loops must have no collectives.
"""

import math
from collections import defaultdict
from typing import NamedTuple

from experiments.studies.parts.hlo import Computation, Instruction, Program, known_turns, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      nbytes: bytes of the arrays that each device receives.
      times: number of executions in one call of the program; infinite in a loop of unknown length.
    """

    kind: str
    nbytes: int
    times: float


def collectives(hlo: str | Program) -> list[Collective]:
    """The collectives of a program, from `compiled.as_text()` or read already."""
    return [found for found, _ in _found(hlo)]


def collectives_in_loops(hlo: str | Program) -> list[Collective]:
    """Those of them that lie in a loop, whatever its length."""
    return [found for found, is_in_loop in _found(hlo) if is_in_loop]


def _found(hlo: str | Program) -> list[tuple[Collective, bool]]:
    """The collectives, and whether each lies in a loop."""
    program = parse(hlo) if isinstance(hlo, str) else hlo
    times, in_loop = defaultdict(float), set()

    def visit(name: str, number: float, is_in_loop: bool) -> None:
        times[name] += number
        in_loop.update({name} if is_in_loop else ())
        for one in program[name].instructions.values():
            turns, is_loop = 1.0, one.opcode == "while"
            if is_loop:
                known = known_turns(program, program[name], one)
                turns = math.inf if known is None else float(known)
            for other in one.calls:
                visit(other, number * turns if turns else 0.0, is_in_loop or is_loop)

    visit(program.entry, 1.0, False)
    return [
        (Collective(kind, received(program[name], one), number), name in in_loop)
        for name, number in times.items()
        if number
        for one in program[name].instructions.values()
        if (kind := one.opcode.removesuffix("-start")) in KINDS and not program[name].continues(one)
    ]


def received(computation: Computation, one: Instruction) -> int:
    """Bytes of the arrays that a device receives. A collective that is only started may name its operands first."""
    shapes = one.shapes
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        sent = len(computation.shapes_of(one))
        shapes = shapes[sent : 2 * sent]
    return sum(shape.nbytes for shape in shapes)
