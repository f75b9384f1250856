"""What every command does with its command line: settings, help, `--tiny`, errors in one line, what is written where.

A command is a function of a config, a frozen dataclass whose fields are the settings. Errors of input end it with a
line on standard error and exit status 2 (settings) or 1 (anything else, as a file that is not there); `--debug` shows
where they were raised. Errors that are raised elsewhere than in this code keep their traceback.
"""

import contextlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import tyro

from experiments.runs import help
from experiments.runs.choices import choose, choose_model
from experiments.runs.garbage import fewer_full_collections
from experiments.runs.names import printable

_LINES = "\n\t"  # what the text of an error may have beside what is printable
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / package) + os.sep for package in ("experiments", "resflow_jax"))
_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)


class Output(NamedTuple):
    """What a command writes.

    Attributes:
      directory: where.
      names: files and directories in it; patterns as of `Path.glob`.
    """

    directory: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
      module: what `python -m` is given.
      text: its docstring.
      default: the config without any flag, `tyro.MISSING` in the place of what must be given.
      tiny: from a config to that of `--tiny`.
      output: from a config to what is written; None if the command says so itself.
      renamed: flags that are no longer there, with what to write in their place.
    """

    module: str
    text: str
    default: Any
    tiny: Callable[[Any], Any]
    output: Callable[[Any], Output] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """As users call it."""
        return f"python -m {self.module}"

    def call(self, function: Callable[[Any], Any], arguments: Sequence[str] | None = None) -> None:
        """Parses the command line, by default the program's own, and calls the function with the config."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        with errors_in_a_line(self.program, debug="--debug" in arguments), fewer_full_collections():
            config = self.parse(arguments)
            with says_what_is_written(self.output(config)) if self.output else contextlib.nullcontext():
                function(config)

    def parse(self, arguments: Sequence[str]) -> Any:
        """The config of a command line; prints the help and exits where that is asked for.

        Raises:
          SystemExit: with status 2, for a command line that cannot be understood.
        """
        return parse(self.program, self.text, self.default, self.tiny, arguments, self.renamed)


@dataclass(frozen=True)
class NamedCommand(Command):
    """A command line whose first argument, NAME, chooses one of several configs.

    Attributes:
      default: the configs by name.
      first: the name that is taken where none is given.
      summaries: what each is, in a line.
      infer: from a config and the arguments to a config with what follows from the data that the arguments name.
    """

    first: str = field(kw_only=True)
    summaries: Mapping[str, str] = field(kw_only=True)
    infer: Callable[[Any, Sequence[str]], Any] = field(kw_only=True, default=lambda config, arguments: config)

    def parse(self, arguments: Sequence[str]) -> Any:
        switches = [argument for argument in arguments if argument in ("--tiny", "--debug")]
        arguments = [argument for argument in arguments if argument not in switches]
        name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
        if arguments in (["-h"], ["--help"]) and name is None:
            print(self.overview())
            sys.exit(0)
        if name is not None and name not in self.default:
            near = get_close_matches(name, self.default)
            meant = f"; perhaps {' or '.join(near)}" if near else ""
            _refuse(self.program, f"NAME: expected one of {', '.join(self.default)}; got {name!r}{meant}")
        chosen = name or self.first
        program = self.program if name is None else f"{self.program} {name}"
        return parse(
            program,
            f"{self.summaries[chosen]}\n\n`{self.program} --help` describes the command and lists the names.",
            self.default[chosen],
            self.tiny,
            arguments + switches,
            self.renamed,
            self.infer,
        )

    def overview(self) -> str:
        """The help before a name is chosen: what the command does, and the names."""
        lines = [f"usage: {self.program} [NAME] [--help [GROUP]] [--tiny] [settings]\n", self.text.strip(), ""]
        lines += [f"NAME, by default {self.first}; `{self.program} NAME --help` lists its settings:"]
        column = max(map(len, self.default))
        groups: dict[str, list[str]] = {}
        for name in self.default:
            groups.setdefault(self.summaries[name], []).append(name)
        for summary, names in groups.items():
            if len(names) == 1:
                lines.append(help.table_line(names[0], summary, column))
            else:
                lines.append(textwrap.fill(f"  {', '.join(names)}: {summary}", help.width(), subsequent_indent="    "))
        return "\n".join(lines)


