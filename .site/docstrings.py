"""Makes reST of docstrings in Google's style whose formulas are plain ASCII.

What docstrings of this library write, and reST would take for markup:

  - formulas, as |x| or W_ or [*shape, 3]: *, | and a closing _ are escaped;
  - indented blocks, formulas, tables and code: they become literal blocks, but for doctests, which reST knows;
  - `names` in single backquotes: names of Python become references, which stay plain where there is no such name;
  - a colon in the text of "Returns:", which napoleon would take for the end of a type;

  - a letter with a full stop at the start of an item, which reST would take for the letter of an enumeration.

Sections themselves are left to sphinx.ext.napoleon.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator

SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields):$")
QUOTED = re.compile(r"``.+?``|`[^`\n]+(\n[^`\n]+)?`")  # it may go on in the next line
ITEM = re.compile(r"([-*+]|\d+\.|\(\d+\)) ")


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """For the event autodoc-process-docstring: changes lines in place."""
    lines[:] = convert(lines)


def signature(app, what, name, obj, options, arguments: str, returns: str) -> tuple[str, str] | None:
    """For the event autodoc-process-signature: that of __init__, where a metaclass hides it, as that of Flax does."""
    if what != "class" or type(obj) is type or "__init__" not in dir(obj):
        return None
    from sphinx.util.inspect import stringify_signature

    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    return stringify_signature(inspect.Signature(parameters), unqualified_typehints=True), returns


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring, without its indentation, as reST with sections of Google's style."""
    converted: list[str] = []
    for header, body in _sections(lines):
        if header is None:
            converted += _text(body)
        elif header.startswith("Example"):
            converted += ["", "Example:", *_indented(_example(_dedented(body)), 2), ""]
        elif header in ("Returns", "Yields"):
            text = _text(_dedented(body))
            converted += ["", f":{header.lower()}: {text[0] if text else ''}", *_indented(text[1:], 2), ""]
        else:
            converted += ["", f"{header}:", *_indented(_text(_dedented(body), is_list=True), 2), ""]
    return converted


def _sections(lines: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """(title, lines) of each section; None for text outside of them."""
    title, body = None, []
    for line in lines:
        if found := SECTION.match(line):
            yield title, body
            title, body = found[1], []
        elif title is not None and line.strip() and not line.startswith(" "):
            yield title, body
            title, body = None, [line]
        else:
            body.append(line)
    yield title, body


def _text(lines: list[str], is_list: bool = False) -> list[str]:
    """Escaped text; indented blocks after an empty line are literal. In a list indentation continues an item."""
    converted, text, rest = [], [], list(lines)
    while rest:
        line = rest[0]
        if line.lstrip().startswith(">>>"):
            size = next((n for n, line in enumerate(rest) if not line.strip()), len(rest))
            converted += [*escaped(text), *rest[:size]]
            text = []
            del rest[:size]
            continue
        after_blank = not text or not text[-1].strip()
        if is_list or not after_blank or not line.startswith(" ") or ITEM.match(line.strip()):
            text.append(line)
            del rest[0]
            continue
        size = next((n for n, line in enumerate(rest) if line.strip() and not line.startswith(" ")), len(rest))
        converted += [*escaped(text), *_literal(_dedented(rest[:size]))]
        text = []
        del rest[:size]
    return [*converted, *escaped(text)]


def _example(lines: list[str]) -> list[str]:
    """Doctests are what reST knows; other code becomes a block."""
    return lines if any(line.startswith(">>>") for line in lines) else _literal(lines)


def _literal(lines: list[str]) -> list[str]:
    code = "\n".join(lines)
    try:
        compile(code, "block", "exec")
        language = "python"
    except SyntaxError:
        language = "text"
    return [f".. code-block:: {language}", "", *_indented(lines, 4), ""]


def escaped(lines: list[str]) -> list[str]:
    """Text: names in backquotes marked, everything else without a meaning in reST."""
    text, parts, end = "\n".join(lines), [], 0
    for found in QUOTED.finditer(text):
        parts += [_plain(text[end : found.start()]), _marked(re.sub(r"\s*\n\s*", " ", found[0].strip("`")))]
        end = found.end()
        if text[end : end + 1].isalnum():
            parts.append("\\ ")
    return "".join([*parts, _plain(text[end:])]).split("\n")


def _plain(text: str) -> str:
    text = re.sub(r"([\\*|`])", r"\\\1", text)
    text = re.sub(r"(^\s*|: )(?=[A-Za-z]\.(\s|$))", r"\1\\", text, flags=re.MULTILINE)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def _marked(code: str) -> str:
    return f":py:obj:`{code}`" if re.fullmatch(r"[A-Za-z_][\w.]*", code) else f"``{code}``"


def _dedented(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).strip("\n").splitlines()


def _indented(lines: list[str], number: int) -> list[str]:
    return [" " * number + line if line.strip() else "" for line in lines]
