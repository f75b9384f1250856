"""What all commands promise alike: their place, their help, their errors, the flags that they share."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

import experiments.__main__ as overview_of_all
import experiments.studies.__main__ as overview_of_studies
from experiments import classify, density, evaluate, sample, toy, variational
from experiments.configs import CONFIGS
from experiments.configs.tiny import tiny
from experiments.runs.choices import OfTheRun, choose, value_of
from experiments.runs.command import Command, NamedCommand, Output, errors_in_a_line, says_what_is_written
from experiments.runs.help import boxes_of
from experiments.runs.overview import commands_in
from experiments.runs.own_data import fitted_to_shape
from experiments.studies import ablation, bias
from resflow_jax import Defensive, Exact, Geometric, ImageFlowConfig, Poisson, Roulette, Scales, Truncated
from resflow_jax.functional.activations import ACTIVATIONS, ActivationName

ROOT = Path(overview_of_all.__file__).parent
PLACES = {"experiments": ROOT, "experiments.studies": ROOT / "studies"}
MODULES = [f"{package}.{name}" for package, place in PLACES.items() for name in commands_in(place)]


def command_of(module):
    return importlib.import_module(module).COMMAND


def helped(command, *arguments, capsys):
    """What a command prints before it exits with status 0."""
    with pytest.raises(SystemExit) as end:
        command.parse([*arguments])
    assert not end.value.code
    return capsys.readouterr().out


def refused(command, *arguments, capsys):
    """What a command says on standard error before it exits with status 2; as one line, without the box around it."""
    with pytest.raises(SystemExit) as end:
        command.call(lambda config: pytest.fail("was called"), arguments)
    assert end.value.code == 2
    return " ".join(re.sub("[│╭╮╰╯─]", " ", "".join(capsys.readouterr())).split())


def imports_of(path):
    """The modules of experiments that a file imports, with the names from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_command_is_imported_by_another():
    """Nor by the parts of runs; what commands share lies in rooms for parts."""
    commands = set(MODULES)
    for path in ROOT.rglob("*.py"):
        found = commands & set(imports_of(path))
        assert not found, f"{path.relative_to(ROOT)} imports {found}"
    for room in ("runs", "configs"):
        for path in (ROOT / room).rglob("*.py"):
            assert not [name for name in imports_of(path) if name.startswith("experiments.studies")], path


def test_every_file_in_the_two_places_is_a_command():
    """What is none lies in a room of its own, where no module pretends to be one, but for workers of commands."""
    for place in PLACES.values():
        files = {path.stem for path in place.glob("*.py")} - {"__init__", "__main__"}
        assert set(commands_in(place)) == files
    rooms = ("runs", "runs/tasks", "configs", "studies/parts", "studies/conditioning", "studies/comparison")
    assert [name for room in rooms for name in commands_in(ROOT / room)] == [
        *("accelerator_steps", "change_run", "competitors", "fuzzing", "stress_files", "wall_clock_run", "worker")
    ]
    for module in MODULES:
        command = command_of(module)
        assert command.module == module and command.text == importlib.import_module(module).__doc__


@pytest.mark.parametrize("main", [overview_of_all.main, overview_of_studies.main])
def test_overviews(main, capsys):
    """A line each, within 100 columns."""
    main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    names = [module for module in MODULES if main is overview_of_all.main or ".studies." in module]
    for module in names:
        assert re.search(rf"^  {module.rpartition('.')[2]} +\S", printed, re.MULTILINE), module


@pytest.mark.parametrize("module", MODULES)
def test_help(module, capsys, monkeypatch):
    """Every command has it, within 120 columns however wide the terminal; the first page has two screens at most."""
    monkeypatch.setenv("COLUMNS", "400")
    command = command_of(module)
    page = helped(command, "--help", capsys=capsys)
    assert page.startswith(f"usage: {command.program} ") and "--tiny" in page
    assert command.text.strip().splitlines()[0] in page
    name = [] if not isinstance(command, NamedCommand) else [command.first]
    everything = helped(command, "--help", "all", capsys=capsys)
    named = helped(command, *name, "--help", "all", capsys=capsys)
    assert everything.partition("\n\n")[2] == named.partition("\n\n")[2], "the first name is the default"
    assert "--debug" in everything and "--tiny" in everything
    for text in (page, everything):
        assert max(map(len, text.splitlines())) <= 120
    assert len(page.splitlines()) <= 100
    assert helped(command, *name, "--tiny", "-h", capsys=capsys).startswith(f"usage: {command.program}")


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_flag(module, capsys):
    """The message names the flag and the program."""
    command = command_of(module)
    needed = ["there"] if any(value is tyro.MISSING for value in vars(_default(command)).values()) else []
    needed += ["--workdir", "out"] if module == "experiments.import_torch" else []
    said = refused(command, *needed, "--no-such-flag", "3", capsys=capsys)
    assert "--no-such-flag" in said and f"{command.program} --help" in said


