"""Lists the commands: `python -m experiments`."""

import ast
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Prints each command and each study with the first line of its docstring; imports none of them."""
    print("Commands, each with --help:\n")
    _print_room("experiments", HERE)
    print("\nStudies, which measure the figures of the papers and of this library:\n")
    _print_room("experiments.studies", HERE / "studies")


def _print_room(package: str, directory: Path) -> None:
    commands = {path.stem: text for path in sorted(directory.glob("*.py")) if "__main__" in (text := path.read_text())}
    commands.pop("__main__", None)
    for name, text in commands.items():
        summary = ast.get_docstring(ast.parse(text)).partition("\n")[0]
        print(f"  python -m {package}.{name:<14} {summary}")


if __name__ == "__main__":
    main()
