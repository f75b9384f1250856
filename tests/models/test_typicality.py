"""The typicality test: p-values of typical data are uniform, those of other data small, on either side of H."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.models.test_composed_flow import contraction, make_flow

DIM = 100
EXACT = rf.Exact()


def normals(seed, number, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (number, DIM))


@pytest.fixture(scope="module")
def flow():
    """N(0, I): the flow is exact, and -log p is a chi-squared."""
    return rf.Flow(rf.ActNorm((DIM,)), rf.StandardNormal((DIM,)))


@pytest.fixture(scope="module")
def typicality(flow):
    return rf.Typicality.fit(flow, normals(0, 2000), normals(1, 1999), batch_size=500)


def log_probs(x):
    return -0.5 * (np.asarray(x) ** 2).sum(-1) - 0.5 * x.shape[-1] * np.log(2 * np.pi)


def test_entropy(typicality):
    """H is the differential entropy within its error, the deviation that of half a chi-squared."""
    known = 0.5 * DIM * (1 + np.log(2 * np.pi))
    assert abs(typicality.entropy - known) < 4 * np.sqrt(DIM / 2 / 2000)
    np.testing.assert_allclose(typicality.deviation, np.sqrt(DIM / 2), rtol=0.07)
    np.testing.assert_allclose(typicality.entropy, -log_probs(normals(0, 2000)).mean(), rtol=1e-12)
    np.testing.assert_allclose(typicality.deviation, log_probs(normals(0, 2000)).std(ddof=1), rtol=1e-10)
    np.testing.assert_allclose(typicality.log_probs, np.sort(log_probs(normals(1, 1999))), rtol=1e-12)
    assert typicality.dim == DIM and typicality.scores.shape == (1999,)
    assert repr(typicality).startswith("Typicality by 1,999 examples: H = 141") and "nats" in repr(typicality)


def test_against_counting(typicality):
    """Scores, p-values and quantiles are what loops over the held-out examples give."""
    x = normals(2, 50, 1.1)
    log_prob = log_probs(x)
    log_prob[:2] = typicality.log_probs[7], -typicality.entropy + typicality.scores[5]  # ties
    held_out = log_probs(normals(1, 1999))
    scores = np.abs(-held_out - float(typicality.entropy))
    for n, value in enumerate(log_prob):
        score = abs(-value - float(typicality.entropy))
        np.testing.assert_allclose(typicality.score(jnp.asarray(value)), score, rtol=1e-12)
        if n > 1:
            assert typicality.p_value(jnp.asarray(value)) == (1 + (scores >= score).sum()) / 2000
        reference = np.asarray(typicality.log_probs)
        less, equal = (reference < value).sum(), (reference == value).sum()
        assert typicality.quantile(jnp.asarray(value)) == (less + 0.5 * equal) / 1999
    tie = typicality.scores[5]
    index = int(np.searchsorted(typicality.scores, typicality.score(jnp.asarray(log_prob[1])), side="left"))
    assert abs(typicality.scores[index] - tie) < 1e-12


def test_ties_count_as_atypical():
    """An example like all held-out ones has p = 1; of equal scores each counts."""
    typicality = rf.Typicality.from_log_probs(jnp.asarray([-1.0, -3.0]), jnp.asarray([-1.0, -3.0, -4.0]), dim=2)
    assert typicality.entropy == 2.0
    found = typicality.p_value(jnp.asarray([-2.0, -1.0, -3.0, -4.0, -5.0, 1.0]))
    np.testing.assert_allclose(found, [1, 1, 1, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(typicality.quantile(jnp.asarray([-9.0, -4.0, -2.0, 1.0])), [0, 1 / 6, 2 / 3, 1])


def test_uniform_in_distribution(flow, typicality):
    """A Kolmogorov-Smirnov test accepts 4000 p-values as uniform, and one in twenty is below 0.05."""
    p = np.sort(rf.anomaly_score(flow, normals(3, 4000), typicality).p_value)
    distance = np.abs(p - np.arange(1, 4001) / 4000).max()
    assert distance < 1.95 * np.sqrt(1 / 4000 + 1 / 2000)  # exceeded with probability 0.001
    assert abs((p <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 4000 + 1 / 2000))


@pytest.mark.parametrize(("scale", "side"), [(1.5, 0.0), (0.5, 1.0), (0.0, 1.0)])
def test_out_of_distribution(flow, typicality, scale, side):
    """Too unlikely, too likely, and the mode itself, which is likelier than all data: each is found."""
    found = rf.anomaly_score(flow, normals(4, 200, scale), typicality)
    assert found.p_value.max() < 0.01
    np.testing.assert_allclose(found.quantile, side, atol=0.01)
    likelier = found.log_prob > typicality.log_probs[-1]
    assert likelier.all() == (side == 1.0)
    assert repr(found).startswith("Anomaly of 200 examples: 200 with p <= 0.05 (p 0.0005")
    assert repr(jax.eval_shape(lambda: found)).startswith("Anomaly(log_prob=float64[200], ")


def test_the_likelihood_alone_would_miss_constant_images():
    """Images of one colour are likelier than noise under a flow of noise; the score finds them, a bound does not."""
    flow = rf.Flow(rf.Chain([rf.Logit(1e-3), rf.Flatten((6, 6, 1))]))
    z = jax.random.normal(jax.random.key(0), (1000, 36))
    x = flow.inverse(z)
    typicality = rf.Typicality.fit(flow, x[:500], x[500:])
    constant = jnp.broadcast_to(jnp.asarray([0.45, 0.5])[:, None, None, None], (2, 6, 6, 1))
    found = rf.anomaly_score(flow, constant, typicality)
    assert (found.log_prob > -typicality.entropy).all() and (found.quantile > 0.95).all()
    assert (found.p_value < 0.05).all()


def test_groups(flow, typicality):
    """p-values of groups: uniform for typical data, small for a shift that no single example shows."""
    key = jax.random.key(9)
    p = typicality.group_p_value(flow.log_prob(normals(5, 4000)).reshape(400, 10), key)
    assert p.shape == (400,)
    distance = np.abs(np.sort(p) - np.arange(1, 401) / 400).max()
    assert distance < 1.95 * np.sqrt(1 / 400 + 10 / 2000)
    other = flow.log_prob(normals(6, 400, 1.08))
    assert typicality.group_p_value(other.reshape(10, 40), key).max() < 0.01 < np.median(typicality.p_value(other))
    one = typicality.group_p_value(flow.log_prob(normals(5, 100))[:, None], key, resamples=20_000)
    np.testing.assert_allclose(one, typicality.p_value(flow.log_prob(normals(5, 100))), atol=0.02)


def test_groups_against_a_loop(typicality):
    """The bootstrap of the paper, by NumPy from the same draws."""
    key, log_prob = jax.random.key(2), np.asarray(typicality.log_probs[::400])
    chosen = np.asarray(jax.random.randint(key, (50, 5), 0, 1999))
    entropy = float(typicality.entropy)
    drawn = [abs(-np.mean(np.asarray(typicality.log_probs)[row]) - entropy) for row in chosen]
    expected = (1 + sum(value >= abs(-log_prob.mean() - entropy) for value in drawn)) / 51
    np.testing.assert_allclose(typicality.group_p_value(jnp.asarray(log_prob), key, resamples=50), expected)


def test_units(typicality):
    """Bits/dim are nats by D log 2: a factor of two in probability for each element."""
    log_prob = -typicality.entropy - jnp.asarray([0.0, DIM * np.log(2)])
    np.testing.assert_allclose(typicality.score(log_prob, unit="bits/dim"), [0, 1], atol=1e-12)
    np.testing.assert_allclose(typicality.score(log_prob), [0, DIM * np.log(2)], atol=1e-12)


def test_values_that_are_no_numbers(typicality):
    """NaN stays NaN; an example of density zero has the largest score."""
    log_prob = jnp.asarray([jnp.nan, -jnp.inf, jnp.inf])
    for found in (typicality.p_value(log_prob), typicality.quantile(log_prob)):
        assert np.isnan(found[0]) and np.isfinite(found[1:]).all()
    np.testing.assert_allclose(typicality.p_value(log_prob)[1:], 1 / 2000)
    np.testing.assert_allclose(typicality.quantile(log_prob)[1:], [0, 1])
    assert np.isnan(typicality.group_p_value(log_prob[:2], jax.random.key(0)))


def test_transformations(flow, typicality):
    """Results under jit and vmap, with the typicality as an argument, and in gradients, are those without."""
    x = normals(7, 6)
    expected = rf.anomaly_score(flow, x, typicality)

    def judge(x, typicality):
        return rf.anomaly_score(flow, x, typicality)

    found = jax.jit(judge)(x, typicality)
    mapped = jax.vmap(lambda x: judge(x[None], typicality))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-10), mapped, expected)
    gradient = jax.grad(lambda x: judge(x, typicality).score.sum())(x)
    np.testing.assert_allclose(gradient, np.sign(-expected.log_prob - typicality.entropy)[:, None] * x, rtol=1e-10)
    made = jax.jit(lambda log_prob: rf.Typicality.from_log_probs(log_prob, dim=DIM))(expected.log_prob)
    assert made.dim == DIM and made.scores.shape == (6,)
    assert repr(jax.eval_shape(lambda: made)).startswith("Typicality(float64[], float64[]")
    assert repr(jax.tree.map(lambda _: object(), made)).startswith("Typicality(<object>")


def test_known_densities_in_a_program(typicality):
    """Concrete arrays that a program closes over are checked while it is traced."""
    known = jnp.linspace(-3.0, -1.0, 5)
    found = jax.jit(lambda x: rf.Typicality.from_log_probs(known, dim=2).p_value(x))(known)
    np.testing.assert_allclose(found, rf.Typicality.from_log_probs(known, dim=2).p_value(known))
    bad = known.at[0].set(jnp.inf)
    with pytest.raises(ValueError, match="expected finite log-densities, got 1"):
        jax.jit(lambda x: rf.Typicality.from_log_probs(bad, dim=2).p_value(x))(known)


def test_fit_takes_every_example_once():
    """The last batch is filled up and cut, keys differ between batches, estimator and condition are used."""
    x, c = jax.random.normal(jax.random.key(1), (7, 3)), jax.random.normal(jax.random.key(2), (7, 2))
    flow = rf.Flow(rf.ResidualBlock(contraction(nnx.Rngs(0), (2,))))
    exact = flow.log_prob(x, condition=c, estimator=EXACT)
    found = rf.Typicality.fit(flow, np.asarray(x), condition=np.asarray(c), estimator=EXACT, batch_size=3)
    np.testing.assert_allclose(found.log_probs, np.sort(exact), rtol=1e-12)
    np.testing.assert_allclose(found.entropy, -exact.mean(), rtol=1e-12)
    held_out = rf.Typicality.fit(flow, x, x[:4], condition=c, condition_held_out=c[0], estimator=EXACT, batch_size=100)
    expected = flow.log_prob(x[:4], condition=c[0], estimator=EXACT)
    np.testing.assert_allclose(held_out.log_probs, np.sort(expected), rtol=1e-12)
    same = jnp.broadcast_to(x[:1], (4, 3))
    options = {"key": jax.random.key(0), "estimator": rf.Truncated(2), "batch_size": 2, "condition": c[0]}
    noisy = rf.Typicality.fit(flow, same, **options)
    assert len(set(np.asarray(noisy.log_probs).tolist())) == 4
    anomaly = rf.anomaly_score(flow, x, found, condition=c, estimator=EXACT)
    np.testing.assert_allclose(anomaly.log_prob, exact, rtol=1e-12)
    np.testing.assert_allclose(anomaly.score, np.abs(-exact + exact.mean()), atol=1e-12)
    np.testing.assert_allclose(np.sort(anomaly.p_value), np.arange(2, 9) / 8)


def test_float32(flow):
    """A flow of float32 has a typicality of float32, and log-densities of either dtype are taken."""
    with jax.enable_x64(False):
        small = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
        typicality = rf.Typicality.fit(small, np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32))
        assert {leaf.dtype for leaf in jax.tree.leaves(typicality)} == {jnp.dtype("float32")}
    assert typicality.p_value(jnp.zeros(3)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("flow: expected Flow", lambda flow, t: rf.Typicality.fit("flow", normals(0, 4))),
        ("typicality: expected Typicality", lambda flow, t: rf.anomaly_score(flow, normals(0, 4), None)),
        ("x_train: expected floats .* of 2 or more examples", lambda flow, t: rf.Typicality.fit(flow, normals(0, 1))),
        ("x_train: expected floats", lambda flow, t: rf.Typicality.fit(flow, jnp.zeros((4, 3)))),
        ("x_held_out: expected floats", lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), jnp.zeros((0, DIM)))),
        ("x_train: expected a float array", lambda flow, t: rf.Typicality.fit(flow, [[0.0]])),
        ("batch_size: expected", lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), batch_size=0)),
        ("key: expected", lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), key=1)),
        (
            "condition_held_out: expected None without x_held_out",
            lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), condition_held_out=jnp.ones(2)),
        ),
        ("condition: expected None", lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), condition=jnp.ones(2))),
        (
            "condition_held_out: expected None",
            lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), normals(1, 4), condition_held_out=jnp.ones(2)),
        ),
        ("x_train: expected finite", lambda flow, t: rf.Typicality.fit(flow, jnp.nan * normals(0, 4))),
        (
            "x_held_out: expected finite",
            lambda flow, t: rf.Typicality.fit(flow, normals(0, 4), jnp.nan * normals(1, 4)),
        ),
        (
            "log_prob: expected finite log-densities, got 1",
            lambda flow, t: rf.Typicality.from_log_probs(jnp.asarray([0.0, jnp.nan]), dim=2),
        ),
        ("log_prob: expected floats", lambda flow, t: rf.Typicality.from_log_probs(jnp.zeros(1), dim=2)),
        ("held_out: expected floats", lambda flow, t: rf.Typicality.from_log_probs(jnp.zeros(2), jnp.zeros(0), dim=2)),
        ("dim: expected", lambda flow, t: rf.Typicality.from_log_probs(jnp.zeros(2), dim=0)),
        ("unit: expected one of", lambda flow, t: t.score(jnp.zeros(2), unit="bits")),
        ("log_prob: expected a float array", lambda flow, t: t.p_value(jnp.arange(3))),
        ("log_prob: expected floats", lambda flow, t: t.group_p_value(jnp.zeros(()), jax.random.key(0))),
        ("resamples: expected", lambda flow, t: t.group_p_value(jnp.zeros(2), jax.random.key(0), resamples=0)),
        ("key: expected", lambda flow, t: t.group_p_value(jnp.zeros(2), None)),
    ],
)
def test_errors(flow, typicality, message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(flow, typicality)


def test_a_trained_flow_of_a_residual_block():
    """With the roulette, whose noise both have, p-values of data of the model are uniform still."""
    x = jax.random.normal(jax.random.key(1), (4, 3))
    flow = make_flow()
    flow.initialize(x)
    nnx.update(flow, jax.tree.map(lambda p: 2 * p, nnx.state(flow, nnx.Param)))
    flow.converge_norms()
    x = flow.sample(jax.random.key(5), 900)
    estimator = rf.Roulette(rf.Geometric(0.5))
    typicality = rf.Typicality.fit(
        flow, x[:300], x[300:600], key=jax.random.key(6), estimator=estimator, batch_size=300
    )
    p = rf.anomaly_score(flow, x[600:], typicality, key=jax.random.key(7), estimator=estimator).p_value
    assert np.abs(np.sort(p) - np.arange(1, 301) / 300).max() < 1.95 * np.sqrt(2 / 300)
