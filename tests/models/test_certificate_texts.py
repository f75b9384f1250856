"""Texts of certificates: bounds are rounded up, and proved bounds are separate from assumed ones."""

import dataclasses
import math

import jax
import pytest

import resflow_jax as rf

LAYER = rf.LayerCertificate(0.97999951, 0.98, 2.0, 2.0)
BLOCK = rf.BlockCertificate(0.9409123456, 0.941192, 2.0, 1.9409123456, 16.9236, (LAYER, LAYER, LAYER))
WORD = rf.BlockCertificate(0.9, 0.9, 2.0, 1.9, 10.0, (), is_proved=False)
FAILED = dataclasses.replace(BLOCK, bound=1.02, inverse_lipschitz=math.inf)


def test_layer_and_block():
    assert repr(LAYER) == "LayerCertificate: norm <= 0.98 (coefficient 0.98)"
    mixed = dataclasses.replace(LAYER, domain=math.inf, codomain=1.0)
    assert repr(mixed) == "LayerCertificate: norm from order inf to 1 <= 0.98 (coefficient 0.98)"
    assert repr(BLOCK) == (
        "BlockCertificate: Lip(g) <= 0.940913 (target 0.941192) from norms 0.98, 0.98, 0.98; Lip(f) <= 1.94092, "
        "Lip(f^-1) <= 16.9236"
    )
    stated = "BlockCertificate: Lip(g) <= 0.9 (stated by the user, not proved); Lip(f) <= 1.9, Lip(f^-1) <= 10"
    assert repr(WORD).startswith(stated)
    assert "<= 0.940913 in the norm of order 1 " in repr(dataclasses.replace(BLOCK, order=1.0))
    assert repr(dataclasses.replace(BLOCK, layers=(LAYER,) * 30)).count("0.98,") == 8
    assert "<= 1 - 1.0e-10 " in repr(dataclasses.replace(BLOCK, bound=1 - 1e-10))


def test_certified():
    assert repr(rf.Certificate((BLOCK,) * 2, 3.7671, 286.41)) == (
        "Certificate of 2 residual blocks: every block is invertible\n"
        "  Lip(g) <= 0.940913 (target 0.941192); of the blocks: 0.940913, 0.940913\n"
        "  Lip(f) <= 3.7671, Lip(f^-1) <= 286.41"
    )
    many = repr(rf.Certificate((BLOCK,) * 48, 1e30, 1e60)).splitlines()
    assert len(many) == 3 and max(map(len, many)) <= 120 and many[1].endswith(", ...")


def test_not_certified():
    """A bound of one or more, and a bound that the user states, are named by the numbers of their blocks."""
    text = repr(rf.Certificate((BLOCK, FAILED, WORD, WORD), 3.0, math.inf))
    assert text.splitlines()[0] == "Certificate of 4 residual blocks: NOT certified"
    assert "Lip(g) <= 1.02 (target 0.941192); of the blocks: 0.940913, 1.02\n" in text
    assert "\n  no contraction by the bound: block 1\n" in text
    assert "\n  stated by the user, not proved: blocks 2, 3\n" in text
    assert text.endswith("Lip(f^-1) <= inf")
    assert "blocks 0, 1, 2, 3, 4, 5 and 3 more" in repr(rf.Certificate((WORD,) * 9, 3.0, 3.0))
    assert "NOT certified" in repr(rf.Certificate((dataclasses.replace(BLOCK, bound=math.nan),), 3.0, 3.0))
    assert repr(rf.Certificate((), 1.0, 1.0)).startswith("Certificate of 0 residual blocks")


@pytest.mark.parametrize("leaf", [object(), None, "x", (), jax.ShapeDtypeStruct((2,), float)])
def test_other_values(leaf):
    """There is a text for any values of the fields."""
    for certificate in (LAYER, BLOCK, rf.Certificate((BLOCK,), 1.0, 1.0)):
        names = [field.name for field in dataclasses.fields(certificate)]
        for chosen in (names, names[:1]):
            text = repr(dataclasses.replace(certificate, **dict.fromkeys(chosen, leaf)))
            assert text.startswith(type(certificate).__name__) and " at 0x" not in text
