"""Settings of `experiments.density`: from the command line, and those that are refused."""

import dataclasses

import pytest

from experiments import density
from experiments.configs import CONFIGS
from experiments.configs.base import DataConfig, OptimizerConfig
from experiments.configs.tiny import tiny as tiny_config
from experiments.runs import launch
from resflow_jax import (
    BetweenBlocks,
    Defensive,
    DenseTail,
    ImageTransform,
    Norms,
    Padding,
    Scales,
    VectorTransform,
)
from tests.experiments.tiny import TINY


def test_command_line_overrides(monkeypatch):
    """`digits` is the default; flags reach nested fields."""
    configs = []
    monkeypatch.setattr(launch, "run_config", configs.append)
    density.main(
        ["--steps", "5", "--batch-size", "8", "--seed", "2", "--workdir", "elsewhere", "--model.blocks", "1", "2"]
    )
    density.main(["fashion_mnist", "--data.dir", "there"])
    density.main(["--tiny", "svhn", "--data.crop", "2"])
    density.main(["--tiny"])
    for arguments in (
        "digits --model.tail.blocks 0 --model.norms.orders f12f --model.data.padding.channels 2 "
        "--model.condition-dim 3 --model.between.no-actnorm --estimator.length.p 0.25",
        "celebahq256 --model.tail.blocks 2 --model.scales.no-squeeze-first --model.data.padding.scale 2",
        "vectors --model.dim 2 --model.norms.learned --model.data.mean 1 2 --model.data.std 3 4",
    ):
        density.main(arguments.split())
    digits, fashion, svhn, tiny, grouped, celebahq, vectors = configs
    assert grouped.model == dataclasses.replace(
        CONFIGS["digits"].model,
        condition_dim=3,
        data=dataclasses.replace(CONFIGS["digits"].model.data, padding=Padding(2)),
        between=BetweenBlocks(actnorm=False),
        norms=Norms("f12f"),
        tail=DenseTail(0, hidden=32),
    )
    assert grouped.estimator == dataclasses.replace(CONFIGS["digits"].estimator, length=Defensive(p=0.25))
    assert celebahq.model.tail == DenseTail(2) and celebahq.model.scales == Scales(factor_out=True)
    assert celebahq.model.data == ImageTransform(padding=Padding(scale=2.0), logit_alpha=0.05)
    assert vectors.model.norms == Norms(learned=True) and vectors.model.data == VectorTransform((1.0, 2.0), (3.0, 4.0))
    assert svhn == dataclasses.replace(tiny_config(CONFIGS["svhn"]), data=svhn.data)
    assert (svhn.data.name, svhn.data.crop) == ("photographs", 2)
    assert tiny == tiny_config(CONFIGS["digits"])
    assert (digits.data.name, digits.steps, digits.batch_size, digits.seed) == ("digits", 5, 8, 2)
    assert str(digits.workdir) == "elsewhere" and digits.model.blocks == (1, 2)
    assert fashion.data.name == "fashion_mnist" and fashion.data.dir == "there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"clip": float("nan")}, "clip: expected a positive number, got nan"),
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"b2": 1.0}, r"b2: expected a number in \(0, 1\), got 1.0"),
        ({"name": "lion"}, "name: expected one of adam, adamax, adamw, sgd; got 'lion'"),
        ({"schedule": "steps"}, "schedule: expected one of cosine, step, constant; got 'steps'"),
        ({"weight_decay": 0.1}, "weight_decay: expected 0, or a positive number with adamw or sgd, got 0.1"),
        ({"accumulate": 0}, "accumulate: expected an integer of at least 1, got 0"),
        ({"schedule": "step"}, 'milestones: expected some with the schedule "step", and none else, got .. with'),
        ({"milestones": (3,)}, "milestones: expected some with the schedule .* got .3,. with 'cosine'"),
        ({"schedule": "step", "milestones": (3, 3)}, "milestones: expected positive numbers that increase, got"),
        ({"schedule": "step", "milestones": (3,), "decay": 1.0}, r"decay: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_optimizer_settings_are_named(arguments, message):
    """Settings that cannot train name the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)


def test_bits_of_the_digits(tmp_path):
    """Their 17 levels stay; files named in their place have any number of bits."""
    with pytest.raises(ValueError, match=r"data\.bits: expected 8 for digits, which have 17 levels, got 5"):
        DataConfig("digits", bits=5)
    assert DataConfig("digits", path=tmp_path, bits=5).bits == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annealing": 7}, "annealing: expected at most 6, the number of steps, got 7"),
        ({"save_every": 0}, "save_every: expected an integer of at least 1, got 0"),
        ({"optimizer": OptimizerConfig(accumulate=7)}, "optimizer.accumulate: expected a divisor of 6, .* got 7"),
        (
            {"optimizer": OptimizerConfig(schedule="step", milestones=(2, 6))},
            "optimizer.milestones: expected numbers below 6, the number of updates, got .2, 6.",
        ),
    ],
)
def test_bad_settings_of_a_run_are_named(settings, message):
    """Settings that have no effect on a run with its number of steps are refused."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps: expected an integer of at least 1, got 0"),
        (["--model.blocks", "0"], "blocks: expected an integer of at least 1, got 0"),
        (["--steps", "x"], "steps"),
        (
            ["mnist2"],
            "NAME: expected one of digits, digits_uniform, digits_densenet, digits_monotone, photographs,",
        ),
        (["mnist2"], "; got 'mnist2'"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    """A bad value ends the program with a message that names it, not with a run."""
    with pytest.raises(SystemExit) as stop:
        density.main(arguments)
    printed = capsys.readouterr().err + str(stop.value)
    assert message in " ".join(printed.replace("│", " ").split())
