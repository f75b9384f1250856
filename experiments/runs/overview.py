"""Lists the commands of a directory, one line each, without importing them."""

import ast
import re
from pathlib import Path


def commands_in(directory: Path) -> dict[str, str]:
    """The modules of a directory that `python -m` can run, except `__main__`, with the first line of each docstring."""
    texts = {path.stem: path.read_text() for path in sorted(directory.glob("*.py")) if path.stem != "__main__"}
    return {
        name: ast.get_docstring(ast.parse(text)).partition("\n")[0]
        for name, text in texts.items()
        if re.search("^if __name__ == ", text, re.MULTILINE)
    }


def print_room(directory: Path) -> None:
    """Prints a line for each command of a directory."""
    for name, summary in commands_in(directory).items():
        print(f"  {name:<14} {summary}")
