"""Lists the commands: `python -m experiments`."""

from pathlib import Path

from experiments.runs.overview import print_room

HERE = Path(__file__).parent


def main() -> None:
    """Prints each command and each study with the first line of its docstring; imports none of them."""
    print("Commands, as python -m experiments.NAME, each with --help and --tiny:\n")
    print_room(HERE)
    print("\nStudies, as python -m experiments.studies.NAME, which measure published figures and our own:\n")
    print_room(HERE / "studies")


if __name__ == "__main__":
    main()
