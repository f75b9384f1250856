"""Faults: what comes of kills, damaged storage, full disks and long runs.

    python -m experiments.studies.stress [--campaigns kills storage data files soak] [--kills 30] [--soak-steps 20000]
        [--seconds 3600] [--workdir DIR]

Each campaign has a file `experiments/studies/parts/stress_NAME.py`. Those of kills, storage and soak start small runs,
do something bad to them, and compare what is left with a run that was left alone. The others read random data, and
hostile files. Each writes to a folder DIR/NAME, where what an earlier call has left is deleted. The study prints a
table, writes it to stress.json with all settings, and ends with status 1 if something was lost or went unnoticed. By
default it takes a few minutes on 2 CPU cores. After --seconds no further fault is tried, which the table says; what was
begun goes on to its end, but for a run that is to be killed.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.tables import markdown_table, print_table
from experiments.runs.workdir import make_workdir, write_atomically
from experiments.studies.parts import stress_kills, stress_soak, stress_storage
from experiments.studies.parts.campaign import Campaign, Deadline, Row
from experiments.studies.parts.hostile_files import CASES
from experiments.studies.parts.stress_data import data_campaign
from experiments.studies.parts.stress_files import files_campaign
from resflow_jax.functional.checks import check_choice, check_count, check_positive
from resflow_jax.io.config_json import as_json

_SECONDS_OF_DATA = 20.0
_MARKER = ".stress"  # in the folder of a campaign


def _data(config: "StressConfig", directory: Path, deadline: Deadline) -> list[Row]:
    return data_campaign(directory, seconds=min(_SECONDS_OF_DATA, deadline.left), seed=config.seed)


def _files(config: "StressConfig", directory: Path, deadline: Deadline) -> list[Row]:
    rows = []
    for name in CASES:
        if deadline.is_over:
            return [*rows, Row(f"hostile files: {name}", 0, "not tried: the time was over", True)]
        found = files_campaign(directory / name, (name,))
        bad = next((f"{row.case}: {row.answer}" for row in found if not row.ok), None)
        answer = bad or "each is read or refused by an error with its name, within its time and memory"
        rows.append(Row(f"hostile files: {name}", len(found), answer, bad is None))
    return rows


CAMPAIGNS: dict[str, Campaign] = {
    "kills": stress_kills.CAMPAIGN,
    "storage": stress_storage.CAMPAIGN,
    "data": Campaign("random data are read as they were given, or refused", _data),
    "files": Campaign("hostile files are refused in bounded time and memory", _files),
    "soak": stress_soak.CAMPAIGN,
}


@dataclass(frozen=True)
class StressConfig:
    """The settings of the study.

    Attributes:
      campaigns: what is tried.
      kills: number of SIGKILLs.
      flips: number of flipped bits and removed files.
      soak_steps: number of steps of the long run.
      seconds: time after which nothing more is tried.
      seed: seed of the random choices.
      workdir: directory that stress.json and the folders of the campaigns are written to.
      small: whether to use the runs of `--tiny`.
    """

    campaigns: tuple[str, ...] = tuple(CAMPAIGNS)
    kills: int = 5
    flips: int = 50
    soak_steps: int = 1000
    seconds: float = 900.0
    seed: int = 0
    workdir: Path = Path("runs/stress")
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        for name in self.campaigns:
            check_choice("campaigns", name, tuple(CAMPAIGNS))
        check_count("kills", self.kills, 1)
        check_count("flips", self.flips, 1)
        check_count("soak_steps", self.soak_steps, 100)
        check_positive("seconds", self.seconds)
        check_count("seed", self.seed, 0)


def tiny(config: StressConfig) -> StressConfig:
    """A few flips of bits of a tiny run."""
    return replace(config, campaigns=("storage",), flips=4, workdir=Path("runs/stress_tiny"), small=True)


COMMAND = Command(
    "experiments.studies.stress",
    __doc__,
    StressConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("stress.json", *(f"{name}/" for name in config.campaigns))),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs; ends with status 1 if a row is not good."""
    COMMAND.call(_checked, arguments)


def _checked(config: StressConfig) -> None:
    if not all(row.is_good for found in run(config).values() for row in found):
        sys.exit(1)


def run(config: StressConfig) -> dict[str, list[Row]]:
    """Tries everything, prints and writes the table; returns its rows by campaign."""
    began, deadline, rows = time.monotonic(), Deadline(config.seconds), {}
    use_compilation_cache()
    check_folders(config)  # raises before anything is deleted
    for name in config.campaigns:
        directory = config.workdir / name
        shutil.rmtree(directory, ignore_errors=True)
        make_workdir(directory)
        (directory / _MARKER).touch()
        print(f"{name}: {CAMPAIGNS[name].summary}", flush=True)
        rows[name] = _tried(CAMPAIGNS[name], config, directory, deadline)
        print(markdown(rows[name]), flush=True)
    content: dict[str, Any] = {
        "settings": as_json(config),
        **{name: [row._asdict() for row in rows[name]] for name in rows},
    }
    write_atomically(config.workdir / "stress.json", json.dumps(content, indent=2) + "\n")
    bad = sum(not row.is_good for found in rows.values() for row in found)
    took = f"{time.monotonic() - began:.0f} s"
    print_table({"failed": f"{bad} of {sum(map(len, rows.values()))} rows", "time in all": took})
    return rows


def check_folders(config: StressConfig) -> None:
    """Raises FileExistsError if there is a folder of the name of a campaign that this study has not made."""
    for name in config.campaigns:
        directory = config.workdir / name
        if directory.exists() and not (directory / _MARKER).exists():
            raise FileExistsError(
                f"workdir: expected a new directory or that of this study, got {config.workdir} with another {name}; "
                f"name another --workdir, or remove {directory} if an earlier version wrote it"
            )


def _tried(campaign: Campaign, config: StressConfig, directory: Path, deadline: Deadline) -> list[Row]:
    """The rows of a campaign, or one that says that the time was over."""
    try:
        if not deadline.is_over:
            return campaign.run(config, directory, deadline)
    except TimeoutError as error:
        return [Row(campaign.summary, 0, str(error), False)]
    return [Row(campaign.summary, 0, "not tried: the time was over", True)]


def markdown(rows: list[Row]) -> str:
    """The table of these rows."""
    cells = [[what, str(n), found, "yes" if ok else "**no**"] for what, n, found, ok in rows]
    return markdown_table(["fault", "tries", "found", "good"], cells)


if __name__ == "__main__":
    main()
