"""Reopen an output and prove it: its structure, its scales and, with the source, every element."""

from __future__ import annotations

import os
from pathlib import Path

from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.errors import CheckpointError
from streamq.formats import compressed_tensors as fmt

from .elements import Progress, compare
from .report import Report
from .structure import check_index, check_scales, find_modules

__all__ = ["Report", "verify"]


def verify(
    dst: str | os.PathLike[str],
    source: Checkpoint | None = None,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> Report:
    """Check the checkpoint in ``dst``; with ``source``, every element of it.

    Structure: headers, index, total_size, names, dtypes and shapes against the config,
    finite non-zero scales, equal global scales inside fused groups. With the source:
    untouched tensors are equal byte for byte, and each weight is within half a code step
    of its code (clipped ones aside).
    Raises StreamqError only where ``dst`` cannot be looked at; findings are in the report.
    """
    report = Report()
    folder = Path(dst)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory.")
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as e:
        report.failures.append(str(e))
        return report
    with checkpoint:
        report.tensors = len(checkpoint.tensors)
        check_index(checkpoint, report)
        try:
            scheme, ignore = fmt.read_config(checkpoint.config.get("quantization_config"))
        except CheckpointError as e:
            report.failures.append(str(e))
            return report
        report.scheme = scheme.name
        modules = find_modules(checkpoint, scheme, set(ignore), report)
        report.quantized = len(modules)
        check_scales(checkpoint, scheme, modules, report)
        if source is not None:
            compare(checkpoint, source, scheme, modules, workers, progress, report)
    return report
