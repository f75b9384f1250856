"""The flows of zuko and normflows on floats in the layout of the data: x [B, D], or images [B, H, W, C] in [0, 1].

Images pass through the logit of our flows, y = logit(alpha + (1 - 2 alpha) x), and each element of y or of a vector is
then standardised by constants, as an ActNorm of ours starts. log p(x) is that of the library's flow plus the log-det
of these two, in nats. Glow has an ActNorm of its own, and standardises nothing before.
"""

import math

import numpy as np
import torch
from torch import nn

from experiments.configs.base import RunConfig
from resflow_jax import ImageFlowConfig
from resflow_jax.models.recipe_checks import halvings


class Transform(nn.Module):
    """x -> u = (y - mean) / std [B, D], with y the logit of an image or x itself.

    Args:
      shape: shape of one x.
      logit_alpha: alpha of the logit; None for none.
      first: examples [N, *shape] that mean and std are taken from; None for 0 and 1.
    """

    def __init__(self, shape: tuple[int, ...], logit_alpha: float | None, first: torch.Tensor | None = None):
        super().__init__()
        self.shape, self.alpha = shape, logit_alpha
        dim = math.prod(shape)
        mean, std = torch.zeros(dim), torch.ones(dim)
        if first is not None:
            y, _ = self._logit(first)
            mean, std = y.mean(dim=0), y.std(dim=0).clamp_min(1e-3)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(u [B, D], log|det du/dx| [B])."""
        y, log_det = self._logit(x)
        return (y - self.mean) / self.std, log_det - self.std.log().sum()

    def inverse(self, u: torch.Tensor) -> torch.Tensor:
        """The x of u."""
        y = u * self.std + self.mean
        if self.alpha is not None:
            y = (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)
        return y.reshape(-1, *self.shape)

    def _logit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.flatten(1)
        if self.alpha is None:
            return x, torch.zeros(len(x), dtype=x.dtype)
        p = self.alpha + (1 - 2 * self.alpha) * x
        log_p, log_q = torch.log(p), torch.log1p(-p)
        return log_p - log_q, (math.log1p(-2 * self.alpha) - log_p - log_q).sum(dim=1)


class ZukoFlow(nn.Module):
    """An autoregressive flow of zuko on the transformed x.

    Args:
      kind: "nsf" or "maf".
      transform: what precedes it.
      hidden: widths of the hidden layers of each network.
      transforms: number of layers, in natural and reversed order in turn.
    """

    def __init__(self, kind: str, transform: Transform, hidden: tuple[int, ...], transforms: int = 5):
        import zuko

        super().__init__()
        self.transform = transform
        made = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}[kind]
        self.flow = made(math.prod(transform.shape), transforms=transforms, hidden_features=hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) [B] in nats."""
        u, log_det = self.transform(x)
        return self.flow().log_prob(u) + log_det

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """z = f(x)."""
        return self.flow().transform(self.transform(x)[0])

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """x with f(x) = z."""
        return self.transform.inverse(self.flow().transform.inv(z))

    def sample(self, number: int) -> torch.Tensor:
        """Samples [number, *shape]."""
        return self.transform.inverse(self.flow().sample((number,)))


class NormflowsGlow(nn.Module):
    """The multi-scale Glow of normflows on the transformed images.

    Args:
      transform: what precedes it, for images.
      hidden: channels of the networks.
      blocks: number of Glow blocks of each scale.
      scales: number of scales, each with a squeeze; by default as many as the sides allow, three at most.
    """

    def __init__(self, transform: Transform, hidden: int, blocks: int = 8, scales: int = 3):
        import normflows as nf

        super().__init__()
        self.transform = transform
        height, width, channels = transform.shape
        scales = halvings(transform.shape, scales)
        bases, flows, merges = [], [], []
        for n in range(scales):  # from the last scale to the first, in the order of sampling
            depth = scales - n  # number of squeezes before the blocks
            inside = channels * 2 ** (depth + 1)  # each squeeze times 4, each split divided by 2
            flows.append([nf.flows.GlowBlock(inside, hidden) for _ in range(blocks)] + [nf.flows.Squeeze()])
            leaving = inside if n == 0 else inside // 2
            shape = leaving, height // 2**depth, width // 2**depth
            bases.append(nf.distributions.DiagGaussian(shape, trainable=False))
            merges += [nf.flows.Merge()] if n else []
        self.flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) [B] in nats. The first call sets the scales of each ActNorm."""
        y, log_det = self._images(x)
        return self.flow.log_prob(y, None) + log_det

    def latent(self, x: torch.Tensor) -> list[torch.Tensor]:
        """z = f(x), by scales."""
        return self.flow.inverse_and_log_det(self._images(x)[0])[0]

    def inverse(self, z: list[torch.Tensor]) -> torch.Tensor:
        """x with f(x) = z."""
        return self._data(self.flow.forward_and_log_det(z)[0])

    def sample(self, number: int) -> torch.Tensor:
        """Samples [number, H, W, C]."""
        return self._data(self.flow.sample(number)[0])

    def _images(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, log_det = self.transform(x)
        return u.reshape(-1, *self.transform.shape).permute(0, 3, 1, 2).contiguous(), log_det

    def _data(self, y: torch.Tensor) -> torch.Tensor:
        return self.transform.inverse(y.permute(0, 2, 3, 1).flatten(1))


def flow_of(model: str, config: RunConfig, first: np.ndarray, width: float, small: bool = False) -> nn.Module:
    """The flow of a witness, initialised on examples `first`, in float32.

    As it ships it has five layers with two hidden layers of 256 units on images, of 64 units on vectors, or eight
    blocks a scale with 128 channels.

    Args:
      model: one of `WITNESSES`.
      config: settings of the run, with the residual flow as model.
      first: floats [N, *shape]; images in [0, 1].
      width: factor on the widths of the networks.
      small: whether it is as small as it can be.
    """
    of_images = isinstance(config.model, ImageFlowConfig)
    shape = config.model.shape if of_images else (config.model.dim,)
    alpha = config.model.data.logit_alpha if of_images else None
    x = torch.from_numpy(np.array(first, np.float32))
    if model == "normflows_glow":
        hidden, blocks = (4, 1) if small else (max(1, round(128 * width)), 8)
        flow = NormflowsGlow(Transform(shape, alpha), hidden, blocks)
    else:
        units, layers = (8, 1) if small else (max(1, round((256 if of_images else 64) * width)), 5)
        flow = ZukoFlow(model.removeprefix("zuko_"), Transform(shape, alpha, x), (units, units), layers)
    with torch.no_grad():
        flow(x)
    return flow
