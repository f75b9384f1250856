"""Checkpoints of a training run by orbax: the latest and the best, written atomically and in the background.

A directory `checkpoints/STEP/` appears under its name only once it is complete, so a run that is
cut off leaves the earlier ones whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from resflow_jax.models.certificate import Certificate
from resflow_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, by step; keeps the latest and that of the lowest validation loss.

    A context manager: leaving it, also by an exception, waits for what is being written. Of several processes, which
    share the directory, all call the same methods; each writes what lies on its devices.
    """

    def __init__(self, directory: Path):
        def lowest(metrics: dict[str, float]) -> float:
            return metrics["loss"]

        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=lowest, reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policies, best_fn=lowest, best_mode="min")
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, or None."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, validation_loss: float | None = None, certificate: Certificate | None = None
    ) -> None:
        """Writes the state in the background; call `wait` before reading it.

        The arrays lie on one device or are global, as of `Placement.on_mesh`. Where the state was validated, with the
        loss, in any unit, and the certificate of its averaged and tightened flow; without a loss it is never the best.

        Raises:
          OSError: if this or the one before cannot be written, as on a full disk; those before stay whole.
        """
        metrics = None if validation_loss is None else {"loss": validation_loss}
        state = jax.tree.map(jnp.copy, state)  # the next step is donated the original while this is written
        items = {"state": ocp.args.StandardSave(_arrays_only(state))}
        if certificate is not None:
            items["certificate"] = ocp.args.JsonSave(certificate.as_dict())
        with self._written():
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, like: TrainState, shardings: TrainState | None = None) -> TrainState:
        """The state saved at `step`, by however many devices.

        Args:
          step: of the checkpoint.
          like: gives structure and shapes.
          shardings: where the arrays are to lie, as of `training.placement`: every process reads what its devices
            hold. None for whole arrays, which every process reads, and which are tied to no device.
        """
        arrays = _arrays_only(like)
        if shardings is None:
            # Through the host, so that the arrays are as little tied to a device as fresh ones are:
            # else every compiled function would be compiled once more for them.
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), arrays)
        else:
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                arrays,
                _arrays_only(shardings),
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=items).state
        state = jax.device_put(state) if shardings is None else state
        return state._replace(estimator=jax.tree.unflatten(jax.tree.structure(like.estimator), state.estimator))

    def certificate(self, step: int) -> dict[str, Any]:
        """What `Certificate.as_dict` gave for the averaged and tightened flow of the state saved at `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(certificate=ocp.args.JsonRestore())).certificate

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises OSError as `save`."""
        with self._written():
            self._manager.wait_until_finished()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """One kind of error for the many that orbax lets through where a file cannot be written."""
        try:
            yield
        except Exception as error:
            directory = self._manager.directory
            raise OSError(f"checkpoints: could not write to {directory}; those before are whole. {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._written():
            self._manager.close()


def _arrays_only(state: TrainState) -> TrainState:
    """The state with the estimator's arrays alone: its settings belong to the config, not to a checkpoint."""
    return state._replace(estimator=jax.tree.leaves(state.estimator))
