"""Training against the clock: its budget, the learning rate, validations, and the weights that are kept."""

import itertools
import time

import numpy as np
import pytest

from experiments.studies.comparison.clock import WARMUP, Clock, rate_factor
from experiments.studies.comparison.training import train


class Time:
    """Seconds that pass when it is told so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Counting:
    """A contender whose set-up takes 20 s, an update 1 s and a snapshot 7 s; its model is the number of updates."""

    def __init__(self, now, set_up=20.0, bad=()):
        self.now, self.set_up, self.bad, self.rates, self.batches = now, set_up, bad, [], []

    def prepare(self, batch):
        self.now.seconds += self.set_up

    def step(self, batch, learning_rate):
        self.now.seconds += 1
        self.rates.append(learning_rate)
        self.batches.append(batch)
        return len(self.rates) not in self.bad

    def averaged(self):
        self.now.seconds += 7
        return len(self.rates)


def trained(seconds=120.0, validate=lambda model: 1 / model, learning_rate=0.5, at_least=0, set_up_counts=True, **of):
    now = Time()
    contender = Counting(now, **of)
    clock = Clock(seconds, now)
    options = {"at_least": at_least, "set_up_counts": set_up_counts}
    return train(contender, itertools.count(), clock, learning_rate, validate, **options), contender


def test_the_budget():
    """Set-up and updates fill it, validations do not count; there are twenty, at equal fractions of the updates."""
    validated = []
    found, contender = trained(validate=lambda model: validated.append(model) or 1 / model)
    assert (found.steps, found.set_up, found.seconds, found.step_seconds) == (100, 20, 120, 1)
    assert validated == list(range(5, 101, 5)) and found.losses == [1 / model for model in validated]
    assert (found.model, found.loss, found.at, found.skipped) == (100, 0.01, 1, 0)
    assert contender.batches == list(range(100))  # the first, which prepares, is the first that trains too


def test_the_best_is_kept():
    """Also where others are not finite."""
    found, _ = trained(validate=lambda model: np.nan if model < 30 else abs(model - 62), bad=(3, 4))
    assert (found.model, found.loss, found.skipped) == (60, 2, 2) and found.at == pytest.approx(0.6)
    found, _ = trained(validate=lambda model: np.nan)
    assert found.model is None and found.loss == np.inf


def test_slow_updates():
    """The last update may end after the budget, and is validated."""
    found, _ = trained(seconds=22.5)
    assert (found.steps, found.losses) == (3, [1, 1 / 2, 1 / 3])


def test_a_set_up_that_takes_all():
    with pytest.raises(TimeoutError, match=r"the set-up took 20 s of CPU time, all of the budget of 15 s"):
        trained(seconds=15.0)
    found, _ = trained(seconds=15.0, at_least=2)
    assert (found.steps, found.losses) == (2, [1 / 2])
    found, _ = trained(seconds=15.0, set_up_counts=False)
    assert (found.steps, found.seconds) == (15, 35)


def test_the_learning_rate():
    """From 0 to the peak in a twentieth of the time for updates, then to 0, whatever the set-up took."""
    for set_up in (0.0, 20.0):
        _, contender = trained(seconds=100 + set_up, set_up=set_up, learning_rate=3.0)
        expected = [3 * rate_factor(n / 100) for n in range(100)]
        np.testing.assert_allclose(contender.rates, expected)
    assert rate_factor(0) == 0 and rate_factor(WARMUP / 2) == 0.5 and rate_factor(WARMUP) == 1
    assert rate_factor((1 + WARMUP) / 2) == pytest.approx(0.5) and rate_factor(1) == pytest.approx(0)
    factors = [rate_factor(f) for f in np.linspace(WARMUP, 1, 50)]
    assert (np.diff(factors) < 0).all()


def test_the_clock_counts_work_alone():
    """CPU time of this process, inside the block: waiting is free."""
    clock = Clock(1.0)
    with clock:
        time.sleep(0.2)
    assert clock.elapsed < 0.1
    with clock:
        began = time.process_time()
        while time.process_time() - began < 0.2:
            pass
    assert 0.2 <= clock.elapsed < 0.3 and clock.fraction == clock.elapsed
    before = clock.elapsed
    sum(range(10**6))
    assert clock.elapsed == before
