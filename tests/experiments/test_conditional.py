"""The conditional study: a tiny run and its files, equal time, the measures against known values, bad settings."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import conditional
from experiments.conditional import ConditionalConfig, GaussianLinearConfig, TwoMoonsConfig
from experiments.configs.base import OptimizerConfig
from experiments.studies.conditioning import classes
from experiments.studies.conditioning.amortised import FlowjaxConfig, Learner, Standardised, take_turns
from experiments.studies.conditioning.classes import DigitsConfig, class_bits_per_dim, make_flow
from experiments.studies.conditioning.posteriors import TRUTH, compare, normal_kl
from experiments.studies.conditioning.simulators import GaussianLinear, TwoMoons
from resflow_jax import DenseTail, ImageFlowConfig, VectorFlowConfig
from resflow_jax.data.embedded import load_digit_labels, load_digits

OPTIMIZER = OptimizerConfig(learning_rate=3e-2, warmup=4, ema_decay=0.8)
IMAGES = ImageFlowConfig((8, 8, 1), blocks=(1,), kernels=(3,), preactivation="all", tail=DenseTail(0))
TINY = ConditionalConfig(
    batch_size=64,
    two_moons=TwoMoonsConfig(
        simulator=TwoMoons(500),
        model=VectorFlowConfig(2, blocks=2, hidden=(8,), condition_dim=2),
        steps=41,
        optimizer=OPTIMIZER,
        flowjax=FlowjaxConfig(layers=1, width=8, depth=1, knots=3),
    ),
    gaussian_linear=GaussianLinearConfig(
        simulator=GaussianLinear(2), model=VectorFlowConfig(2, blocks=1, hidden=(8,), condition_dim=2), steps=0
    ),
    digits=DigitsConfig(model=IMAGES, steps=2, batch_size=16, optimizer=OPTIMIZER, draws=1, images=4, samples=2),
    observations=2,
    samples=60,
    pairs=50,
    log_every=10,
)


def test_a_tiny_run(tmp_path, capsys):
    """The files; the loss falls towards that of the posterior; metrics and table say what was returned."""
    results = conditional.run(replace(TINY, workdir=tmp_path / "run"))
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written == {".lock", "config.json", "metrics.jsonl", "two_moons.png", "digits.png"}
    assert all((tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG") for name in written if "png" in name)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fits, scores = results["two_moons"], results["digits"]
    assert set(fits) - {"flowjax"} == {"exact posterior", "residual flow"} and set(results) == {"two_moons", "digits"}
    ours = [line for line in lines if line.get("flow") == "residual flow"]
    assert [line["step"] for line in ours] == [11, 21, 31, 41, 41]
    assert ours[-2]["nll"] < ours[0]["nll"] - 0.2 and ours[-1]["nll"] == fits["residual flow"].nll
    for name, fit in fits.items():
        assert fit.nll >= fits["exact posterior"].nll and len(fit.c2st) == 2
        assert name == "exact posterior" or (fit.excess > 5 * fit.excess_stderr and np.mean(fit.c2st) > 0.6)
    assert fits["exact posterior"].excess == 0
    assert {line["flow"] for line in lines if line["task"] == "digits"} == {"p(x)", "p(x | class)"} == set(scores)
    printed = capsys.readouterr().out
    assert f"{fits['residual flow'].nll:.3f} +- {fits['residual flow'].nll_stderr:.3f} nats" in printed
    assert f"{scores['p(x | class)'].bits_per_dim.mean:.3f} +-" in printed and "certified" in printed


def test_standardised_densities_in_their_own_units():
    """log q of standardised theta plus the log-det of standardising is a density of theta; pairs keep to a budget."""
    task = Standardised.of(GaussianLinear(3), np.random.default_rng(0), 40)
    theta, x = task.standardise(*task.budget)
    for values in (theta, x):
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(values.std(0), 1, rtol=1e-6)
    np.testing.assert_allclose(task.theta(theta), task.budget[0], atol=1e-6)
    assert abs(task.log_det + np.log(task.budget[0].std(0)).sum()) < 1e-12
    drawn = task.pairs(np.random.default_rng(1), 200)
    rows = {tuple(row) for row in np.concatenate([theta, x], axis=1)}
    assert {tuple(row) for row in np.concatenate(drawn, axis=1)} <= rows
    fresh = Standardised.of(GaussianLinear(3), np.random.default_rng(0), None)
    assert len(np.unique(fresh.pairs(np.random.default_rng(1), 200)[0], axis=0)) == 200


class Clocked(Learner):
    """Takes its own time, by a clock that only it moves."""

    def __init__(self, name, clock, cost):
        self.name, self.clock, self.cost, self.rates = name, clock, cost, []

    def step(self, pairs, learning_rate):
        self.clock[0] += 100 if not self.rates else self.cost
        self.rates.append(learning_rate)
        return 1.0


def test_learners_have_equal_time(monkeypatch):
    """One that is four times as fast does four times the steps, to one; the first step, with compilation, is apart."""
    clock = [0.0]
    monkeypatch.setattr("experiments.studies.conditioning.amortised.time.perf_counter", lambda: clock[0])
    learners = [Clocked("slow", clock, 1.0), Clocked("fast", clock, 0.25), Clocked("slower", clock, 3.0)]
    task = Standardised.of(GaussianLinear(2), np.random.default_rng(0), None)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=10)
    rates = [1e-2, 2e-2, 1e-2]
    turns = list(take_turns(learners, task, rates, optimizer, steps=61, batch_size=2, every=20, seed=0))
    assert [turn.steps["slow"] for turn in turns] == [21, 41, 61]
    for turn in turns:
        assert turn.seconds["slow"] == turn.seconds["fast"] == 4 * (turn.steps["fast"] - 1) / 16
        assert abs(turn.seconds["slower"] - turn.seconds["slow"]) <= 1.5
    assert all(learner.first_step == 100 for learner in learners)
    assert max(learners[1].rates) == pytest.approx(2 * max(learners[0].rates))


def test_a_loss_that_is_not_finite_stops_the_run():
    class Failing(Clocked):
        def step(self, pairs, learning_rate):
            return np.nan

    task = Standardised.of(GaussianLinear(2), np.random.default_rng(0), None)
    turns = take_turns([Failing("bad", [0], 1)], task, [1], OPTIMIZER, steps=5, batch_size=2, every=2, seed=0)
    with pytest.raises(FloatingPointError, match=r"training of the bad diverged by step 1: loss nan"):
        next(turns)


class Oracle(Learner):
    """Knows the posterior, or one that is too wide by a factor, in standardised units."""

    def __init__(self, task, name, factor=1.0):
        self.task, self.name, self.factor = task, name, factor

    def _x(self, x):
        mean, deviation = self.task.moments[1]
        return mean + deviation * np.asarray(x, np.float64)

    def log_prob(self, theta, x):
        x, theta = self._x(x), self.task.theta(theta)
        mean = self.task.simulator.posterior_mean(x)
        log_prob = self.task.simulator.posterior_log_prob(mean + (theta - mean) / self.factor, x)
        return log_prob - theta.shape[1] * np.log(self.factor) - self.task.log_det

    def sample(self, key, number, x):
        x = self._x(x)
        theta = self.task.simulator.posterior(np.random.default_rng(1), number, x)
        mean = self.task.simulator.posterior_mean(x)
        return (mean + self.factor * (theta - mean) - self.task.moments[0][0]) / self.task.moments[0][1]


def test_comparison_of_known_posteriors():
    """The posterior itself is no worse than the truth; one twice as wide is, by KL(p || q) in closed form."""
    rng = np.random.default_rng(0)
    task = Standardised.of(GaussianLinear(2, 0.3, 0.2), rng, 100)  # few, so that the moments are far from the true ones
    oracles = [Oracle(task, "right"), Oracle(task, "wide", 2.0)]
    fits, samples, observed = compare(oracles, task, rng, observations=2, samples=300, pairs=4000)
    right, wide = fits["right"], fits["wide"]
    assert abs(right.excess) < 1e-5 and abs(right.nll - fits[TRUTH].nll) < 1e-5
    expected = 0.5 * (2 / 4 - 2 + 2 * np.log(4))
    assert abs(wide.excess - expected) < 5 * wide.excess_stderr < 0.1
    assert all(abs(score - 0.5) < 0.08 for score in right.c2st + fits[TRUTH].c2st) and min(wide.c2st) > 0.6
    assert right.normal_kl < 0.05 < wide.normal_kl
    assert all(np.shape(found) == (2, 300, 2) for found in samples.values()) and observed.shape == (2, 2)


def test_divergence_of_a_normal_fit():
    """KL of the moments of samples from the posterior: near zero; of samples shifted and stretched: in closed form."""
    simulator, rng = GaussianLinear(3, 0.3, 0.2), np.random.default_rng(0)
    x = rng.normal(size=(1, 3))
    s, exact = simulator.posterior_variance, simulator.posterior(rng, 200_000, x[0])
    assert 0 < normal_kl(simulator, [exact], x) < 1e-3
    mean = simulator.posterior_mean(x[0])
    moved = mean + 2 * (exact - mean) + 0.3
    expected = 0.5 * (3 * 4 - 3 + 3 * 0.3**2 / s - 3 * np.log(4))
    assert abs(normal_kl(simulator, [moved], x) - expected) < 0.05
    assert normal_kl(TwoMoons(), [exact], x) is None


def test_classes_of_the_digits(monkeypatch):
    """Labels go with their images: what scikit-learn says of an equal image; also where a flow is trained on them."""
    from sklearn.datasets import load_digits as load

    known = {image.tobytes(): label for image, label in zip(load().images.astype(np.uint8), load().target, strict=True)}
    splits = load_digits()
    for images, labels in zip((splits.train, splits.validation, splits.test), load_digit_labels(), strict=True):
        assert [known[image[..., 0].tobytes()] for image in images] == list(labels)
    monkeypatch.setattr(classes, "fit", lambda flow, images, **options: (images, options["condition"]))
    images, one_hot = classes.train(DigitsConfig(model=IMAGES), 0, conditional=True)
    assert [known[image[..., 0].tobytes()] for image in images] == list(one_hot.argmax(1)) and len(images) == 1347


def test_bits_per_dim_of_every_class():
    """A column a class, with common noise: all are equal where the flow ignores the class."""
    images = load_digits().test[:3]
    flow = make_flow(IMAGES, 0, conditional=True)
    bits = class_bits_per_dim(flow, images, jax.random.key(0), 2)
    assert bits.shape == (2, 3, 10) and np.ptp(bits, axis=-1).min() > 1e-3
    params = nnx.state(flow.base, nnx.Param)
    nnx.update(flow.base, jax.tree.map(lambda p: 0 * p, params))
    kernel = flow.bijector
    for _, module in nnx.iter_graph(kernel):
        if type(module).__name__ == "Conditioning":
            module.hidden.kernel[...] *= 0
    same = class_bits_per_dim(flow, images, jax.random.key(0), 2)
    np.testing.assert_allclose(np.ptp(same, axis=-1), 0, atol=1e-10)
    assert np.abs(same[0] - same[1]).min() > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(TINY, observations=1), "observations: expected an integer of at least 2, got 1"),
        (lambda: replace(TINY, simulations=1), "simulations: expected an integer of at least 2, got 1"),
        (
            lambda: replace(TINY.two_moons, model=VectorFlowConfig(2)),
            "model.condition_dim: expected 2, as TwoMoons has, got None",
        ),
        (
            lambda: replace(TINY.gaussian_linear, model=VectorFlowConfig(3, condition_dim=2)),
            "model.dim: expected 2, as GaussianLinear has, got 3",
        ),
        (
            lambda: replace(TINY.two_moons, optimizer=OptimizerConfig(name="sgd")),
            "optimizer.name: expected one of adam; got 'sgd'",
        ),
        (
            lambda: replace(TINY.two_moons, optimizer=OptimizerConfig(reversible=True)),
            "optimizer.reversible: expected False, got True",
        ),
        (
            lambda: DigitsConfig(model=replace(IMAGES, condition_dim=10)),
            "digits.model.condition_dim: expected None",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_flowjax(tmp_path, monkeypatch, capsys):
    """Its flow is left out, with a message."""
    monkeypatch.setattr(conditional, "has_flowjax", lambda: False)
    config = replace(TINY, workdir=tmp_path / "run", digits=replace(TINY.digits, steps=0))
    config = replace(config, two_moons=replace(TINY.two_moons, steps=2))
    assert set(conditional.run(config)["two_moons"]) == {"exact posterior", "residual flow"}
    assert "flowjax is not installed" in capsys.readouterr().out


def test_the_command_line_reaches_the_config(monkeypatch):
    """Names and nested settings."""
    seen = []
    monkeypatch.setattr(conditional, "run", seen.append)
    conditional.main(["--two-moons.steps", "7", "--gaussian-linear.model.blocks", "3", "--digits.draws", "1"])
    assert (seen[0].two_moons.steps, seen[0].gaussian_linear.model.blocks, seen[0].digits.draws) == (7, 3, 1)
