"""Where the tests find files: those beside them, those of the repository, and those outside that may be absent."""

from pathlib import Path

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"
