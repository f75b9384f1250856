"""Lists the studies: `python -m experiments.studies`."""

from pathlib import Path

from experiments.runs.overview import print_room


def main() -> None:
    """Prints each study with the first line of its docstring; imports none of them."""
    print("Studies, as python -m experiments.studies.NAME, each with --help and --tiny:\n")
    print_room(Path(__file__).parent)


if __name__ == "__main__":
    main()
