"""Hostile files of every format are refused, and the campaign sees it where one is not."""

from pathlib import Path

import pytest

from experiments.studies.parts.hostile_files import CASES
from experiments.studies.parts.stress_files import files_campaign, read


@pytest.mark.usefixtures("compiles_alike")
def test_hostile_files(tmp_path):
    """Each is a ValueError that names the file, in seconds and in little memory; nothing is written beside it."""
    rows = files_campaign(tmp_path / "files")
    assert not [row for row in rows if not row.ok]
    assert {row.case.partition(":")[0] for row in rows} == set(CASES)
    assert len(rows) > 400
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    written = {path.name for path in (tmp_path / "files").iterdir()}
    assert written == {"m.pth", "flow.safetensors", "x.npy", "x.npz", "images.idx", "images.idx.gz", "config.json"}


def refuses(message):
    def reader(path):
        raise ValueError(message.format(path))

    return reader


@pytest.mark.parametrize(
    ("reader", "ok"),
    [
        (refuses("{}: expected something else"), True),
        (refuses("expected something else"), False),
        (refuses("{}: \x1b[2J"), False),
        (refuses("{}: " + "x" * 5000), False),
        (lambda path: 3, False),
        (lambda path: [][0], False),
        (lambda path: bytearray(400_000_000) and refuses("{}")(path), False),
    ],
    ids=["right", "no name", "control character", "long", "read", "another error", "memory"],
)
def test_what_is_right(reader, ok, tmp_path):
    """The campaign tells a right answer from wrong ones."""
    path = tmp_path / "file"
    path.write_bytes(b"1")
    assert read("case", reader, path).ok is ok


def test_a_process_that_dies_is_a_fault(tmp_path):
    """An unknown format ends it."""
    (row,) = files_campaign(Path(tmp_path), ("unknown",))
    assert not row.ok and "KeyError" in row.answer