def test_every_setting_has_a_text(capsys):
    """Those of all configs and commands, with every kind of estimator and of law."""
    pages = [
        [command_of(module), "--help", "all"] for module in MODULES if not isinstance(command_of(module), NamedCommand)
    ]
    pages += [[ablation.COMMAND, "mnist", "--help", "all"], [toy.COMMAND, "rings", "--help", "all"]]
    pages += [[density.COMMAND, name, "--help", "all"] for name in ("digits", "vectors", "images")]
    pages += [[classify.COMMAND, "digits", "--help", "all"]]
    for choice in (
        "exact",
        "truncated",
        "roulette --estimator.length poisson",
        "roulette --estimator.length geometric",
    ):
        pages.append([density.COMMAND, "digits", "--estimator", *choice.split(), "--help", "estimator"])
    for command, *arguments in pages:
        for line in _settings(helped(command, *arguments, capsys=capsys)):
            flag, text = line
            assert re.sub(r"\((default|required).*?\)$", "", text).strip(), f"{command.program}: {flag} has no text"


def _settings(page):
    """Flag and text of every setting on a page, as `help` sets them."""
    found = []
    for line in page.splitlines():
        if match := re.match(r"  (--\S+)(.*)", line):
            found.append((match[1], match[2][24 - len(match[1]) :].strip() if len(match[0]) > 29 else ""))
        elif line.startswith(" " * 29) and found:
            found[-1] = found[-1][0], f"{found[-1][1]} {line.strip()}".strip()
    return found


def test_groups_of_settings(capsys):
    """A group shows its own settings and those of the groups inside; a wrong name is refused with the right ones."""
    page = helped(density.COMMAND, "digits", "--help", "model", capsys=capsys)
    flags = {flag for flag, _ in _settings(page)}
    assert {"--model.activation", "--model.norms.orders", "--model.tail.blocks"} <= flags
    assert all(flag.startswith("--model.") for flag in flags)
    first = helped(density.COMMAND, "digits", "--help", capsys=capsys)
    assert "--model." not in first and re.search(r"^  model +the flow\. \(\d+ settings\)$", first, re.MULTILINE)
    assert "expected one of all, estimator, " in refused(density.COMMAND, "digits", "--help", "moodel", capsys=capsys)


def test_boxes():
    """The text that tyro prints, taken apart: usage, groups, settings in one line or two."""
    usage, boxes = boxes_of(
        "usage: x [-h]\n\n \n options       \n -----------\n  -h, --help  show\n              this\n"
        "  --a INT     an a (default: 1)\n  --b {c,\n  d}\n        a b (default: c)\n"
        " \n m.n options\n ------\n  the n.\n  -----\n  --m.n.flag\n        yes (default: False)\n"
    )
    assert usage == "usage: x [-h]" and list(boxes) == ["options", "m.n"]
    assert boxes["options"].settings == {
        "-h, --help": "show this",
        "--a INT": "an a (default: 1)",
        "--b {c, d}": "a b (default: c)",
    }
    assert boxes["m.n"] == ("the n.", {"--m.n.flag": "yes"})


def test_choices_are_refused_by_name(capsys):
    """Activation, schedule and estimator are no free strings; the literal is what the library has."""
    for flag in ("--model.activation", "--optimizer.schedule", "--estimator", "--model.norms.ties"):
        said = refused(density.COMMAND, "digits", flag, "none-such", capsys=capsys)
        assert flag in said and "none-such" in said and f"{density.COMMAND.program} digits" in said
    assert tuple(ACTIVATIONS) == ActivationName.__args__


def test_the_estimator_is_chosen_by_a_flag():
    """In every command that has one, with its settings; where the kind stays, so do the settings of the config."""
    digits = density.COMMAND.parse(["digits", "--estimator", "exact", "--estimator.chunk-size", "3"])
    assert digits.estimator == Exact(3) and digits.evaluation == CONFIGS["digits"].evaluation
    mnist = density.COMMAND.parse(["mnist", "--estimator", "roulette", "--evaluation.estimator=truncated"])
    assert mnist.estimator == CONFIGS["mnist"].estimator and mnist.evaluation.estimator == Truncated()
    law = density.COMMAND.parse(
        ["rings", "--estimator", "roulette", "--estimator.length", "poisson", "--estimator.length.rate", "3"]
    )
    assert law.estimator == Roulette(Poisson(3.0))
    assert toy.COMMAND.parse(["--estimator", "roulette"]) == toy.COMMAND.parse(
        ["8gaussians", "--estimator", "roulette"]
    )
    assert variational.COMMAND.parse(["--estimator", "truncated"]).estimator == Truncated()
    assert bias.COMMAND.parse(["--roulette.length", "geometric"]).roulette == Roulette(Geometric())
    assert evaluate.COMMAND.parse(["run"]).estimator == OfTheRun()
    judged = evaluate.COMMAND.parse(["run", "--estimator", "exact", "--examples", "5"])
    assert judged.estimator == Exact() and judged.run_dir == Path("run")
    two = command_of("experiments.conditional").parse(["--two-moons.estimator", "roulette"])
    assert two.two_moons.estimator == Roulette() == two.gaussian_linear.estimator


