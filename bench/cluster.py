"""Workers and nodes: ``python bench/cluster.py [ROUNDS]``, with Ray; see docs/performance.md.

First what this machine gives: threads of one process against nodes of a Ray cluster with one CPU
each, all on this machine. Then nodes whose storage is slow (a delay in each read and write of
theirs, see nodes/sitecustomize.py), so that not the CPUs of this machine are the limit. W4A16
reads its source once. ``start``: what 7 MB take, which is starting a process on each node.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from run import HERE, STREAMQ, WORK, make, show, warm

#: Bytes a second that a node reads and writes where its storage is slow.
RATE = 100e6
SCHEME = ["--scheme", "w4a16", "--shard-size", "40MB", "--json"]


def seconds_of(src: Path, options: list[str], rounds: int) -> tuple[float, str]:
    """Median of the conversion in seconds, that of Ray's workers included; and a remark."""
    dst = WORK / "out"
    found, said = [], ""
    for _ in range(rounds):
        os.sync()
        command = [STREAMQ, "convert", str(src), str(dst), *SCHEME, *options]
        ran = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        found.append(ran["seconds"])
        said = "; ".join(ran["remarks"])
        shutil.rmtree(dst)
    return statistics.median(found), said


def on_nodes(src: Path, counts: tuple[int, ...], rate: float, rounds: int) -> list[dict[str, Any]]:
    """Rows for as many nodes of one CPU; of ``rate`` bytes a second each, or as fast as can be."""
    head = {"num_cpus": 0, "include_dashboard": False}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a head reports to Ray's makers otherwise
    cluster = Cluster(initialize_head=True, head_node_args=head)
    variables = {"PYTHONPATH": str(HERE / "nodes"), "NODE_RATE": str(rate)}
    rows, first = [], 0.0
    try:
        for count in counts:
            while len(cluster.worker_nodes) < count:
                cluster.add_node(num_cpus=1, object_store_memory=80 << 20, env_vars=variables)
            options = ["--engine", f"ray:{cluster.address}"]
            start, _ = seconds_of(make("XS"), options, 1)
            seconds, said = seconds_of(src, options, rounds)
            first = first or seconds
            how = f"nodes, {rate / 1e6:.0f} MB/s each" if rate else "nodes"
            rows.append({**row(how, count, seconds, first, said), "start": f"{start:.2f}"})
    finally:
        cluster.shutdown()
    return rows


def row(how: str, count: int, seconds: float, first: float, said: str) -> dict[str, Any]:
    """One line of the table."""
    return {
        "what": how, "count": str(count), "seconds": f"{seconds:.2f}",
        "times one": f"{first / seconds:.2f}", "start": "", "remark": said,
    }  # fmt: skip


def main() -> None:
    """All rows."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    src = make("M")
    warm(src)
    rows, first = [], 0.0
    for count in (1, 2, 4):
        seconds, said = seconds_of(src, ["--workers", str(count)], rounds)
        first = first or seconds
        rows.append(row("threads", count, seconds, first, said))
    rows += on_nodes(src, (1, 2, 4), 0, rounds)
    rows += on_nodes(src, (1, 2, 4, 8), RATE, 1)
    show(rows, "cluster")


if __name__ == "__main__":
    main()
