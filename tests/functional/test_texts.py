"""Texts of numbers, settings and results: rounded to the safe side, and never an error."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from resflow_jax.functional.texts import constructor, described, setting, span, upper
from resflow_jax.training.evaluation import BitsPerDim

STATUS = rf.InverseStatus(
    jnp.asarray([[12, 31, 20], [14, 15, 16]]),
    jnp.asarray([[1e-7, 3.14e-6, 2e-7], [0.0, 1e-9, 1e-8]]),
    jnp.ones((2, 3)),
    jnp.asarray([[True, False, True], [True, True, True]]),
)
NORMS = rf.PowerIterationStatus(jnp.asarray(7), jnp.asarray(2e-5), jnp.asarray(True))
DIAGNOSTICS = rf.Diagnostics(jnp.asarray([2.0, 5.0]), jnp.zeros((2, 16)), jnp.asarray([-1.0, 0.5]), jnp.ones(2))
CHECK = rf.ContractionCheck(0.5, False, 0.5, 0.25, 1e-16)
ESTIMATE = rf.Estimate(1.85384, 0.0136, 0.0132, 0.0029)
RESULTS = [STATUS, NORMS, DIAGNOSTICS, CHECK, ESTIMATE, BitsPerDim(*ESTIMATE)]


@pytest.mark.parametrize("value", [0.94, 0.940918351, 1.0000001, 5.3e9, 1e-12, 0.1 + 0.2, 1 - 1e-6, 123456.7, 2.5])
def test_upper_is_no_less(value):
    """A bound is rounded up, by less than a part in 100000; six digits stay."""
    found = float(upper(value))
    assert value <= found <= value * (1 + 1e-5)
    assert upper(float(f"{value:.6g}")) == f"{value:.6g}"


def test_upper_keeps_below_one():
    assert upper(1 - 1e-9) == "1 - 1.0e-09"
    assert upper(1.0) == "1"
    assert upper(1 + 1e-9) == "1.00001"
    assert (upper(math.inf), upper(0.0), upper(math.nan), upper(1e308)) == ("inf", "0", "nan", "1e+308")


def test_results():
    """Each fits a line, with its units."""
    texts = [repr(result) for result in RESULTS]
    assert texts == [
        "InverseStatus of 2 blocks x 3 examples: 2 of 3 converged (not 1), largest residual 3.1e-06, "
        "iterations 12 to 31",
        "PowerIterationStatus: converged, iterations 7, residual 2.0e-05",
        "Diagnostics of 2 blocks: products with the Jacobian a probe 7 (2 to 5 a block), mean log-det -0.5 nats "
        "(-1 to 0.5 a block)",
        "ContractionCheck: not refuted, which proves nothing; Lip(g) >= 0.5 (norm of a Jacobian 0.5, difference "
        "quotient 0.25), mixing of examples 1.0e-16",
        "Estimate: 1.854 +- 0.014 (0.013 from the choice of examples, 0.003 from noise)",
        "BitsPerDim: 1.854 +- 0.014 bits/dim (0.013 from the choice of examples, 0.003 from noise)",
    ]
    assert str(STATUS) == texts[0]
    one = repr(jax.tree.map(lambda leaf: leaf[0], DIAGNOSTICS))
    assert one.endswith("log-det -1 nats in the mean, deviation 0 over the batch")
    assert repr(jax.tree.map(lambda leaf: leaf[1], STATUS)).startswith("InverseStatus of 3 examples: 3 of 3 converged,")
    assert repr(jax.tree.map(lambda leaf: leaf[0, 1], STATUS)).startswith("InverseStatus of 1 example: 0 of 1")
    assert repr(NORMS._replace(converged=jnp.asarray(False))).startswith("PowerIterationStatus: NOT converged")
    assert "2 of 2 converged" in repr(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), NORMS))
    assert "refuted, g is not a" in repr(CHECK._replace(is_refuted=True))
    assert repr(jax.tree.map(lambda leaf: leaf[:0], STATUS)) == "InverseStatus of 0 blocks x 3 examples: no solve"


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_results_without_values(result):
    """Tracers, shapes, deleted arrays and other leaves of a tree are shown by dtype and shape, or by type."""
    seen = []

    def look(result):
        seen.append(repr(result))
        return result

    arrays = jax.tree.map(jnp.asarray, result)
    jax.jit(look)(arrays)
    jax.vmap(look)(jax.tree.map(lambda leaf: leaf[None], arrays))
    seen.append(repr(jax.eval_shape(lambda: arrays)))
    for text in seen:
        assert text.startswith(f"{type(result).__name__}({result._fields[0]}=") and "\n" not in text
    assert len(set(seen)) == 1
    for leaf in (object(), None, "x", jax.random.key(0), jnp.zeros((0, 2, 3)), jax.P("data")):
        text = repr(type(result)(*(leaf for _ in result)))
        assert text.startswith(type(result).__name__) and " at 0x" not in text
    copies = jax.tree.map(jnp.copy, arrays)
    jax.tree.map(lambda leaf: leaf.delete(), copies)
    assert repr(copies) == seen[0]


def test_estimate_of_little():
    """The text says what is unknown for one image, one draw, or no noise."""
    assert "that of noise unknown" in repr(rf.Estimate(1.0, 0.5, 0.5, math.nan))
    assert repr(rf.Estimate(1.0, math.inf, math.inf, 0.1)).startswith("Estimate: 1.000 +- inf (inf from")
    assert repr(rf.Estimate(1.0, 0.0, 0.0, 0.0)).startswith("Estimate: 1.000 +- 0.000")
    assert repr(rf.Estimate(12345.678, 123.4, 120.0, 30.0)).startswith("Estimate: 12346 +- 123")


def test_settings():
    assert setting(rf.ACTIVATIONS["lipswish"]) == "lipswish"
    assert setting((1, 2.0, "x", None)) == "(1, 2, 'x', None)" and setting((3,)) == "(3,)"
    assert setting(tuple(range(20))) == "(0, 1, 2, ..., 19)"
    assert setting(jnp.zeros((2, 3))) == "float64[2,3]" == described(np.zeros((2, 3)))
    assert setting(jax.ShapeDtypeStruct((2,), jnp.float32)) == "float32[2]"
    assert setting(object()) == "<object>" and setting(math.sqrt) and setting(np.float32) == "float32"
    assert setting("long" * 40)  # a string is whole
    assert setting({"long": "dict" * 40}) == "<dict>"
    assert setting(rf.Anderson()) == "Anderson()"
    assert setting(rf.FixedPoint(tolerance=1e-9)) == "FixedPoint(tolerance=1e-09)"
    assert setting(rf.DenseMap(3, 4)) == "DenseMap(3, 4)"
    assert span(np.array([2, 2])) == "2" and span(np.array([2, 3])) == "2 to 3"


class Fails:
    def __repr__(self):
        raise ZeroDivisionError


@dataclass
class Odd:
    required: object
    size: int = 3
    own: object = None
    array: object = None

    @property
    def broken(self):
        raise ZeroDivisionError


def test_constructor():
    """Sizes are always shown, other settings if not the default; failing values are omitted or shown by type."""
    assert constructor(Odd(2.5)) == "Odd(2.5, size=3)"
    assert (
        constructor(Odd(Fails(), own=(1.5,), array=np.zeros(2))) == "Odd(<Fails>, size=3, own=(1.5,), array=float64[2])"
    )
    assert constructor(Odd(1), required=None, own="mine") == "Odd(size=3, own=mine)"
    assert constructor(object()) == "object()"
