"""The study of compiled steps: its cases, its process, what it reads from a program, and the means of loops."""

import gzip
import json
import math
import subprocess
from dataclasses import asdict, replace

import jax
import pytest

import resflow_jax as rf
from experiments.studies import accelerators
from experiments.studies.accelerators import (
    AcceleratorsConfig,
    kind_of_loop,
    mean_terms,
    means_of,
    print_rows,
    roofline,
    row_of,
)
from experiments.studies.parts import accelerator_steps
from experiments.studies.parts.accelerator_steps import (
    StepCase,
    compile_step,
    environment,
    how_to_install,
    libtpu,
    settings_of,
)


@pytest.fixture(scope="module", autouse=True)
def with_lines_of_the_source():
    """Loops are told apart by them, and the settings of the tests leave them out."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


CASE = StepCase("digits_uniform", "train", "cpu", 1, "replicated", 4, tiny=True)
SAID = {
    "seconds": {"lower": 1.0, "compile": 2.0},
    "memory": {"temp": 1, "argument": 2, "output": 3, "generated_code": 4},
    "cost_analysis": {"flops": 5.0, "bytes accessed": 6.0},
}
LOOPS = """
FileNames
1 "/x/resflow_jax/functional/term_sums.py"
2 "/x/other.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=1 line=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %r = f32[] add(%p, %q)
}

%body (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %sum = f32[8,8]{1,0} all-reduce(%x), to_apply=%add
  ROOT %y = f32[8,8]{1,0} dot(%x, %sum), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%more (x.1: f32[8,8]) -> pred[] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  ROOT %yes = pred[] custom-call(%x.1), custom_call_target="xla_python_cpu_callback"
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} while(%a), condition=%more, body=%body, metadata={stack_frame_id=1}
  ROOT %c = f32[8,8]{1,0} while(%b), condition=%more, body=%body, metadata={stack_frame_id=2}
}
"""


@pytest.fixture(autouse=True)
def without_libtpu(monkeypatch, tmp_path):
    """As on a machine that has none. A process of the study compiles for the CPU, without most optimisations."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "nowhere.so"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_tiny(tmp_path, capsys):
    """A process compiles the step for the CPU, and says so; a second call reads what is there."""
    config = replace(accelerators.tiny(AcceleratorsConfig()), workdir=tmp_path)
    result = accelerators.run(config)
    assert json.loads((tmp_path / "accelerators.json").read_text()) == result
    (row,) = result["rows"]
    assert row["case"] == asdict(CASE) and row["roofline"] is None and row["host_callbacks"] == 0
    assert 0 < row["once"]["flops"] < row["with_turns"]["flops"] and 0 < row["once"]["hbm"] < row["with_turns"]["hbm"]
    assert row["means"]["series"]["turns"] == pytest.approx(2.64, abs=0.01) and row["other_loops"] == []
    assert set(row["means"]) == {"series", "power iteration"}
    assert row["once"]["flops"] <= row["cost_analysis"]["flops"], "which has the element-wise work too"
    assert "compiled for the CPU" in capsys.readouterr().out
    before = (tmp_path / "programs" / f"{CASE.name}.json").stat().st_mtime_ns
    assert accelerators.run(config) == result
    assert (tmp_path / "programs" / f"{CASE.name}.json").stat().st_mtime_ns == before
    assert "| digits_uniform (tiny) train, 4 images, 1 cpu |" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["evaluate", "sample"])
def test_other_programs(what, tmp_path):
    """They compile, and have the loops that one expects."""
    case = StepCase("digits_uniform", what, "cpu", 2, "replicated", 2, tiny=True)
    compile_step(case, tmp_path / case.name)
    row = row_of(case, tmp_path)
    assert set(row["means"]) == {"evaluate": {"series"}, "sample": {"solve"}}[what]
    assert row["other_loops"] == [] and row["with_turns"]["flops"] > row["once"]["flops"] > 0
    assert row["collectives"] == {"kinds": {}, "bytes": 0, "in_loops": 0}


def test_a_program_is_written_as_a_whole(tmp_path, monkeypatch):
    """Where it fails, the earlier one is still there."""

    class Stops:
        def __getattr__(self, name):
            return lambda: self if name == "compile" else {}

        def as_text(self):
            raise OSError("No space left on device")

    path = tmp_path / f"{CASE.name}.hlo.gz"
    path.write_bytes(b"an earlier one")
    monkeypatch.setattr(accelerator_steps, "lowered", lambda case: Stops())
    with pytest.raises(OSError, match="No space left"):
        compile_step(CASE, tmp_path / CASE.name)
    assert path.read_bytes() == b"an earlier one" and list(tmp_path.iterdir()) == [path]


