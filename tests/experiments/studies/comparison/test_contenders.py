"""Which settings are tried for which model, on which data; the table of diamonds."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.runs.models import VECTORS
from experiments.studies.comparison import contenders
from experiments.studies.comparison.contenders import (
    MODELS,
    fingerprint,
    gives_bound,
    lack,
    models_for,
    widened,
    with_contender,
    with_rates,
    with_widths,
)
from experiments.studies.comparison.datasets import (
    DEFAULTS,
    TOY,
    batches_of,
    config_of,
    names_in,
    searched_on,
    task_for,
)
from experiments.studies.comparison.diamonds import RESOLUTIONS, dequantized, divided, load_diamonds, read
from resflow_jax import Dequantization, Exact, ImageTransform, Roulette

CONFIG = config_of("digits")


@pytest.mark.parametrize("data", [name for name in DEFAULTS if name != TOY])
def test_settings_are_valid(data):
    """Of all models, with all candidates; they change widths, learning rate and seed alone."""
    config = config_of(data)
    for model in models_for(config):
        rates = with_rates(model, config)
        tried = rates + with_widths(rates[2], config)
        assert len(set(tried)) == 5
        for candidate in tried:
            found = with_contender(config, model, candidate, 3)
            assert found.seed == 3 and found.optimizer.learning_rate == candidate.learning_rate
            assert found.optimizer == replace(config.optimizer, learning_rate=candidate.learning_rate)
            own = model == "residual" or isinstance(config.estimator, Exact)
            assert (found.batch_size, found.estimator) == (config.batch_size, config.estimator if own else Roulette())
    residual = with_contender(config, "residual", with_rates("residual", config)[0], 0)
    assert residual == config


def test_widths():
    """Of every kind of model; nothing else of it changes."""
    model = CONFIG.model
    half = widened(model, 0.5)
    data = replace(model.data, dequantization=Dequantization(2, 4))
    assert half == replace(model, hidden_channels=16, tail=replace(model.tail, hidden=16), data=data)
    flow_pp = VECTORS["flow_pp"](model)
    half = widened(flow_pp, 0.5)
    assert half.conditioner.width == 16 and half.data == ImageTransform(dequantization=Dequantization(4, 8))
    assert replace(half, conditioner=flow_pp.conditioner, data=flow_pp.data) == flow_pp
    glow = VECTORS["glow"](model)
    assert widened(glow, 0.5).conditioner.hidden == (64, 64)
    assert widened(VECTORS["ffjord"](model), 2).conditioner.hidden == (64, 64)
    vectors = config_of("moons").model
    assert widened(vectors, 2).hidden == (64, 64)
    assert widened(VECTORS["maf"](vectors), 2).hidden == (256, 256)
    assert widened(VECTORS["nice"](vectors), 1e-9).conditioner.hidden == (1, 1)
    assert widened(vectors, 1.0) == vectors


def test_fingerprints():
    """They change with the settings of a model, not with what a candidate or a job sets."""
    other = replace(CONFIG, seed=3, steps=7, optimizer=replace(CONFIG.optimizer, learning_rate=1.0))
    deeper = replace(CONFIG, model=replace(CONFIG.model, blocks=(1, 1)))
    larger = replace(CONFIG, batch_size=7)
    for model in models_for(CONFIG):
        own = fingerprint(model, CONFIG)
        assert fingerprint(model, other) == own != fingerprint(model, larger)
        assert (fingerprint(model, deeper) == own) == (model != "residual")
    assert len({fingerprint(model, CONFIG) for model in VECTORS if model in models_for(CONFIG)}) == 7


def test_bounds():
    """Of models with a variational dequantisation, on images alone."""
    bounds = {model for model in MODELS if gives_bound(model, CONFIG)}
    assert bounds == {"residual", "flow_pp"}
    assert not any(gives_bound(model, config_of("moons")) for model in VECTORS)


def test_learning_rates():
    """The shipped one, a third and three times it; for networks without a bound the shipped one is at most 2e-3."""
    assert [c.learning_rate for c in with_rates("residual", CONFIG)] == [3e-2, 1e-2, 9e-2]
    assert [c.learning_rate for c in with_rates("glow", CONFIG)] == [2e-3, 6.7e-4, 6e-3]
    best = with_rates("zuko_nsf", CONFIG)[1]
    assert with_widths(best, CONFIG) == (replace(best, width=0.5), replace(best, width=0.25))
    assert [c.width for c in with_widths(best, config_of("rings"))] == [2, 4]


def test_toy_densities_share_a_search():
    assert {searched_on(name) for name in names_in(TOY)} == {"checkerboard"}
    assert searched_on("digits") == "digits" and searched_on("diamonds") == "diamonds"


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    assert lack("residual") is None and lack("ffjord") == "ffjord needs diffrax: pip install resflow_jax[diffrax]"
    assert lack("zuko_nsf") == "zuko_nsf needs zuko: pip install resflow_jax[bench]"


def test_names():
    assert len(names_in(TOY)) == 8 and names_in("digits") == ("digits",)


def test_batches():
    """Every example once an epoch, in an order of the seed; fresh points of toy densities."""
    task = task_for("digits", replace(CONFIG, batch_size=100))
    batches = batches_of(task)
    epoch = [next(batches) for _ in range(len(task.splits.train) // 100)]
    rows = np.concatenate(epoch).reshape(-1, 64)
    assert len(np.unique(rows, axis=0)) == len(np.unique(np.asarray(task.splits.train).reshape(-1, 64), axis=0)) - (
        len(task.splits.train) - len(rows)
    )
    np.testing.assert_array_equal(next(batches_of(task)), epoch[0])
    other = task_for("digits", replace(CONFIG, batch_size=100, seed=1))
    assert (next(batches_of(other)) != epoch[0]).any()
    points = batches_of(task_for("moons", config_of("moons")))
    assert next(points).shape == (256, 2) and (next(points) != next(points)).any()


def test_the_table(tmp_path):
    """Rows that are no measurements are left out; noise of the resolution; standardised by the training rows."""
    path = tmp_path / "diamonds.csv"
    line = "{},Ideal,E,SI2,61.5,55,{},3.95,{},2.43\n"
    lines = [line.format(n / 100, 300 + n, y) for n, y in enumerate([0, 58.9] + [3.98] * 50)]
    path.write_text('"carat","cut","color","clarity","depth","table","price","x","y","z"\n' + "".join(lines))
    table = read(path)
    assert table.shape == (50, 7)
    np.testing.assert_array_equal(table[0], [0.02, 61.5, 55, 302, 3.95, 3.98, 2.43])
    noisy = dequantized(table)
    widths = np.array(list(RESOLUTIONS.values()))
    noise = (noisy - table) / widths
    assert (np.abs(noise) <= 0.5).all() and (noise.min(axis=0) < -0.4).all() and (noise.max(axis=0) > 0.4).all()
    np.testing.assert_array_equal(dequantized(table), noisy)
    splits = divided(noisy)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 5, 5]
    np.testing.assert_allclose(splits.train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(splits.train.std(axis=0), 1, atol=1e-5)
    together = np.concatenate([splits.train, splits.validation, splits.test])
    whole = (noisy - noisy.mean(axis=0)) / noisy.std(axis=0)
    found = (together - together.mean(axis=0)) / together.std(axis=0)
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(whole, axis=0), atol=1e-4)


def test_the_table_of_plotnine(monkeypatch):
    """Its size; and what to install without it."""
    load_diamonds.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("experiments.studies.comparison.diamonds.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"diamonds: expected plotnine, .*pip install resflow_jax\[bench\]"):
            load_diamonds()
    if contenders.find_spec("plotnine") is None:
        pytest.skip("needs the wheel of plotnine")
    splits = load_diamonds()
    assert splits.train.shape == (43135, 7) and splits.validation.shape == splits.test.shape == (5391, 7)
