"""Fuzz one target, guided by coverage: ``python fuzz/run.py header -max_total_time=300``.

What comes behind the target goes to libFuzzer. What it finds new goes to ``.fuzz/<target>``, a
crash to the directory that it runs in; ``tests/corpus/<target>`` is where it begins.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import atheris
from mutate import mutated

ROOT = Path(__file__).parent.parent

# Not the kernels: numba compiles what they are, not what instruments them.
with atheris.instrument_imports(include=[
    "streamq.batch", "streamq.checkpoint", "streamq.families", "streamq.formats", "streamq.hub",
    "streamq.planning", "streamq.recipe", "streamq.repairing", "streamq.stored", "streamq.tables",
    "streamq.trust", "streamq.verifying",
]):  # fmt: skip
    from targets import FOLDER, TARGETS


#: Bytes before the JSON of an input.
AHEAD = {"header": 1, "index": 0, "config": 1}  # a record ends within its JSON


def mutator_of(name: str) -> dict[str, object]:
    """Half of the mutations of JSON are those of its values."""
    if name not in AHEAD:
        return {}
    ahead, words = AHEAD[name], set[str]()

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        new = mutated(data[ahead:], rng, words) if rng.random() < 0.5 else None
        if new is None:
            return bytes(atheris.Mutate(data, max_size))
        return (data[:ahead] + new)[:max_size]

    return {"custom_mutator": mutator}


def main() -> None:
    """Run libFuzzer on the target that is named first, in a child: it ends without cleaning up."""
    if child := os.fork():
        try:
            _, status = os.waitpid(child, 0)
        finally:
            shutil.rmtree(FOLDER, ignore_errors=True)
        sys.exit(os.waitstatus_to_exitcode(status))
    name, *options = sys.argv[1:]
    found = ROOT / ".fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    corpus = ROOT / "tests" / "corpus" / name
    words = f"-dict={ROOT / 'fuzz' / 'words.dict'}"
    atheris.Setup(
        [sys.argv[0], str(found), str(corpus), words, *options], TARGETS[name], **mutator_of(name)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
