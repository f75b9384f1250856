"""Files with coupling blocks: the flow computes what the blocks are defined to compute, to 1e-9 in float64.

The expected values are computed here, in NumPy on images [C, H, W], from the tensors of the file. For one of these
models tests/fixtures/torch_coupling.pth has those of the original code, see test_checkpoints.py.
"""

import argparse

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.options import IMAGE_DEFAULTS
from resflow_jax.interop.torch.writer import write_torch_file
from resflow_jax.models.build import feature_shapes

COMMON = {"block": "coupling", "imagesize": 8, "idim": 3, "fc_idim": 4}
OPTIONS = {
    "checkerboards, then channels": {"data": "mnist", "nblocks": "2-1"},
    "factored out and mixed": {"data": "mnist", "nblocks": "1-3", "factor_out": True, "quadratic": True, "act": "elu"},
    "squeezed first": {
        "data": "cifar10",
        "nblocks": "1-1",
        "squeeze_first": True,
        "imagesize": 16,
        "fc_end": False,
        "preact": False,
    },
    "dense": {"data": "cifar10", "nblocks": "2", "squeeze_first": True, "fc": True, "kernels": "3-1"},
    "without logit": {
        "data": "cifar10",
        "nblocks": "2",
        "squeeze_first": True,
        "imagesize": 8,
        "logit_transform": False,
    },
}


class Model:
    """The model of some options with random tensors, in NumPy. Tensors are made when they are first used."""

    def __init__(self, options):
        self.options, self.tensors, self.rng = IMAGE_DEFAULTS | COMMON | options, {}, np.random.default_rng(0)

    def tensor(self, name, shape, scale=0.3):
        if name not in self.tensors:
            self.tensors[name] = np.asarray(scale * self.rng.normal(size=shape))
        return self.tensors[name]

    def activate(self, x, name):
        if self.options["act"] == "elu":
            return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        beta = self.tensor(f"{name}.beta", (1,))
        return x / (1 + np.exp(-x * np.log1p(np.exp(beta)))) / 1.1

    def convolve(self, x, name, size, kernel):
        weight, bias = self.tensor(f"{name}.weight", (size, len(x), kernel, kernel)), self.tensor(f"{name}.bias", size)
        half = kernel // 2
        padded = np.pad(x, [(0, 0), (half, half), (half, half)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))
        return np.einsum("ihwkl,oikl->ohw", windows, weight) + bias[:, None, None]

    def conv_net(self, x, name, size, preact):
        kernels = [int(kernel) for kernel in self.options["kernels"].split("-")]
        widths = [self.options["idim"]] * (len(kernels) - 1) + [size]
        for n, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            if n or preact:
                x = self.activate(x, f"{name}.{2 * n - (not preact)}")
            x = self.convolve(x, f"{name}.{2 * n + preact}", width, kernel)
        return x

    def dense_net(self, x, name, shape, width):
        x, preact = x.ravel(), self.options["preact"]
        widths = [width] * self.options["kernels"].count("-") + [int(np.prod(shape))]
        for n, outputs in enumerate(widths):
            if n or preact:
                x = self.activate(x, f"{name}.{2 * n - (not preact)}")
            where = f"{name}.{2 * n + preact}"
            x = self.tensor(f"{where}.weight", (outputs, x.size)) @ x + self.tensor(f"{where}.bias", outputs)
        return x.reshape(shape)

    def coupling(self, x, name, swap, kind, preact):
        """(y, log_det) of a block: kind "masked", "channels" or the width of dense layers."""
        channels = len(x)
        if kind == "masked":
            keep = (np.indices(x.shape[1:]).sum(0) % 2 == 0) ^ swap
            f = self.conv_net(keep * x, f"{name}.nnet", 2 * channels, preact)
            scale, shift = 1 / (1 + np.exp(-f[:channels] - 2)), f[channels:]
            return np.where(keep, x, x * scale + shift), (~keep * np.log(scale)).sum()
        half = channels // 2
        kept, moved = (x[half:], x[:half]) if swap else (x[:half], x[half:])
        if kind == "channels":
            f = self.conv_net(kept, f"{name}.nnet", channels, preact)
        else:
            f = self.dense_net(kept, f"{name}.nnet.nnet", x.shape, kind)
        scale = 1 / (1 + np.exp(-f[:half] - 2))
        moved = moved * scale + f[half:]
        return np.concatenate([moved, kept] if swap else [kept, moved]), np.log(scale).sum()

    def actnorm(self, x, name, flat):
        shape = (x.size,) if flat else (len(x),)
        name = f"{name}.fc_module" if flat else name
        weight, bias = self.tensor(f"{name}.weight", shape), self.tensor(f"{name}.bias", shape)
        self.tensors[f"{name}.initialized"] = np.asarray(1)
        weight, bias = (v.reshape(x.shape if flat else (-1, 1, 1)) for v in (weight, bias))
        return (x + bias) * np.exp(weight), np.broadcast_to(weight, x.shape).sum()

    def mix(self, x, name):
        if f"{name}.weight" not in self.tensors:
            self.tensors[f"{name}.weight"] = 2 * np.eye(len(x)) + self.rng.normal(size=(len(x), len(x)))
        weight = self.tensors[f"{name}.weight"]
        return np.einsum("oi,ihw->ohw", weight, x), np.prod(x.shape[1:]) * np.linalg.slogdet(weight)[1]

    def scale(self, x, s, is_last):
        options, place, log_det, swap = self.options, 0, 0.0, True
        prefix, fc = f"transforms.{s}.chain", options["fc"]
        has_logit = s == 0 and options["logit_transform"]
        if has_logit:
            alpha = 1e-6 if options["data"] == "mnist" else 0.05
            inner = alpha + (1 - 2 * alpha) * x
            log_det += (np.log(1 - 2 * alpha) - np.log(inner) - np.log1p(-inner)).sum()
            x, place = np.log(inner) - np.log1p(-inner), 1
        steps = [("norm", fc)] if s == 0 and options["first_resblock"] else []
        alone = is_last or fc
        for n in range(int(options["nblocks"].split("-")[s])):
            preact = options["preact"] and (alone or not (options["first_resblock"] and s == n == 0))
            kind = options["idim"] if fc else "masked" if has_logit else "channels"
            steps += [("mix", None)] * options["quadratic"] + [("block", (kind, preact)), ("norm", fc)]
        if is_last and options["fc_end"]:
            steps += [("block", (options["fc_idim"], True)), ("norm", True)] * 4
        for step, setting in steps:
            name = f"{prefix}.{place}"
            if step == "norm":
                x, term = self.actnorm(x, name, setting)
            elif step == "mix":
                x, term = self.mix(x, name)
            else:
                swap = not swap
                x, term = self.coupling(x, name, swap, *setting)
            log_det, place = log_det + term, place + 1
        return x, log_det

    def forward(self, x):
        """z in the order of this library, and the log-det, of an image [C, H, W]."""
        scales, parts, log_det = self.options["nblocks"].count("-") + 1, [], 0.0
        if self.options["squeeze_first"]:
            x = squeezed(x)
        for s in range(scales):
            x, term = self.scale(x, s, s == scales - 1)
            log_det += term
            if s < scales - 1:
                x = squeezed(x)
                if self.options["factor_out"]:
                    x, part = np.split(x, 2)
                    parts.append(part)
        return np.concatenate([part.transpose(1, 2, 0).ravel() for part in [*parts, x]]), log_det


