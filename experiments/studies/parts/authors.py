"""A flow in the authors' PyTorch code, https://github.com/rtqichen/residual-flows, and the times of its operations.

The code is read from a checkout, and is not part of this project. Blocks, estimators, inverse and power iterations are
the authors'; the training step is that of their `train_img.py`. In their evaluation mode 20 exact terms precede the
Poisson(2) further ones. Their inverse stops where (x - x_prev)^2 < 1e-5 (1 + |y|) everywhere in a batch. The weights
are their own initial ones. It runs on a GPU if PyTorch sees one.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resflow_jax import DenseTail, ImageFlowConfig

TAIL = DenseTail()


class Authors:
    """Times the authors' code on one batch.

    Args:
      config: the flow, as for `authors_flow`.
      images: integers with 256 levels [B, H, W, C].
      checkout: directory of the authors' repository.
      learning_rate: that of Adam.
      clip: the largest norm of a gradient.

    Raises:
      FileNotFoundError, ValueError: as `authors_flow`.
    """

    def __init__(self, config: ImageFlowConfig, images: np.ndarray, checkout: Path, learning_rate: float, clip: float):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        np.random.seed(0)
        x = torch.tensor((images.transpose(0, 3, 1, 2) + 0.5) / 256, dtype=torch.float32)
        self._x = x.contiguous().to(self._device)
        self._model, self._normed = authors_flow(config, tuple(x.shape), checkout)
        self._model.to(self._device)
        self._model(self._x, 0)  # sets the ActNorms
        self._optimizer = torch.optim.Adam(self._model.parameters(), learning_rate, betas=(0.9, 0.99))
        self._clip = clip

    def train(self) -> dict[str, float]:
        """One training step: forward, backward, clipping, Adam, power iterations to a tolerance of 1e-3."""
        self._model.train()
        return {"seconds": self._timed(self._step)["seconds"]}

    def _step(self) -> None:
        log_p = self._log_prob()
        (-log_p.mean() / (math.log(2) * self._x[0].numel())).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for module in self._model.modules():
                if isinstance(module, self._normed):
                    module.compute_weight(update=True)

    def evaluate(self) -> dict[str, float]:
        """log p of the batch with 20 terms and a roulette; `noise` is its standard deviation."""
        self._model.eval()
        with torch.no_grad():
            first, second = (self._timed(self._log_prob) for _ in range(2))
        difference = first["value"] - second["value"]
        return {
            "seconds": min(first["seconds"], second["seconds"]),
            "noise": float(difference.square().mean().div(2).sqrt()),
        }

    def sample(self) -> dict[str, float]:
        """The inverse of z = f(x); `error` is max |x - f^-1(z)|."""
        self._model.eval()
        with torch.no_grad():
            z = self._model(self._x)
            result = self._timed(lambda: self._model(z, inverse=True))
        return {"seconds": result["seconds"], "error": float((result["value"] - self._x).abs().max())}

    def peak_bytes(self) -> int | None:
        """The most memory of the GPU that was in use; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None

    def _log_prob(self) -> torch.Tensor:
        z, negative_log_det = self._model(self._x, 0)
        return (-0.5 * (z.square() + math.log(2 * math.pi))).sum(1) - negative_log_det.squeeze(1)

    def _timed(self, function: Callable[[], Any]) -> dict[str, Any]:
        self._wait()
        began = time.perf_counter()
        value = function()
        self._wait()
        return {"seconds": time.perf_counter() - began, "value": value}

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def authors_flow(
    config: ImageFlowConfig, size: tuple[int, ...], checkout: Path
) -> tuple[torch.nn.Module, tuple[type, ...]]:
    """A flow in the authors' code, and the classes of its normalised layers.

    Args:
      config: a flow of LipSwish convolutions. Its shape, blocks, hidden_channels, kernels, coefficient, width of dense
        blocks and alpha of the logit are taken over; other settings must be the defaults.
      size: shape of a batch, [B, C, H, W].
      checkout: directory of the authors' repository.

    Raises:
      FileNotFoundError: if `checkout` has no package `resflows`.
      ValueError: for another number of dense blocks or of their layers, a width for each scale, and a spline.
    """
    if not (checkout / "resflows").is_dir():
        raise FileNotFoundError(f"authors: expected a checkout of rtqichen/residual-flows, got {checkout}")
    if replace(config.tail, hidden=TAIL.hidden) != TAIL:
        raise ValueError(f"config: expected the tail of the authors' code, {TAIL} of any width, got {config.tail}")
    if isinstance(config.hidden_channels, tuple) or config.data.spline_bins:
        raise ValueError("config: expected one width for all scales and no spline, as in the authors' code")
    sys.path.insert(0, str(checkout))
    from resflows import layers
    from resflows.layers import base
    from resflows.resflow import ResidualFlow

    model = ResidualFlow(
        size,
        n_blocks=list(config.blocks),
        intermediate_dim=config.hidden_channels,
        factor_out=False,
        init_layer=layers.LogitTransform(config.data.logit_alpha),
        actnorm=True,
        coeff=config.coefficient,
        vnorms="2" * (len(config.kernels) + 1),
        sn_atol=1e-3,
        sn_rtol=1e-3,
        n_power_series=None,
        n_dist="poisson",
        kernels="-".join(map(str, config.kernels)),
        activation_fn="swish",
        fc_end=True,
        fc_idim=config.tail.hidden,
        n_exact_terms=2,
        preact=True,
        neumann_grad=True,
        grad_in_forward=True,
        first_resblock=True,
    )
    return model, (base.InducedNormConv2d, base.InducedNormLinear, base.SpectralNormConv2d, base.SpectralNormLinear)
