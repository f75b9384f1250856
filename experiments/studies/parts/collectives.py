"""Reads from the optimised HLO of a compiled program the collectives by which its devices communicate.

A collective in loops counts once for each iteration, if XLA knows their number. In a loop of unknown length it counts
infinitely often, so such loops must have no collectives.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = {"pred": 8}


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


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program, from `compiled.as_text()`."""
    found, calls, entry, name = defaultdict(list), defaultdict(list), None, None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            continue
        if collective := _COLLECTIVE.search(line):
            found[name].append((collective[2], _nbytes(collective[1])))
        turns = 1.0
        if " while(" in line:
            known = _TURNS.search(line)
            turns = float(known[1]) if known else math.inf
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"%?([\w.\-]+)", branches)
        calls[name] += [(other, turns) for other in called]

    times = defaultdict(float)

    def visit(computation: str, number: float) -> None:
        times[computation] += number
        for other, turns in calls[computation]:
            visit(other, number * turns)

    visit(entry, 1.0)
    return [Collective(kind, size, times[name]) for name, those in found.items() for kind, size in those if times[name]]


def _nbytes(shapes: str) -> int:
    """Bytes of all arrays of an HLO type, such as (f32[2,3]{1,0}, s32[])."""
    total = 0
    for kind, sides in _SHAPE.findall(shapes):
        bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        total += bits * math.prod(int(side) for side in sides.split(",") if side) // 8
    return total
