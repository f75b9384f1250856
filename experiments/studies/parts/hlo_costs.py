"""Operations and memory traffic of a program, counted from its optimised HLO.

    flops    2 * multiplications of the matrix products and convolutions, without those by zeros of padding and dilation
    passes   the same, times the passes of a TPU's bfloat16 unit: 6 for float32 products of precision "highest", 3 for
             "high", else 1
    hbm      bytes that instructions read from and write to HBM, with the padding of tiles
    vmem     the same for arrays that lie in VMEM
    cycles   the compiler's own estimate of the cycles of a core, where a program has it

Each instruction reads its operands and writes its results. A fusion is one instruction: what its inside passes on does
not move. Of an operand that is only sliced the slices move, and of an array that is updated in place the update.
Tuples, bitcasts, parameters and constants move nothing; what is asynchronous moves when it starts. A loop counts as
often as it turns, body and condition; a conditional as the costliest of its branches.
"""

import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np

from experiments.studies.parts.hlo import ENDS, HBM, STARTS, VMEM, Computation, Instruction, Program, Shape

# turns(computation with the loop, loop) -> how often it turns
Turns = Callable[[Computation, Instruction], float]

_PASSES = {"highest": 6, "high": 3}
_NOTHING = {"get-tuple-element", "tuple", "bitcast", "parameter", "constant", "after-all", "opt-barrier", "domain"}
_SLICES = ("dynamic-slice", "slice", "gather")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALLOCATES = '"AllocateBuffer"'  # a custom call that only names memory


@dataclass(frozen=True)
class Cost:
    """Counts of a program or of a part of it; see the head of this module."""

    flops: float = 0.0
    passes: float = 0.0
    hbm: float = 0.0
    vmem: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: float) -> "Cost":
        return Cost(*(times * a if a else 0.0 for a in astuple(self)))


def cost(program: Program, turns: Turns = lambda computation, loop: 1.0) -> Cost:
    """The cost of one call of a program, by default with every loop body counted once."""
    done: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in done:
            computation = program[name]
            done[name] = sum((of_instruction(computation, one) for one in computation.instructions.values()), Cost())
        return done[name]

    def of_instruction(computation: Computation, one: Instruction) -> Cost:
        if one.opcode == "while":
            (body,), (condition,) = one.called["body"], one.called["condition"]
            return turns(computation, one) * (of(body) + of(condition))
        if one.opcode == "conditional":
            branches = np.array([astuple(of(name)) for name in one.calls])
            return Cost(*branches.max(axis=0).tolist())
        if one.opcode == "call":
            return sum((of(name) for name in one.calls), Cost())
        flops, passes = _products(program, computation, one)
        moved = {HBM: 0, VMEM: 0}
        for memory, nbytes in _moved(program, computation, one):
            moved[memory] = moved.get(memory, 0) + nbytes
        estimate = _CYCLES.search(one.attributes)
        return Cost(flops, passes, moved[HBM], moved[VMEM], float(estimate[1]) if estimate else 0.0)

    return of(program.entry)


def _products(program: Program, computation: Computation, one: Instruction) -> tuple[float, float]:
    """(flops, passes) of an instruction, and of the inside of a fusion."""
    if one.opcode not in ("dot", "convolution"):
        inner = [program[name] for name in one.called.get("calls", ())]
        inside = [_products(program, part, each) for part in inner for each in part.instructions.values()]
        return sum((flops for flops, _ in inside), 0.0), sum((passes for _, passes in inside), 0.0)
    left, right, out = computation[one.operands[0]].shapes[0], computation[one.operands[1]].shapes[0], one.shapes[0]
    flops = 2.0 * (_dot if one.opcode == "dot" else _convolution)(one, left, right, out)
    asked = (one.attribute("operand_precision") or "").split(",")
    is_float32 = "f32" in (left.kind, right.kind)
    return flops, flops * (max(_PASSES.get(word, 1) for word in asked) if is_float32 else 1)


