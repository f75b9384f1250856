"""The flows of coupling, autoregressive and continuous layers from their configs: maps, files, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.io.config_json import config_from_json, config_to_json
from resflow_jax.models.residual_flow import flow_from_config
from tests.moving import add_noise

Coupling, Scales = rf.CouplingFlowConfig, rf.CouplingScales
MLP, CNN, NET = rf.MLPConditioner((4,)), rf.CNNConditioner((4,), (3, 1), "elu"), rf.ResNetConditioner(4, 1)
SMOOTH = rf.MLPConditioner((4,), "tanh")
IMAGE = (4, 4, 1)
ONE_SCALE = Scales(1, checkerboard=1, last=1)
CONFIGS = {
    "nice": Coupling.nice((3,), conditioner=MLP, condition_dim=2),
    "real nvp": Coupling.real_nvp((3,), couplings=3, conditioner=MLP),
    "glow": Coupling.glow((2,), couplings=2, conditioner=MLP, condition_dim=1),
    "flow++": Coupling.flow_pp((3,), couplings=2, conditioner=MLP, pieces=2),
    "spline": Coupling.neural_spline((3,), couplings=2, conditioner=MLP, pieces=3),
    "made": rf.AutoregressiveFlowConfig.made((3,), hidden=(4,)),
    "maf": rf.AutoregressiveFlowConfig.maf((3,), layers=2, hidden=(4,), condition_dim=2),
    "ffjord": rf.ContinuousFlowConfig.ffjord(
        (3,), conditioner=SMOOTH, tolerance=1e-8, adjoint="direct", condition_dim=2
    ),
    "nice of images": Coupling.nice((2, 3, 1), conditioner=MLP, couplings=2),
    "real nvp of images": Coupling.real_nvp((4, 4, 1), couplings=1, conditioner=CNN, scales=ONE_SCALE),
    "glow of images": Coupling.glow((4, 4, 1), couplings=2, conditioner=CNN, scales=Scales(2)),
    "flow++ of images": Coupling.flow_pp(
        (4, 2, 1),
        couplings=1,
        conditioner=NET,
        pieces=2,
        scales=Scales(1, 2, 0),
        data=rf.ImageTransform(logit_alpha=None, dequantization=rf.Dequantization(1, 3)),
    ),
    "ffjord of images": rf.ContinuousFlowConfig.ffjord(
        (2, 2, 1), conditioner=rf.CNNConditioner((2,), (1, 3), "tanh"), squeezes=1, tolerance=1e-8, adjoint="direct"
    ),
}


def moved_flow(config):
    flow = flow_from_config(config, rngs=nnx.Rngs(0))
    add_noise(flow, 0.2)
    return flow


def dense_jacobians(flow, x, condition):
    """The Jacobians of a flow at the examples of a batch, [B, D, D]."""
    graphdef, state = nnx.split(flow)

    def at(state, e, c):
        return nnx.merge(graphdef, state)(e[None], None if c is None else c[None])[0]

    jacobians = jax.jit(jax.vmap(jax.jacfwd(at, argnums=1), (None, 0, 0)))(state, x, condition)
    return jacobians.reshape(len(x), flow.dim, flow.dim)


@pytest.mark.parametrize("name", CONFIGS)
def test_density_inverse_and_file(name, tmp_path):
    """The log-density is that of the dense Jacobian, the inverse undoes f, JSON and files give the same back."""
    config = CONFIGS[name]
    read = config_from_json(config_to_json(config))
    assert read == config and hash(config) == hash(read)
    flow = moved_flow(config)
    x = jax.random.uniform(jax.random.key(0), (2, *config.shape), minval=0.2, maxval=0.8)
    own = None if config.condition_dim is None else jax.random.normal(jax.random.key(1), (2, config.condition_dim))
    z, log_prob = flow.forward_and_log_prob(x, condition=own, estimator=rf.Exact())
    if name != "ffjord":  # the log-det of its block is in `tests.layers.test_continuous`
        log_det = np.linalg.slogdet(dense_jacobians(flow, x, own))[1]
        tolerance = 1e-6 if "ffjord" in name else 1e-9
        np.testing.assert_allclose(log_prob, flow.base.log_prob(z) + log_det, rtol=tolerance, atol=tolerance)
    back, status = flow.inverse(z, condition=own, return_status=True)
    np.testing.assert_allclose(back, x, atol=1e-7)
    assert status.converged.all()
    rf.save(tmp_path / "flow.safetensors", flow)
    again = rf.load(tmp_path / "flow.safetensors")
    assert again.config == config and type(again) is type(flow)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))
    certificate = rf.certify(flow)
    assert certificate.unbounded and certificate.inverse_lipschitz == np.inf
    assert "nothing to certify\n  no Lipschitz bound for" in repr(certificate)


@pytest.mark.parametrize("preset", ["nice", "real_nvp", "glow", "flow_pp", "neural_spline"])
@pytest.mark.parametrize("shape", [(2,), (8, 8, 1), (6, 10, 3), (7, 7, 1), (2, 2, 1)])
def test_presets_build_for_every_shape(preset, shape):
    """Their sizes fit, and so do those for other data of the same kind."""
    config = getattr(Coupling, preset)(shape)
    flow = nnx.eval_shape(lambda: flow_from_config(config, rngs=nnx.Rngs(0)))
    assert flow.event_shape == config.shape == shape and flow.dim == np.prod(shape)
    other = (3,) if len(shape) == 1 else (12, 4, 2)
    fitted = config.fitted(other)
    assert fitted.shape == other
    if shape in ((2,), (7, 7, 1)):  # of each kind, one whose settings change
        assert nnx.eval_shape(lambda: flow_from_config(fitted, rngs=nnx.Rngs(0))).event_shape == other


def test_settings_in_the_place_of_those_of_a_preset():
    """Layers on pixels where no squeeze is possible are as many as asked for; a dense network takes the whole image."""
    assert Coupling.glow((7, 7, 1), couplings=32) == Coupling.glow((8, 8, 1), couplings=32).fitted((7, 7, 1))
    assert Coupling.glow((7, 7, 1), couplings=32).scales.last == 32
    for preset in (Coupling.real_nvp, Coupling.glow, Coupling.flow_pp, Coupling.neural_spline):
        assert preset((8, 8, 1), conditioner=MLP).scales == Scales()
    assert rf.ContinuousFlowConfig.ffjord((8, 8, 1), conditioner=MLP).squeezes == 0


def test_a_flow_of_layers_is_saved_too(tmp_path):
    """Composed of coupling layers by hand, stacked, with a mask that is an array."""

    def step(rngs):
        keep = np.asarray([True, False, True])
        return rf.Chain(
            [rf.SplineCoupling((3,), MLP, keep, bins=3, rngs=rngs), rf.MixtureCoupling((3,), MLP, rngs=rngs)]
        )

    field = rf.VelocityField((3,), MLP, rngs=nnx.Rngs(0))
    layers = [rf.ResidualStack(step, 2, rngs=nnx.Rngs(1)), rf.MaskedAutoregressive(3, (4,), rngs=nnx.Rngs(2))]
    flow = rf.Flow(rf.Chain([*layers, rf.ContinuousBlock(field)]))
    rf.save(tmp_path / "flow.safetensors", flow)
    again = rf.load(tmp_path / "flow.safetensors")
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))
    assert repr(again) == repr(flow)


def test_certificates_beside_residual_blocks():
    """A flow of both kinds: the blocks are certified, the other layers are named, the whole flow has no bound."""
    block = rf.ResidualBlock(rf.LipschitzMLP(3, (4,), rngs=nnx.Rngs(0)))
    layers = [rf.MixtureCoupling((3,), MLP, components=2, rngs=nnx.Rngs(0)), block]
    flow = rf.Flow(rf.Chain(layers))
    flow.tighten()
    certificate = rf.certify(flow)
    assert certificate.is_certified and certificate.lipschitz == np.inf
    assert certificate.unbounded == (("MixtureCoupling", layers[0].no_bound),)
    assert "every block is invertible" in repr(certificate) and "1 layer MixtureCoupling" in repr(certificate)
    z = jax.random.normal(jax.random.key(0), (2, 3))
    x, status = flow.inverse(z, return_status=True)
    np.testing.assert_allclose(flow(x), z, atol=1e-8)
    assert status.converged.shape == (2, 2)
    with pytest.raises(ValueError, match="status: expected a row for each of the 1 residual blocks, got 2"):
        certificate.error_bounds(status)


def test_tabulate():
    """`nnx.tabulate` lists the networks, and leaves the flow as it was."""
    flow = rf.CouplingFlow(CONFIGS["nice of images"], rngs=nnx.Rngs(0))
    text = nnx.tabulate(flow, jnp.zeros((1, 2, 3, 1)))
    assert "CouplingFlow Summary" in text and flow(jnp.full((1, 2, 3, 1), 0.5)).shape == (1, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coupling((1,)), "shape: expected at least 2 elements to divide"),
        (lambda: Coupling((4, 4)), r"shape: expected \(D,\) for vectors or \(H, W, C\)"),
        (lambda: Coupling((4,), "cubic"), "coupling: expected one of additive"),
        (lambda: Coupling((4,), scale="tanh"), "scale: expected one of exp"),
        (lambda: Coupling.neural_spline((4,), scale="sigmoid"), "scale: expected 'exp' where coupling is not 'affine'"),
        (lambda: Coupling((4,), pieces=9), "pieces: expected 8 where coupling is not 'spline' or 'mixture', got 9 for"),
        (lambda: Coupling((4,), couplings=0), "couplings: expected"),
        (lambda: Coupling((4,), "spline", pieces=1), "pieces: expected"),
        (lambda: Coupling((4,), "spline", pieces=501), "pieces: expected at most 500 of a spline, got 501"),
        (lambda: Coupling((4,), linear=1), "linear: expected bool"),
        (lambda: Coupling((4,), conditioner=3), "conditioner: expected MLPConditioner or CNNConditioner or ResNet"),
        (lambda: Coupling((4,), conditioner=CNN), "conditioner: expected MLPConditioner for vectors"),
        (lambda: Coupling((4,), scales=Scales(1)), "scales: expected the default for vectors"),
        (lambda: Coupling((4,), scales=None), "scales: expected CouplingScales"),
        (lambda: Coupling((4,), condition_dim=0), "condition_dim: expected"),
        (lambda: Coupling((4,), data=rf.ImageTransform()), "data: expected VectorTransform for vectors"),
        (lambda: Coupling(IMAGE, conditioner=CNN), "scales: expected squeezes or last coupling layers"),
        (lambda: Coupling((6, 6, 1), conditioner=CNN, scales=Scales(2)), "shape: expected height and width divisible"),
        (lambda: Coupling((2, 2, 1), conditioner=CNN, scales=Scales(1, last=1)), "scales.last: expected 0"),
        (lambda: Scales(-1), "scales.squeezes: expected"),
        (lambda: Scales(factor_out=2), "scales.factor_out: expected bool"),
        (lambda: rf.Dequantization(-1), "dequantization.couplings: expected"),
        (lambda: rf.Dequantization(1, 0), "dequantization.width: expected"),
        (lambda: rf.AutoregressiveFlowConfig(IMAGE), r"shape: expected \(D,\)"),
        (lambda: rf.AutoregressiveFlowConfig((3,), 0), "layers: expected"),
        (lambda: rf.AutoregressiveFlowConfig((3,), activation="gelu"), "activation: expected one of"),
        (
            lambda: rf.AutoregressiveFlowConfig((3,), activation="maxmin"),
            "activation: expected an activation that acts",
        ),
        (lambda: Coupling.glow((1, 1, 3)), "shape: expected images of at least 2 pixels"),
        (lambda: Coupling.glow((7, 7, 1), couplings="3"), "couplings: expected"),
        (lambda: rf.ContinuousFlowConfig((3,), 0), "blocks: expected"),
        (lambda: rf.ContinuousFlowConfig((3,), conditioner=CNN), "conditioner: expected MLPConditioner for vectors"),
        (lambda: rf.ContinuousFlowConfig((3,), conditioner=3), "conditioner: expected MLPConditioner or CNN"),
        (lambda: rf.ContinuousFlowConfig((3,), squeezes=1), "squeezes: expected 0 for vectors"),
        (lambda: rf.ContinuousFlowConfig((3, 3, 1), conditioner=CNN, squeezes=1), "shape: expected height and width"),
        (lambda: rf.ContinuousFlowConfig((3,), adjoint="none"), "adjoint: expected one of"),
        (lambda: rf.ContinuousFlowConfig((3,), tolerance=0.0), "tolerance: expected"),
        (lambda: rf.CouplingFlow(rf.VectorFlowConfig(3), rngs=nnx.Rngs(0)), "config: expected CouplingFlowConfig"),
        (lambda: rf.CouplingFlow(CONFIGS["nice"], rngs=nnx.Rngs(noise=0)), "rngs: expected a stream for params"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
