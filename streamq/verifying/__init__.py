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
from streamq.hub import is_hub
from streamq.planning import cuts_of
from streamq.recipe import Recipe
from streamq.stored import Stored, look
from streamq.tensors import TensorInfo

from .elements import Progress, compare
from .exact import convert_again, plan_of
from .files import check_files, describe, read_record
from .lint import Facts, Finding, lint
from .readers import check_readers, schemes_on_disk
from .report import Report
from .structure import check_index, check_scales, check_sums, find_weights

__all__ = ["Finding", "Report", "verify"]


def verify(
    dst: str | os.PathLike[str],
    source: Checkpoint | None = None,
    *,
    recipe: Recipe | None = None,
    check_tp: tuple[int, ...] = (),
    workers: int = 2,
    progress: Progress | None = None,
) -> Report:
    """Check the checkpoint in ``dst``; with ``source``, every byte or element of it.

    Files: the checksums that streamq.json has of each. Structure: headers, index, total_size,
    names, dtypes and shapes against the config, finite non-zero scales; compressed-tensors configs
    mean to every reader what is on disk, and so do Ascend's descriptions; no rule about a loader
    finds a fault (``verifying.lint``). With the source: where streamq.json tells how ``dst`` was
    made from it, it is converted again and every byte compared. Of other outputs untouched tensors
    are equal byte for byte, and each weight is within half a code step of its code (clipped ones
    aside); a quantized source counts with the values of its codes.
    ``recipe``: the one it was made by, where that declares groups or layouts of experts.
    ``check_tp``: numbers of tensor-parallel ranks; what they would cut are warnings.
    Raises StreamqError only where ``dst`` or the source cannot be looked at; findings are in
    the report.
    """
    if is_hub(dst):
        raise CheckpointError(f"{dst}: only directories are verified; `hf download` it first.")
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
        _lint_files(folder, report)
        return report
    with checkpoint:
        report.failures += describe(damages, checkpoint)
        report.tensors = len(checkpoint.tensors)
        check_index(checkpoint, report)
        try:
            found = look(checkpoint)
        except CheckpointError as e:
            report.failures.append(str(e))
            _lint(Facts(checkpoint, None, [], Family(checkpoint.config)), report)
            return report
        weights = find_weights(checkpoint, found, report)
        names = dict.fromkeys(s.scheme.name for s in weights)
        report.scheme = ", ".join(names) or found.format.name
        report.quantized = len(weights)
        rows: dict[str, Any] = {}
        if recipe is not None:
            rows = {"extra_groups": recipe.groups, "extra_experts": recipe.experts}
        family = Family(checkpoint.config, **rows)
        check_scales(checkpoint, weights, report)
        if found.format.name == "compressed-tensors" and not report.failures:
            schemes = schemes_on_disk(checkpoint, weights)
            report.failures += check_readers(checkpoint.config, family, schemes)
        if isinstance(found.format, Ascend):
            said = description_of(checkpoint.config)
            report.failures += findings(said, checkpoint.tensors, family)
        _lint(Facts(checkpoint, found, weights, family), report)
        report.warnings += _cuts(weights, family, check_tp)
        if source is not None:
            plan = plan_of(record, source, report) if record else None
            if plan is None or not convert_again(
                checkpoint, source, plan, workers, progress, report
            ):
                of_source = Family(source.config, **rows)
                compare(checkpoint, source, of_source, weights, found.format, workers, progress,
                        report)  # fmt: skip
        else:
            check_sums(checkpoint, weights, workers, report)
        for read in (checkpoint, source):
            try:
                if read is not None:
                    read.refuse_changed()
            except CheckpointError as e:
                report.failures.append(str(e))
    return report


def _lint(facts: Facts, report: Report) -> None:
    report.findings = lint(facts)
    report.failures += [f.text for f in report.findings if f.severity == "error"]
    report.warnings += [f.text for f in report.findings if f.severity == "warning"]


def _lint_files(folder: Path, report: Report) -> None:
    """What can be said of a checkpoint whose index is wrong."""
    try:
        checkpoint = open_checkpoint(folder, use_index=False)
    except CheckpointError:
        return
    with checkpoint:
        _lint(Facts(checkpoint, None, [], Family(checkpoint.config)), report)


def _cuts(weights: list[Stored], family: Family, sizes: tuple[int, ...]) -> list[str]:
    heads = family.config.get("num_key_value_heads")
    pairs = [(TensorInfo(s.name, s.codes.dtype, s.shape, s.codes.file, 0), s.scheme)
             for s in weights]  # fmt: skip
    return cuts_of(pairs, sizes, heads if isinstance(heads, int) else None)
