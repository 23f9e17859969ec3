"""Whole conversions side by side: alternating runs, medians, whole processes.

    python bench/run.py                       S, M, MoE, F3D in NVFP4A16, FP8_BLOCK; K against L
    python bench/run.py -c M -s w4a16 -r 9    one checkpoint, one scheme, nine rounds
    python bench/run.py --checksums -c M      what those of streamq.json cost
    python bench/run.py --kernels             GB/s of every kernel beside memcpy
    python bench/run.py --peers -r 3          other tools, where `make peers` installed them
    python bench/run.py --peers mlx-lm        one of them

Every round runs each contestant once, in turn. The checkpoint is in the page cache, and
before each run the disk is idle and an untimed copy was made and removed: on a virtual
machine the first to write pays for the memory that the host hands out (4.4 against 1.6 s
for one and the same ``cp``). Written to ``.bench/*.csv`` as well.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import CHECKPOINTS
from peers import PEERS
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
WORK = HERE.parent / ".bench"
STREAMQ = str(Path(sys.executable).with_name("streamq"))


class Contestant(NamedTuple):
    """A command with ``{src}`` and ``{dst}``; ``base`` names whom it is compared with."""

    name: str
    command: list[str]
    base: str


class Run(NamedTuple):
    """One process: wall time in seconds, peak resident size in MB."""

    seconds: float
    memory: float


def _ours(scheme: str) -> list[str]:
    return [STREAMQ, "convert", "{src}", "{dst}", "--scheme", scheme, "--quiet"]


def contestants(scheme: str) -> list[Contestant]:
    """Ours, ``cp`` and the run without kernels, with and without a sync of the files."""
    ours = _ours(scheme)
    io = [sys.executable, str(HERE / "io_only.py"), *ours[1:]]
    return [
        Contestant("cp -r", ["cp", "-r", "{src}", "{dst}"], ""),
        Contestant("cp -r, sync", ["sh", "-c", "cp -r {src} {dst} && sync {dst}/*"], ""),
        Contestant("streamq --no-sync", [*ours, "--no-sync"], "cp -r"),
        Contestant("streamq", ours, "cp -r, sync"),
        Contestant("I/O only --no-sync", [*io, "--no-sync"], "streamq --no-sync"),
        Contestant("I/O only", io, "streamq"),
    ]


def summed(scheme: str) -> list[Contestant]:
    """Ours with checksums and without, with and without a sync of the files."""
    ours = _ours(scheme)
    bare = [sys.executable, str(HERE / "no_sums.py"), *ours[1:]]
    return [
        Contestant("no checksums --no-sync", [*bare, "--no-sync"], ""),
        Contestant("no checksums", bare, ""),
        Contestant("streamq --no-sync", [*ours, "--no-sync"], "no checksums --no-sync"),
        Contestant("streamq", ours, "no checksums"),
    ]


def rivals(scheme: str, peers: list[str]) -> list[Contestant]:
    """Ours and those of the other tools that are installed and have the scheme."""
    ours = _ours(scheme)
    found = [
        Contestant("streamq", ours, ""),
        Contestant("streamq --no-sync", [*ours, "--no-sync"], ""),
    ]
    for name, (_, environment, schemes) in PEERS.items():
        python = HERE.parent / ".oracle" / environment / "bin" / "python"
        if name in peers and scheme in schemes and python.is_file():
            command = [str(python), "-P", str(HERE / "peers.py"), name, "{src}", "{dst}", scheme]
            found.append(Contestant(name, command, "streamq --no-sync"))  # nor do they sync
    return found


def make(name: str) -> Path:
    """The checkpoint of that name, made in a process of its own.

    The peak memory that the kernel reports of a child is at least what its parent had
    when it forked, so this process stays small.
    """
    subprocess.run([sys.executable, HERE / "checkpoints.py", name, WORK], check=True)
    return WORK / name


def run(command: list[str], src: Path, dst: Path, prime: bool = True) -> Run:
    """Run once, with ``prime`` on equal terms with every other run."""
    if prime:
        shutil.copytree(src, dst)
        shutil.rmtree(dst)
    os.sync()
    filled = [part.format(src=src, dst=dst) for part in command]
    began = time.perf_counter()
    process = subprocess.Popen(filled, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(filled)}")
    shutil.rmtree(dst, ignore_errors=True)
    return Run(seconds, usage.ru_maxrss * 1024 / 1e6)


def warm(src: Path) -> None:
    """Bring a checkpoint into the page cache."""
    for path in src.glob("*.safetensors"):
        with path.open("rb") as f:
            while f.read(1 << 24):
                pass


def race(name: str, scheme: str, rounds: int, field: list[Contestant]) -> list[dict[str, Any]]:
    """All contestants on one checkpoint; rows of a table."""
    small, src, dst = make("XS"), make(name), WORK / "out"
    size = sum(p.stat().st_size for p in src.glob("*.safetensors"))
    warm(src)
    results: dict[str, list[Run]] = {c.name: [] for c in field}
    for c in field:  # compile kernels, load the interpreters' files
        run(c.command, small, dst)
    for _ in range(rounds):
        for c in field:
            results[c.name].append(run(c.command, src, dst))
    return [_row(name, size, scheme, c, results) for c in field]


def _row(
    checkpoint: str, size: int, scheme: str, c: Contestant, results: dict[str, list[Run]]
) -> dict[str, Any]:
    seconds = statistics.median(r.seconds for r in results[c.name])
    # Rounds are paired: the machine's mood is shared by the runs of one round.
    pairs = zip(results[c.name], results.get(c.base, []), strict=False)
    ratios = [a.seconds / b.seconds for a, b in pairs]
    return {
        "checkpoint": checkpoint,
        "GB": f"{size / 1e9:.2f}",
        "scheme": scheme,
        "what": c.name,
        "seconds": f"{seconds:.2f}",
        "GB/s": f"{size / 1e9 / seconds:.2f}",
        "peak MB": f"{statistics.median(r.memory for r in results[c.name]):.0f}",
        "ratio": f"{statistics.median(ratios):.2f} of {c.base}" if ratios else "",
    }


def many_against_few(scheme: str, rounds: int) -> list[dict[str, Any]]:
    """The same bytes in 70,000 tensors and in a few large ones."""
    sources = {name: make(name) for name in ("K", "L")}
    dst = WORK / "out"
    results: dict[str, list[Run]] = {name: [] for name in sources}
    command = _ours(scheme)
    for src in sources.values():
        warm(src)
        run(command, src, dst)
    for _ in range(rounds):
        for name, src in sources.items():
            results[name].append(run(command, src, dst))
    rows = []
    for name, src in sources.items():
        size = sum(p.stat().st_size for p in src.glob("*.safetensors"))
        c = Contestant(name, command, "L" if name == "K" else "")
        rows.append({**_row(name, size, scheme, c, results), "what": CHECKPOINTS[name][0]})
    return rows


def show(rows: list[dict[str, Any]], name: str) -> None:
    """Print a table and write it as CSV."""
    if not rows:
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    WORK.mkdir(exist_ok=True)
    with (WORK / f"{name}.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Parse options and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ["S", "M", "MoE", "F3D", "K"]
    parser.add_argument("-c", "--checkpoint", action="append", choices=names)
    parser.add_argument("-s", "--scheme", action="append")
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--checksums", action="store_true")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="NAME")
    o = parser.parse_args()
    if o.kernels:
        from kernels import measure

        show(measure(), "kernels")
        return
    schemes = o.scheme or ["nvfp4a16", "fp8_block"]
    names = o.checkpoint or names
    if o.peers is not None:
        peers = o.peers or list(PEERS)
        rows = [row for c in o.checkpoint or ["M"] for s in schemes
                for row in race(c, s, o.rounds, rivals(s, peers))]  # fmt: skip
        show(rows, "peers")
        return
    field = summed if o.checksums else contestants
    rows = [row for c in names if c != "K" for s in schemes
            for row in race(c, s, o.rounds, field(s))]  # fmt: skip
    show(rows, "checksums" if o.checksums else "conversions")
    if "K" in names and not o.checksums:
        show([row for s in schemes for row in many_against_few(s, o.rounds)], "many-tensors")


if __name__ == "__main__":
    main()
