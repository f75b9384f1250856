"""Runs the tests of `tests/float32` in a process of their own: float32, XLA's own optimisations, two CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("float32")


def test_float32_with_the_usual_optimisations():
    """Nothing of this process's settings reaches them: neither its conftest.py nor its variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTEST_"))}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--confcutdir={FOLDER}", str(FOLDER)],
        cwd=FOLDER.parents[1],
        env=kept | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, f"{finished.stdout[-10000:]}\n{finished.stderr[-2000:]}"
    assert "passed" in finished.stdout and "skipped" not in finished.stdout
