"""Two real processes of two devices each: the run of one device, killed, stopped and resumed on other devices."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.configs.base import DistributedConfig, EvaluationConfig, MeshConfig, OptimizerConfig
from experiments.runs import setup
from experiments.runs.launch import cores_for_run, run_config
from experiments.runs.metrics import NullMetrics
from experiments.runs.metrics_file import MetricsFile
from resflow_jax import DenseTail, Roulette
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.parallel import make_mesh
from tests.experiments.outputs import read_metrics
from tests.experiments.runs.worker import without_pictures
from tests.experiments.tiny import DIGITS, run_and_cut
from tests.paths import ROOT

CONFIG = dataclasses.replace(
    CONFIGS["digits_uniform"],
    model=dataclasses.replace(DIGITS.model, hidden_channels=64, tail=DenseTail(blocks=0, hidden=64)),
    steps=12,
    batch_size=24,
    log_every=1,
    optimizer=OptimizerConfig(warmup=2),
    estimator=Roulette(subsample=1),  # whatever the number of devices
    evaluation=EvaluationConfig(estimator=Roulette(subsample=1), draws=2, examples=30, every=3),
)
SETTINGS = {  # of CONFIG, where it differs from that of digits_uniform
    "model.blocks": 1,
    "model.hidden-channels": 64,
    "model.tail.blocks": 0,
    "model.kernels": "3 3",
    "steps": 12,
    "batch-size": 24,
    "log-every": 1,
    "optimizer.warmup": 2,
    "evaluation.draws": 2,
    "evaluation.examples": 30,
    "evaluation.every": 3,
    "estimator.subsample": 1,
    "evaluation.estimator.subsample": 1,
}
ARGUMENTS = [word for name, value in SETTINGS.items() for word in (f"--{name}", *str(value).split())]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Switches pictures off."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        yield


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The reference run: its result and the lines of metrics.jsonl."""
    config = dataclasses.replace(CONFIG, workdir=tmp_path_factory.mktemp("one"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
        return run_config(config), read_metrics(config.workdir)


def start(workdir, *arguments, event=("none", 0, 0), each=((), ()), numbers=(0, 1)):
    """Starts two processes of `experiments.density`, or one of them, with further arguments for both and for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parents[1] / "programs"),  # of all tests of this worker
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    distributed = f"--distributed.coordinator 127.0.0.1:{port} --distributed.num-processes 2".split()
    own = [*ARGUMENTS, "--workdir", str(workdir), *distributed, *arguments]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "tests.experiments.runs.worker", *map(str, event)),
                *("digits_uniform", *own, "--distributed.process-id", str(n), *each[n]),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in numbers
    ]


def ended(processes, seconds=240):
    """Exit status, output and errors of each process."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def check_same_run(workdir, expected):
    """Compares every line, up to rounding in float64."""
    _, expected_lines = expected
    lines = read_metrics(workdir)
    assert [(line["step"], line["split"]) for line in lines] == [(n, "train") for n in range(1, 13)] + [(12, "test")]
    for line, other in zip(lines, expected_lines, strict=True):
        jax.tree.map(lambda a, b: a == b or np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), line, other)


@pytest.mark.usefixtures("shared_steps")
def test_killed_and_resumed_on_another_number_of_devices(on_one_device, tmp_path):
    """Two processes with parameters divided among four devices are killed; one with eight resumes the reference run."""
    workdir = tmp_path / "run"
    processes = start(workdir, "--mesh.parameters", "full", event=("stall", 1, 7))
    deadline = time.monotonic() + 240
    while not ((workdir / "checkpoints" / "6").is_dir() and len(read_metrics(workdir)) == 7):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            pytest.fail(f"two processes did not get to step 7: {ended(processes, 1)}")
        time.sleep(0.2)
    for process in processes:
        process.kill()
    _, (_, others_printed, others_errors) = ended(processes)
    assert "step/s" not in others_errors and not others_printed, "the second process writes nothing"
    assert [path.name for path in (workdir / "training").iterdir()] == ["process 0"], "nor does it draw"
    result = run_config(dataclasses.replace(CONFIG, workdir=workdir))
    np.testing.assert_allclose(result, on_one_device[0], rtol=1e-8)
    check_same_run(workdir, on_one_device)


def test_kernels_that_stay_divided(on_one_device, tmp_path):
    """Training and evaluation with parameters divided among all devices give the reference run, with its pictures."""
    mesh = MeshConfig(model=4, parameters="model")
    result = run_config(dataclasses.replace(CONFIG, workdir=tmp_path / "run", mesh=mesh))
    np.testing.assert_allclose(result, on_one_device[0], rtol=1e-8)
    check_same_run(tmp_path / "run", on_one_device)


@pytest.mark.usefixtures("shared_steps")
def test_stopped_by_a_signal_to_one_process(on_one_device, tmp_path):
    """A run interrupted on eight devices is resumed by pmap in two processes; SIGTERM to the second ends both.

    The signal comes before their first step. They then resume by shard_map, to the end.
    """
    workdir = tmp_path / "run"
    run_and_cut(dataclasses.replace(CONFIG, workdir=workdir), batches=4)
    first, second = ended(start(workdir, "--parallel", "pmap", event=("terminate", 1, 0)))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert f"resuming {workdir} at step 3" in first[1] and not second[1]
    step = int(re.search(r"stopped at step (\d+) of 12; the same command goes on from there", first[1])[1])
    assert 4 <= step < 12
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == step
    first, second = ended(start(workdir, "--parallel", "shard_map"))
    assert (first[0], second[0]) == (0, 0) and not second[1], (first, second)
    assert f"resuming {workdir} at step {step}" in first[1]
    result = on_one_device[0]
    assert first[1].splitlines()[-1] == f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}"
    assert (workdir / "report.html").exists()
    check_same_run(workdir, on_one_device)


