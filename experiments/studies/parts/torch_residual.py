"""Residual flows in PyTorch under training: those of normflows and of the authors' code, as the papers train them.

Both get the sizes of a config of ours, Adam, clipping, and a moving average of the weights as the config says. Blocks,
estimators, layers and power iterations are their own.
"""

import copy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from experiments.runs.tasks.task import Task
from experiments.studies.comparison.torch_contender import TorchContender, TorchModel
from experiments.studies.parts.authors import authors_flow
from experiments.studies.parts.peers import normflows_from
from resflow_jax import ImageFlowConfig, ResidualFlow

NORM_UPDATES = 5  # of a copy that is evaluated


class NormflowsResidual(nn.Module):
    """A residual flow of normflows on images [B, H, W, C] in [0, 1], with initial weights of ours.

    Args:
      config: config of the flow.
      first: floats [N, H, W, C] that ours is initialised on.
      seed: seed of its weights.
    """

    def __init__(self, config: ImageFlowConfig, first: np.ndarray, seed: int):
        super().__init__()
        flow = ResidualFlow(config, rngs=nnx.Rngs(seed))
        flow.initialize(jnp.asarray(first))
        self.flow = normflows_from(flow, papers=True).model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Estimates of log p(x) [B] in nats."""
        return self.flow.log_prob(x.permute(0, 3, 1, 2).contiguous())

    def update_norms(self) -> None:
        """Five power iterations for each layer."""
        import normflows as nf

        nf.utils.update_lipschitz(self.flow, 5)


class AuthorsResidual(nn.Module):
    """A residual flow of the authors' code on images [B, H, W, C] in [0, 1].

    Args:
      config: config of the flow, as for `authors_flow`.
      first: floats [N, H, W, C] that its ActNorms are set on.
      checkout: directory of the authors' repository.
      seed: seed of the lengths of the series, which that code draws by NumPy.
    """

    def __init__(self, config: ImageFlowConfig, first: np.ndarray, checkout: Path, seed: int):
        super().__init__()
        np.random.seed(seed)
        x = torch.from_numpy(np.array(first, np.float32))
        size = len(x), *config.shape[2:], *config.shape[:2]
        self.flow, self._normed = authors_flow(config, size, checkout)
        with torch.no_grad():
            self(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Estimates of log p(x) [B] in nats."""
        z, negative_log_det = self.flow(x.permute(0, 3, 1, 2).contiguous(), 0)
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) - negative_log_det.squeeze(1)

    def update_norms(self) -> None:
        """Power iterations of each layer to a tolerance of 1e-3, as in the authors' `train_img.py`."""
        for module in self.flow.modules():
            if isinstance(module, self._normed):
                module.compute_weight(update=True)


class TorchResidual(TorchContender):
    """A residual flow in PyTorch under training, whose norms are updated after each step."""

    def step(self, batch: np.ndarray, learning_rate: float) -> bool:
        """Makes an update, and updates the norms. Returns False if the update was not finite, and was skipped."""
        done = super().step(batch, learning_rate)
        with torch.no_grad():
            self.flow.update_norms()
        return done

    def averaged(self) -> TorchModel:
        """A copy of the model with averaged weights, and with the norms of these."""
        return self._copied(self._average.module)

    def current(self) -> TorchModel:
        """A copy of the model as it is."""
        return self._copied(self.flow)

    def _copied(self, flow: nn.Module) -> TorchModel:
        flow = copy.deepcopy(flow)
        with torch.no_grad():
            for _ in range(NORM_UPDATES):
                flow.update_norms()
        return TorchModel(self.task, self.loss, flow.eval())


def torch_residual(name: str, task: Task, authors: Path | None = None) -> TorchResidual:
    """The residual flow of "normflows" or of the "authors", with the sizes of the task's config.

    Args:
      name: name of the code.
      task: the data, and the config of the run, whose model is a flow of `authors_flow`.
      authors: a checkout of the authors' repository, for "authors".
    """
    config = task.config
    if name == "normflows":
        return TorchResidual(task, lambda first: NormflowsResidual(config.model, first, config.seed))
    return TorchResidual(task, lambda first: AuthorsResidual(config.model, first, authors, config.seed))
