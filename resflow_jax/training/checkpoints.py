"""Checkpoints of a training run by orbax: the latest two and the best, written atomically and in the background.

A directory `checkpoints/STEP/` gets its name only when it is complete. A run that is cut off leaves the earlier
checkpoints whole. Each has the SHA-256 of its files in checksums.json, since tensorstore does not notice every change
of an array: whatever is restored is checked first. Checkpoints of earlier versions have no checksums and are restored
unchecked.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from resflow_jax.functional.checks import check_choice
from resflow_jax.io.checksums import damage, has_checksums, write_checksums
from resflow_jax.models.certificate import Certificate
from resflow_jax.training.checkpoint_errors import DamagedCheckpointError, is_of_files, listed, told
from resflow_jax.training.forms import SavedState, from_host
from resflow_jax.training.old_checkpoints import check_shapes, is_old_state, upgraded_certificate, upgraded_state
from resflow_jax.training.step import TrainState

_KEPT = 2  # of the latest checkpoints: if the newest is damaged, there is the one before
_ASIDE = "aside"
_LATE = ("_CHECKPOINT_METADATA",)  # orbax adds the time to it at last; nothing that is restored depends on it
_MOST = 2**31 - 1


class _Manager(ocp.CheckpointManager):
    """Orbax's manager; a checkpoint whose metrics cannot be read has none, and the others can be opened."""

    def metrics(self, step: int) -> dict[str, float] | None:
        try:
            found = super().metrics(step)
        except (ValueError, OSError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("loss"), int | float) else None


