"""Fuzz one target, guided by coverage: ``python fuzz/run.py header -max_total_time=300``.

What comes behind the target goes to libFuzzer. What it finds new goes to ``.fuzz/<target>``, a
crash to the directory that it runs in; ``tests/corpus/<target>`` is where it begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parent.parent

# Not the kernels: numba compiles what they are, not what instruments them.
with atheris.instrument_imports(include=[
    "streamq.checkpoint", "streamq.families", "streamq.formats", "streamq.planning",
    "streamq.recipe", "streamq.repairing", "streamq.stored", "streamq.verifying",
]):  # fmt: skip
    from targets import TARGETS


def main() -> None:
    """Run libFuzzer on the target that is named first."""
    name, *options = sys.argv[1:]
    found = ROOT / ".fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    corpus = ROOT / "tests" / "corpus" / name
    words = f"-dict={ROOT / 'fuzz' / 'words.dict'}"
    atheris.Setup([sys.argv[0], str(found), str(corpus), words, *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
