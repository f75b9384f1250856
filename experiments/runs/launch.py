"""One run from its config: the devices, the processes, the task, and what is trained."""

from experiments.configs.base import RunConfig
from experiments.runs import train
from experiments.runs.command import Output, say_what_will_be_written
from experiments.runs.devices import cores_for, use_all_cores
from experiments.runs.fingerprint import is_from_files
from experiments.runs.processes import all_end_with_one, check_same, is_first, join
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Task
from resflow_jax import Estimate


def files_of(task: Task) -> tuple[str, ...]:
    """The files that a run writes."""
    pages, state = ("report.html", "metrics.jsonl", "curves.png"), ("certificate.json", "checkpoints/")
    settings = ("config.json", "data.json") if is_from_files(task.config.data) else ("config.json",)
    return *pages, *task.pictures, "training/", "tensorboard/", *settings, *state


def launch(config: RunConfig) -> None:
    """Takes the devices, joins the other processes if there are any, and runs."""
    use_all_cores(cores_for_run(config))
    join(config.distributed)
    with all_end_with_one():
        run_config(config)


def cores_for_run(config: RunConfig) -> int:
    """The number of CPU devices of each process: that of the mesh, or the most that can take equal shares of a batch.

    The number of processes of a detected cluster is not known yet; there $JAX_NUM_CPU_DEVICES sets the devices of each.
    """
    processes = config.distributed.num_processes or 1
    if config.mesh.data is not None:
        return max(1, config.mesh.data * config.mesh.model // processes)
    shared = max(1, config.batch_size // processes)
    return max(config.mesh.model, cores_for(shared) // config.mesh.model * config.mesh.model)


def run_config(config: RunConfig) -> Estimate:
    """Trains or resumes, evaluates and draws. Returns the metric of the test split."""
    check_same(config)
    task = task_of(config)  # errors in settings and data come before the line about files
    if is_first():
        say_what_will_be_written(Output(config.workdir, files_of(task)))
    return train.run(config, task)
