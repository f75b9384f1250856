"""The flow that a run is judged by, its validation, and pictures of it during training."""

from typing import NamedTuple

import jax
import numpy as np

from experiments.runs.metrics import Metrics
from experiments.runs.tasks.task import Task
from resflow_jax import Certificate, ResidualFlow, certify
from resflow_jax.training.forms import mesh_of
from resflow_jax.training.placement import Placement, on_host, tightened
from resflow_jax.training.step import TrainState


class Judged(NamedTuple):
    """The flow that a run is judged by: the averaged weights, tightened.

    Attributes:
      flow: the flow that all processes evaluate together; sharded as by `Placement.averaged_flow`.
      drawn: the same flow, for pictures, which the first process draws alone.
      certificate: certificate of the flow.
    """

    flow: ResidualFlow
    drawn: ResidualFlow
    certificate: Certificate


def judged(placement: Placement, state: TrainState) -> Judged:
    """The flow that a run is judged by, from a state in the checkpoint form; all processes call this together.

    Arrays that are divided among devices stay divided; the certificate is then computed from a copy on the host. If the
    devices belong to several processes, the first process also draws from this copy, on its CPU.
    """
    return judge(placement.averaged_flow(state))


def judge(flow: ResidualFlow) -> Judged:
    """Tightens and certifies a flow as `Placement.averaged_flow` gives it; the flow itself changes."""
    flow = tightened(flow)
    if mesh_of(flow) is None:
        return Judged(flow, flow, certify(flow))
    whole = on_host(flow)
    return Judged(flow, flow if jax.process_count() == 1 else whole, certify(whole))


def validation_loss(task: Task, flow: ResidualFlow, step: int) -> float:
    """The loss of the validation split.

    Raises:
      FloatingPointError: if it is not finite.
    """
    estimate = task.estimate(flow, "validation")
    if not np.isfinite(estimate.mean):
        raise FloatingPointError(
            f"training diverged by step {step}: {task.label} of the validation split is {estimate.mean}."
        )
    return task.sign * estimate.mean


def sketch(task: Task, flow: ResidualFlow, step: int, metrics: Metrics) -> None:
    """Draws pictures of a flow during training."""
    directory = task.config.workdir / "training"
    directory.mkdir(exist_ok=True)
    for name, path in task.sketch(flow, directory / f"{step:07}").items():
        metrics.picture(step, name, path)