def parse(
    program: str,
    text: str,
    default: Any,
    tiny: Callable[[Any], Any],
    arguments: Sequence[str],
    renamed: Mapping[str, str],
    infer: Callable[[Any, Sequence[str]], Any] | None = None,
) -> Any:
    """As `Command.parse`, with what a name has chosen."""
    arguments, asked = _without_help([argument for argument in arguments if argument != "--debug"])
    is_tiny = "--tiny" in arguments
    arguments = [argument for argument in arguments if argument != "--tiny"]
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in renamed:
            _refuse(program, f"{flag}: there is no such setting any more; write {renamed[flag]}")
    try:
        config = choose_model(default, arguments)
        config = tiny(config) if is_tiny else config
        config = config if infer is None else infer(config, arguments)
        config, choices = choose(config, arguments)
    except ValueError as error:
        _refuse(program, str(error))
    fields: list[tuple[str, Any, Any]] = [("config", Annotated[type(config), tyro.conf.arg(name="")], config)]
    for n, choice in enumerate(choices):
        kind = Annotated[Literal[tuple(choice.kinds)], tyro.conf.arg(name=choice.flag, help=choice.text)]
        fields.append((f"choice_{n}", kind, choice.chosen))
    common = {"tiny": "a run of seconds to a minute with the same code", "debug": "show where an error was raised"}
    fields += [(name, Annotated[bool, tyro.conf.arg(help=help_)], False) for name, help_ in common.items()]
    call = make_dataclass("Settings", fields, frozen=True)
    call.__doc__ = ""
    if asked:
        groups = {choice.flag: choice.group for choice in choices if choice.group is not None}
        print(_help(program, text, call, asked[0], own=len(fields), groups=groups), end="")
        sys.exit(0)
    said = io.StringIO()
    try:
        with _columns(help.width()), contextlib.redirect_stderr(said):
            return tyro.cli(call, args=arguments, prog=program, description=text, config=_MARKERS).config
    except ValueError as error:
        _refuse(program, str(error))
    except SystemExit:
        print(said.getvalue().replace("'config.", "'").rstrip(), file=sys.stderr)
        raise


def _help(program: str, text: str, call: type, group: str | None, own: int, groups: Mapping[str, str]) -> str:
    """The text of `--help`; the settings that are no fields of the config, `own` in number with `--help`, come last.

    `groups` has first lines for the texts of groups.
    """
    printed = io.StringIO()
    with _columns(help.width()), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(call, args=["--help"], prog=program, description="", config=_MARKERS)
    usage, boxes = help.boxes_of(printed.getvalue())
    main = list(boxes["options"].settings.items())
    boxes["options"] = boxes["options"]._replace(settings=dict(main[own:] + main[:own]))
    for name, line in groups.items():
        boxes[name] = boxes[name]._replace(text=f"{line}\n{boxes[name].text}")
    try:
        return help.page(usage.replace("[-h]", "[--help [GROUP]]", 1), text, boxes, group)
    except ValueError as error:
        _refuse(program, str(error))


def _without_help(arguments: list[str]) -> tuple[list[str], list[str | None]]:
    """The arguments without `--help` and the group after it, and [group], [None] for the first page, or []."""
    for n, argument in enumerate(arguments):
        if argument in ("-h", "--help"):
            group = arguments[n + 1] if n + 1 < len(arguments) and not arguments[n + 1].startswith("-") else None
            return arguments[:n] + arguments[n + 1 + (group is not None) :], [group]
    return arguments, []


@contextlib.contextmanager
def _columns(number: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def says_what_is_written(output: Output) -> Iterator[None]:
    """Prints what will be written, and at the end what has been."""
    say_what_will_be_written(output)
    yield
    written = [name for name in output.names if any(output.directory.glob(name))]
    if written:
        print(f"written: {_listed(output.directory, written)}", flush=True)


def say_what_will_be_written(output: Output) -> None:
    """The first line of a command."""
    print(f"will write {_listed(output.directory, output.names)}", flush=True)


def _listed(directory: Path, names: Sequence[str]) -> str:
    text = f"{printable(str(directory))}/: {', '.join(names)}"
    return textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False)


@contextlib.contextmanager
def errors_in_a_line(program: str, *, debug: bool = False) -> Iterator[None]:
    """Ends the program with a line on standard error for an error that the input is to blame for."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if debug or not _is_of_input(error):
            raise
        print(f"{program}: error: {printable(str(error), keep=_LINES)}\n(--debug shows where)", file=sys.stderr)
        sys.exit(1)


def _is_of_input(error: BaseException) -> bool:
    """Whether this code has raised the error itself, or the operating system has."""
    if isinstance(error, OSError):
        return True
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OURS)


def _refuse(program: str, message: str) -> NoReturn:
    print(f"{program}: error: {printable(message, keep=_LINES)}\nsee {program} --help", file=sys.stderr)
    sys.exit(2)