class Checkpoints:
    """The checkpoints of one run, by step. It keeps the latest two and that of the lowest validation loss.

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
                checkpoint_managers.LatestN(_KEPT),
                checkpoint_managers.BestN(
                    get_metric_fn=lowest, reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        # If a directory could not be made in the background, the threads of orbax would wait 20 minutes, also at exit.
        # The callback runs when all files are written, before the checkpoint gets its name.
        in_background = ocp.options.AsyncOptions(
            create_directories_asynchronously=False, post_finalization_callback=self._write_checksums
        )
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies, best_fn=lowest, best_mode="min", async_options=in_background
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "certificate": ocp.JsonCheckpointHandler()}
        self._directory = Path(directory).resolve()
        self._manager = _Manager(self._directory, options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None if none was validated."""
        return next(iter(self._by_merit("best", _MOST)), None)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in increasing order."""
        return sorted(self._manager.all_steps())

    def validation_loss(self, step: int) -> float | None:
        """The validation loss that was saved at `step`; None if there was none."""
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics["loss"]

    def save(
        self, state: TrainState, validation_loss: float | None = None, certificate: Certificate | None = None
    ) -> None:
        """Writes the state in the background. Call `wait` before reading it.

        Steps must rise. If the newest checkpoint is of this step and holds the same state, loss and certificate
        already, nothing is written.

        Args:
          state: a state in the host or the checkpoint layout (see `training.forms`).
          validation_loss: loss of the state in any unit. A checkpoint without it, or with one that is not finite, is
            never the best one.
          certificate: certificate of the averaged and tightened flow of the state.

        Raises:
          OSError: if this checkpoint or the one before cannot be written, for example on a full disk; earlier ones stay
            whole.
          ValueError: if there is a checkpoint of this step with other contents, or of a later step; nothing is written.
          Exception: errors that are not of the file system are not changed.
        """
        validation_loss = None if validation_loss is None else float(validation_loss)  # as JSON holds it
        has_loss = validation_loss is not None and math.isfinite(validation_loss)
        metrics = {"loss": validation_loss} if has_loss else None
        state = jax.tree.map(jnp.copy, state)  # the next step donates the original while this is written
        items = {"state": ocp.args.StandardSave(SavedState.of(state))}
        if certificate is not None:
            items["certificate"] = ocp.args.JsonSave(certificate.as_dict())
        with self._written():
            self._manager.wait_until_finished()  # the checksums of the one before are of its step
            self._saving = int(state.step)
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
          shardings: from `Placement.shardings`, for a state in the checkpoint layout; every process then reads what its
            devices hold. None for a state in the host layout, which every process reads whole.
          ema_decay: decay of the `Trainer`. Only checkpoints of early development versions need it, whose averages are
            converted (see `training.old_checkpoints`).

        Raises:
          DamagedCheckpointError: if a file has changed since it was written, or is missing.
          ValueError: if the checkpoint is that of another flow, or if it needs `ema_decay` and got None.
        """
        self._check(step)
        return self._restore(step, like, shardings, ema_decay)

    def restore_intact(
        self,
        like: TrainState,
        shardings: TrainState | None = None,
        *,
        ema_decay: float | None = None,
        weights: Literal["latest", "best"] = "latest",
        before: int | None = None,
    ) -> TrainState:
        """Returns the newest or the best state whose checkpoint is not damaged.

        All processes call it together. One that cannot be read is skipped, with a warning that names it and the one
        that is taken. Nothing is deleted.

        Args:
          like: as for `restore`.
          shardings: as for `restore`.
          ema_decay: as for `restore`.
          weights: "latest" for the newest state, "best" for that of the lowest validation loss.
          before: only checkpoints before this step are taken; None for all.

        Raises:
          DamagedCheckpointError: if there is no such checkpoint that can be read; the message says of each why.
        """
        check_choice("weights", weights, ("latest", "best"))
        problems: dict[int, str] = {}
        for step in self._by_merit(weights, _MOST if before is None else before):
            try:
                self._check(step)
                state = self._restore(step, like, shardings, ema_decay)
            except Exception as error:
                if not (self._directory / str(step)).exists():  # a running run has replaced it
                    self._manager.reload()
                    return self.restore_intact(like, shardings, ema_decay=ema_decay, weights=weights, before=before)
                is_unreadable = not has_checksums(self._directory / str(step)) and jax.process_count() == 1
                if not isinstance(error, DamagedCheckpointError) and not is_unreadable:
                    raise
                problems[step] = told(error)
                continue
            if problems:
                warnings.warn(
                    f"checkpoints: in {self._directory} {listed(problems)}; that of step {step} is taken instead",
                    stacklevel=2,
                )
            return state
        found = listed(problems) or "there is none"
        raise DamagedCheckpointError(
            f"checkpoints: expected a readable checkpoint in {self._directory}, got none: {found}. Nothing was "
            "deleted; a copy of one of these directories brings the run back, a new work directory starts it anew"
        )

    def set_aside_after(self, step: int) -> None:
        """Moves the checkpoints after `step` to aside/, so that training can save these steps again.

        All processes call it together.
        """
        self.wait()
        if jax.process_index() == 0:
            for later in (other for other in self.steps if other > step):
                place, number = self._directory / _ASIDE / str(later), 0
                while place.exists():
                    number += 1
                    place = place.with_name(f"{later}-{number}")
                place.parent.mkdir(exist_ok=True)
                (self._directory / str(later)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside_after")
        self._manager.reload()

    def _restore(
        self, step: int, like: TrainState, shardings: TrainState | None, ema_decay: float | None
    ) -> TrainState:
        """`restore` of a checkpoint that has been checked."""
        saved_like = SavedState.of(like)
        metadata = self._manager.item_metadata(step)
        if metadata is not None and is_old_state(metadata.state):
            return self._restore_old(step, metadata.state, like, shardings, ema_decay)
        if metadata is not None:
            check_shapes(metadata.state, saved_like)  # a whole array would be read in the shape that it has on disk
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
        """Returns the `Certificate.as_dict` that was saved at `step`.

        Raises:
          DamagedCheckpointError: if its file has changed since it was written, or is missing.
        """
        self._check(step, "certificate/")
        args = ocp.args.Composite(certificate=ocp.args.JsonRestore())
        return upgraded_certificate(self._manager.restore(step, args=args).certificate)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises OSError as `save` does."""
        with self._written():
            self._manager.wait_until_finished()

    def _write_checksums(self) -> None:
        """Writes those of the checkpoint that is being saved, in the first process."""
        if jax.process_index() == 0:
            name = str(self._saving)
            for path in self._directory.glob(f"{name}*"):
                if path.name == name or path.name.startswith(f"{name}.orbax-checkpoint-tmp"):
                    write_checksums(path, without=_LATE)

    def _check(self, step: int, below: str = "") -> None:
        """Raises DamagedCheckpointError, in all processes, if the files of a checkpoint are not as they were written.

        The first process reads them.
        """
        problem = damage(self._directory / str(step), below) if jax.process_index() == 0 else None
        is_damaged = problem is not None
        if jax.process_count() > 1:
            is_damaged = bool(multihost_utils.broadcast_one_to_all(np.int32(is_damaged)))
        if is_damaged:
            problem = problem or "process 0 says why"
            raise DamagedCheckpointError(
                f"checkpoints: could not read checkpoint {step} in {self._directory}: it is damaged, {problem}", problem
            )

    def _by_merit(self, weights: str, before: int) -> list[int]:
        """The steps of the checkpoints before a step, the newest or the best first; those without merit are left out.

        A checkpoint whose metrics have changed has no loss.
        """
        steps = [step for step in reversed(self.steps) if step < before]
        if weights == "latest":
            return steps
        losses = {step: self.validation_loss(step) for step in steps}
        for step in [step for step in steps if damage(self._directory / str(step), "metrics/") is not None]:
            losses[step] = np.inf  # it comes last, and is named
        return sorted((step for step in steps if losses[step] is not None), key=lambda step: losses[step])

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
            if not is_of_files(error):
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