def test_processes_with_different_configs(tmp_path):
    """Both processes end before anything is made, and name the differences; paths of data may differ."""
    each = ("--data.dir", "here"), ("--data.dir", "there", "--seed", "3")
    first, second = ended(start(tmp_path / "run", each=each))
    assert first[0] == second[0] == 1 and not (tmp_path / "run").exists()
    assert "config: expected the same in all processes, got other settings in 1 than in 0" in first[2]
    assert "the config of process 0 in process 1, got other settings:\n  seed: 0 there, 3 now\n" in second[2]


def test_a_process_that_never_joins(tmp_path):
    """The other process reports it in time, whether it is the coordinator or not."""
    options = ("--distributed.timeout", "3")
    processes = [process for n in (0, 1) for process in start(tmp_path / f"run{n}", *options, numbers=(n,))]
    began = time.monotonic()
    for number, (status, _, errors) in enumerate(ended(processes)):
        assert status == 1 and not (tmp_path / f"run{number}").exists()
        assert "distributed.timeout: expected within 3 s 2 processes to meet at 127.0.0.1:" in errors
        assert f"; this is number {number}; one or more never came" in errors
    assert time.monotonic() - began < 60


def test_what_other_processes_keep(tmp_path):
    """It keeps the lines of the first process, for its decisions, and writes no file."""
    line = {"step": 1, "split": "train", "loss": float("nan"), "norms": [1.0, float("inf")]}
    first = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0)
    with NullMetrics(tmp_path, keep_until=0) as other:
        for one in (first, other):
            one.write(**line)
        other.picture(1, "none", tmp_path / "none.png")
    assert other.lines == first.lines
    assert NullMetrics(tmp_path, keep_until=1).lines == first.lines and NullMetrics(tmp_path, keep_until=0).lines == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (MeshConfig, {"data": 0}, "mesh.data: expected an integer of at least 1, got 0"),
        (MeshConfig, {"parameters": "some"}, "mesh.parameters: expected one of replicated, model, full; got 'some'"),
        (MeshConfig, {"parameters": "model"}, "mesh.model: expected at least 2 .*, and else 1, got 1 with 'model'"),
        (MeshConfig, {"model": 2}, "mesh.model: .* got 2 with 'replicated'"),
        (DistributedConfig, {"coordinator": "here:1"}, "distributed: expected coordinator, .*got here:1, None, None"),
        (
            DistributedConfig,
            {"auto": True, "process_id": 0},
            r"distributed.auto: expected no other setting of the cluster beside it, got \[0\]",
        ),
        (
            DistributedConfig,
            {"coordinator": "here", "num_processes": 2, "process_id": 0},
            "distributed.coordinator: expected HOST:PORT, got 'here'",
        ),
        (
            DistributedConfig,
            {"coordinator": "here:1", "num_processes": 2, "process_id": 2},
            "distributed.process_id: expected less than num_processes, 2, got 2",
        ),
    ],
)
def test_bad_settings_are_named(cls, settings, message):
    """Each wrong setting is refused before anything is made."""
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 12}, "batch_size: expected a multiple of 8, the number of devices that share a batch, got 12"),
        ({"mesh": MeshConfig(data=3)}, "mesh: expected sizes whose product is 8, the number of devices"),
        (
            {"parallel": "pmap", "mesh": MeshConfig(model=2, parameters="model")},
            'mesh.parameters: expected "replicated" with pmap, got "model"',
        ),
        (
            {"parallel": "shard_map", "mesh": MeshConfig(parameters="full")},
            'mesh.parameters: expected "replicated" with shard_map, got "full"',
        ),
    ],
)
def test_devices_that_do_not_fit(tmp_path, settings, message):
    """The error comes before anything is written."""
    with pytest.raises(ValueError, match=message):
        run_config(dataclasses.replace(CONFIG, workdir=tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_cores_for_a_run(monkeypatch):
    """By default as many cores as can share a batch are used; otherwise as many CPU devices as the mesh has."""
    monkeypatch.setattr("experiments.runs.devices.number_of_cores", lambda: 12)
    for settings, expected in [
        ({"batch_size": 64}, 8),
        ({"batch_size": 36}, 12),
        ({"batch_size": 7}, 7),
        ({"mesh": MeshConfig(data=2, model=3, parameters="model")}, 6),
        ({"mesh": MeshConfig(model=5, parameters="model")}, 5),
        ({"distributed": DistributedConfig(coordinator="a:1", num_processes=4, process_id=0)}, 8),
    ]:
        config = dataclasses.replace(CONFIG, **({"batch_size": 64} | settings))
        assert cores_for_run(config) == expected, settings


def test_cluster_detection_fails(monkeypatch):
    """What to say instead."""
    from experiments.runs.processes import join

    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: (_ for _ in ()).throw(ValueError("no cluster")))
    with pytest.raises(ValueError, match=r"distributed.auto: expected a cluster .* detects, got: no cluster"):
        join(DistributedConfig(auto=True))