def squeezed(x):
    """Output channel c * 4 + dy * 2 + dx."""
    channels, height, width = x.shape
    x = x.reshape(channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3)
    return x.reshape(4 * channels, height // 2, width // 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_blocks_compute(name, tmp_path):
    """z, log-det and inverse of two images; a file written of the flow gives it back."""
    model = Model(OPTIONS[name])
    options = model.options
    side, channels = options["imagesize"], 1 if options["data"] == "mnist" else 3
    images = np.random.default_rng(1).uniform(0.1, 0.9, (2, channels, side, side))
    expected = [model.forward(image) for image in images]
    path = tmp_path / "model.pth"
    write_torch_file(path, {"args": argparse.Namespace(**options), "state_dict": model.tensors})
    flow = rf.load_torch_checkpoint(path)
    x = jnp.asarray(images.transpose(0, 2, 3, 1))
    z, log_det = flow.forward(x)
    np.testing.assert_allclose(z, [z for z, _ in expected], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det, [term for _, term in expected], rtol=1e-9)
    np.testing.assert_allclose(flow.inverse(z), x, atol=1e-9)
    assert flow.blocks == 0 and len(feature_shapes(flow.config)) == options["nblocks"].count("-") + 1
    rf.save_torch_checkpoint(flow, path)
    again = rf.load_torch_checkpoint(path)
    assert again.config == flow.config
    chex.assert_trees_all_close(nnx.state(again), nnx.state(flow), rtol=1e-12, atol=1e-12)
    rf.save(tmp_path / "flow.safetensors", flow)
    chex.assert_trees_all_equal(nnx.state(rf.load(tmp_path / "flow.safetensors")), nnx.state(flow))


def test_tensors_that_do_not_fit(tmp_path):
    model = Model(OPTIONS["dense"])
    model.forward(np.full((3, 8, 8), 0.5))
    path = tmp_path / "model.pth"
    del model.tensors["transforms.0.chain.2.nnet.nnet.1.bias"]
    write_torch_file(path, {"args": argparse.Namespace(**model.options), "state_dict": model.tensors})
    with pytest.raises(ValueError, match=r"some missing: transforms\.0\.chain\.2\.nnet\.nnet\.1\.bias"):
        rf.load_torch_checkpoint(path)
