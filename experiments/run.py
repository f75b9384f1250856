"""What every experiment does with its work directory: config.json, metrics.jsonl, the compilation cache."""

import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from resflow_jax.io.config_json import as_document, as_json, completed, upgraded
from resflow_jax.io.whole_files import whole_file
from resflow_jax.models.certificate import Certificate


def use_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR or ~/.cache/resflow_jax for the next start."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "resflow_jax"))


def use_all_cores(number: int | None = None) -> None:
    """Makes every CPU core a JAX device, or `number` of them; to be called before JAX does anything.

    XLA divides one small operation badly among cores; programs on parts of a batch run side by side. Where the user has
    said how many CPU devices there are, there are so many.
    """
    if jax.config.jax_num_cpu_devices < 0 and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", number or number_of_cores())


def cores_for(batch_size: int) -> int:
    """The most CPU cores that can take equal shares of a batch."""
    return _most_sharing(batch_size, number_of_cores())


def number_of_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


_XLA_FLAGS = {
    "xla_backend_optimization_level": "1",
    "xla_backend_extra_options": "xla_cpu_use_multi_output_fusion=true,xla_cpu_flatten_after_fusion=true,"
    "xla_cpu_disable_loop_unrolling=true",
    "xla_cpu_multi_thread_eigen": "false",
}


def use_xla_flags() -> None:
    """Sets flags of XLA's CPU compiler, where the user has not, unless there is an accelerator.

    To be called before JAX does anything.

    LLVM's first level of optimisation, loops that are not unrolled, and fusions with several outputs halve the time
    that a step takes to compile, and those fusions make it a little faster. Where each core is a device, its
    operations are not to be divided further.
    """
    if not _is_for_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in _XLA_FLAGS.items():
        if name not in flags:
            flags += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()


def _is_for_cpu() -> bool:
    """Whether JAX will run on the CPU: there is nothing else, or the user says so. It must not start for that."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" if asked else not any(map(find_spec, ("jax_plugins", "libtpu")))


def devices_for(batch_size: int) -> int:
    """The most devices that can take equal shares of a batch."""
    return _most_sharing(batch_size, jax.device_count())


def _most_sharing(batch_size: int, number: int) -> int:
    """The most of so many that can take equal shares of a batch."""
    return max(n for n in range(1, number + 1) if batch_size % n == 0)


def data_mesh(batch_size: int) -> Mesh:
    """The devices that share a batch which is no step of training, along the axis "data"; as many as can."""
    number = devices_for(batch_size)
    return jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that a crash leaves the old or the new one."""
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise could_not_write(error, path) from error


def could_not_write(error: OSError, path: Path) -> OSError:
    """The error with the file that could not be written: a full disk does not say."""
    return OSError(error.errno, f"{error.strerror}; could not write it, what was saved before is whole", str(path))


def certificate_rows(certificate: Certificate) -> dict[str, str]:
    """The lines of a closing table that say what is certified, from above, of the flow."""
    worst = max(certificate.blocks, key=lambda block: block.bound)
    answer = "every block is invertible" if certificate.is_certified else "NOT EVERY BLOCK IS INVERTIBLE"
    return {
        "certified": f"{answer}: Lip(g) <= {worst.bound:.4f} in {len(certificate.blocks)} blocks (target "
        f"{worst.target_bound:.4f})",
        "of the whole flow": f"Lip(f) <= {certificate.lipschitz:.1e}, Lip(f^-1) <= {certificate.inverse_lipschitz:.1e}",
    }


def print_table(rows: dict[str, str]) -> None:
    """A closing table."""
    for name, value in rows.items():
        print(f"{name:<24}{value}")


# Settings that may differ when a run is resumed: they change neither the model nor what a step does, to rounding, but
# for the number of steps, on which the schedule of the learning rate depends from then on.
MAY_CHANGE = (
    "steps",
    "workdir",
    "parallel",
    "mesh.data",
    "mesh.model",
    "mesh.parameters",
    "distributed.auto",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "distributed.timeout",
    "log_every",
    "save_every",
    "data.dir",
    "data.threads",
    "data.workers",
    "evaluation.draws",
    "evaluation.patience",
)


def claim_workdir(workdir: Path, config: Any) -> None:
    """Makes the directory and writes config.json, or checks that a run may go on there.

    Where nothing has been trained yet, another config is as good.

    Raises:
      FileExistsError: if the directory holds metrics or checkpoints that no config.json accounts for.
      ValueError: if the directory holds a run of another config; the message lists the differences.
      NotADirectoryError: if the path is taken by a file.
      OSError: if it cannot be made or written to.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir: expected a directory, got the file {workdir}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"workdir: could not make {workdir}: {error.strerror}") from error
    path = workdir / "config.json"
    if path.exists():
        try:
            old = completed(upgraded(json.loads(path.read_text())), config)
        except ValueError as error:
            raise ValueError(f"workdir: expected the config of a run in {path}, could not read it: {error}") from error
        differences = [d for d in config_differences(old, as_json(config)) if d.split(":")[0] not in MAY_CHANGE]
        if differences and _has_results(workdir):
            raise ValueError(
                f"workdir: {workdir} holds a run of another config; name another --workdir, or use its settings:\n  "
                + "\n  ".join(differences)
            )
    elif (workdir / "metrics.jsonl").exists() or (workdir / "checkpoints").exists():
        raise FileExistsError(f"workdir: expected a new directory or that of a run, got {workdir} without config.json")
    write_atomically(path, json.dumps(as_document(config), indent=2) + "\n")


def _has_results(workdir: Path) -> bool:
    """Whether a run has got so far that something would be lost."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    has_lines = metrics.exists() and metrics.stat().st_size > 0
    return has_lines or (checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()))


def config_differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Lines "name: old there, new now", one a setting, for two configs as JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from config_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name}: {old!r} there, {new!r} now"


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with "step" and "split"."""

    def __init__(self, path: Path, *, keep_until: int):
        """Keeps the training lines up to a step, for a run that goes on from there; drops the rest."""
        self._path = path
        self.lines = kept_lines(path, keep_until)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line: Any) -> None:
        """Appends a line."""
        line = without_nan(line)
        self.lines.append(line)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise could_not_write(error, self._path) from error


def kept_lines(path: Path, keep_until: int) -> list[dict[str, Any]]:
    """The training lines of a metrics.jsonl up to a step; none if there is no file."""
    lines = _whole_lines(path) if path.exists() else []
    return [line for line in lines if line["step"] <= keep_until and line["split"] == "train"]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for a last one that was cut off."""
    texts, lines = path.read_text().splitlines(), []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f"workdir: expected JSON in line {number} of {path}: {error}") from error
    return lines


def without_nan(value: Any) -> Any:
    """A line's values, None where one is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
