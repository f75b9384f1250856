"""Operations and bytes of programs, exactly: of hand-written ones as TPUs have them, and of compiled ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.studies.parts.collectives import Collective, collectives
from experiments.studies.parts.hlo import known_turns, parse
from experiments.studies.parts.hlo_costs import Cost, cost

FUSED = """
%fused (p0: f32[4,8,128], p1: f32[8,128], p2: s32[]) -> (f32[8,128], f32[4,8,128]) {
  %p0 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0:T(8,128)} bitcast(%part)
  %sum = f32[8,128]{1,0:T(8,128)} add(%flat, %p1)
  %back = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%sum)
  %new = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %back, %p2, %zero, %zero)
  ROOT %both = (f32[8,128]{1,0:T(8,128)}, f32[4,8,128]{2,1,0:T(8,128)}) tuple(%sum, %new)
}

ENTRY %main (stack: f32[4,8,128], x: f32[8,128], n: s32[]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  %n = s32[]{:S(6)} parameter(2)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %work = (f32[8,128]{1,0:T(8,128)S(1)}, f32[4,8,128]{2,1,0:T(8,128)}) fusion(%stack, %copy-done, %n), calls=%fused
  ROOT %out = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%work), index=0
}
"""

# An all-gather in three parts: the second lies in a fusion that has work of its own.
ASYNCHRONOUS = """
%start (s0: f32[8,128]) -> (f32[8,128], f32[64,128], u32[]) {
  %s0 = f32[8,128]{1,0} parameter(0)
  %g0 = f32[64,128]{1,0} all-gather(%s0), channel_id=5, frontend_attributes={chain_id="7"}
  ROOT %r0 = (f32[8,128], f32[64,128], u32[]) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%middle (s1: f32[8,128], t1: f32[64,128], x1: f32[3]) -> (f32[3], f32[8,128], f32[64,128], f32[64,128]) {
  %s1 = f32[8,128]{1,0} parameter(0)
  %t1 = f32[64,128]{1,0} parameter(1)
  %x1 = f32[3]{0} parameter(2)
  %g1 = f32[64,128]{1,0} all-gather(%s1), channel_id=5, frontend_attributes={chain_id="7"}
  %y1 = f32[3]{0} add(%x1, %x1)
  ROOT %r1 = (f32[3]{0}, f32[8,128]{1,0}, f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%y1, %s1, %t1, %g1)
}

%end (s2: f32[8,128], t2: f32[64,128]) -> f32[64,128] {
  %s2 = f32[8,128]{1,0} parameter(0)
  %t2 = f32[64,128]{1,0} parameter(1)
  %g2 = f32[64,128]{1,0} all-gather(%s2), channel_id=5, frontend_attributes={chain_id="7"}
  ROOT %r2 = f32[64,128]{1,0} custom-call(%s2, %t2, %g2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (s: f32[8,128], x: f32[3]) -> f32[64,128] {
  %s = f32[8,128]{1,0} parameter(0)
  %x = f32[3]{0} parameter(1)
  %one = (f32[8,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) fusion(%s), calls=%start
  %a = f32[8,128]{1,0} get-tuple-element(%one), index=0
  %b = f32[64,128]{1,0:S(1)} get-tuple-element(%one), index=1
  %two = (f32[3]{0}, f32[8,128]{1,0}, f32[64,128]{1,0:S(1)}, f32[64,128]{1,0:S(1)}) fusion(%a, %b, %x), calls=%middle
  %c = f32[64,128]{1,0:S(1)} get-tuple-element(%two), index=2
  ROOT %three = f32[64,128]{1,0:S(1)} fusion(%a, %c), calls=%end
}
"""


def compiled(function, *args):
    return parse(jax.jit(function).lower(*args).compile().as_text())


def with_turns(mean):
    """A rule of turns: those that are known, or else a mean."""
    return lambda program: cost(program, lambda c, one: known_turns(program, c, one) or mean)


def test_a_fusion_moves_what_it_needs():
    """A slice of a stack is read, a slice of it is written in place; copies to VMEM move once, when they start."""
    piece = 4 * 8 * 128
    assert cost(parse(FUSED)) == Cost(0, 0, hbm=piece + 2 * piece, vmem=piece + 2 * piece)


def test_a_collective_in_parts():
    """It is one, and moves its shard and the whole once."""
    program = parse(ASYNCHRONOUS)
    assert cost(program) == Cost(0, 0, hbm=4 * 8 * 128 + 2 * 12, vmem=4 * 64 * 128)
    assert collectives(program) == [Collective("all-gather", 4 * 64 * 128, 1.0)]


@pytest.mark.parametrize(
    ("line", "hbm"),
    [
        ("f32[8]{0} add(%a, %a)", 3 * 32),
        ("f32[8]{0} bitcast(%a)", 0),
        ("f32[8]{0} broadcast(%s), dimensions={}", 36),
        ("f32[3]{0} slice(%a), slice={[0:3]}", 24),
        ("f32[2]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={2}", 16),
        ("f32[8]{0} dynamic-update-slice(%a, %b, %i)", 16),
        ("((f32[8]{0}), f32[2]{0:S(1)}, u32[]) dynamic-slice-start(%a, %i), dynamic_slice_sizes={2}", 8),
        ("f32[8]{0} all-reduce(%a), to_apply=%add", 64),
        ("f32[8]{0} all-reduce-done(%a)", 0),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%b), dimensions={0}", 40),
        ('f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ('f32[8]{0} custom-call(%a), custom_call_target="other"', 64),
        ("f32[8,2]{1,0:T(8,128)} copy(%c)", 64 + 4 * 8 * 128),
    ],
)
def test_bytes_of_instructions(line, hbm):
    """Operands and results, or what moves of them."""
    text = f"""
ENTRY %main (a: f32[8], b: f32[2], c: f32[8,2], i: s32[]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %b = f32[2]{{0}} parameter(1)
  %c = f32[8,2]{{1,0}} parameter(2)
  %i = s32[]{{:S(6)}} parameter(3)
  %s = f32[] constant(1)
  ROOT %r = {line}
}}
"""
    assert cost(parse(text)).hbm == hbm


@pytest.mark.parametrize(("words", "passes"), [("highest,highest", 6), ("high,default", 3), ("default,default", 1)])
def test_passes(words, passes):
    """A product of higher precision takes several passes of a TPU, if its factors are float32."""
    text = """
ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %r = f32[4,2]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, operand_precision={WORDS}
}
""".replace("WORDS", words)
    assert cost(parse(text)) == Cost(128, 128 * passes, 4 * (32 + 16 + 8), 0)
    assert cost(parse(text.replace("f32", "bf16"))).passes == 128


def test_products():
    """A matrix product, a batch of them, in float32 so that the CPU keeps them as they are."""
    a, b = jnp.ones((4, 8), jnp.float32), jnp.ones((8, 16), jnp.float32)
    found = cost(compiled(jnp.matmul, a, b))
    assert found == Cost(2 * 4 * 8 * 16, 2 * 4 * 8 * 16, 4 * (32 + 128 + 64), 0)
    batch = cost(compiled(jnp.matmul, jnp.stack([a] * 3), jnp.stack([b] * 3)))
    assert batch.flops == 3 * found.flops and batch.hbm == 3 * found.hbm


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"padding": "VALID"}, 3 * 3),
        ({"padding": "SAME"}, 3 * 3 + 2 * 2),
        ({"padding": "VALID", "window_strides": 2}, 2 * 3),
        ({"padding": ((0, 0),) * 2, "lhs_dilation": 2}, 2 + 1 + 2 + 1 + 2 + 1 + 2),
        ({"padding": "VALID", "rhs_dilation": 2}, 1 * 3),
    ],
)
def test_convolutions(settings, pairs):
    """Products with zeros of padding or dilation do not count: 5x5 images with kernels of 3x3."""
    settings = {name: (value,) * 2 if isinstance(value, int) else value for name, value in settings.items()}
    settings = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | settings

    x = jnp.ones((2, 5, 5, 6), jnp.float32)
    for groups in (1, 3):
        kernel = jnp.ones((3, 3, 6 // groups, 9), jnp.float32)
        apply = partial(lax.conv_general_dilated, **settings, feature_group_count=groups)
        assert cost(compiled(apply, x, kernel)).flops == 2 * 2 * (6 // groups) * 9 * pairs**2


def test_loops():
    """A body counts once, or as often as it turns; a mean stands for what depends on data."""
    x, w = jnp.ones((4, 8), jnp.float32), jnp.ones((8, 8), jnp.float32)

    def nested(x, w):
        inner = lambda y, _: (jnp.tanh(y @ w), None)  # noqa: E731
        return lax.scan(lambda y, _: (lax.scan(inner, y, length=3)[0] + 1, None), x, length=5)[0]

    def endless(x, w):
        return lax.while_loop(lambda y: jnp.max(y) < 100, lambda y: 2 * (y @ w), x)

    once = 2 * 4 * 8 * 8
    program = compiled(nested, x, w)
    assert cost(program).flops == once and with_turns(math.nan)(program).flops == 15 * once
    assert with_turns(math.nan)(program).hbm > cost(program).hbm
    program = compiled(endless, x, w)
    assert cost(program).flops == once and with_turns(2.5)(program).flops == 2.5 * once


def test_branches():
    """The costliest of them counts."""
    x, w = jnp.ones((4, 8), jnp.float32), jnp.ones((8, 8), jnp.float32)

    def branches(n, x, w):
        return lax.switch(n, [lambda x: x @ w, lambda x: x @ w @ w, jnp.sin], x)

    assert cost(compiled(branches, jnp.int32(0), x, w)).flops == 2 * 2 * 4 * 8 * 8


def test_sums():
    """Costs add and multiply; a part that never runs costs nothing, even in an endless loop."""
    one = Cost(1, 2, 3, 4)
    assert one + one == 2 * one == Cost(2, 4, 6, 8) and math.inf * Cost(1) == Cost(math.inf)


def test_cycles_are_the_compilers_estimate():
    """Each instruction's estimate counts as often as the loop around it turns; one without an estimate counts zero."""
    text = """HloModule m, is_scheduled=true

%body (s: (f32[8])) -> (f32[8]) {
  %s = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=0
  %y = f32[8]{0} copy(%x), backend_config={"flag_configs":[],"estimated_cycles":"70"}
  ROOT %t = (f32[8]{0}) tuple(%y)
}

%condition (c: (f32[8])) -> pred[] {
  %c = (f32[8]{0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> (f32[8]) {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"5"}
  %c = f32[8]{0} copy(%b)
  %i = (f32[8]{0}) tuple(%c)
  ROOT %w = (f32[8]{0}) while(%i), condition=%condition, body=%body
}
"""
    assert cost(parse(text)).cycles == 5 + 70
    assert cost(parse(text), lambda computation, loop: 3.0).cycles == 5 + 3 * 70
