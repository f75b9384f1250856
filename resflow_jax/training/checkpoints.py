"""Checkpoints of a training run by orbax: the latest and the best, written atomically and in the background.

A directory `checkpoints/STEP/` gets its name only when it is complete. A run that is cut off leaves the earlier
checkpoints whole.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from resflow_jax.models.certificate import Certificate
from resflow_jax.training.forms import SavedState, from_host
from resflow_jax.training.old_checkpoints import is_old_state, upgraded_certificate, upgraded_state
from resflow_jax.training.step import TrainState

# Orbax writes arrays by tensorstore, which raises errors of files as a ValueError. Its message starts with a status, or
# has the error number of the operating system.
_OF_FILES = re.compile(
    r"(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|NOT_FOUND|ABORTED|DEADLINE_EXCEEDED|DATA_LOSS"
    r"|FAILED_PRECONDITION|UNKNOWN): |.*os_error_code=",
    re.DOTALL,
)


class Checkpoints:
    """The checkpoints of one run, by step. It keeps the latest one and that of the lowest validation loss.

    It is a context manager: leaving it, also by an exception, waits until everything is written. Several processes
    share the directory; all call the same methods, and each writes what lies on its devices.

    Example:
      >>> import tempfile, optax
      >>> from resflow_jax.training.checkpoints import Checkpoints
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> state = trainer.create_state(flow, rf.Roulette())
      >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
      ...     checkpoints.save(state, validation_loss=1.5)
      ...     checkpoints.wait()
      ...     restored = checkpoints.restore(checkpoints.best_step, like=state)
      >>> int(restored.step)
      0
    """

    def __init__(self, directory: Path):
        """Opens the directory, or makes it."""

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
        # If a directory could not be made in the background, the threads of orbax would wait 20 minutes, also at exit.
        here = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies, best_fn=lowest, best_mode="min", async_options=here
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "certificate": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None if none was validated."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, validation_loss: float | None = None, certificate: Certificate | None = None
    ) -> None:
        """Writes the state in the background. Call `wait` before reading it.

        Steps must rise. If the newest checkpoint is of this step and holds the same state, loss and certificate
        already, nothing is written.

        Args:
          state: a state in the host or the checkpoint form (see `training.forms`).
          validation_loss: loss of the state in any unit. A checkpoint without it is never the best one.
          certificate: certificate of the averaged and tightened flow of the state.

        Raises:
          OSError: if this checkpoint or the one before cannot be written, as on a full disk; earlier ones stay whole.
          ValueError: if there is a checkpoint of this step with other contents, or of a later step; nothing is written.
          Exception: errors that are not of the file system are not changed.
        """
        metrics = None if validation_loss is None else {"loss": validation_loss}
        state = jax.tree.map(jnp.copy, state)  # the next step is donated the original while this is written
        items = {"state": ocp.args.StandardSave(SavedState.of(state))}
        if certificate is not None:
            items["certificate"] = ocp.args.JsonSave(certificate.as_dict())
        with self._written():
            is_saved = self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)
        if not is_saved:
            self._check_kept(state, metrics, certificate)

    def restore(
        self,
        step: int,
        like: TrainState,
        shardings: TrainState | None = None,
        *,
        ema_decay: float | None = None,
    ) -> TrainState:
        """Returns the state that was saved at `step`, on any number of devices.

        Args:
          step: step of the checkpoint.
          like: a state that gives the structure and the shapes, as `jax.eval_shape` gives it too.
          shardings: from `Placement.shardings`, for a state in the checkpoint form; every process then reads what its
            devices hold. None for a state in the host form, which every process reads whole.
          ema_decay: decay of the `Trainer`. It is needed for checkpoints that were written before flows were
            compositions, since their arrays have other names (see `training.old_checkpoints`).

        Raises:
          ValueError: if the checkpoint is that of another flow, or if it needs `ema_decay` and got None.
        """
        saved_like = SavedState.of(like)
        metadata = self._manager.item_metadata(step)
        if metadata is not None and is_old_state(metadata.state):
            return self._restore_old(step, metadata.state, like, shardings, ema_decay)
        if shardings is None:
            # The arrays pass through the host, so that they are tied to no device. Otherwise every compiled function
            # would be compiled once more for them.
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), saved_like)
        else:
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                saved_like,
                SavedState.of(shardings),
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=items).state
        state = jax.device_put(state) if shardings is None else state
        return state.as_state(like)

    def _restore_old(
        self, step: int, metadata: Any, like: TrainState, shardings: TrainState | None, ema_decay: float | None
    ) -> TrainState:
        """`restore` of a checkpoint of an earlier version; every process reads it whole."""
        target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), metadata)
        old = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
        state = upgraded_state(old, SavedState.of(like), ema_decay)
        state = jax.device_put(state) if shardings is None else jax.tree.map(from_host, state, SavedState.of(shardings))
        return state.as_state(like)

    def certificate(self, step: int) -> dict[str, Any]:
        """Returns the `Certificate.as_dict` that was saved at `step`."""
        args = ocp.args.Composite(certificate=ocp.args.JsonRestore())
        return upgraded_certificate(self._manager.restore(step, args=args).certificate)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises OSError as `save` does."""
        with self._written():
            self._manager.wait_until_finished()

    def _check_kept(self, state: TrainState, metrics: dict[str, float] | None, certificate: Certificate | None) -> None:
        """Raises ValueError unless the state that orbax did not save is that of the checkpoint of its step."""
        self.wait()  # the checkpoint may not be complete yet
        step, latest = int(state.step), self.latest_step
        if step != latest:
            raise ValueError(f"state: expected a step after {latest}, the newest checkpoint, got {step}: not saved")
        same = {
            "loss": metrics is None or _is_same_json(metrics, self._manager.metrics(step)),
            "certificate": certificate is None or _is_same_json(certificate.as_dict(), self._certificate(step)),
            "state": self._holds(state),
        }
        if not all(same.values()):
            others = " and ".join(name for name, is_same in same.items() if not is_same)
            raise ValueError(
                f"state: expected a step after {step}, or what the checkpoint of step {step} holds, got another "
                f"{others}: not saved"
            )

    def _holds(self, state: TrainState) -> bool:
        """Whether the checkpoint of a state's step holds the same numbers, bit for bit, or NaN in both."""

        def kinds(tree):
            return sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))

        step, arrays = int(state.step), SavedState.of(state)
        if kinds(self._manager.item_metadata(step).state) != kinds(arrays):
            return False  # reading would convert
        try:
            kept = self.restore(step, state, jax.tree.map(lambda leaf: leaf.sharding, state))
        except ValueError:  # the arrays have other names
            return False
        return bool(_are_same(SavedState.of(kept), arrays))

    def _certificate(self, step: int) -> dict[str, Any] | None:
        items = self._manager.item_metadata(step)
        return self.certificate(step) if "certificate" in items else None

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Turns the errors of files that orbax raises, of many kinds, into an OSError; other errors are not changed."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):
                self._manager.reload()  # orbax has forgotten the checkpoints that the failed one was to replace
            if not isinstance(error, OSError) and not (isinstance(error, ValueError) and _OF_FILES.match(str(error))):
                raise
            directory = self._manager.directory
            raise OSError(f"checkpoints: could not write to {directory}; earlier ones are whole. {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._written():
            self._manager.close()


@jax.jit
def _are_same(tree: Any, other: Any) -> jax.Array:
    """Whether all arrays are equal, counting NaN as equal to NaN; a scalar that every process has."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    same = [jnp.all((a == b) | ((a != a) & (b != b))) for a, b in pairs]
    return jnp.all(jnp.stack(same))


def _is_same_json(given: Any, kept: Any) -> bool:
    """Whether a value is that of a JSON file, where tuples are lists. NaN counts as equal to NaN."""
    return json.dumps(given, sort_keys=True) == json.dumps(kept, sort_keys=True)
