"""A flow in PyTorch under the clock, with the optimiser settings and the averaging of our own models."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from experiments.runs.tasks.task import Task
from resflow_jax.data.images import ImageSplits


class TorchContender:
    """A flow in PyTorch in training: Adam, clipping, averaging as the config of the run says.

    Args:
      task: the data, and the config of the run.
      make: from examples [N, ...] in the form that the flow takes to the flow, initialised on them.
    """

    def __init__(self, task: Task, make: Callable[[np.ndarray], nn.Module]):
        self.task, self.config, self._make = task, task.config, make
        self.loss = Loss(task)
        self._first = np.asarray(task.initial())

    def prepare(self, batch: np.ndarray) -> None:
        """Builds the flow, and initialises it on training examples."""
        config = self.config
        torch.manual_seed(config.seed)
        self.flow = self._make(self._first).train()
        settings = config.optimizer
        self._optimizer = torch.optim.Adam(self.flow.parameters(), lr=0.0, betas=(0.9, settings.b2))
        self._average = AveragedModel(self.flow, multi_avg_fn=bias_corrected(settings.ema_decay))

    def step(self, batch: np.ndarray, learning_rate: float) -> bool:
        """Makes an update. Returns False if it was not finite, and was skipped."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad()
        loss = self.loss(self.flow, batch).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.optimizer.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            return False
        self._optimizer.step()
        self._average.update_parameters(self.flow)
        return True

    def averaged(self) -> "TorchModel":
        """A copy of the model with averaged weights."""
        return self._copied(self._average.module)

    def _copied(self, flow: nn.Module) -> "TorchModel":
        return TorchModel(self.task, self.loss, copy.deepcopy(flow).eval())


def bias_corrected(decay: float) -> Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], None]:
    """The moving average of `optax.ema` with its bias correction, which forgets where the parameters began."""

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], number: torch.Tensor) -> None:
        weight = (1 - decay) / (1 - decay ** (float(number) + 1))
        torch._foreach_lerp_(averaged, current, weight)

    return update


class Loss:
    """The loss of each example of a task: bits/dim of dequantised integer images, or -log p of vectors in nats.

    Args:
      task: the task.
    """

    def __init__(self, task: Task):
        self.levels = task.splits.levels if isinstance(task.splits, ImageSplits) else None

    def __call__(self, flow: nn.Module, examples: np.ndarray) -> torch.Tensor:
        """Losses [B] of a batch, with noise from the global generator."""
        x = torch.from_numpy(np.array(examples, np.float32))
        if self.levels is None:
            return -flow(x)
        x = (x + torch.rand(x.shape)) / self.levels
        dim = x[0].numel()
        return -flow(x) / (dim * math.log(2)) + math.log2(self.levels)


class TorchModel:
    """A trained flow in PyTorch; methods as those of `FlaxModel`."""

    def __init__(self, task: Task, loss: Loss, flow: nn.Module):
        self._task, self._loss, self._flow = task, loss, flow

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._flow.parameters() if parameter.requires_grad)

    def scores(self, examples: np.ndarray, seed: int, draws: int) -> np.ndarray:
        size = self._task.batch_size
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # training goes on with its own noise
            torch.manual_seed(seed)
            found = [
                torch.cat([self._loss(self._flow, examples[n : n + size]) for n in range(0, len(examples), size)])
                for _ in range(draws)
            ]
        return self._task.sign * torch.stack(found).double().numpy()

    def sampler(self, number: int) -> Callable[[int], np.ndarray]:
        def sample(seed: int) -> np.ndarray:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._flow.sample(number).numpy()

        return sample

    def evaluator(self, x: np.ndarray) -> Callable[[int], np.ndarray]:
        size, x = self._task.batch_size, torch.from_numpy(np.array(x, np.float32))

        def evaluate(seed: int) -> np.ndarray:
            with torch.no_grad():
                return torch.cat([self._flow(x[n : n + size]) for n in range(0, len(x), size)]).numpy()

        return evaluate

    def reconstruction(self, x: np.ndarray) -> tuple[float, int]:
        with torch.no_grad():
            x = torch.from_numpy(np.array(x, np.float32))
            return float((self._flow.inverse(self._flow.latent(x)) - x).abs().max()), 0
