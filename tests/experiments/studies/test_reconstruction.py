"""What the features of classifiers keep: a tiny study of networks that were never trained, and its measures."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from experiments.studies import reconstruction
from experiments.studies.parts import class_runs
from experiments.studies.reconstruction import LOST, ReconstructionConfig, largest_growth, one_of_each, recovered
from tests.experiments.tiny import finish_untrained


class Third(nnx.Module):
    def __call__(self, x):
        return x / 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The config of the tiny study, its result, and the runs that it asked for; the runs keep their first weights."""
    config = replace(reconstruction.tiny(ReconstructionConfig()), workdir=tmp_path_factory.mktemp("study"))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_runs, "run_config", lambda settings: asked.append(settings) or finish_untrained(settings))
        return config, reconstruction.run(config), asked


def test_runs(study):
    """The three networks with equal settings otherwise, each in its own directory; finished ones are not run again."""
    _, _, asked = study
    assert [settings.workdir.name for settings in asked] == ["c0.9", "vanilla", "standard"]
    assert [settings.model.coefficient for settings in asked] == [0.9, None, None]
    assert len({(settings.steps, settings.seed, settings.optimizer) for settings in asked}) == 1
    for settings in asked:
        assert not class_runs.finish(settings)
    with pytest.raises(ValueError, match="holds a run of another config"):
        class_runs.finish(replace(asked[0], seed=1))


def test_images_come_back(study):
    """From the i-ResNet's features alone for sure; the error falls with the iterations; strides lose pixels."""
    config, result, _ = study
    exact, standard = result["fixed_point"]["c0.9"], result["fixed_point"]["standard"]
    assert exact["max"] < 1e-6 and exact["lost"] == exact["unconverged"] == 0 and exact["images"] == 8
    assert standard["lost"] == 8 and standard["max"] >= standard["median"] > LOST
    errors = result["iterations"]["c0.9"]["max"]
    assert errors[0] > 100 * errors[3] and errors[-1] < 1e-6
    growth = result["growth"]
    assert all(0 < seen < bound < 1 for seen, bound in zip(growth["c0.9"], growth["certified"], strict=True))
    assert len(growth["vanilla"]) == len(growth["certified"]) == 2
    directory = config.workdir / "digits"
    assert json.loads((directory / "reconstruction.json").read_text()) == result
    for name in ("reconstructions.png", "iterations.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_tables(study, capsys):
    """Each network by the fixed point, the vanilla one by Anderson too, and the errors by iterations."""
    _, result, _ = study
    reconstruction.report(result, "c0.9")
    printed = capsys.readouterr().out
    for start in ("| i-ResNet, c = 0.9 | fixed point | ", "| no bound (vanilla) | Anderson | ", "| standard ResNet | "):
        assert start in printed
    assert "0 of 8 | 0 | 90.00 ± 1.00 |" in printed and "| n = 1 | n = 2 | n = 3 | n = 5 | n = 7 | n = 10 |" in printed


def test_growth_of_a_known_map():
    """g = x / 3, alone and behind a layer that stretches; inside of a stack too."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    block = rf.ResidualBlock(Third(), lipschitz=0.5, event_shape=(2,))
    stack = rf.ResidualStack(
        lambda rngs: rf.ResidualBlock(Third(), lipschitz=0.5, event_shape=(2,)), 2, rngs=nnx.Rngs(0)
    )
    found = largest_growth(rf.Flow(rf.Chain([rf.Affine((2,)), block, stack])), x)
    np.testing.assert_allclose(found, [1 / 3] * 3)


def test_a_block_that_is_no_contraction():
    """The iteration is reported as failed, and the images as lost."""
    flow = rf.Flow(rf.UnconstrainedBlock((2, 2, 1), 4, rngs=nnx.Rngs(0)))
    for kernel in flow.bijector.branch.kernels:
        kernel[...] = 40 * kernel[...]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 2, 2, 1)))
    assert largest_growth(flow, x)[0] > 1
    found = recovered(flow, x, rf.FixedPoint(max_iterations=100))
    assert found.unconverged == 4 and found.figures["lost"] == 4 and found.figures["max"] > 1


def test_images_that_are_not_finite():
    """They count as infinitely far."""

    class Lost(rf.Bijector):
        event_shape = (1,)

        def transform(self, x, condition=None):
            return x, jnp.zeros(x.shape[0])

        def invert(self, y, condition=None):
            return jnp.where(y > 0, jnp.nan, y)

    found = recovered(rf.Flow(Lost()), jnp.array([[-1.0], [1.0]]), rf.FixedPoint())
    assert found.errors.tolist() == [0, np.inf] and found.figures["lost"] == 1


def test_images_of_every_class():
    """The first of each, in order, then others."""
    assert one_of_each(np.array([2, 0, 2, 1, 0]), 4).tolist() == [1, 3, 0, 2]
    assert one_of_each(np.array([1, 1]), 4).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"data": "mnist"}, "data: expected one of .*got 'mnist'"),
        ({"coefficients": (0.9, 0.5)}, r"coefficients: expected some in increasing order, got \(0.9, 0.5\)"),
        ({"coefficients": (1.0,)}, "coefficients: expected .*got 1.0"),
        ({"images": 1}, "images: expected an integer of at least 2, got 1"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**setting)
