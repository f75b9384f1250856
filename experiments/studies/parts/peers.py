"""Rebuilds a residual flow in the PyTorch library normflows, with the same weights, to compare times.

    flow = ResidualFlow(config, rngs=...);  peer = normflows_from(flow);  peer.forward(x) == flow(x)

All timed code is that of normflows: residual blocks with their fixed-point inverse and their log-det estimate, the
layers inside them, ActNorm, squeeze and logit. Only the flattening in H, W, C order is added here. By default the
linear layers of normflows get our normalised kernels, which they do not change; with `papers` they get our kernels
before normalisation, and our norm bound.

In evaluation mode normflows (1.7.3) computes as follows; its tolerance and its 20 terms are not arguments:

    inverse    x <- y - g(x) until (x - x_prev)^2 < 1e-5 (1 + |y|) everywhere in the batch, so steps of 3e-3 and more
               may remain; it stops after about 1000 steps without a warning
    log-det    n + 20 terms of the power series, n >= 1 geometric with p = 1/2 for a whole batch (with `papers`,
               Poisson(2)): 22 products with the Jacobian on average; one Gaussian probe per example; unbiased

Its threads wait for each other, so one busy core delays all of them: measure times on idle cores, or on one core.

Its random numbers come from the global generators, `torch.manual_seed` and `np.random.seed`. Needs the extra `bench`.
"""

import math
from collections.abc import Iterator
from itertools import chain, zip_longest

import jax
import jax.numpy as jnp
import normflows as nf
import numpy as np
import torch
from normflows.nets.lipschitz import InducedNormConv2d, InducedNormLinear, Swish
from torch import nn

from resflow_jax import ImageFlowConfig, ResidualFlow
from resflow_jax.functional.linear_maps import ConvMap
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Contraction, Layered
from resflow_jax.layers.lipschitz import LipschitzLinear
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Flatten, Squeeze


