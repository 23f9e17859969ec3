"""What the compilers make of every Triton kernel, on a machine without a GPU.

    python bench/triton_targets.py                         the table of docs/gpu.md
    python bench/triton_targets.py --json sm_90 gfx942     for programs
    python bench/triton_targets.py --json --every-dtype sm_80

Kernels are launched as always, with arguments on the CPU and a driver that has a target and no
device: what is compiled is what would run there. Registers of a thread, bytes of shared memory
of a program and bytes spilled are what ptxas and LLVM report.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

# Before triton is imported: compile, anew, and say what ptxas says.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import torch
import triton
from streamq.kernels import triton as kernels
from streamq.kernels.golden import CASES
from triton.backends.compiler import GPUTarget

from streamq.schemes import ALL, BYTES, Packing, Scheme

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

#: Columns of a row: that of a common model, and one that no tile holds.
COLS, LONG = 4096, 53248
#: What each line of the table quantizes, with the columns; f32 arithmetic, packed as stored.
QUANTIZED: dict[str, tuple[Scheme, int]] = {
    "NVFP4": (CASES["NVFP4"], COLS),
    "NVFP4, searched": (CASES["NVFP4_SEARCH"], COLS),
    "MXFP4": (CASES["MXFP4"], COLS),
    "MXFP4, searched": (CASES["MXFP4_SEARCH"], COLS),
    "MXFP8": (CASES["MXFP8"], COLS),
    "FP8, tensor": (CASES["FP8_TENSOR"], COLS),
    "FP8, rows": (CASES["FP8_DYNAMIC"], COLS),
    "FP8, long rows": (CASES["FP8_DYNAMIC"], LONG),
    "FP8, blocks": (CASES["FP8_BLOCK"], COLS),
    "FP8, blocks, ue8m0": (CASES["FP8_BLOCK_UE8M0"], COLS),
    "INT4, groups": (CASES["W4A16"], COLS),
    "INT4, groups, zero points": (CASES["W4A16_ASYM"], COLS),
    "INT3, groups": (CASES["W3A16"], COLS),
    "INT8, rows": (CASES["W8A8"], COLS),
    "INT8, rows of 28672": (CASES["W8A8"], 28672),
    "INT8, long rows, zero points": (CASES["INT8_CHANNEL_ASYM"], LONG),
    "INT4, groups, searched": (CASES["INT4_SEARCH"], COLS),
    "INT4, groups, zero points, searched": (CASES["INT4_ASYM_SEARCH"], COLS),
    "INT8, rows, searched": (CASES["INT8_CHANNEL_SEARCH"], COLS),
    "INT8, long rows, searched": (CASES["INT8_CHANNEL_SEARCH"], LONG),
}
#: What is read back: values in bf16, and energies.
READ = ("NVFP4", "FP8, blocks", "INT4, groups, zero points", "INT3, groups")


class NoDevice:
    """A driver with a target to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> str:
        """By what compiled kernels are kept apart."""
        return str(self._target.arch)

    def get_current_stream(self, device: str) -> int:
        """Nothing runs."""
        return 0


