"""A valid call of every public function, class and method, for tests that replace one argument after the other.

No call is made as it stands, so that only what checks arguments costs time.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import resflow_jax as rf
from resflow_jax import plot, training
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.training.losses import negative_log_likelihood

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
IMAGES = np.zeros((6, 2, 2, 1), np.uint8)
MAP, CONV = rf.DenseMap(3, 3), rf.ConvMap((2, 2), 1, 1)
SMALL = rf.MLPConditioner((4,))
KERNEL, TAPS = jnp.eye(3) / 2, jnp.ones((3, 3, 1, 1)) / 9


def rngs():
    return nnx.Rngs(0)


@cache
def flow():
    return rf.Flow(rf.ActNorm((3,)), event_shape=(3,))


@cache
def image_flow():
    return rf.Flow(rf.ActNorm((1,)), event_shape=(2, 2, 1))


@cache
def residual_flow():
    with deferred_norms():
        return rf.ResidualFlow(rf.VectorFlowConfig(3, 2, (4,)), rngs=rngs())


@cache
def classifier():
    return rf.Classifier(rf.ActNorm((3,)), rf.PooledHead((3,), 2, rngs=rngs()), event_shape=(3,))


def mixture():
    return rf.MixtureOfNormals(2, (3,), rngs=rngs())


@cache
def typicality():
    return rf.Typicality.from_log_probs(jnp.arange(3.0), dim=3)


def trainer():
    return training.Trainer(nnx.graphdef(flow()), negative_log_likelihood(), optax.sgd(0.1), 0.9)


@cache
def state():
    return trainer().create_state(flow(), rf.Roulette())


@cache
def placement():
    return training.Placement(trainer(), training.make_mesh(1, devices=jax.devices()[:1]))


def matvec(v):
    return v / 2


def g(params, x):
    return 0.5 * x


def history():
    steps = np.arange(3)
    return rf.History(steps, steps / 1.0, steps / 1.0, steps / 10, 2, "steps", None, (3,))


def _classes():
    """Classes by name, with valid arguments."""
    size = {"condition_dim": None, "rngs": rngs()}
    solver = {"tolerance": 1e-5, "max_iterations": 9, "on_failure": "warn"}
    block = {"activation": "elu", "preactivation": True, "rngs": rngs()}
    net = {"condition_dim": None, "activation": "lipswish", "coefficient": 0.9, "rngs": rngs()}
    layered = {**net, "preactivation": True, "norms": None}
    linear = {"coefficient": 0.9, "rngs": rngs(), "domain": 2.0, "codomain": 2.0, "matmul_dtype": None}
    slopes = {"slopes": (1.0,), "other_slopes": ()}
    trusted = {"contraction": Half(), "lipschitz": 0.5, "event_shape": (3,), "condition_shape": None}
    config = {"activation": "elu", "preactivation": "all", "coefficient": 0.9, "condition_dim": None}
    config |= {"matmul_dtype": None, "between": rf.BetweenBlocks(), "norms": rf.Norms()}
    config |= {"densenet": rf.DenseNetBlocks(), "block": "residual"}
    image = {"data": rf.ImageTransform(), "tail": rf.DenseTail(), "scales": rf.Scales()}
    noise = rf.VariationalDequantization((2, 2, 1), 1, 2, rngs=rngs())
    return {
        "ActNorm": {"shape": (3,)},
        "Activation": {"name": "a", "function": lambda p, x: x, "initial": (), "group": 1, **slopes},
        "Affine": {"event_shape": (3,), **size},
        "Anderson": {**solver, "memory": 5},
        "BetweenBlocks": dict.fromkeys(("actnorm", "feature_actnorm", "first_actnorm", "batchnorm"), True)
        | {"centering": None, "invertible_linear": False},
        "Bounded": {"low": 0.0, "high": 1.0, "alpha": 1e-6, "one_sided": "log"},
        "Broyden": {**solver, "memory": 5},
        "Chain": {"bijectors": [rf.ActNorm((3,))]},
        "ChannelPadding": {"channels": 1, "noise": "uniform", "scale": 1.0, "shift": 0.0},
        "Classifier": {
            "bijector": rf.ActNorm((3,)),
            "head": rf.PooledHead((3,), 2, rngs=rngs()),
            "base": None,
            "event_shape": (3,),
        },
        "ClassifierConfig": {
            **{"shape": (4, 4, 1), "classes": 2, "blocks": (1,), "hidden_channels": (2,), "padding": 1},
            **{"squeeze_first": False, "activation": "elu", "coefficient": 0.9, "architecture": "invertible"},
            **{"head": "pooled", "head_channels": None, "logit_alpha": None},
        },
        "ConvMap": {
            **{"size": (2, 2), "channels_in": 1, "channels_out": 1, "kernel_size": 3, "padding": "zero"},
            "matmul_dtype": None,
        },
        "Defensive": {"p": 0.5, "share": 0.01, "lipschitz": None},
        "DenseMap": {"features_in": 3, "features_out": 3, "matmul_dtype": None},
        "DenseNet": {"shape": (3,), "depth": 1, "growth": 2, "first": None, "kernel": 3, "padding": "zero", **net},
        "DenseNetBlocks": {"depth": 0, "growth": 4},
        "DenseTail": {"blocks": 1, "hidden": 2, "layers": 2, "norms": None}
        | {"densenet_first": 2, "densenet_growth": 2},
        "DiagonalNormal": {"event_shape": (3,), **size},
        "Exact": {"chunk_size": 4},
        "Fitted": {"table": jnp.array([1.0, 0.5]), "lipschitz": None},
        "FixedPoint": solver,
        "Flatten": {"shape": (2, 2, 1)},
        "Flow": {"bijector": rf.ActNorm((1,)), "base": None, "event_shape": (2, 2, 1), "dequantizer": noise},
        "Geometric": {"p": 0.5},
        "ImageFlowConfig": {
            "shape": (4, 4, 1),
            "blocks": (1,),
            "hidden_channels": 2,
            "kernels": (3,),
            **config,
            **image,
        },
        "ImageTransform": {"mean": None, "std": None, "padding": rf.Padding(), "logit_alpha": 1e-6}
        | {"dequantization": rf.Dequantization(), "spline_bins": 4},
        "Invert": {"bijector": rf.ActNorm((3,)), "solver": None},
        "InvertibleLinear": {"dim": 3, "rngs": rngs()},
        "LipschitzCNN": {"shape": (2, 2, 1), "hidden": (2,), "kernels": (3, 3), "padding": "zero", **layered},
        "LipschitzConv": {
            **{"size": (2, 2), "channels_in": 1, "channels_out": 1, "kernel_size": 3, "padding": "zero"},
            **linear,
        },
        "LipschitzDense": {"features_in": 3, "features_out": 3, **linear},
        "LipschitzMLP": {"dim": 3, "hidden": (2,), **layered},
        "Logit": {"alpha": 1e-6, "low": 0.0, "high": 1.0},
        "MixtureOfNormals": {"components": 2, "event_shape": (3,), "class_conditional": False, **size},
        "MovingBatchNorm": {"shape": (3,), "decay": 0.1, "epsilon": 1e-4},
        "MovingCentering": {"shape": (3,), "decay": 0.1},
        "MultiScale": {"scales": [rf.ActNorm((1,)), rf.ActNorm((1,))], "shape": (2, 2, 1)},
        "Normalization": {"mean": np.zeros(3), "std": np.ones(3)},
        "Norms": {"orders": None, "learned": False, "ties": "closed"},
        "Padding": {"channels": 1, "noise": "uniform", "scale": 1.0, "shift": 0.0},
        "Permutation": {"order": (2, 0, 1), "axis": -1},
        "Poisson": {"rate": 2.0},
        "PooledHead": {"shape": (3,), "classes": 2, "hidden": None, "activation": "elu", "rngs": rngs()},
        "ResNetClassifier": {"config": rf.ClassifierConfig((4, 4, 1), 2, (1,), (2,)), "rngs": rngs()},
        "Reshape": {"shape": (4,), "new_shape": (2, 2)},
        "MonotoneBlock": {**trusted, "solver": None},
        "ImplicitBlock": {**dict.fromkeys(("g_x", "g_y"), rf.LipschitzMLP(3, (2,), rngs=rngs())), "solver": None},
        "ResidualBlock": trusted,
        "ResidualFlow": {"config": rf.VectorFlowConfig(3, 1, (4,)), "rngs": rngs()},
        "ResidualStack": {"make_step": lambda rngs: rf.ActNorm((3,)), "depth": 2, "rngs": rngs()},
        "Roulette": {
            **{"length": rf.Poisson(), "exact_terms": 1, "samples": 1, "probe": "rademacher"},
            **{"gradient": "neumann", "minres_steps": 0, "probes": 1, "second_order": False},
            **{"subsample": 1, "trace_probes": 1},
        },
        "Scales": {"squeeze_first": False, "factor_out": False},
        "Spline": {"shape": (3,), "bins": 4, "bound": 3.0},
        "Squeeze": {"shape": (2, 2, 1)},
        "StandardNormal": {"event_shape": (3,)},
        "StridedBlock": {"shape": (2, 2, 1), "channels": 2, "hidden_channels": 2, "stride": 2, **block},
        "Truncated": {"terms": 2, "probe": "rademacher", "gradient": "neumann", "probes": 1},
        "UnconstrainedBlock": {"shape": (2, 2, 1), "hidden_channels": 2, **block},
        "VectorFlowConfig": {"dim": 3, "blocks": 1, "hidden": (4,), **config, "data": rf.VectorTransform()},
        "VectorTransform": {"mean": (0.0,), "std": (1.0,), "padding": rf.Padding()},
        "ZeroPadding": {"channels": 1},
    }


def _peers():
    """Classes of coupling, autoregressive and continuous flows, with valid arguments."""
    coupling = {"shape": (4,), "conditioner": None, "mask": "halves", "flipped": False, "condition_dim": None}
    coupling |= {"rngs": rngs()}
    network = {"activation": "relu", "zero": True}
    data = {"condition_dim": None, "data": rf.VectorTransform()}
    ode = {"time": 1.0, "tolerance": 1e-5, "max_steps": 9, "adjoint": "checkpointed"}
    configs = {
        "AutoregressiveFlow": {
            "shape": (3,),
            "layers": 1,
            "hidden": (4,),
            "activation": "relu",
            "actnorm": True,
            **data,
        },
        "ContinuousFlow": {"shape": (3,), "blocks": 1, "conditioner": SMALL, "squeezes": 0, **ode, **data},
        "CouplingFlow": {
            **{"shape": (4,), "coupling": "spline", "couplings": 1, "conditioner": SMALL, "scale": "exp", "pieces": 4},
            **{"linear": True, "actnorm": True, "scales": rf.CouplingScales(), **data},
        },
    }
    flows = {name: {"config": getattr(rf, f"{name}Config")(**of), "rngs": rngs()} for name, of in configs.items()}
    return {
        **flows,
        **{f"{name}Config": of for name, of in configs.items()},
        "AdditiveCoupling": coupling,
        "AffineCoupling": {**coupling, "scale": "exp"},
        "CNNConditioner": {"hidden": (4,), "kernels": (3, 3), "preactivation": True, **network},
        "ContinuousBlock": {"field": Half(), "event_shape": (3,), "condition_shape": None, **ode},
        "CouplingScales": {"squeezes": 1, "checkerboard": 1, "last": 0, "factor_out": True},
        "Dequantization": {"couplings": 1, "width": 4},
        "MLPConditioner": {"hidden": (4,), "preactivation": True, **network},
        "MaskedAutoregressive": {
            **{"dim": 3, "hidden": (4,), "condition_dim": None, "activation": "relu", "rngs": rngs()},
        },
        "MixtureCoupling": {**coupling, "components": 2},
        "ResNetConditioner": {"width": 4, "depth": 1, "kernel": 3, **network},
        "SplineCoupling": {**coupling, "bins": 4, "bound": 3.0},
        "VariationalDequantization": {"shape": (2, 2, 1), "couplings": 1, "width": 4, "rngs": rngs()},
        "VelocityField": {"shape": (3,), "conditioner": None, "condition_dim": None, "rngs": rngs()},
    }


class Half(nnx.Module):
    """A contraction."""

    def __call__(self, x):
        return 0.5 * x


def _methods():
    """(object, method, valid arguments)."""
    drawn = {"condition": None, "key": KEY, "estimator": rf.Roulette()}
    base = {"key": KEY, "num_samples": 2, "condition": None, "temperature": 1.0}
    of_z = {"z": X, "condition": None}
    yield rf.Bijector, rf.ActNorm((3,)), "forward", {"x": X, **drawn, "return_diagnostics": False}
    inverse = {"condition": None, "solver": rf.Anderson(), "return_status": False}
    yield rf.Bijector, rf.ActNorm((3,)), "inverse", {"y": X, **inverse}
    yield rf.ActNorm, rf.ActNorm((3,)), "set_constants", {"center": np.zeros(3), "std": np.ones(3)}
    yield rf.Flow, flow(), "__call__", {"x": X, "condition": None}
    for name in ("forward", "log_prob", "forward_and_log_prob"):
        yield rf.Flow, residual_flow(), name, {"x": X, **drawn, "return_diagnostics": False}
    for name in ("initialize", "update_statistics", "features"):
        yield rf.Flow, flow(), name, {"x": X, "condition": None}
    yield rf.Flow, flow(), "inverse", {"z": X, **inverse}
    yield rf.Flow, residual_flow(), "inverse_and_log_prob", {"z": X, **inverse, **drawn, "return_diagnostics": False}
    block = rf.ContinuousBlock(Half(), event_shape=(3,))
    yield rf.ContinuousBlock, block, "forward_with_status", {"x": X, **drawn}
    yield rf.Flow, flow(), "base_log_prob", of_z
    yield rf.Flow, flow(), "split_latent", {"z": X}
    yield rf.Flow, flow(), "join_latent", {"parts": [X]}
    drawing = {"key": KEY, "shape": 2, "condition": None, "solver": rf.Anderson(), "return_status": False}
    yield rf.Flow, flow(), "sample", {**drawing, "temperature": 1.0}
    del drawing["return_status"]
    drawing |= {"estimator": rf.Roulette(), "return_diagnostics": False}
    yield rf.Flow, residual_flow(), "sample_and_log_prob", drawing
    norms = {"tolerance": 1e-3, "residual_tolerance": None, "max_iterations": 2, "restart": False}
    yield rf.Flow, flow(), "update_norms", norms
    yield rf.Classifier, classifier(), "__call__", {"x": X, "condition": None}
    yield rf.Classifier, classifier(), "logits", {"x": X, "condition": None, "key": KEY, "dropout": 0.5}
    yield rf.Classifier, classifier(), "class_logits", {"z": X}
    logits = {**drawn, "return_diagnostics": False, "return_logits": True}
    yield rf.Classifier, classifier(), "forward_and_log_prob", {"x": X, **logits}
    for cls, made in ((rf.StandardNormal, rf.StandardNormal((3,))), (rf.DiagonalNormal, rf.DiagonalNormal((3,)))):
        yield cls, made, "log_prob", of_z
        yield cls, made, "sample", base
    for name in ("log_prob", "log_joint"):
        yield rf.MixtureOfNormals, mixture(), name, of_z
    yield rf.MixtureOfNormals, mixture(), "sample", base
    yield rf.PooledHead, rf.PooledHead((3,), 2, rngs=rngs()), "__call__", {"h": X}
    yield rf.PooledHead, rf.PooledHead((3,), 2, rngs=rngs()), "initialize", {"h": X}
    for cls, made, kernel, x in ((rf.DenseMap, MAP, KERNEL, X), (rf.ConvMap, CONV, TAPS, np.ones((2, 2, 2, 1)))):
        yield cls, made, "__call__", {"kernel": kernel, "x": x}
    yield rf.LipschitzConv, conv(), "__call__", {"x": np.ones((2, 2, 2, 1), np.float32)}
    yield rf.Activation, rf.ACTIVATIONS["relu"], "lipschitz_in", {"p": 2.0}
    scores = {"log_prob": np.ones(3)}
    for name in ("p_value", "quantile"):
        yield rf.Typicality, typicality(), name, scores
    yield rf.Typicality, typicality(), "score", {**scores, "unit": "nats"}
    yield rf.Typicality, typicality(), "group_p_value", {**scores, "key": KEY, "resamples": 3}
    held = {"log_prob": np.ones(4), "held_out": np.ones(3), "dim": 3}
    yield rf.Typicality, rf.Typicality, "from_log_probs", held
    fitted = {"x_train": X, "x_held_out": X, "key": KEY, "condition": None, "condition_held_out": None}
    fitted |= {"estimator": rf.Roulette(), "batch_size": 4}
    yield rf.Typicality, rf.Typicality, "fit", {"flow": flow(), **fitted}
    yield rf.Estimate, rf.Estimate, "from_scores", {"scores": np.ones((3, 2))}
    for law in (rf.Defensive(), rf.Geometric(), rf.Poisson(), rf.Fitted(jnp.array([1.0, 0.5]))):
        yield type(law), law, "within", {"lipschitz": 0.5}
    yield rf.Fitted, rf.Fitted(jnp.array([1.0, 0.5])), "with_rows", {"blocks": 2}
    yield training.Trainer, trainer(), "create_state", {"flow": flow(), "estimator": rf.Roulette()}
    yield training.Placement, placement(), "check_batch_size", {"batch_size": 2}


@cache
def conv():
    with deferred_norms():
        return rf.LipschitzConv((2, 2), 1, 1, rngs=rngs())


def _recipes():
    """(config, method, valid arguments)."""
    for name in ("nice", "real_nvp", "glow", "flow_pp", "neural_spline"):
        yield rf.CouplingFlowConfig, name, {"shape": (4,)}
    yield rf.ContinuousFlowConfig, "ffjord", {"shape": (4,)}
    for name in ("made", "maf"):
        yield rf.AutoregressiveFlowConfig, name, {"shape": (4,)}
    for config in (rf.CouplingFlowConfig((4,)), rf.ContinuousFlowConfig((4,)), rf.AutoregressiveFlowConfig((4,))):
        yield config, "fitted", {"shape": (3,)}


def _functions():
    """(module, name, valid arguments)."""
    drawn = {"condition": None, "key": KEY, "estimator": rf.Roulette()}
    power = {"domain": 2.0, "codomain": 2.0, "tolerance": 1e-3, "residual_tolerance": None, "max_iterations": 2}
    power |= {"rmatvec": None, "iterations": None, "restart": False, "scale": 1.0}
    yield rf, "anomaly_score", {"flow": residual_flow(), "x": X, "typicality": typicality(), **drawn}
    yield rf, "best_start", {"matvec": matvec, "starts": X, "rmatvec": None}
    yield rf, "certified_radius", {"flow": classifier(), "logits": np.ones((2, 2))}
    yield rf, "certify", {"flow": flow()}
    yield rf, "check_contraction", {"g": g, "params": None, "x": X, "key": KEY, "condition": None, "samples": 2}
    evaluated = {"levels": 256, "draws": 1, "batch_size": 4, "mesh": None}
    yield rf, "evaluate_bits_per_dim", {"flow": image_flow(), "images": IMAGES, **drawn, **evaluated}
    fitted = {"condition": None, "key": 0, "validation": 0.1, "steps": 1, "epochs": None, "batch_size": 2}
    fitted |= {"learning_rate": 1e-3, "optimizer": None, "estimator": None, "evaluation_estimator": None, "ema": 0.9}
    fitted |= {"patience": None, "validate_every": None, "initialize": False, "levels": None, "mesh": None}
    yield rf, "fit", {"flow": flow(), "x": X, **fitted, "progress": False, "callback": None}
    lengths = {"batch_size": 1, "fixed_cost": 4.0, "share": 0.01, "lipschitz": None}
    yield rf, "fit_lengths", {"term_norms": np.ones(3), **lengths}
    yield rf, "gram_iteration_bound", {"linear_map": MAP, "kernel": KERNEL, "iterations": 1}
    yield rf, "induced_norm_bound", {"linear_map": MAP, "kernel": KERNEL, "domain": 2.0, "codomain": 2.0}
    yield rf, "spectral_norm_bound", {"linear_map": MAP, "kernel": KERNEL}
    yield rf, "load", {"path": Path("none"), "like": None}
    yield rf, "make_reversible", {"flow": residual_flow(), "solver": None}
    yield rf, "load_torch_checkpoint", {"path": Path("none"), "weights": None, "norms": "stored"}
    yield rf, "save", {"path": Path("none"), "flow": flow()}
    yield rf, "save_torch_checkpoint", {"flow": residual_flow(), "path": Path("none"), "average": None}
    yield rf, "power_iteration", {"matvec": matvec, "v": X[0], **power}
    block = {"condition": None, "key": KEY, "estimator": rf.Roulette(), "lipschitz": None, "prepare": None}
    block |= {"chunk_size": None, "return_diagnostics": False}
    yield rf, "residual", {"g": g, "params": None, "x": X, **block}
    inverse = {"condition": None, "solver": rf.Anderson(), "return_status": False}
    yield rf, "residual_inverse", {"g": g, "params": None, "y": X, **inverse}
    both = {name: value for name, value in {**block, **inverse}.items() if name != "prepare"}
    yield rf, "monotone", {"g": g, "params": None, "x": X, **both}
    yield rf, "monotone_inverse", {"g": g, "params": None, "y": X, **inverse}
    yield rf, "spectral_norm", {"matvec": matvec, "u": X[0], "v": X[0]}
    mesh = training.make_mesh(1, devices=jax.devices()[:1])
    yield training, "Placement", {"trainer": trainer(), "mesh": mesh, "strategy": "jit", "parameters": "replicated"}
    yield training, "fit_estimator", {"state": state(), "batch_size": 2}
    yield training, "jit_train_step", {"trainer": trainer(), "mesh": mesh, "parameters": "replicated"}
    yield training, "make_mesh", {"data": 1, "model": 1, "devices": jax.devices()[:1]}
    yield training, "pmap_train_step", {"trainer": trainer(), "devices": jax.devices()[:1]}
    yield training, "shard_map_train_step", {"trainer": trainer(), "mesh": mesh}
    yield training, "replicate", {"tree": X, "devices": jax.devices()[:1]}
    yield training, "unreplicate", {"tree": X, "mesh": mesh}
    common = {"condition": None, "key": KEY}
    yield plot, "samples", {"x": flow(), "ax": None, "number": 2, "elements": (0, 1), "columns": None, **common}
    box = {"box": ((0.0, 1.0), (0.0, 1.0)), "cells": 2, "estimator": None}
    plane = rf.Flow(rf.ActNorm((2,)), event_shape=(2,))
    yield plot, "density", {"flow": plane, "ax": None, **box, **common}
    yield plot, "curves", {"history": history(), "ax": None, "unit": "nats"}


@cache
@deferred_norms()
def calls():
    """Name of what is called: (the function, its valid arguments)."""
    classes = {**_classes(), **_peers()}
    found = {f"rf.{name}": (getattr(rf, name), arguments) for name, arguments in classes.items()}
    for cls, made, name, arguments in _methods():
        part = (
            "training" if cls.__module__.startswith("resflow_jax.training") and not hasattr(rf, cls.__name__) else "rf"
        )
        found[f"{part}.{cls.__name__}.{name}"] = getattr(made, name), arguments
    for config, name, arguments in _recipes():
        cls = config if isinstance(config, type) else type(config)
        found[f"rf.{cls.__name__}.{name}"] = getattr(config, name), arguments
    for module, name, arguments in _functions():
        part = module.__name__.rpartition(".")[2].replace("resflow_jax", "rf")
        found[f"{part}.{name}"] = getattr(module, name), arguments
    return found