class Peer:
    """A flow of normflows on NumPy arrays in the layout of `ResidualFlow`: x [B, H, W, C], z [B, D].

    All methods but `train_step` compute no gradients. They use PyTorch's default number of threads, or a GPU if PyTorch
    sees one.

    Attributes:
      model: the `normflows.NormalizingFlow`; its flows map z to x, in the order of sampling.
    """

    def __init__(self, model: nf.NormalizingFlow, dtype: np.dtype):
        self._dtype = torch.from_numpy(np.zeros((), dtype)).dtype
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self._device, self._dtype).eval()

    def samples(self, z: np.ndarray) -> np.ndarray:
        """x with f(x) = z, by the fixed-point iterations alone.

        The `sample` and `forward` of normflows always estimate the log-det too; its blocks can omit it.
        """
        with torch.no_grad():
            x = self._tensor(z)
            for flow in self.model.flows:
                x = flow.iresblock.inverse(x) if isinstance(flow, nf.flows.Residual) else flow(x)[0]
        return _channels_last(x)

    def samples_and_log_prob(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(x, estimates of log p(x) [B]), computed from z as in the `sample` of normflows."""
        with torch.no_grad():
            x = self._tensor(z)
            log_prob = self.model.q0.log_prob(x)
            for flow in self.model.flows:
                x, log_det = flow(x)
                log_prob = log_prob - log_det
        return _channels_last(x.detach()), log_prob.cpu().numpy()

    def forward(self, x: np.ndarray) -> np.ndarray:
        """z = f(x), without the log-det."""
        with torch.no_grad():
            z = self._images(x)
            for flow in reversed(self.model.flows):
                z = flow.iresblock.forward(z) if isinstance(flow, nf.flows.Residual) else flow.inverse(z)[0]
        return z.cpu().numpy()

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Estimates of log p(x) [B] with 20 terms and a roulette."""
        with torch.no_grad():
            return self.model.eval().log_prob(self._images(x)).detach().cpu().numpy()

    def start_training(self, learning_rate: float, clip: float) -> None:
        """Makes the Adam optimiser of `train_step`."""
        self._clip = clip
        self._optimizer = torch.optim.Adam(self.model.parameters(), learning_rate)

    def train_step(self, x: np.ndarray) -> float:
        """Forward, backward, clipping by the global norm, Adam, five power iterations per layer. Loss in bits/dim."""
        self.model.train()
        self._optimizer.zero_grad()
        loss = self.model.forward_kld(self._images(x)) / (math.log(2) * x[0].size)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        nf.utils.update_lipschitz(self.model, 5)
        return float(loss.detach())

    def peak_bytes(self) -> int | None:
        """The most memory of the GPU that was in use; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None

    def _images(self, x: np.ndarray) -> torch.Tensor:
        return self._tensor(x).permute(0, 3, 1, 2).contiguous()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.asarray(array), dtype=self._dtype, device=self._device)


def normflows_from(flow: ResidualFlow, *, papers: bool = False) -> Peer:
    """The same image flow in normflows, with the weights and the dtype of `flow`.

    With `papers`, lengths are drawn from the Poisson distribution of mean 2, as in the papers, not from the geometric
    distribution of normflows. Kernels are then those before normalisation, with the norm bound of each layer, as
    training needs them.

    Raises:
      ValueError: for vectors, for factored-out channels, and for layers and activations other than those of
        `experiments.configs.digits_uniform`.
    """
    if not isinstance(flow.config, ImageFlowConfig) or isinstance(flow.bijector, MultiScale):
        raise ValueError(f"flow: expected one of images without factor_out, got {flow.config}")
    layers = list(_unrolled(flow.bijector))
    flat = [isinstance(layer, Flatten) for layer in layers].index(True)
    flows = [_converted(layer, (1, 1) if n < flat else (), papers) for n, layer in enumerate(layers)]
    base = nf.distributions.DiagGaussian(flow.dim, trainable=False)
    peer = Peer(nf.NormalizingFlow(base, flows[::-1]), flow.dtype)
    peer.forward(np.full((1, *flow.event_shape), 0.5))  # convolutions set their image size at the first call
    if papers:  # update the singular vectors of dense layers, which belong to the kernels before
        nf.utils.update_lipschitz(peer.model, 500)
    return peer


def _unrolled(bijector: Bijector) -> Iterator[Bijector]:
    """The layers inside chains and stacks, one by one."""
    match bijector:
        case Chain():
            inside = bijector.bijectors
        case ResidualStack():
            inside = bijector.unstacked()
        case _:
            yield bijector
            return
    for part in inside:
        yield from _unrolled(part)


def _converted(bijector: Bijector, pixel: tuple[int, ...], papers: bool) -> nf.flows.Flow:
    """The counterpart of a layer; `pixel` gives the height and width dimensions of a parameter per channel."""
    match bijector:
        case Logit():
            return nf.transforms.Logit(bijector.alpha)
        case ActNorm() if bijector.shift.ndim == 1:
            # y = (x - center) / d * exp(w) + shift, as the inverse of x = y * exp(s) + t, without initialisation
            affine = nf.flows.AffineConstFlow((bijector.shift.size, *pixel))
            s = jnp.log(bijector.std[...]) - bijector.log_scale[...]
            affine.s = _parameter(s.reshape(affine.s.shape))
            t = bijector.center[...] - bijector.shift[...] * jnp.exp(s)
            affine.t = _parameter(t.reshape(affine.t.shape))
            return affine
        case Squeeze():
            return nf.flows.Squeeze()  # its channel order is ours
        case Flatten():
            return _Flatten(bijector.shape)
        case ResidualBlock():
            law = {"n_dist": "poisson", "lamb": 2.0} if papers else {}
            return nf.flows.Residual(_network(bijector.contraction, raw=papers), **law)
    raise ValueError(
        f"flow: expected only Logit, ActNorm per channel, Squeeze, Flatten and ResidualBlock, "
        f"got {type(bijector).__name__}"
    )


def _network(contraction: Contraction, *, raw: bool) -> nn.Sequential:
    if not isinstance(contraction, Layered) or contraction.activation.name != "lipswish":
        got = contraction.activation.name if isinstance(contraction, Layered) else type(contraction).__name__
        raise ValueError(f"flow: expected chains of layers with lipswish between them, got {got}")
    swishes = [_swish(params["beta"][...]) for params in contraction.activation_params]
    linears = [_linear(layer, raw=raw) for layer in contraction.linears]
    first, second = (swishes, linears) if contraction.preactivation else (linears, swishes)
    return nn.Sequential(*filter(None, chain.from_iterable(zip_longest(first, second))))


def _swish(beta: jax.Array) -> Swish:
    swish = Swish()
    swish.beta = _parameter(beta[None])
    return swish


def _linear(layer: LipschitzLinear, *, raw: bool) -> InducedNormConv2d | InducedNormLinear:
    """The layer with its normalised kernel, whose norm is below one, so that a coefficient of one does not change it.

    With `raw` it has the kernel before normalisation and the layer's own coefficient.
    """
    kernel, bias = layer.weights()
    coefficient = 1.0
    if raw:
        kernel, coefficient = layer.kernel[...], layer.coefficient
    if isinstance(layer.linear_map, ConvMap):
        *_, size, channels_in, channels_out = kernel.shape
        linear = InducedNormConv2d(channels_in, channels_out, size, 1, size // 2, coeff=coefficient, n_iterations=5)
        linear.weight = _parameter(kernel.transpose(3, 2, 0, 1))
    else:
        linear = InducedNormLinear(*kernel.shape, coeff=coefficient, n_iterations=5)
        linear.weight = _parameter(kernel.T)
    linear.bias = _parameter(bias)
    return linear


def _parameter(array: jax.Array) -> nn.Parameter:
    return nn.Parameter(torch.tensor(np.asarray(array)))


class _Flatten(nf.flows.Flow):
    """Inverse: [B, C, H, W] -> [B, D] in the order H, W, C."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape  # (H, W, C)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, int]:
        return z.view(-1, *self.shape).permute(0, 3, 1, 2).contiguous(), 0

    def inverse(self, z: torch.Tensor) -> tuple[torch.Tensor, int]:
        return z.permute(0, 2, 3, 1).flatten(1), 0


def _channels_last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).cpu().numpy()
