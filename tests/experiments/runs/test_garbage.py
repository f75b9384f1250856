"""The garbage collector's thresholds while a command runs."""

import gc
from dataclasses import dataclass

import pytest

from experiments.runs.command import Command
from experiments.runs.garbage import fewer_full_collections


def test_thresholds_come_back():
    """Also after an error."""
    before = gc.get_threshold()
    with pytest.raises(KeyError), fewer_full_collections():
        assert gc.get_threshold() == (before[0], 2 * before[1], 10 * before[2])
        raise KeyError
    assert gc.get_threshold() == before


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      number: any number.
    """

    number: int = 3


def test_commands_use_it():
    """A command runs with fewer full collections."""
    found = []
    command = Command("experiments.none", "A command.", Config(), tiny=lambda config: config)
    command.call(lambda config: found.append(gc.get_threshold()[1]), [])
    assert found == [2 * gc.get_threshold()[1]]
