"""One job of the comparison: its model, its training against the clock, and its figures."""

import platform
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from experiments.configs.tiny import tiny
from experiments.runs.tasks.task import Task
from experiments.studies.comparison.clock import Clock
from experiments.studies.comparison.contenders import is_witness, packages, with_contender
from experiments.studies.comparison.datasets import batches_of, config_of, task_for
from experiments.studies.comparison.jobs import Job
from experiments.studies.comparison.measures import measure
from experiments.studies.comparison.training import Contender, Model, train
from resflow_jax.data.images import ImageSplits
from resflow_jax.functional.primitives.platforms import number_of_cores

VALIDATED = {"images": 500, "vectors": 2000}  # examples of the validation split at most
SEARCH_VALIDATIONS = 4
SMALL_STEPS = 2  # updates of a small job, whatever its budget


def made(
    job: Job, data_dir: str | None = None, started: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """Does a job. Returns its result as JSON, and of a run samples and data.

    A training that diverges has "error" in its result, and no figures.

    Args:
      job: what to do.
      data_dir: directory of TensorFlow data sets.
      started: called when libraries and data are there, and the model is made.
    """
    task, contender = contender_of(job, data_dir)
    started()
    if is_witness(job.model):
        import torch

        torch.set_num_threads(1)
    kind = "images" if isinstance(task.splits, ImageSplits) else "vectors"
    examples = task.splits.validation[: VALIDATED[kind]]

    def validate(model: Model) -> float:
        with np.errstate(all="ignore"):
            return float(task.sign * model.scores(examples, task.config.seed + 1, 1).mean())

    at_least = SMALL_STEPS if job.small else 0
    options = {"at_least": at_least, "set_up_counts": not job.is_search}
    options |= {"validations": SEARCH_VALIDATIONS} if job.is_search else {}
    trained = train(contender, batches_of(task), Clock(job.seconds), job.learning_rate, validate, **options)
    result = {
        "error": None,
        "validation_loss": trained.loss,
        "validation_losses": trained.losses,
        "best_at": trained.at,
        "steps": trained.steps,
        "skipped": trained.skipped,
        "set_up_seconds": trained.set_up,
        "step_seconds": trained.step_seconds,
        "seconds": trained.seconds,
        "machine": machine(),
    }
    if trained.model is None:
        return result | {"error": f"diverged: no finite validation in {trained.steps} steps"}, None
    if job.is_search:
        return result | {"parameters": trained.model.parameters}, None
    numbers = {"number": 20} if job.small else {}
    figures, arrays = measure(trained.model, task, job.examples, **numbers)
    return result | figures, arrays


def contender_of(job: Job, data_dir: str | None = None) -> tuple[Task, Contender]:
    """The task of a job, with its data, and the model in training."""
    config = with_contender(config_of(job.data, data_dir), job.model, job.candidate, job.seed)
    for package in packages(job.model):
        import_module(package)  # before the clock starts
    task = task_for(job.data, tiny(config) if job.small else config)
    if is_witness(job.model):
        from experiments.studies.comparison.torch_contender import TorchContender
        from experiments.studies.comparison.torch_flows import flow_of

        make = partial(flow_of, job.model, task.config, width=job.width, small=job.small)
        return task, TorchContender(task, make)
    from experiments.studies.comparison.flax_contender import FlaxContender

    return task, FlaxContender(task)


def machine() -> dict[str, Any]:
    """The processor, how much of it this process has, and the versions of what computes."""
    found = {
        "processor": _of_processor("model name") or platform.processor() or platform.machine(),
        "vectors": _vectors(),
        "cores": number_of_cores(),
        "devices": jax.device_count(),
        "cache": bool(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir),
        "python": platform.python_version(),
    }
    for package in ("jax", "flax", "torch", "zuko", "normflows", "diffrax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _vectors() -> str | None:
    """The widest vector instructions of the processor, which its name does not tell."""
    flags = (_of_processor("flags") or "").split()
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)


def _of_processor(field: str) -> str | None:
    """What Linux says of the first core; None elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return None
