"""The text of `--help`, a screen at a time: what a command does, its main settings, the names of groups of others.

`--help GROUP` lists the settings of one group, `--help all` everything. It is made from the text of tyro, which has a
box for each group; the boxes are taken apart and set anew, so that a setting takes a line where it fits.
"""

import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

WIDTH = 100  # at most
COLUMN = 26  # of the names of settings
SCREEN = 60  # lines up to which everything is shown at once
MAIN = ("positional arguments", "options")


class Box(NamedTuple):
    """The settings of one group.

    Attributes:
      text: what the group is.
      settings: a flag with what it takes, and what it is.
    """

    text: str
    settings: dict[str, str]


def width() -> int:
    """Columns of the terminal, up to `WIDTH`."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)


def page(usage: str, text: str, boxes: Mapping[str, Box], asked: str | None) -> str:
    """The text that is shown; `asked` names a group or is "all", None asks for the first page.

    Raises:
      ValueError: if there is no such group.
    """
    groups = [name for name in boxes if name not in MAIN]
    top = list(dict.fromkeys(name.partition(".")[0] for name in groups))
    if asked not in (None, "all", *groups, *top):
        names = ", ".join(dict.fromkeys(["all", *top, *groups]))
        raise ValueError(f"--help: expected one of {names}; got {asked!r}")
    if asked not in (None, "all"):
        return "\n".join(_shown(n, boxes[n]) for n in groups if n == asked or n.startswith(f"{asked}."))
    head = f"{usage}\n\n{text.strip()}\n\n"
    everything = head + "\n".join(_shown(name, box) for name, box in boxes.items())
    if asked == "all" or not groups or everything.count("\n") <= SCREEN:
        return everything
    lines = ["groups of further settings: --help GROUP lists one, --help all everything"]
    for name in top:
        inside = [other for other in groups if other == name or other.startswith(f"{name}.")]
        number = sum(len(boxes[other].settings) for other in inside)
        what = boxes[name].text.partition("\n")[0] if name in boxes else ""
        lines.append(table_line(name, f"{what} ({number} settings)".strip(), COLUMN))
    main = [_shown(name, boxes[name]) for name in MAIN if name in boxes]
    return head + "\n".join([*main, *lines]) + "\n"


def boxes_of(printed: str) -> tuple[str, dict[str, Box]]:
    """The usage, and the boxes by title, "model" for "model options", of the help text that tyro prints in ASCII."""
    lines = [line.rstrip() for line in printed.splitlines()]
    usage, boxes, paragraphs, settings, flag = "", {}, [], {}, None
    for n, line in enumerate(lines):
        is_title = re.fullmatch(r" \S.*", line) and n + 1 < len(lines) and re.fullmatch(r" -+", lines[n + 1])
        if line.startswith("usage: "):
            usage = line
        elif is_title:
            paragraphs, settings, flag = [], {}, None
            name = line.strip()
            boxes[name if name in MAIN else name.removesuffix(" options")] = (paragraphs, settings)
        elif not boxes or re.fullmatch(r" +-+", line):
            continue
        elif found := re.match(r"  (\S.*?)(?:  +(\S.*))?$", line) if _starts_setting(line) else None:
            flag = found[1]
            settings[flag] = found[2] or ""
        elif flag is not None:
            settings[flag] = f"{settings[flag]} {line.strip()}".strip()
        else:
            paragraphs.append(line[2:])
    for _, settings in boxes.values():
        for flag, text in settings.items():
            settings[flag] = text.removesuffix("(default: False)").rstrip()
    return usage, {name: Box("\n".join(text).strip(), settings) for name, (text, settings) in boxes.items()}


def _starts_setting(line: str) -> bool:
    return re.match(r"  (-h, )?--\w|  [A-Z][A-Z_-]*(  |$)", line) is not None


def _shown(name: str, box: Box) -> str:
    """The lines of a box."""
    first, newline, rest = box.text.partition("\n")
    lines = [textwrap.fill(f"{name}: {first}", width()) + newline + rest]
    for flag, text in box.settings.items():
        if len(flag) <= COLUMN:
            lines.append(table_line(flag, text, COLUMN))
        else:
            lines += [f"  {flag}", table_line("", text, COLUMN)]
    return "\n".join(lines) + "\n"


def table_line(name: str, text: str, column: int) -> str:
    """A name and what it is, the latter in a column of its own, wrapped."""
    indent = f"  {name:<{column}} "
    return textwrap.fill(
        text, width(), initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )
