"""Contractions from plain arguments: dense Jacobians, certified bounds, conditions, blocks in flows, errors."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import ACTIVATIONS
from resflow_jax.layers.block_certificate import certify_contraction, tighten_contraction
from resflow_jax.layers.lipschitz import deferred_norms
from tests.moving import add_noise

# name: (constructor from rngs, shape of x, shape of a condition)
NETWORKS = {
    "conditional MLP": (
        lambda rngs: rf.LipschitzMLP(3, (6,), condition_dim=2, activation="clipswish", preactivation=True, rngs=rngs),
        (3,),
        (2,),
    ),
    "MLP with norms": (
        lambda rngs: rf.LipschitzMLP(3, (4,), activation="elu", norms=(np.inf, 2, np.inf), condition_dim=1, rngs=rngs),
        (3,),
        (1,),
    ),
    "single layer": (lambda rngs: rf.LipschitzMLP(3, (), coefficient=0.7, rngs=rngs), (3,), None),
    "conditional CNN": (
        lambda rngs: rf.LipschitzCNN((2, 3, 2), (4, 2), (3, 1, 3), condition_dim=3, activation="maxmin", rngs=rngs),
        (2, 3, 2),
        (3,),
    ),
    "conditional DenseNet": (
        lambda rngs: rf.DenseNet((3,), 2, 2, activation="lipswish", condition_dim=2, rngs=rngs),
        (3,),
        (2,),
    ),
    "convolutional DenseNet": (
        lambda rngs: rf.DenseNet((2, 3, 1), 1, 2, condition_dim=2, coefficient=0.8, rngs=rngs),
        (2, 3, 1),
        (2,),
    ),
}
GRIDS = {
    "CNN on a line, periodic": (
        lambda rngs: rf.LipschitzCNN((5, 2), (4,), (3, 3), padding="periodic", condition_dim=1, rngs=rngs),
        (5, 2),
        (1,),
    ),
    "CNN in space": (lambda rngs: rf.LipschitzCNN((2, 3, 2, 1), (2,), (3, 1), rngs=rngs), (2, 3, 2, 1), None),
    "DenseNet in a torus": (
        lambda rngs: rf.DenseNet((3, 3, 1), 1, 2, padding="periodic", rngs=rngs),
        (3, 3, 1),
        None,
    ),
}
ALL = [*NETWORKS, *GRIDS]
# Dense, on a line, on a plane and in space, with a condition and without.
BLOCKS = ["MLP with norms", "conditional CNN", "conditional DenseNet", *GRIDS]


@cache
def made(name, scale=4.0):
    """A contraction with kernels so large that the normalisation matters, x [4, ...] and conditions for it, or None."""
    constructor, shape, condition_shape = (NETWORKS | GRIDS)[name]
    with deferred_norms():  # of other kernels
        g = constructor(nnx.Rngs(1))
    for linear in g.linears:
        linear.kernel[...] *= scale
        linear.search_norm(8)
        linear.update_norm(1e-10, 1e-8, 2000)
    keys = jax.random.split(jax.random.key(2), 3)
    if g.conditioning is not None:
        g.conditioning.out.kernel[...] *= 4
        g.conditioning.out.bias[...] = jax.random.normal(keys[0], g.conditioning.out.bias.shape)
    x = jax.random.normal(keys[1], (4, *shape))
    return g, x, None if condition_shape is None else 2 * jax.random.normal(keys[2], (4, *condition_shape))


def make(name):
    """The same, each time a copy."""
    g, x, c = made(name)
    return nnx.clone(g), x, c


def compiled(g):
    """(dg/dx [B, D, D], g) of a batch and its conditions."""
    graphdef, state = nnx.split(g)

    @jax.jit
    def run(state, x, c):
        module = nnx.merge(graphdef, state)

        def one(x, c):
            y = module(x[None], None if c is None else c[None])[0]
            return y.ravel(), y

        jacobian = jax.vmap(jax.jacfwd(one, has_aux=True), in_axes=(0, None if c is None else 0))(x, c)[0]
        return jacobian.reshape(len(x), x[0].size, x[0].size), module(x, c)

    return lambda x, c: tuple(map(np.asarray, run(state, x, c)))


@pytest.mark.parametrize("name", ALL)
def test_a_contraction_for_every_condition(name):
    """No Jacobian exceeds the certified bound, nor does any pair, however far c; c does change g; shape is kept."""
    g, x, c = make(name)
    tighten_contraction(g)
    block = certify_contraction(g)
    assert block.is_proved and block.bound <= g.lipschitz < 1
    assert g.event_shape == x.shape[1:] and g.condition_shape == (None if c is None else c.shape[1:])
    run, outputs = compiled(g), []
    for given in [None] if c is None else [c, 30 * c, -300 * c]:
        (jacobians, y), (others, other) = run(x, given), run(3 * x[::-1], given)
        assert y.shape == x.shape
        for matrix in (*jacobians, *others):
            assert np.linalg.norm(matrix, block.order) <= block.bound * (1 + 1e-12)
        changes = [
            np.linalg.norm(np.asarray(a).reshape(4, -1), block.order, axis=1) for a in (other - y, 3 * x[::-1] - x)
        ]
        assert (changes[0] <= block.bound * changes[1] * (1 + 1e-12)).all()
        outputs.append(y)
    assert all(np.abs(y - outputs[0]).max() > 1e-3 for y in outputs[1:])
    if c is not None:  # an example's condition is its own
        swapped = run(x, c.at[1:].set(7.0))[1]
        np.testing.assert_array_equal(swapped[0], outputs[0][0])
        assert (np.abs(swapped - outputs[0])[1:].reshape(3, -1).max(axis=1) > 1e-6).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_it(name):
    """y = x + g(x; c): log-det, its gradient in c and parameters, and inverse, against the dense Jacobian."""
    g, x, c = make(name)
    block = rf.ResidualBlock(g)
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)

    def log_det(params, x, c):
        return nnx.merge(graphdef, params, rest).forward(x, condition=c, estimator=rf.Exact())[1]

    def dense(params, x, c):
        layer = nnx.merge(graphdef, params, rest)

        def one(x, c):
            function = lambda x: layer(x[None], None if c is None else c[None])[0].ravel()  # noqa: E731
            return jnp.linalg.slogdet(jax.jacfwd(function)(x).reshape(x.size, x.size))[1]

        return jax.vmap(one, in_axes=(0, None if c is None else 0))(x, c)

    def gradients(function, *args):
        def total(params, x, c):
            values = function(params, x, c)
            return jnp.sum(values * jnp.arange(1.0, 5.0)), values

        argnums = (0, 1) if args[2] is None else (0, 1, 2)
        return jax.grad(total, argnums=argnums, has_aux=True)(*args)

    @jax.jit
    def run(*args):
        block = nnx.merge(graphdef, args[0], rest)
        back = block.inverse(block(*args[1:]), condition=args[2], return_status=True)
        return gradients(log_det, *args), gradients(dense, *args), back

    (found_gradients, found), (expected_gradients, expected), (back, status) = run(params, x, c)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    if c is not None:
        assert jnp.any(found_gradients[2] != 0)
    assert status.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-7)


def test_constructor_arguments_are_kept():
    """Each as an attribute of its name, hashable: a copy made of them has the same structure."""
    cases = [
        (rf.LipschitzMLP, "dim hidden condition_dim activation coefficient preactivation norms"),
        (rf.LipschitzCNN, "shape hidden kernels padding condition_dim activation coefficient preactivation norms"),
        (rf.DenseNet, "shape depth growth first kernel padding condition_dim activation coefficient"),
    ]
    makers = [
        lambda: rf.LipschitzMLP(3, [4], condition_dim=2, norms=[1, 2, 1], rngs=nnx.Rngs(0)),
        lambda: rf.LipschitzCNN([2, 2, 1], [4], [3, 1], condition_dim=2, rngs=nnx.Rngs(0)),
        lambda: rf.DenseNet([2, 2, 1], 1, 2, first=2, condition_dim=2, rngs=nnx.Rngs(0)),
    ]
    for (kind, names), make in zip(cases, makers, strict=True):
        g = nnx.eval_shape(make)
        arguments = {name: getattr(g, name) for name in names.split()}
        hash(tuple(arguments.values()))
        copy = nnx.eval_shape(lambda kind=kind, arguments=arguments: kind(**arguments, rngs=nnx.Rngs(5)))
        assert nnx.split(copy)[0] == nnx.split(g)[0]


@pytest.mark.parametrize("activation", ["clipswish", "fullsort", "lipschitz_cube"])
def test_widths_are_those_of_what_activations_put_out(activation):
    """Kernels of the linear layers: an activation that doubles channels gets half of them."""
    expansion = ACTIVATIONS[activation].expansion
    g = nnx.eval_shape(lambda: rf.LipschitzMLP(3, (6, 8), activation=activation, rngs=nnx.Rngs(0)))
    shapes = [linear.kernel.shape for linear in g.linears]
    assert shapes == [(3, 6 // expansion), (6, 8 // expansion), (8, 3)]
    g = nnx.eval_shape(lambda: rf.DenseNet(3, 2, 4, first=5, activation=activation, rngs=nnx.Rngs(0)))
    shapes = [linear.kernel.shape for linear in g.linears]
    assert shapes == [(3, 5), (5, 4 // expansion), (9, 4 // expansion), (13, 3)]
    assert g.lipschitz == 0.98**4
    same = nnx.eval_shape(lambda: rf.LipschitzMLP(3, (6, 8), activation=ACTIVATIONS[activation], rngs=nnx.Rngs(0)))
    assert same.activation is ACTIVATIONS[activation]


def test_a_conditional_flow():
    """Affine, residual blocks and base that depend on c: every density integrates to one, samples have its mean."""
    rngs = nnx.Rngs(0)
    blocks = [rf.ResidualBlock(rf.LipschitzMLP(1, (8,), condition_dim=2, rngs=rngs)) for _ in range(2)]
    bijector = rf.Chain([rf.Affine((1,), condition_dim=2, rngs=rngs), *blocks])
    flow = rf.Flow(bijector, rf.MixtureOfNormals(2, (1,), condition_dim=2, rngs=rngs))
    add_noise(flow, 0.2, seed=0)  # with others the two means below may be close by chance
    flow.converge_norms()
    x = np.linspace(-60, 60, 4001)
    means = []
    for c in ([0.0, 0.0], [0.3, -0.5]):
        log_prob = flow.log_prob(jnp.asarray(x[:, None]), condition=jnp.asarray(c), estimator=rf.Exact())
        density = np.exp(log_prob)
        np.testing.assert_allclose(np.trapezoid(density, x), 1, rtol=1e-6)
        means.append(np.trapezoid(density * x, x))
        deviation = np.sqrt(np.trapezoid(density * (x - means[-1]) ** 2, x))
        samples = flow.sample(jax.random.key(0), 2000, condition=jnp.asarray(c))
        assert abs(samples.mean() - means[-1]) < 4 * deviation / 2000**0.5
    assert abs(means[0] - means[1]) > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: rf.LipschitzMLP(0, rngs=rngs), "dim: expected an integer of at least 1, got 0"),
        (lambda rngs: rf.LipschitzMLP(2, (0,), rngs=rngs), "hidden: expected an integer of at least 1, got 0"),
        (lambda rngs: rf.LipschitzMLP(2, 3, rngs=rngs), r"hidden: expected a tuple of sizes, such as \(3,\), got 3"),
        (lambda rngs: rf.LipschitzMLP(2, rngs=3), "rngs: expected Rngs, got int"),
        (lambda rngs: rf.LipschitzMLP(2, activation="gelu", rngs=rngs), "activation: expected one of .*; got 'gelu'"),
        (
            lambda rngs: rf.LipschitzMLP(2, (3,), activation="clipswish", rngs=rngs),
            "activation: expected widths that 2 divides for clipswish, got 3",
        ),
        (
            lambda rngs: rf.LipschitzMLP(3, (4,), activation="maxmin", preactivation=True, rngs=rngs),
            "preactivation: expected none for maxmin on 3 channels, which is not a multiple of 2",
        ),
        (lambda rngs: rf.LipschitzMLP(2, coefficient=1.0, rngs=rngs), r"coefficient: expected a number in \(0, 1\)"),
        (lambda rngs: rf.LipschitzMLP(2, (4,), norms=(2, 2), rngs=rngs), "norms: expected 3 orders, one more than"),
        (lambda rngs: rf.LipschitzMLP(2, (), norms=(2, 0.5), rngs=rngs), "norms: expected an order of at least 1"),
        (lambda rngs: rf.LipschitzMLP(2, condition_dim=0, rngs=rngs), "condition_dim: expected an integer of at least"),
        (
            lambda rngs: rf.LipschitzCNN((4,), rngs=rngs),
            r"shape: expected \(\*size, C\), the channels last, got \(4,\)",
        ),
        (
            lambda rngs: rf.LipschitzCNN((4, 4, 1), (8,), rngs=rngs),
            r"kernels: expected 2 sizes, one more than hidden \(8,\), got \(3, 1, 3\)",
        ),
        (
            lambda rngs: rf.LipschitzCNN((4, 4, 1), (8,), (3, 2), rngs=rngs),
            r"kernels: expected odd sizes, got \(3, 2\)",
        ),
        (lambda rngs: rf.DenseNet(3, 0, rngs=rngs), "depth: expected an integer of at least 1, got 0"),
        (lambda rngs: rf.DenseNet(3, 2, 3, rngs=rngs), "activation: expected widths that 2 divides for clipswish"),
        (lambda rngs: rf.DenseNet((4, 4, 1), kernel=2, rngs=rngs), "kernel: expected an odd size, got 2"),
        (lambda rngs: rf.DenseNet(3, first=0, rngs=rngs), "first: expected an integer of at least 1, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