def _dot(one: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    contracted = [int(n) for n in (one.attribute("lhs_contracting_dims") or "").split(",") if n]
    return math.prod(out.sides) * math.prod(left.sides[n] for n in contracted)


def _convolution(one: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    """Multiplications with inputs that are there, as XLA's own cost analysis counts them."""
    image, kernel, result = one.attribute("dim_labels").replace("->", "_").split("_")
    feature_groups, batch_groups = (int(one.attribute(f"{name}_group_count") or 1) for name in ("feature", "batch"))
    window = dict(word.split("=") for word in (one.attribute("window") or "").split())
    number = left.sides[image.index("b")] // batch_groups
    number *= left.sides[image.index("f")] // feature_groups * out.sides[result.index("f")]
    axes = sorted(label for label in image if label.isdigit())
    for n, axis in enumerate(axes):

        def setting(name: str, default: str, n: int = n) -> str:
            return window[name].split("x")[n] if name in window else default

        number *= _pairs(
            left.sides[image.index(axis)],
            right.sides[kernel.index(axis)],
            out.sides[result.index(axis)],
            int(setting("stride", "1")),
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    return number


@lru_cache(maxsize=1024)
def _pairs(size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of an output and a kernel element along an axis that meet an input, neither padding nor a dilation's zero.

    A reversed kernel has as many.
    """
    place = stride * np.arange(out)[:, None] - low + kernel_dilation * np.arange(kernel)
    return int(((place >= 0) & (place < dilation * size) & (place % dilation == 0)).sum())


def _moved(program: Program, computation: Computation, one: Instruction) -> list[tuple[int, int]]:
    """(memory, bytes) of what an instruction reads and writes."""
    opcode = one.opcode.removesuffix("-start")
    if opcode in _NOTHING or opcode.endswith("-done") or one.attribute("custom_call_target") == _ALLOCATES:
        return []
    shapes = computation.shapes_of(one)
    if opcode == "fusion":
        return _moved_by_fusion(program, computation, one)
    if opcode in _SLICES:
        # one that is only started names its operands first
        out = one.shapes[len(shapes)] if one.opcode != opcode else one.shapes[0]
        return [(shapes[0].memory, out.stored), (out.memory, out.stored)]
    if opcode == "dynamic-update-slice":
        return [(shapes[1].memory, shapes[1].stored), (shapes[0].memory, shapes[1].stored)]
    if one.opcode == "copy-start":
        return [(shape.memory, shape.stored) for shape in one.shapes[:2]]  # the copy and the original
    results = one.shapes
    if one.opcode in ("async-start", "all-gather-start", "collective-permute-start", "send", "recv"):
        results = one.shapes[len(shapes) : 2 * len(shapes)]
    return [(shape.memory, shape.stored) for shape in (*shapes, *results)]


def _moved_by_fusion(program: Program, computation: Computation, one: Instruction) -> list[tuple[int, int]]:
    inner, moved = program[one.calls[0]], []
    target = inner[inner.root].attribute("custom_call_target")
    if target in (STARTS, ENDS):  # a collective moves its array when it starts
        sent = computation.shapes_of(one)
        received = one.shapes[len(sent) : 2 * len(sent)]
        return [(shape.memory, shape.stored) for shape in (*sent, *received)] if target == STARTS else []
    for n, name in enumerate(one.operands):
        needed = _read(program, inner, inner.parameters[n])
        moved += [(shape.memory, min(shape.stored, needed)) for shape in computation[name].shapes]
    roots = inner[inner.root].operands if inner[inner.root].opcode == "tuple" else [inner.root]
    for name, shape in zip(roots, one.shapes, strict=True):
        moved.append((shape.memory, min(shape.stored, _written(program, inner, name))))
    return moved


def _read(program: Program, computation: Computation, name: str) -> float:
    """Bytes that the inside of a fusion needs of one of its arrays."""
    total = 0.0
    for user in computation.users[name]:
        is_first = name not in user.operands[1:]
        is_passed_on = user.opcode == "tuple" and user.name == computation.root
        if is_passed_on or computation.continues(user) or (user.opcode == "dynamic-update-slice" and is_first):
            continue
        if user.opcode in _SLICES and is_first:
            total += user.shapes[0].stored
        elif user.opcode == "bitcast":
            total += _read(program, computation, user.name)
        elif user.opcode == "fusion":
            inner = program[user.calls[0]]
            places = [n for n, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(program, inner, inner.parameters[n]) for n in places)
        else:
            return math.inf
    return math.inf if name == computation.root else total


def _written(program: Program, computation: Computation, name: str) -> float:
    """Bytes that a fusion writes of a result, which may be an array that it updates in place."""
    one = computation[name]
    if one.opcode == "parameter" or computation.continues(one):
        return 0
    if one.opcode == "bitcast":
        return _written(program, computation, one.operands[0])
    if one.opcode == "fusion" and len(one.shapes) == 1:
        inner = program[one.calls[0]]
        return _written(program, inner, inner.root)
    if one.opcode == "dynamic-update-slice" and _is_parameter(computation, one.operands[0]):
        return computation[one.operands[1]].shapes[0].stored
    return math.inf


def _is_parameter(computation: Computation, name: str) -> bool:
    one = computation[name]
    return one.opcode == "parameter" or (one.opcode == "bitcast" and _is_parameter(computation, one.operands[0]))
