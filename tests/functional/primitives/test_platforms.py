"""A function for CPUs and one for other platforms: which of them runs, is traced, and how JAX transforms them."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.primitives.platforms import by_platform

X = jnp.linspace(0.1, 1.0, 5)


def function(x):
    """{"sin": sin(2 x), "sum": sum of x} on a CPU, and the same with cos elsewhere."""
    tree = {"x": x, "scale": jnp.asarray(2.0)}
    return by_platform(
        tree,
        cpu=lambda tree: {"sin": jnp.sin(tree["scale"] * tree["x"]), "sum": jnp.sum(tree["x"])},
        default=lambda tree: {"sin": jnp.cos(tree["scale"] * tree["x"]), "sum": jnp.sum(tree["x"])},
        out={"sin": jax.typeof(x), "sum": jax.typeof(jnp.sum(x))},
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_values(transform):
    """On the CPU, where the tests run, the CPU's function is called, compiled or not."""
    out = transform(function)(X)
    np.testing.assert_allclose(out["sin"], np.sin(2 * X), rtol=1e-12)
    np.testing.assert_allclose(out["sum"], np.sum(X), rtol=1e-12)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_transformations(transform):
    """jvp, gradient, second derivative and vmap are those of the CPU's function."""
    primal, tangent = transform(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(X)
    np.testing.assert_allclose(primal["sin"], np.sin(2 * X), rtol=1e-12)
    np.testing.assert_allclose(tangent["sin"], 2 * np.cos(2 * X), rtol=1e-12)
    gradient = transform(jax.grad(lambda x: jnp.sum(function(x)["sin"]) + function(x)["sum"]))
    np.testing.assert_allclose(gradient(X), 2 * np.cos(2 * X) + 1, rtol=1e-12)
    hessian = transform(jax.hessian(lambda x: jnp.sum(function(x)["sin"])))(X)
    np.testing.assert_allclose(hessian, np.diag(-4 * np.sin(2 * X)), rtol=1e-12, atol=1e-15)
    batched = transform(jax.vmap(function))(jnp.stack([X, -X]))
    np.testing.assert_allclose(batched["sin"], np.sin([2 * X, -2 * X]), rtol=1e-12)


def test_other_platforms_get_the_other_function():
    """A program that is exported for a GPU or a TPU, or for several platforms, has theirs."""
    for platforms, in_it, not_in_it in [
        (["cuda"], "cosine", "sine %"),
        (["tpu"], "cosine", "sine %"),
        (["cpu"], "stablehlo.sine", "cosine"),
    ]:
        text = jax.export.export(jax.jit(function), platforms=platforms)(X).mlir_module()
        assert in_it in text
        assert f"stablehlo.{not_in_it}" not in text
    both = jax.export.export(jax.jit(function), platforms=["cpu", "cuda"])(X)
    np.testing.assert_allclose(both.call(X)["sin"], np.sin(2 * X), rtol=1e-12)


def test_only_what_is_lowered_is_traced():
    """Compiling for a CPU does not trace the function for other platforms."""

    def default(x):
        raise AssertionError("traced")

    out = jax.jit(lambda x: by_platform(x, cpu=jnp.sin, default=default, out=jax.typeof(x)))(X)
    np.testing.assert_allclose(out, np.sin(X), rtol=1e-12)


def on_a_tpu(x):
    """tanh(x) on TPUs whose program is not divided, else cos(x)."""
    return by_platform(x, cpu=jnp.cos, default=jnp.cos, tpu=jnp.tanh, out=jax.typeof(x))


def test_a_tpu_has_its_own_function_unless_the_compiler_divides_the_program():
    """jit on several devices takes the default, as does vmap; jit on one and shard_map take the function for TPUs."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    parts = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, parts)
    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    for function, expected in [
        (jax.jit(on_a_tpu), "tanh"),
        (jax.jit(on_a_tpu, in_shardings=sharding), "cosine"),
        (jax.jit(jax.vmap(on_a_tpu)), "cosine"),
        (jax.jit(jax.shard_map(on_a_tpu, mesh=mesh, in_specs=parts, out_specs=parts)), "tanh"),
    ]:
        text = jax.export.export(function, platforms=["tpu"])(x).mlir_module()
        assert [name for name in ("tanh", "cosine") if f"stablehlo.{name}" in text] == [expected]
