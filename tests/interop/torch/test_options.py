"""The options of the authors' scripts: what they say of the data."""

import argparse

import pytest

from resflow_jax.interop.torch.options import data_levels


@pytest.mark.parametrize(
    ("options", "levels"),
    [({}, 256), ({"data": "celeba_5bit"}, 32), ({"data": "celebahq", "nbits": 5}, 32), ({"nbits": 2**62}, 256)],
)
def test_levels_of_the_data(options, levels):
    """They are those of the script; other bits than an image can have are refused before a power of two is made."""
    assert data_levels(argparse.Namespace(**options)) == levels
    for bits in (-1, 9, 2**62):
        with pytest.raises(ValueError, match=r"^nbits: expected"):
            data_levels(argparse.Namespace(data="celebahq", nbits=bits))