def test_choices_that_a_config_refuses(capsys):
    """Fitted lengths need a roulette."""
    config = CONFIGS["digits"]
    assert choose(config, [])[0] == config
    assert [choice.flag for choice in choose(config, [])[1]][:2] == ["estimator", "estimator.length"]
    said = refused(density.COMMAND, "--fit-lengths", "--estimator", "exact", capsys=capsys)
    assert "fit_lengths: expected a Roulette as estimator, got Exact" in said
    assert value_of("a.b-c", ["--a.b_c=1", "--a.b-c", "2", "x"]) == "2" and value_of("a", ["--a"]) is None


@pytest.mark.parametrize(
    ("command", "arguments", "instead"),
    [
        (toy.COMMAND, ["--data", "rings"], "python -m experiments.toy rings"),
        (ablation.COMMAND, ["--data=mnist"], "python -m experiments.studies.ablation mnist"),
        (ablation.COMMAND, ["--data-dir", "there"], "--data.dir DIR"),
        (sample.COMMAND, ["run", "--data", "there"], "--data.path PATH"),
        (evaluate.COMMAND, ["run", "--exact"], "--estimator exact"),
    ],
)
def test_flags_of_before(command, arguments, instead, capsys):
    """Are refused by the name of what there is now."""
    said = refused(command, *arguments, capsys=capsys)
    flag = next(argument for argument in arguments if argument.startswith("--")).partition("=")[0]
    assert f"{flag}: there is no such setting any more" in said
    assert instead in said


def test_names(capsys):
    """The first argument is a name, or else the default is meant; a wrong one is refused by its program."""
    assert toy.COMMAND.parse(["rings", "--steps", "5"]).data == "rings" and toy.COMMAND.parse([]).data == "8gaussians"
    assert ablation.COMMAND.parse(["mnist", "--data.dir", "there"]).data_dir == "there"
    assert (
        density.COMMAND.parse(["--tiny", "moons"])
        == density.COMMAND.parse(["moons", "--tiny"])
        == tiny(CONFIGS["moons"])
    )
    said = refused(toy.COMMAND, "digits", capsys=capsys)
    assert said.startswith("python -m experiments.toy: error: NAME: expected one of 8gaussians, ")
    assert "got 'digits' see python -m experiments.toy --help" in said


@pytest.mark.parametrize("module", MODULES)
def test_tiny(module):
    """Every command has it, on embedded data, under a directory of its own; further flags still count."""
    command = command_of(module)
    config, usual = command.parse(["--tiny"]), None
    if not any(value is tyro.MISSING for value in vars(_default(command)).values()):
        usual = command.parse([])
        assert config != usual and config.workdir != usual.workdir
    seeded = "--seed" if hasattr(config, "seed") else None
    if seeded:
        assert command.parse(["--tiny", seeded, "7"]).seed == 7


def _default(command):
    return command.default[command.first] if isinstance(command, NamedCommand) else command.default


