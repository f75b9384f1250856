"""Training: one pure step, three strategies to run it on many devices, and the placement of its state and batches.

`training.losses` and `training.class_losses` have the losses of densities and of classifiers, `training.evaluation` and
`training.class_evaluation` their evaluation, and `training.checkpoints` the checkpoints.

Example:
  >>> "Trainer" in rf.training.__all__
  True
"""

from resflow_jax.training.forms import replicate, unreplicate
from resflow_jax.training.parallel import jit_train_step, make_mesh, pmap_train_step, shard_map_train_step
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer, TrainState, fit_estimator

__all__ = [
    "Placement",
    "TrainState",
    "Trainer",
    "fit_estimator",
    "jit_train_step",
    "make_mesh",
    "pmap_train_step",
    "replicate",
    "shard_map_train_step",
    "unreplicate",
]