def compiled(target: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel that each case launches."""
    seen: list[tuple[str, Any, int]] = []
    logs: dict[str, str] = {}  # a kernel that some case had before is not compiled again
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kw: Any) -> Any:
        log = StringIO()
        with redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kw)
        logs.setdefault(kernel.hash, log.getvalue())
        seen.append((self.__name__, kernel, kw["num_warps"]))
        return kernel

    triton.runtime.driver.set_active(NoDevice(TARGETS[target]))
    for module in (kernels.tiles, kernels.fp8):
        module.WARP = TARGETS[target].warp_size
    triton.JITFunction.run = compile_only
    try:
        for case, call in _cases(DTYPES[dtype]):
            seen.clear()
            call()
            for name, kernel, warps in seen:
                yield {
                    "case": case, "kernel": name, "target": target, "dtype": dtype, "warps": warps,
                    **_resources(kernel, logs[kernel.hash]), "code": _code(kernel),
                }  # fmt: skip
    finally:
        triton.JITFunction.run = run


def _cases(dtype: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What launches every kernel; with a status, as nothing can be waited for."""
    status = kernels.new_status("cpu")

    def weight(cols: int) -> Any:
        return torch.empty((256, cols), dtype=dtype)

    yield "amax", lambda: kernels.amax(weight(COLS), status=status)
    for name, (scheme, cols) in QUANTIZED.items():
        outer = torch.ones(256) if scheme.needs_amax else None
        x, packing, made = weight(cols), _packing(scheme), []

        def quantize(
            x: Any = x, scheme: Any = scheme, packing: Any = packing, outer: Any = outer,
            made: Any = made,
        ) -> None:  # fmt: skip
            made.append(kernels.quantize(x, scheme, packing, outer=outer, status=status))

        yield name, quantize
        if name in READ:
            yield (
                f"{name}: values",
                lambda x=x, scheme=scheme, packing=packing, made=made: kernels.dequantize(
                    made[0], scheme, torch.empty_like(x), packing=packing
                ),
            )
            yield (
                f"{name}: energies",
                lambda x=x, scheme=scheme, packing=packing, outer=outer, made=made: (
                    kernels.energies(x, made[0], scheme, packing, outer)
                ),
            )


def _packing(scheme: Scheme) -> Packing:
    if scheme.element == "e2m1":
        return Packing("nibbles", 4)
    if scheme.element == "e4m3" or scheme.block[1] == ALL:
        return BYTES
    return Packing("words", scheme.bits)


def _resources(kernel: Any, log: str) -> dict[str, int]:
    """Registers and spills as the assembler reports them."""
    if "ptx" in kernel.asm:
        registers = re.search(r"Used (\d+) registers", log)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert registers is not None, f"no report of ptxas: {log}"
        return {
            "registers": int(registers[1]),
            "shared": kernel.metadata.shared,
            "spilled": sum(map(int, spills)),
        }
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count): +(\d+)",
                              kernel.asm["amdgcn"]))  # fmt: skip
    return {
        "registers": int(numbers["vgpr_count"]),
        "shared": kernel.metadata.shared,
        "spilled": 4 * (int(numbers["vgpr_spill_count"]) + int(numbers["sgpr_spill_count"])),
    }


def _code(kernel: Any) -> dict[str, int]:
    """How often instructions that decide about bits occur: ``tests/test_triton_targets.py``."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    names = re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z_][\w.]*)", text, re.MULTILINE)
    counts: dict[str, int] = {}
    for name in names:
        if re.match(r"(div|rcp|fma|mad|ex2|sqrt|rsqrt|v_div|v_fma|v_mad|v_rcp|v_mac)", name):
            counts[name] = counts.get(name, 0) + 1
    # Adding 1.5 * 2^23 rounds to an integer, if nobody takes it off again at compile time. sm_100
    # adds in pairs, with the number in a register.
    counts["rint"] = text.count("0f4B400000") + text.count("add.rn.f32x2")
    counts["ftz"] = text.count(".ftz")
    mode = re.search(r"\.amdhsa_float_denorm_mode_32 (\d)", text)
    counts["denormals"] = 3 if mode is None else int(mode[1])
    return counts


def table() -> None:
    """Print Markdown: a line for each kernel and case, a column for each target."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for target in TARGETS:
        for row in compiled(target, "bf16"):
            found.setdefault((row["case"], row["kernel"]), {})[target] = row
    print(f"| case | kernel | warps | {' | '.join(TARGETS)} |")
    print("|---" * (3 + len(TARGETS)) + "|")
    for (case, kernel), rows in found.items():
        cells = [_cell(rows[target]) for target in TARGETS]
        print(f"| {case} | {kernel} | {rows['sm_90']['warps']} | {' | '.join(cells)} |")


def _cell(row: dict[str, Any]) -> str:
    spilled = f", {row['spilled']} spilled" if row["spilled"] else ""
    return f"{row['registers']}, {row['shared']}{spilled}"


def main() -> None:
    """Compile in a cache of its own."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel.")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}, for --json")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--every-dtype", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        if not chosen.json:
            table()
            return
        rows = [
            row
            for target in chosen.targets or TARGETS
            for dtype in (DTYPES if chosen.every_dtype else ("bf16",))
            for row in compiled(target, dtype)
        ]
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
