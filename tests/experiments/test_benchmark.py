"""The benchmark on a tiny case: its table and file, compilation from the cache, bad input; exponents of known laws."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.studies import scaling
from experiments.studies.parts import competitors
from resflow_jax import DenseTail, ImageFlowConfig

pytestmark = pytest.mark.filterwarnings("ignore:length. Poisson:RuntimeWarning")  # the papers' law
TINY = competitors.Case(
    ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=DenseTail(0)), 4
)


@pytest.fixture
def tiny(monkeypatch):
    """The case "digits" made tiny, measured in this process."""
    monkeypatch.setitem(competitors.CASES, "digits", TINY)

    class InProcess:
        def __init__(self, case, competitor, cache=None, strategy="jit", authors=None):
            self.ours = competitors.make_competitor(competitors.CASES[case], competitor, strategy)

        def __call__(self, measure, *arguments):
            return {**getattr(self.ours, measure)(*arguments), "peak_bytes": 1.0}

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(benchmark, "Worker", InProcess)
    monkeypatch.setattr(competitors, "MATMULS", ((512, 512, 512),))
    monkeypatch.setattr(competitors, "TIMED_FLOPS", 1e8)


@pytest.mark.parametrize("competitor", ["resflow_jax", "resflow_jax plain"])
def test_a_round(competitor, tiny, tmp_path, capsys, monkeypatch):
    """Every measure is positive, the inverse is right, and the table and the file tell the same."""
    if competitor == "resflow_jax plain":  # to ask another process once is enough
        monkeypatch.setattr(benchmark, "machine", lambda: "1 core")
    config = benchmark.BenchmarkConfig(("digits",), (competitor,), 1, 1, False, tmp_path)
    with jax.numpy_dtype_promotion("standard"):  # a plain script uses optax as it is
        result = benchmark.run(config)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    (measured,) = result["cases"]["digits"].values()
    assert set(measured) == set(benchmark.ROWS) and all(value > 0 for value in measured.values())
    assert measured["error"] < 1e-5
    printed = capsys.readouterr().out
    assert all(label in printed for label, _, _ in benchmark.ROWS.values())


def test_operations_are_counted():
    """Twice the multiplications of every layer: 3x3 from one channel to four, and back, on 16 pixels."""
    flow = competitors.make_flow(TINY, competitors.photograph_crops((4, 4, 1), 4))
    assert competitors.evaluation_flops(flow) == 2 * 2 * 9 * 4 * 16


def test_photographs():
    """Crops of the size and channels asked for, of whole levels, not constant."""
    images = competitors.photograph_crops((6, 8, 3), 4)
    assert images.shape == (4, 6, 8, 3) and images.dtype == np.uint8 and images.std() > 10


@pytest.mark.usefixtures("compiles_alike")
def test_a_process_of_its_own(tmp_path):
    """A worker answers by a line of JSON, and says what went wrong if it ends."""
    with benchmark.Worker("digits", "resflow_jax", tmp_path) as worker:
        answer = worker("matmul")
        assert answer["flops_per_second"] > 1e8 and answer["peak_bytes"] > 1e7
        with pytest.raises(RuntimeError, match="digits resflow_jax jit: ended with 1 at no_such_measure"):
            worker("no_such_measure")


def test_compilation():
    """Seconds and bytes of a step that is never run."""
    answer = competitors.compile_step(TINY)
    assert all(answer[name] > 0 for name in ("trace", "compile", "temporary_bytes"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ("mnist",)}, "cases: expected one of 28x28, .*; got 'mnist'"),
        ({"competitors": ("torchflows",)}, "competitors: expected one of resflow_jax, .*; got 'torchflows'"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(options, message):
    """The error names the setting and what is expected."""
    with pytest.raises(ValueError, match=message):
        benchmark.BenchmarkConfig(**options)


def test_bad_series():
    """The error comes before anything is measured."""
    with pytest.raises(ValueError, match=r"series: expected one of depth, .*; got 'height'"):
        scaling.ScalingConfig(series=("height",))
    with pytest.raises(ValueError, match=r"depths: expected two different numbers or more, got \(4, 4\)"):
        scaling.ScalingConfig(depths=(4, 4))


def test_nobody_to_measure(monkeypatch, tmp_path):
    """An error says that the only competitor is not installed."""
    monkeypatch.setattr(benchmark, "_has", lambda peer, authors: False)
    config = benchmark.BenchmarkConfig(("digits",), ("normflows",), 1, 1, False, tmp_path)
    with pytest.raises(ValueError, match="competitors: expected at least one that can be measured"):
        benchmark.run(config)


def test_exponents(monkeypatch, tmp_path):
    """Measurements that follow a power law give its exponents; a picture is written."""
    laws = {"depth": (1, 0), "width": (2, 1), "batch": (1, 0), "side": (2, 2)}

    def measure(case, steps, strategy, reversible):
        assert steps == 7 and not reversible
        config = case.config
        sizes = {
            "depth": config.blocks[0],
            "width": config.hidden_channels,
            "batch": case.batch_size,
            "side": config.shape[0],
        }
        return tuple(np.prod([size ** laws[name][n] for name, size in sizes.items()], dtype=float) for n in (0, 1))

    monkeypatch.setattr(scaling, "measure", measure)
    result = scaling.run(scaling.ScalingConfig(workdir=tmp_path))
    for name, (time, memory) in laws.items():
        np.testing.assert_allclose(result[name]["time_exponent"], time, atol=1e-9)
        np.testing.assert_allclose(result[name]["memory_exponent"], memory, atol=1e-9)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"name: expected one of depth, .*; got 'height'"):
        scaling.varied("height", 2)


def test_two_steps_of_two_sizes(monkeypatch, tmp_path):
    """The study itself, tiny: a step takes time and memory, twice the batch no less of the latter."""
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setattr(scaling, "SERIES", {"batch": (2, 4)})
    result = scaling.run(scaling.ScalingConfig(steps=2, series=("batch",), length=2, workdir=tmp_path))
    assert min(result["batch"]["seconds"]) > 0 and 0 < result["batch"]["bytes"][0] <= result["batch"]["bytes"][1]
    assert json.loads((tmp_path / "scaling.json").read_text()) == result


def test_the_gradient_of_a_reversible_flow():
    """It differs from that of the flow that stores its inputs by the tolerance of the inverse."""
    assert 0 < scaling.gradient_error(replace(TINY, config=replace(TINY.config, blocks=(2,)))) < 1e-5


def test_the_authors_code(tmp_path):
    """Without a checkout it is left out; a directory that is none, and a flow that it does not have, are errors."""
    assert not benchmark._has("authors", None) and benchmark._has("authors", tmp_path)
    pytest.importorskip("torch", reason="needs the extra bench")
    with pytest.raises(FileNotFoundError, match="authors: expected a checkout of rtqichen/residual-flows, got"):
        competitors.make_competitor(competitors.CASES["28x28"], "authors", authors=tmp_path)
    (tmp_path / "resflows").mkdir()
    with pytest.raises(ValueError, match="config: expected the tail of the authors' code"):
        competitors.make_competitor(TINY, "authors", authors=tmp_path)
