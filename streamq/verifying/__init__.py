"""Reopen an output and prove it: its structure, its scales and, with the source, every element."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.formats import Ascend
from streamq.formats.ascend import description_of
from streamq.formats.ascend_readers import findings
from streamq.recipe import Recipe
from streamq.stored import look

from .elements import Progress, compare
from .exact import convert_again, plan_of
from .files import check_files, describe, read_record
from .readers import check_readers, schemes_on_disk
from .report import Report
from .structure import check_index, check_scales, check_sums, find_weights

__all__ = ["Report", "verify"]


def verify(
    dst: str | os.PathLike[str],
    source: Checkpoint | None = None,
    *,
    recipe: Recipe | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Report:
    """Check the checkpoint in ``dst``; with ``source``, every byte or element of it.

    Files: the checksums that streamq.json has of each. Structure: headers, index, total_size,
    names, dtypes and shapes against the config, finite non-zero scales, equal global scales
    inside fused groups; compressed-tensors configs mean to every reader what is on disk, and so do
    Ascend's descriptions. With the source: where streamq.json tells how ``dst`` was made from it,
    it is converted again and every byte compared. Of other outputs untouched tensors are equal
    byte for byte, and each weight is within half a code step of its code (clipped ones aside); a
    quantized source counts with the values of its codes.
    ``recipe``: the one it was made by, where that declares groups or layouts of experts.
    Raises StreamqError only where ``dst`` or the source cannot be looked at; findings are in
    the report.
    """
    report = Report()
    folder = Path(dst)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory.")
    record = read_record(folder, report)
    damages = check_files(folder, record, workers, report) if record else []
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as e:
        report.failures += [*describe(damages, None), str(e)]
        return report
    with checkpoint:
        report.failures += describe(damages, checkpoint)
        report.tensors = len(checkpoint.tensors)
        check_index(checkpoint, report)
        try:
            found = look(checkpoint)
        except CheckpointError as e:
            report.failures.append(str(e))
            return report
        weights = find_weights(checkpoint, found, report)
        names = dict.fromkeys(s.scheme.name for s in weights)
        report.scheme = ", ".join(names) or found.format.name
        report.quantized = len(weights)
        rows: dict[str, Any] = {}
        if recipe is not None:
            rows = {"extra_groups": recipe.groups, "extra_experts": recipe.experts}
        family = Family(checkpoint.config, **rows)
        check_scales(checkpoint, weights, family, report)
        if found.format.name == "compressed-tensors" and not report.failures:
            schemes = schemes_on_disk(checkpoint, weights)
            report.failures += check_readers(checkpoint.config, family, schemes)
        if isinstance(found.format, Ascend):
            said = description_of(checkpoint.config)
            report.failures += findings(said, checkpoint.tensors, family)
        if source is not None:
            plan = plan_of(record, source, report) if record else None
            if plan is not None and convert_again(
                checkpoint, source, plan, workers, progress, report
            ):
                return report
            of_source = Family(source.config, **rows)
            compare(checkpoint, source, of_source, weights, found.format, workers, progress, report)
        else:
            check_sums(checkpoint, weights, workers, report)
    return report
