"""Checkpoints of the authors' PyTorch implementation: flows that compute the same, all options, export, bad files.

tests/fixtures/reference_*.pth were written by the authors' training scripts; `expected/...` in the .npz beside them is
what the original computes from them in float64, exact log-dets by whole Jacobians (images [C, H, W], z flattened so).
tests/fixtures/torch_*.pth hold models of the authors' classes with other options and random weights, that with coupling
blocks after 200 steps on the digits: beside them x, z, the log-dets of the first two examples and, of classifiers,
logits, in float64, of the raw and of the averaged weights.
"""

import argparse
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.config import args_from_config, config_from_args
from resflow_jax.interop.torch.files import Stub, read_torch_file
from resflow_jax.interop.torch.flow import TorchFlow
from resflow_jax.interop.torch.options import estimator_from_args
from resflow_jax.interop.torch.writer import write_torch_file
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.models.build import feature_shapes
from tests.paths import FIXTURES

MNIST, TOY = FIXTURES / "reference_mnist_tiny.pth", FIXTURES / "reference_toy2d.pth"

# variant: (file, weights, norms, suffixes of the expected z and of the other arrays)
VARIANTS = {
    "mnist raw stored": ("mnist_tiny", "raw", "stored", "train_weights", "train"),
    "mnist raw converged": ("mnist_tiny", "raw", "converged", "train_weights_converged", "train_converged"),
    "mnist ema stored": ("mnist_tiny", "ema", "stored", "ema_stored_uv", "ema_stored_uv"),
    "mnist ema converged": ("mnist_tiny", None, "converged", "ema_converged", "ema_converged"),
    "toy raw stored": ("toy2d", "raw", "stored", "train_weights", "train"),
    "toy raw converged": ("toy2d", None, "converged", "train_weights_converged", "train_converged"),
}
MODELS = ("hybrid", "mixed", "dense", "coupling", "toy")


def channels_last(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x, float)