def test_images_of_your_own(tmp_path, capsys):
    """Their shape is that of the flow, with as many scales as it allows; a shape that is given stays."""
    for name, size in (("even", (16, 8)), ("odd", (15, 9))):
        (tmp_path / name).mkdir()
        for n in range(3):
            Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / name / f"{n}.png")
    np.save(tmp_path / "grey.npy", np.zeros((4, 12, 12), np.uint8))
    found = {
        name: density.COMMAND.parse(["images", "--data.path", str(tmp_path / name)])
        for name in ("even", "odd", "grey.npy")
    }
    assert {name: (config.model.shape, len(config.model.blocks)) for name, config in found.items()} == {
        "even": ((16, 8, 3), 3),
        "odd": ((15, 9, 3), 1),
        "grey.npy": ((12, 12, 1), 3),
    }
    assert found["even"].data.path == tmp_path / "even" and found["even"].workdir == Path("runs/images")
    given = density.COMMAND.parse(["images", "--data.path", str(tmp_path / "even"), "--model.shape", "4", "4", "1"])
    assert given.model.shape == (4, 4, 1)
    small = density.COMMAND.parse(["images", "--tiny", "--data.path", str(tmp_path / "odd")])
    assert small.model.shape == (15, 9, 3) and small.model.hidden_channels == 8
    model = ImageFlowConfig((8, 8, 1), scales=Scales(squeeze_first=True))
    assert len(fitted_to_shape(model, (12, 8, 1)).blocks) == 2
    model = ImageFlowConfig((8, 8, 1), blocks=(1, 1, 1), hidden_channels=(4, 6, 8))
    assert fitted_to_shape(model, (6, 6, 1)).hidden_channels == (4, 6)
    with pytest.raises(SystemExit) as end:
        density.COMMAND.call(print, ["images", "--data.path", str(tmp_path / "nowhere")])
    assert (
        end.value.code == 1 and "path: expected a folder or a file of images, found nothing" in capsys.readouterr().err
    )


def test_vectors_of_your_own(tmp_path, capsys):
    """Their dimension is that of the flow, which has their means and deviations; a shift that is given stays."""
    (tmp_path / "table.csv").write_text("a,b,c\n" + "\n".join(f"{n},{n + 1},{n % 7 - 1e6}" for n in range(40)))
    config = density.COMMAND.parse(["vectors", "--data.path", str(tmp_path / "table.csv")])
    assert config.model.dim == 3 and config.data.path == tmp_path / "table.csv"
    assert config.data.shift[:2] == (0, 0) and abs(config.data.shift[2] + 1e6 - 3) < 1
    assert len(config.model.data.mean) == len(config.model.data.std) == 3
    given = density.COMMAND.parse(["vectors", "--data.path", str(tmp_path / "table.csv"), "--data.shift", *"123"])
    assert given.data.shift == (1, 2, 3)
    assert density.COMMAND.parse(["vectors"]).model.dim == 30
    (tmp_path / "bad.csv").write_text("1,2\n3\n")
    said = refused(density.COMMAND, "vectors", "--data.path", str(tmp_path / "bad.csv"), capsys=capsys)
    assert "path: expected 2 numbers in line 2" in said


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("steps: expected"), 1), (FileNotFoundError("none"), 1), (ImportError("needs the extra"), 1)],
)
def test_errors_in_a_line(error, status, capsys):
    """Without a traceback, with the program's name; with --debug as they are."""

    def fail(config):
        raise error

    command = Command("experiments.x", "text", bias.BiasConfig(), bias.tiny)
    fail.__code__ = fail.__code__.replace(co_filename=str(ROOT / "x.py"))
    with pytest.raises(SystemExit) as end:
        command.call(fail, [])
    assert end.value.code == status
    assert capsys.readouterr().err == f"python -m experiments.x: error: {error}\n(--debug shows where)\n"
    with pytest.raises(type(error)):
        command.call(fail, ["--debug"])


def test_errors_that_nobody_expected(capsys):
    """Those of other code than ours keep their traceback; an interrupt has none."""
    with pytest.raises(ValueError, match="literal"), errors_in_a_line("x"):
        int("a")  # raised in this file, which is no part of the commands
    with pytest.raises(SystemExit) as end, errors_in_a_line("x"):
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyboardInterrupt), errors_in_a_line("x", debug=True):
        raise KeyboardInterrupt


def test_what_is_written_is_said(tmp_path, capsys):
    """All that may be at the start, and at the end what is there."""
    with says_what_is_written(Output(tmp_path, ("a.json", "pictures/*.png", "never.txt"))):
        assert capsys.readouterr().out == f"will write {tmp_path}/: a.json, pictures/*.png, never.txt\n"
        (tmp_path / "a.json").write_text("{}")
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "0.png").write_text("")
    assert capsys.readouterr().out == f"written: {tmp_path}/: a.json, pictures/*.png\n"


def test_what_every_command_writes():
    """Each says so, but for those whose run does."""
    silent = {f"experiments.{name}" for name in ("density", "classify", "toy", "resume")}
    for module in MODULES:
        command = command_of(module)
        assert (command.output is None) == (module in silent)
        if command.output is not None:
            output = command.output(command.parse(["--tiny"]))
            assert output.names and output.directory.parts[0] == "runs"


def test_lengths_of_the_default_are_kept():
    """A flag that names the kind that is there changes nothing."""
    config = density.COMMAND.parse(["digits", "--estimator", "roulette", "--estimator.length", "defensive"])
    assert config == CONFIGS["digits"] and config.estimator.length == Defensive(0.4)
