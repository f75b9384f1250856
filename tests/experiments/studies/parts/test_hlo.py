"""The reader of HLO: types, computations, source files, and the turns of loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.studies.parts.hlo import Shape, known_turns, parse, shapes_in

LOOP = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/there/step.py"
2 "/there/term_sums.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=26 end_line=26 column=3 end_column=93}
2 {file_name_id=2 function_name_id=2 line=70 end_line=70 column=16 end_column=48}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%adds (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[]{:T(128)} add(%a, %b)
}

%body (state: (s32[], f32[3])) -> (s32[], f32[3]) {
  %state = (s32[]{:T(128)}, f32[3]{0:T(128)S(1)}) parameter(0)
  %one = s32[] constant(STEP)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[3]{0} get-tuple-element(%state), index=1
  %next = s32[] fusion(%n, %one), kind=kLoop, calls=%adds
  ROOT %new = (s32[], /*index=1*/f32[3]{0}) tuple(%next, %x)
}

%condition (state.1: (s32[], f32[3])) -> pred[] {
  %state.1 = (s32[], f32[3]{0}) parameter(0)
  %end = s32[] constant(11)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%n.1, %end), direction=LT
}

ENTRY %main (x.1: f32[3], start: s32[]) -> f32[3] {
  %x.1 = f32[3]{0} parameter(0), metadata={op_name="x (the \\"input\\")"}
  %start = s32[] parameter(1)
  %two = s32[] constant(2)
  %first = s32[] copy(%two)
  %init = (s32[], f32[3]{0}) tuple(%first, %x.1)
  %loop = (s32[], f32[3]{0}) while(%init), condition=%condition, body=%body, metadata={stack_frame_id=2}
  ROOT %out = f32[3]{0} get-tuple-element(%loop), index=1
}
"""


def loops(text):
    program = parse(text)
    found = [(inside, one) for inside in program.computations.values() for one in inside.instructions.values()]
    return [known_turns(program, inside, one) for inside, one in found if one.opcode == "while"]


def test_types():
    """Kinds, sides, tiles, order of dimensions and memories; the padding of tiles counts as stored."""
    (shape,) = shapes_in("f32[64,8,8,1]{0,3,2,1:T(1,128)S(1)}")
    assert shape == Shape("f32", (64, 8, 8, 1), (1, 128), (0, 3, 2, 1), 1)
    assert shape.nbytes == 4 * 64 * 64 and shape.stored == 4 * 128 * 64
    half, counter, flag = shapes_in("(bf16[9,8,130]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, /*index=2*/pred[3])")
    assert half.stored == 2 * 9 * 8 * 256 and half.memory == 0
    assert (counter.stored, counter.memory, flag.stored) == (4, 2, 3)
    kinds = {"f8e4m3fn[16]": 16, "s4[16]": 8, "c64[2]": 16, "token[]": 0, "f32[0,4]": 0}
    assert {text: shapes_in(text)[0].nbytes for text in kinds} == kinds


def test_programs():
    """Computations, instructions with what they call, their attributes, and the Python file that made them."""
    program = parse(LOOP.replace("STEP", "1"))
    assert list(program.computations) == ["adds", "body", "condition", "main"] and program.entry == "main"
    main, body = program["main"], program["body"]
    loop = main["loop"]
    assert main.root == "out" and main["out"].attribute("index") == "1" and loop.attribute("index") is None
    assert loop.called == {"condition": ("condition",), "body": ("body",)} and loop.operands == ("init",)
    assert program.source(loop) == "/there/term_sums.py" and program.source(main["init"]) == ""
    assert body["next"].calls == ("adds",) and body.users["n"] == [body["next"]]
    assert [shape.kind for shape in body["new"].shapes] == ["s32", "f32"]
    assert main.parameters == {0: "x.1", 1: "start"} and main.shapes_of(main["out"])[1].sides == (3,)


def test_turns_of_counters():
    """From the start, the end and the step, if all three are constants; or as XLA writes it."""
    assert loops(LOOP.replace("STEP", "1")) == [9] and loops(LOOP.replace("STEP", "4")) == [3]
    assert loops(LOOP.replace("STEP", "1").replace("direction=LT", "direction=LE")) == [10]
    assert loops(LOOP.replace("STEP", "0")) == [None], "it does not end"
    assert loops(LOOP.replace("STEP", "1").replace("tuple(%first,", "tuple(%start,")) == [None]
    assert loops(LOOP.replace("STEP", "1").replace("direction=LT", "direction=NE")) == [None]
    written = LOOP.replace("body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},')
    assert loops(written.replace("STEP", "0")) == [7]


def test_turns_of_compiled_loops():
    """Scans have known turns; a loop that depends on data has none."""

    def nested(x):
        inner = lambda y, _: (jnp.sin(y), None)  # noqa: E731
        return lax.scan(lambda y, _: (lax.scan(inner, y, length=3)[0] + 1, None), x, length=5)[0]

    def endless(x):
        return lax.while_loop(lambda y: jnp.max(y) < 100, lambda y: 2 * y, x)

    text = jax.jit(nested).lower(jnp.ones(4)).compile().as_text()
    assert sorted(loops(text)) == [3, 5]
    text = jax.jit(endless).lower(jnp.ones(4)).compile().as_text()
    assert loops(text) == [None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "text: expected an HLO module with an ENTRY computation, got 'nothing'"),
        ("ENTRY %main () -> f32[] {\n  %a = f32[] constant\n}", "text: expected TYPE opcode"),
        ("ENTRY %main () -> f32[] {\n  %a = f32[] add(%b\n}", "text: expected a closing parenthesis"),
    ],
)
def test_what_is_no_program(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
