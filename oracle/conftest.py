"""Paths and warnings of the tests that run other projects' code."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # helpers.py


def pytest_configure(config):
    """Warnings are errors in this project (pyproject.toml); those of others are theirs."""
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::streamq")
