"""The end of a run, where a file is odd."""

from experiments.runs.closing import along_training


def test_other_files_beside_the_pictures_of_training(tmp_path):
    """Are left out; pictures are in the order of their steps, at most as many of each kind."""
    (tmp_path / "training").mkdir()
    steps = (200, 3, 10000000, 40)
    drawn = [f"{step:07}_{kind}.png" for step in steps for kind in ("samples", "reconstructions")]
    for name in (*drawn, "._0000200_samples.png", "notes.png", "my_notes.png", "0000200_samples.png.7-a.tmp"):
        (tmp_path / "training" / name).touch()
    found = along_training(tmp_path, at_most=3)
    assert list(found) == [
        f"{kind} at step {step}" for kind in ("samples", "reconstructions") for step in (3, 200, 10000000)
    ]
    assert found["samples at step 200"] == tmp_path / "training" / "0000200_samples.png"
