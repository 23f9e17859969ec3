"""Whole conversions on a GPU beside what bounds them, measured in the same run.

Seconds are those of the conversion alone, in one process: torch is imported, the GPU has its
context and the kernels are compiled. Nothing is synced.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from run import WORK, make

import streamq
from streamq.converting import Settings
from streamq.pipeline.find import open_devices

SCHEMES = ("nvfp4a16", "fp8_block", "w4a16")
PIECE = 8 << 20
THREADS = len(os.sched_getaffinity(0))


def pipeline(rounds: int) -> list[dict[str, str]]:
    """Rows of a table, of checkpoint M in each of some schemes."""
    return [row for scheme in SCHEMES for row in measure(make("M"), scheme, rounds)]


def measure(src: Path, scheme: str, rounds: int) -> list[dict[str, str]]:
    """Rows for one checkpoint and scheme; medians of alternating rounds."""
    from streamq.pipeline.cuda import GpuStream

    (gpu,) = open_devices(["cuda:0"])
    files = sorted(src.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    dst = WORK / "out"

    def convert(device: str) -> Callable[[], float]:
        def run() -> float:
            settings = Settings(device=device, sync=False)
            seconds = streamq.convert(src, dst, scheme, settings=settings).seconds
            shutil.rmtree(dst)
            return seconds

        return run

    def without_kernels() -> float:
        kept = GpuStream.amax, GpuStream.quantize
        GpuStream.amax, GpuStream.quantize = _no_amax, _no_codes  # type: ignore[method-assign]
        try:
            return convert("cuda")()
        finally:
            GpuStream.amax, GpuStream.quantize = kept  # type: ignore[method-assign]

    written = streamq.plan(src, scheme).bytes_out
    field: dict[str, Callable[[], float]] = {
        "pread": lambda: _read(files, gpu),
        "to the GPU": lambda: _copy(gpu, size, to=True),
        "from the GPU": lambda: _copy(gpu, written, to=False),
        "pwrite": lambda: _write(dst, written, gpu),
        "--device cuda, no kernels": without_kernels,
        "--device cuda": convert("cuda"),
        "--device cpu": convert("cpu"),
    }
    for run in field.values():  # compiles, and brings the checkpoint into the page cache
        run()
    times: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(rounds):
        for name, run in field.items():
            times[name].append(run())
    seconds = {name: statistics.median(found) for name, found in times.items()}
    bounds = list(field)[:4]
    bound = max(bounds, key=seconds.__getitem__)
    return [
        {
            "scheme": scheme, "what": name, "seconds": f"{s:.3f}",
            "GB/s": f"{(written if name in ('from the GPU', 'pwrite') else size) / s / 1e9:.1f}",
            "bound": "the bound" if name == bound else
                     "" if name in bounds else f"{seconds[bound] / s:.2f} of {bound}",
        }
        for name, s in seconds.items()
    ]  # fmt: skip


def _no_amax(stream: Any, x: Any, shape: tuple[int, int], dtype: Any) -> Any:
    import torch

    with stream.current():
        return torch.zeros(4 * shape[0], dtype=torch.uint8, device=x.device)


def _no_codes(stream: Any, x: Any, *args: Any) -> Any:
    import torch

    with stream.current():
        return torch.zeros(args[-1].nbytes, dtype=torch.uint8, device=x.device)


def _each(work: list[Any], do: Callable[[Any], None]) -> float:
    """Seconds that threads need for all pieces of some work."""
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(do, work))
    return time.perf_counter() - began


def _pieces(sizes: list[int]) -> list[tuple[int, int, int]]:
    """File by number, offset, bytes."""
    return [(i, at, min(PIECE, size - at)) for i, size in enumerate(sizes)
            for at in range(0, size, PIECE)]  # fmt: skip


def _read(files: list[Path], gpu: Any) -> float:
    """Read all files into pinned memory."""
    fds = [os.open(path, os.O_RDONLY) for path in files]
    buffers = [gpu.pinned(PIECE) for _ in range(THREADS)]

    def read(piece: tuple[int, int, int]) -> None:
        file, at, n = piece
        buffer = buffers.pop()
        os.preadv(fds[file], [buffer[:n].data], at)
        buffers.append(buffer)

    seconds = _each(_pieces([path.stat().st_size for path in files]), read)
    for fd in fds:
        os.close(fd)
    return seconds


def _write(folder: Path, size: int, gpu: Any) -> float:
    """Write so many bytes from pinned memory to four preallocated files."""
    folder.mkdir()
    sizes = [size // 4] * 4
    fds = [os.open(folder / str(i), os.O_RDWR | os.O_CREAT) for i in range(4)]
    buffer = gpu.pinned(PIECE)
    buffer[:] = np.arange(PIECE, dtype=np.uint8)
    began = time.perf_counter()
    for fd in fds:
        os.posix_fallocate(fd, 0, size // 4)
    _each(_pieces(sizes), lambda p: os.pwrite(fds[p[0]], buffer[: p[2]].data, p[1]) and None)
    seconds = time.perf_counter() - began
    for fd in fds:
        os.close(fd)
    shutil.rmtree(folder)
    return seconds


def _copy(gpu: Any, size: int, to: bool) -> float:
    """Copy so many bytes over the bus in one direction, from or to pinned memory."""
    stream, host = gpu.stream(), gpu.pinned(PIECE)
    there = stream.upload(host)
    stream.mark().wait()
    began = time.perf_counter()
    for _ in range(-(-size // PIECE)):
        if to:
            there = stream.upload(host)
        else:
            stream.download(there, host)
    stream.mark().wait()
    return time.perf_counter() - began