def ordered_as_ours(flow, z):
    """z of the original, each part flattened as [C, H, W]; ours as [H, W, C]."""
    if isinstance(flow.config, rf.VectorFlowConfig):
        return z
    shapes = feature_shapes(flow.config)
    shapes = shapes if isinstance(flow.bijector, rf.MultiScale) else shapes[-1:]
    sizes = [math.prod(shape) for shape in shapes]
    parts = np.split(z, np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate(
        [
            part.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(z), -1)
            for part, (height, width, channels) in zip(parts, shapes, strict=True)
        ],
        axis=1,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_z_log_det_and_inverse_of_trained_flows(variant):
    """z and log-det to 1e-9 in float64, with the file's vectors and with converged ones; then the inverse to 1e-8."""
    name, weights, norms, z_name, suffix = VARIANTS[variant]
    with np.load(FIXTURES / f"reference_{name}.npz") as arrays:
        expected = {k.removeprefix("expected/"): v for k, v in arrays.items() if k.startswith("expected/")}
    flow = rf.load_torch_checkpoint(FIXTURES / f"reference_{name}.pth", weights, norms)
    x = channels_last(expected["x"])
    z, log_prob = flow.forward_and_log_prob(x, estimator=rf.Exact())
    log_det = log_prob - flow.base_log_prob(z)
    np.testing.assert_allclose(z, ordered_as_ours(flow, expected[f"z_{z_name}"]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det, expected[f"logdet_exact_{suffix}"], rtol=1e-9, atol=1e-9)
    if f"log_px_{suffix}" in expected:
        np.testing.assert_allclose(log_prob, expected[f"log_px_{suffix}"], rtol=1e-9, atol=1e-9)
    if f"x_from_z_{suffix}" in expected and norms == "converged":
        probe = jnp.asarray(ordered_as_ours(flow, expected["z_probe"]))
        got, status = flow.inverse(probe, return_status=True)
        assert status.converged.all() and rf.certify(flow).is_certified
        np.testing.assert_allclose(got, channels_last(expected[f"x_from_z_{suffix}"]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_all_options(name, tmp_path):
    """What the original computes, from raw and averaged weights; and a file written of the flow gives it back."""
    path = FIXTURES / f"torch_{name}.pth"
    with np.load(FIXTURES / f"torch_{name}.npz") as arrays:
        expected = dict(arrays)
    x = channels_last(expected["x"])
    flows = {}
    for weights in ("raw", "ema") if "ema_z" in expected else ("raw",):
        flow = flows[weights] = rf.load_torch_checkpoint(path, weights, norms="stored")
        if flow.pads:  # by the mean of the noise
            z = flow(x)
        else:
            z, log_det = flow.forward(x, estimator=rf.Exact())
            np.testing.assert_allclose(log_det[:2], expected[f"{weights}_logdet"], rtol=1e-9)
        np.testing.assert_allclose(z, ordered_as_ours(flow, expected[f"{weights}_z"]), rtol=1e-9, atol=1e-9)
        if isinstance(flow, TorchFlow) and flow.config.classes:
            np.testing.assert_allclose(flow.logits(x), expected[f"{weights}_logits"], rtol=1e-9, atol=1e-9)
    copy = tmp_path / "copy.pth"
    rf.save_torch_checkpoint(flows["raw"], copy, average=flows.get("ema"))
    for weights, flow in flows.items():
        again = rf.load_torch_checkpoint(copy, weights, norms="stored")
        assert again.config == flow.config
        chex.assert_trees_all_close(nnx.state(again), nnx.state(flow), rtol=1e-14, atol=1e-14)


def test_a_written_file_holds_what_the_scripts_read(tmp_path):
    """The tensors of the original, bit for bit, but for what only its training kept; the options build the same."""
    path = tmp_path / "model.pth"
    raw, average = (rf.load_torch_checkpoint(MNIST, weights, norms="stored") for weights in ("raw", "ema"))
    rf.save_torch_checkpoint(raw, path, average=average)
    theirs, ours = read_torch_file(MNIST), read_torch_file(path)
    ignored = ("last_n_samples", "last_firmom", "last_secmom", "geom_p", "lamb", "scale")
    assert theirs["state_dict"].keys() == ours["state_dict"].keys()
    for old, new in (
        (theirs["state_dict"], ours["state_dict"]),
        (theirs["ema"].state["shadow_params"], ours["ema"].state["shadow_params"]),
    ):
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            assert tensor.shape == new[name].shape or name.endswith(ignored)
            if not name.endswith(ignored):
                np.testing.assert_array_equal(new[name], tensor, err_msg=name)
    tensors = ours["state_dict"]
    dense = [name.removesuffix("weight") for name, t in tensors.items() if name.endswith("weight") and t.ndim == 2]
    assert len(dense) == 12
    for name in dense:
        sigma = tensors[f"{name}u"] @ tensors[f"{name}weight"] @ tensors[f"{name}v"]
        np.testing.assert_allclose(tensors[f"{name}scale"], sigma, rtol=1e-12)
    assert (ours["ema"].module, ours["ema"].name) == ("resflows.utils", "ExponentialMovingAverage")
    assert {k: v for k, v in vars(ours["args"]).items() if vars(theirs["args"])[k] != v} == {}


@pytest.mark.parametrize("name", ["hybrid", "toy"])
def test_a_file_has_the_map_of_every_actnorm(name, tmp_path):
    """Its center, deviation and shift are part of the weight and bias that are written: the same z, log-det, logits.

    A file has the centers of its own averages.
    """
    flow = rf.load_torch_checkpoint(FIXTURES / f"torch_{name}.pth", "raw", norms="stored")
    with np.load(FIXTURES / f"torch_{name}.npz") as arrays:
        x = channels_last(arrays["x"])
    flow.initialize(x)
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(flow):
        if isinstance(layer, ActNorm):
            layer.log_scale[...] += rng.normal(size=layer.shift.shape)
            layer.shift[...] += rng.normal(size=layer.shift.shape)
    average = nnx.clone(flow)
    nnx.update(average, jax.tree.map(lambda leaf: 0.9 * leaf, nnx.state(average, nnx.Param)))
    path = tmp_path / "model.pth"
    rf.save_torch_checkpoint(flow, path, average=None if name == "toy" else average)
    expected = {"raw": flow} if name == "toy" else {"raw": flow, "ema": average}
    for weights, wanted in expected.items():
        found = rf.load_torch_checkpoint(path, weights, norms="stored")
        np.testing.assert_allclose(found(x), wanted(x), rtol=1e-9, atol=1e-9)
        if name == "toy":
            log_dets = [f.forward(x, estimator=rf.Exact())[1] for f in (found, wanted)]
            np.testing.assert_allclose(*log_dets, rtol=1e-9)
        else:
            np.testing.assert_allclose(found.logits(x), wanted.logits(x), rtol=1e-9, atol=1e-9)


def test_float32():
    """In JAX's default dtype z and log-det are within 1e-4 of the original's; an example is found again to 1e-5."""
    with np.load(FIXTURES / "reference_mnist_tiny.npz") as arrays:
        x, z = channels_last(arrays["expected/x"]), arrays["expected/z_ema_converged"]
        log_det = arrays["expected/logdet_exact_ema_converged"]
    with jax.enable_x64(False):
        flow = rf.load_torch_checkpoint(MNIST)
        assert flow.dtype == jnp.float32
        x = jnp.asarray(np.asarray(x, np.float32))
        found, found_log_det = flow.forward(x, estimator=rf.Exact())
        np.testing.assert_allclose(found_log_det, log_det, rtol=1e-4)
        np.testing.assert_allclose(found, ordered_as_ours(flow, z), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flow.inverse(found), x, atol=1e-5)


def changed(tmp_path, source, change):
    content = read_torch_file(source)
    change(content)
    path = tmp_path / "changed.pth"
    write_torch_file(path, content)
    return path


def without(name):
    return lambda content: content["state_dict"].pop(name)


def with_tensor(name, tensor):
    return lambda content: content["state_dict"].__setitem__(name, tensor)


def with_option(name, value):
    return lambda content: setattr(content["args"], name, value)


WEIGHT = "chain.1.nnet.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(WEIGHT), rf"state_dict: .* some missing: {WEIGHT}"),
        (with_tensor("chain.9.weight", np.zeros(2)), r"state_dict: .* some left over: chain\.9\.weight"),
        (with_tensor(WEIGHT, np.zeros((3, 2))), rf"{WEIGHT}: expected shape \(16, 2\), as args say, got \(3, 2\)"),
        (with_tensor(WEIGHT, np.full((16, 2), np.nan)), rf"{WEIGHT}: expected finite numbers, got 32 others"),
        (with_tensor(WEIGHT, "a weight"), rf"state_dict: expected tensors by name, got str for '{WEIGHT}'"),
        (
            with_option("nblocks", 10**12),
            "nblocks: expected no more blocks than the [0-9]+ tensors of the file, got 10",
        ),
        (with_tensor(1, np.zeros(2)), "state_dict: expected tensors by name, got ndarray for 1"),
        (with_option("nblocks", 5), r"state_dict: .* some missing: chain\.10\.bias"),
        (
            with_option("dims", "16-8"),
            r"chain\.1\.nnet\.3\.weight: expected shape \(8, 16\), as args say, got \(16, 16\)",
        ),
        (
            with_option("arch", "realnvp"),
            "arch: expected 'iresnet', got 'realnvp': the script gives coupling blocks no",
        ),
        (with_option("act", "selu"), "act: expected one of swish, .*; got 'selu': its slopes"),
        (with_option("vnorms", "22"), "vnorms: expected at least 4 orders for 3 layers, got '22'"),
        (with_option("vnorms", "2x22"), "vnorms: expected digits from 1 to 9 and 'f'"),
        (with_option("vnorms", "23f2"), "vnorms: expected orders 1, 2 or f with a norm from 1 or to f"),
        (with_option("actnorm", "yes"), "actnorm: expected bool, got 'yes'"),
        (with_option("dims", "16-x"), "dims: expected numbers joined by '-', got '16-x'"),
        (with_option("coeff", 1.5), "coefficient: expected a number in"),
        (
            lambda content: content.pop("args"),
            "expected a checkpoint of the training scripts .* got a dict of 'state_dict'",
        ),
        (lambda content: content.update(args={}), "args: expected a namespace of options, got dict"),
        (lambda content: content.update(state_dict=[]), "state_dict: expected a dict of tensors, got list"),
    ],
)
def test_bad_files(change, message, tmp_path):
    """The error names the file, and the tensor or the option that is wrong."""
    path = changed(tmp_path, TOY, change)
    with pytest.raises(ValueError, match=message) as error:
        rf.load_torch_checkpoint(path)
    assert str(path) in str(error.value)


def test_numbers_that_are_not_read(tmp_path):
    """NaN in a tensor that nothing here is made of is no error."""
    name = next(name for name in read_torch_file(TOY)["state_dict"] if name.endswith(".lamb"))
    path = changed(tmp_path, TOY, with_tensor(name, np.asarray(np.nan, np.float32)))
    found, expected = (nnx.state(rf.load_torch_checkpoint(p, norms="stored")) for p in (path, TOY))
    chex.assert_trees_all_equal(found, expected)


def test_averages_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"weights: expected 'raw' for a file without averages \('ema'\), got 'ema'"):
        rf.load_torch_checkpoint(TOY, weights="ema")
    with pytest.raises(ValueError, match="ema: expected an object with a dict of tensors, shadow_params, got none"):
        rf.load_torch_checkpoint(changed(tmp_path, MNIST, lambda content: content.update(ema=[1])))

    def forget(content):
        del content["ema"].state["shadow_params"]["transforms.0.chain.1.bias"]

    with pytest.raises(ValueError, match=r"ema: .* some missing: transforms\.0\.chain\.1\.bias"):
        rf.load_torch_checkpoint(changed(tmp_path, MNIST, forget))
    assert rf.load_torch_checkpoint(MNIST, "raw", "stored").blocks == 8


def test_other_files_and_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        rf.load_torch_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pth"):
        rf.load_torch_checkpoint(tmp_path / "text.pth")
    (tmp_path / "half.pth").write_bytes(TOY.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"half\.pth"):
        rf.load_torch_checkpoint(tmp_path / "half.pth")
    with pytest.raises(ValueError, match="weights: expected one of None, ema, raw; got 'best'"):
        rf.load_torch_checkpoint(TOY, weights="best")
    with pytest.raises(ValueError, match="norms: expected one of converged, stored; got 'exact'"):
        rf.load_torch_checkpoint(TOY, norms="exact")


IMAGES = {"data": "mnist", "imagesize": 8, "idim": 4, "nblocks": "1-1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "glow"}, "block: expected one of resblock, coupling; got 'glow'"),
        ({"block": "coupling", "batchnorm": True}, "batchnorm: expected False together with coupling blocks, got True"),
        ({"data": "faces"}, "data: expected one of mnist, .*; got 'faces'"),
        ({"nblocks": "0-1"}, "nblocks: expected at least one block a scale, got '0-1'"),
        ({"kernels": "3", "vnorms": "2f"}, "vnorms: expected two equal orders for the one size in kernels, got '2f'"),
        ({"kernels": "3-5-3", "vnorms": "22ff"}, "kernels: expected sizes that fit images of 4 pixels, got 5"),
        ({"kernels": "2-3-3"}, "kernels: expected odd sizes"),
        ({"padding": 1, "padding_dist": "cauchy"}, "padding_dist: expected uniform or gaussian, got 'cauchy'"),
        ({"task": "hybrid"}, "logit_layer.weight: expected in the file, as its args say, but it is missing"),
        ({"imagesize": 2}, "imagesize: expected a number from 4 to 4096, got 2"),
        ({"imagesize": 10**6}, "imagesize: expected a number from 4 to 4096, got 1000000"),
    ],
)
def test_bad_options_of_images(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_args(argparse.Namespace(**IMAGES | options), {})


def test_options_that_a_file_lacks_are_those_of_the_scripts():
    """Files of earlier versions; surplus entries of nblocks build nothing."""
    config = config_from_args(argparse.Namespace(data="cifar10", nblocks="1-2-3-4-5-6"), {})
    assert config.blocks == (1, 2, 3, 4) and config.shape == (32, 32, 3) and config.data.logit_alpha == 0.05
    assert config.hidden_channels == 512 and config.norms.orders is None and config.tail.blocks == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian")),
        (
            {"n_dist": "geometric", "n_exact_terms": 4, "n_samples": 2},
            rf.Roulette(rf.Geometric(0.5), 4, 2, "gaussian", minres_steps=0),
        ),
        ({"n_power_series": 7}, rf.Truncated(7)),
    ],
)
def test_estimator(options, expected):
    assert estimator_from_args(argparse.Namespace(**IMAGES | options)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rf.VectorFlowConfig(dim=3), "dim: expected 2, which the original has an option for, got 3"),
        (rf.VectorFlowConfig(dim=2, preactivation="none"), "preactivation: expected 'all'"),
        (rf.VectorFlowConfig(dim=2, activation="sin"), "activation: expected one of .*; got 'sin'"),
        (
            rf.VectorFlowConfig(dim=2, hidden=(4,), preactivation="all", norms=rf.Norms((2, 2.5, 2))),
            "norms: expected whole orders",
        ),
        (
            rf.ImageFlowConfig((8, 8, 1), blocks=(1, 1), data=rf.ImageTransform(logit_alpha=0.1)),
            "data.logit_alpha: expected 1e-06",
        ),
        (
            rf.ImageFlowConfig((8, 8, 1), blocks=(1, 1), data=rf.ImageTransform(spline_bins=4)),
            "data.spline_bins: expected 0",
        ),
        (rf.ImageFlowConfig((8, 8, 1), blocks=(1, 1), hidden_channels=(4, 6)), "hidden_channels: expected"),
        (rf.ImageFlowConfig((8, 8, 1), blocks=(1,)), "preactivation: expected 'all'"),
        (rf.ImageFlowConfig((8, 8, 1), blocks=(1,), block="implicit"), "block: expected 'residual', .* got 'implicit'"),
        (
            rf.VectorFlowConfig(2, preactivation="all", block="monotone"),
            "block: expected 'residual', .* got 'monotone'",
        ),
        (
            rf.ImageFlowConfig((8, 8, 1), blocks=(1, 1), densenet=rf.DenseNetBlocks(depth=1)),
            "densenet.depth: expected 0",
        ),
        (
            rf.ImageFlowConfig((8, 8, 1), blocks=(1, 1), between=rf.BetweenBlocks(batchnorm=True)),
            "between.batchnorm: expected False",
        ),
    ],
)
def test_configs_that_the_original_cannot_say(config, message):
    with pytest.raises(ValueError, match=message):
        args_from_config(config)


def test_nothing_is_written_for_them(tmp_path):
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=1, hidden=(2,)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dim: expected 2"):
        rf.save_torch_checkpoint(flow, tmp_path / "flow.pth")
    assert not list(tmp_path.iterdir())


def test_the_average_is_of_the_same_config(tmp_path):
    flow, other = rf.load_torch_checkpoint(MNIST, "raw", "stored"), rf.load_torch_checkpoint(TOY, "raw", "stored")
    with pytest.raises(ValueError, match="average: expected a flow of the config"):
        rf.save_torch_checkpoint(flow, tmp_path / "flow.pth", average=other)


def test_the_stub_of_the_averages_has_only_what_the_file_says():
    """The whole model hangs on the averages; of its classes nothing is there but names."""
    model = read_torch_file(MNIST)["ema"].state["module"]
    assert isinstance(model, Stub) and (model.module, model.name) == ("resflows.resflow", "ResidualFlow")
    assert isinstance(model.state, dict) and set(model.state["_modules"]) == {"init_layer", "transforms"}