def test_what_is_read(tmp_path, capsys):
    """Means of loops by their source, collectives in loops, callbacks; a failure has a line too."""
    case = StepCase("digits_uniform", "train", "v5e", 8, "full", 64)
    (tmp_path / f"{case.name}.json").write_text(json.dumps(SAID | {"case": asdict(case), "settings": {}}))
    with gzip.open(tmp_path / f"{case.name}.hlo.gz", "wt") as file:
        file.write(LOOPS)
    row = row_of(case, tmp_path)
    once, terms = 2 * 8**3, means_of(case)["series"]
    assert row["once"]["flops"] == 2 * once and row["with_turns"]["flops"] == pytest.approx((terms + 1) * once)
    assert row["means"] == {"series": {"turns": terms, "loops": 1}, "other": {"turns": 1.0, "loops": 1}}
    assert row["other_loops"] == ["/x/other.py"] and row["host_callbacks"] == 1
    assert row["collectives"] == {"kinds": {"all-reduce": 1}, "bytes": 256, "in_loops": 1}
    print_rows([row, {"case": asdict(case), "failed": "not compiled within 1 minutes"}])
    printed = capsys.readouterr().out
    assert "nothing here is a measurement" in printed and "8 v5e, full" in printed and "not compiled within" in printed


def test_compilations_that_fail(tmp_path, monkeypatch):
    """They leave a line, and are tried again: nothing of them is kept."""

    def late(command, timeout, **settings):
        raise subprocess.TimeoutExpired(command, timeout)

    def fails(command, **settings):
        return subprocess.CompletedProcess(command, 1, "", "a warning\nRESOURCE_EXHAUSTED: 20G of 16G\n")

    for run, said in ((late, "not compiled within 0.5 minutes"), (fails, "RESOURCE_EXHAUSTED: 20G of 16G")):
        monkeypatch.setattr(accelerators.subprocess, "run", run)
        assert accelerators.compiled(CASE, tmp_path, 0.5, again=False) == said
    there = tmp_path / f"{CASE.name}.json"
    there.write_text(json.dumps({"settings": settings_of(CASE)}))
    assert accelerators.compiled(CASE, tmp_path, 0.5, again=False) is None
    assert accelerators.compiled(CASE, tmp_path, 0.5, again=True) == said
    there.write_text(json.dumps({"settings": settings_of(CASE) | {"seed": 7}}))
    assert accelerators.compiled(CASE, tmp_path, 0.5, again=False) == said, "a program of other settings"


def test_roofline():
    """The larger of two times, and the rate of the operations at it."""
    found = roofline("v5e", flops=197e9, passes=2 * 197e9, hbm=819e6)
    assert found["products"] == pytest.approx(2e-3) and found["memory"] == pytest.approx(1e-3)
    assert found["flops_per_second"] == pytest.approx(98.5e12) and found["share_of_peak"] == pytest.approx(0.5)
    assert roofline("v5p", 0, 0, 0)["flops_per_second"] == 0 and roofline("cpu", 1, 1, 1) is None


@pytest.mark.parametrize(
    ("estimator", "terms"),
    [
        (rf.Roulette(), 0.99 / 0.4 + 0.01 / 0.06),  # the exact terms are a loop of their own
        (rf.Roulette(rf.Defensive(), exact_terms=8, subsample=1), 8 + 0.99 * 2 + 0.01 / 0.06),
        (rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0), 4),
        (rf.Roulette(rf.Poisson(2.0), exact_terms=2, subsample=4), 2),
        (rf.Roulette(rf.Geometric(0.5), 0, samples=2), 2 * 2 - 1 / 0.75),
        (rf.Truncated(7), 7),
    ],
)
def test_means_of_series(estimator, terms):
    """Exact terms and the mean of the longest drawn length, in closed form."""
    assert mean_terms(estimator) == pytest.approx(terms, rel=1e-6)


def test_kinds_of_loops():
    """By the files of the library, which must exist."""
    for end in accelerators._KINDS:
        assert (accelerator_steps.Path(rf.__file__).parent / end).exists()
    assert kind_of_loop("/a/resflow_jax/functional/iteration.py") == "solve" and kind_of_loop("") == "other"


def test_cases():
    """All combinations, but for layouts that make no difference; the batch is the config's, a chip."""
    words = (
        "--configs digits_uniform cifar10 --what train sample --kind v5e v5p --chips 1 8 --parameters replicated full"
    )
    config = accelerators.COMMAND.parse(words.split())
    cases = config.cases
    assert len(cases) == len(set(case.name for case in cases)) == 2 * 2 * (2 + 2 + 1)
    assert {case.batch_size for case in cases} == {64} and all(case.settings.model for case in cases)


def test_libtpu_is_asked_for():
    """By name, with the version that JAX needs."""
    assert libtpu() is None and environment("cpu")["JAX_PLATFORMS"] == "cpu"
    with pytest.raises(ImportError, match=r'expected the package libtpu .*pip install "jax\[tpu\]"'):
        environment("v5e")
    assert "libtpu==" in how_to_install()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": ()}, "what: expected one or more, got none"),
        ({"configs": ("rings",)}, "configs: expected some of digits, .*, got 'rings'"),
        ({"chips": (3,)}, "chips: expected some of 1, 4, 8, 16, 64, 256, got 3"),
        (
            {"parameters": ("full",)},
            "parameters: expected replicated too, or training on several chips, got full alone",
        ),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"minutes": math.nan}, "minutes: expected a positive number, got nan"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AcceleratorsConfig(**settings)
