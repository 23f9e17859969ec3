"""Kill conversions at random moments, again and again, until they get through.

    python tests/kills.py COUNT [FOLDER] [SEED]

Each is a process of its own, forked from this one, which has compiled the kernels. After each
kill DST is absent or complete and verifies; in the end it is byte for byte what an undisturbed
run writes. Formats take turns, runs with and without sync too.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from small_units import OF_FORMATS, contents, small_units, write_small

import streamq
from streamq.converting import Settings


def convert(source: Path, out: Path, fmt: str, scheme: str, sync: bool) -> None:
    """A conversion in this process."""
    streamq.convert(source, out, scheme, format=fmt, settings=Settings(workers=2, sync=sync))


def forked(*arguments: object) -> int:
    """A conversion in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            convert(*arguments)  # type: ignore[arg-type]
            code = 0
        finally:
            os._exit(code)
    return child


def main() -> None:
    """See above; fails with a sentence."""
    count = int(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    small_units()
    sources = {fmt: write_small(folder / f"in-{fmt}", fmt) for fmt, _ in OF_FORMATS}
    kills = finished = resumed = 0
    wanted, seconds = {}, {}
    for fmt, scheme in OF_FORMATS:
        convert(sources[fmt], folder / fmt, fmt, scheme, False)
        wanted[fmt] = contents(folder / fmt)
        for sync in (False, True):
            out = folder / f"{fmt}-{sync}"
            began = time.perf_counter()
            os.waitpid(forked(sources[fmt], out, fmt, scheme, sync), 0)
            seconds[fmt, sync] = time.perf_counter() - began
            assert contents(out) == wanted[fmt], fmt
    while kills < count:
        fmt, scheme = OF_FORMATS[finished % len(OF_FORMATS)]
        out = folder / f"out{finished}"
        while not out.exists():
            sync = rng.random() < 0.3
            child = forked(sources[fmt], out, fmt, scheme, sync)
            if kills < count and rng.random() < 0.9:
                time.sleep(rng.uniform(0, 0.9) * seconds[fmt, sync])
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                journal = out.with_name(f"{out.name}.partial") / "journal"
                resumed += not out.exists() and journal.exists() and journal.stat().st_size > 0
            elif status:
                sys.exit(f"{fmt}: a run after {kills} kills failed; {out}")
        report = streamq.verify(out)
        if contents(out) != wanted[fmt] or report.failures:
            sys.exit(f"{fmt}: after {kills} kills {out} is not what it should be")
        shutil.rmtree(out)
        finished += 1
    print(
        f"{kills} kills, {resumed} of them with work in the journal; {finished} conversions of "
        f"{len(OF_FORMATS)} formats got through, all byte for byte as undisturbed ones"
    )


if __name__ == "__main__":
    main()
