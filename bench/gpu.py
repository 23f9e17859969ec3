"""GB/s of each Triton kernel, beside a device-to-device copy of as many bytes in the same run.

    python bench/gpu.py                     every section
    python bench/gpu.py kernels -r 15       one section, fifteen rounds

Contestants take turns, round after round; medians. Bytes are those that have to move: the
weight once, codes and scales once (the weight twice where a scale over the tensor comes
first). A copy reads and writes half of them each. Written to ``.bench/gpu-*.csv`` as well.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_peers import eager, torchao
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
WORK = HERE.parent / ".bench"

#: A weight of 537 MB in bf16: ten times what the caches of an H200 hold, and longer on the way
#: than a launch takes to prepare.
ROWS, COLS = 32768, 8192
#: Launches between two readings of the clock.
TIMES = 10

Call = Callable[[], Any]


def kernels(rounds: int) -> list[dict[str, str]]:
    """One row for each kernel and each of its rivals."""
    import torch
    from streamq.kernels import triton as ours

    x = torch.randn(ROWS, COLS, device="cuda", dtype=torch.float32).mul_(0.02).bfloat16()
    field: dict[str, tuple[Call, int]] = {"amax": (_amax(ours, x), x.nbytes)}
    for name, scheme in _schemes().items():
        field[name] = _quantize(ours, x, scheme)
    for name in ("NVFP4A16", "W4A16", "FP8_BLOCK"):
        field[f"{name} values"] = _values(ours, x, name)
    for rivals in (eager(x), torchao(x)):
        field |= {name: (call, field[name.split()[0]][1]) for name, call in rivals.items()}
    half = max(moved for _, moved in field.values()) // 2
    a, b = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    copies = {name: _copy(a[: moved // 2], b[: moved // 2]) for name, (_, moved) in field.items()}
    seconds: dict[str, list[float]] = {name: [] for name in field}
    of_copy: dict[str, list[float]] = {name: [] for name in field}
    for call, _ in field.values():
        call()  # compiled here
    for _ in range(rounds):
        for name in field:
            seconds[name].append(_time(field[name][0]))
            of_copy[name].append(_time(copies[name]))
    rows = []
    for name, (_, moved) in field.items():
        ours_s, copy_s = statistics.median(seconds[name]), statistics.median(of_copy[name])
        rows.append({
            "kernel": name, "GB/s": f"{moved / ours_s / 1e9:.0f}",
            "copy GB/s": f"{moved / copy_s / 1e9:.0f}", "of copy": f"{copy_s / ours_s:.2f}",
            "ms": f"{ours_s * 1e3:.3f}",
        })  # fmt: skip
    return rows


def _schemes() -> dict[str, Any]:
    from dataclasses import replace

    from streamq.schemes import SCHEMES

    names = (
        "NVFP4A16", "MXFP4A16", "MXFP8A16", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16",
        "W4A16_ASYM", "W3A16", "W2A16",
    )  # fmt: skip
    searched = ("NVFP4A16", "MXFP4A16", "W4A16", "W4A16_ASYM")
    return {name: SCHEMES[name] for name in names} | {
        f"{name}, searched": replace(SCHEMES[name], scales="search") for name in searched
    }


def _amax(ours: Any, x: Any) -> Call:
    out, status = ours.amax(x), ours.new_status("cuda")
    return lambda: ours.amax(x, out=out, status=status)


def _packing(scheme: Any) -> Any:
    from streamq.formats import FORMATS

    return FORMATS["compressed-tensors"].layout(ROWS, COLS, "BF16", scheme).packing


def _quantize(ours: Any, x: Any, scheme: Any) -> tuple[Call, int]:
    import torch

    packing = _packing(scheme)
    outer = torch.full((ROWS,), 25000.0, device="cuda") if scheme.needs_amax else None
    out = ours.quantize(x, scheme, packing, outer=outer)
    status = ours.new_status("cuda")
    moved = x.nbytes + sum(getattr(out, part).nbytes for part in scheme.parts)
    return lambda: ours.quantize(x, scheme, packing, outer=outer, out=out, status=status), moved


def _values(ours: Any, x: Any, name: str) -> tuple[Call, int]:
    import torch

    from streamq.schemes import SCHEMES

    scheme = SCHEMES[name]
    packing = _packing(scheme)
    outer = torch.full((ROWS,), 25000.0, device="cuda") if scheme.needs_amax else None
    q = ours.quantize(x, scheme, packing, outer=outer)
    out = torch.empty_like(x)
    moved = out.nbytes + q.codes.nbytes + q.scale.nbytes
    return lambda: ours.dequantize(q, scheme, out, packing=packing), moved


def _copy(a: Any, b: Any) -> Call:
    return lambda: b.copy_(a)


def _time(call: Call) -> float:
    """Seconds of one call, by the clock of the device."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(TIMES):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / TIMES


#: What can be measured; each gives rows of one table.
SECTIONS: dict[str, Callable[[int], list[dict[str, str]]]] = {"kernels": kernels}


def main() -> None:
    """Measure the sections that were asked for."""
    parser = argparse.ArgumentParser(description="GB/s on a GPU.")
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("-r", "--rounds", type=int, default=9)
    chosen = parser.parse_args()
    for name in chosen.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}: there are {', '.join(SECTIONS)}")
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        sys.exit(f"bench/gpu.py needs {' and '.join(missing)}: install streamq[gpu].")
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py measures on a GPU, and torch finds none here.")
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    WORK.mkdir(exist_ok=True)
    for name in chosen.sections or SECTIONS:
        rows = SECTIONS[name](chosen.rounds)
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        with (WORK / f"gpu-{name}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
