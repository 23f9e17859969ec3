"""What an output says of itself: names, dtypes, shapes and scales against its config."""

from __future__ import annotations

from math import inf

import numpy as np

from streamq.checkpoint import Checkpoint, read_json
from streamq.errors import StreamqError
from streamq.families import Family
from streamq.quantized import Module, module_of, parts_of, read
from streamq.schemes import Scheme

from .report import Report


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """Several shards have an index, and its total_size is right."""
    path = checkpoint.root / "model.safetensors.index.json"
    if not path.is_file():
        if len(checkpoint.files) > 1:
            report.failures.append(f"{len(checkpoint.files)} shards without {path.name}")
        return
    metadata = read_json(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != checkpoint.nbytes:
        report.failures.append(
            f"{path.name}: total_size is {total}, the tensors have {checkpoint.nbytes} bytes"
        )


def find_modules(
    checkpoint: Checkpoint, scheme: Scheme, ignore: set[str], report: Report
) -> list[Module]:
    """The quantized weights, after comparing names, dtypes and shapes with the layout."""
    left_alone = Family(checkpoint.config).left_alone(scheme)
    parts = parts_of(checkpoint)
    modules = []
    for name, found in parts.items():
        if name in ignore:
            report.failures.append(f"{name!r} is quantized, but config.json ignores it")
        try:
            modules.append(module_of(checkpoint, name, found, scheme))
        except StreamqError as e:
            report.failures.append(str(e))
    for t in checkpoint.tensors.values():
        module = t.name.removesuffix(".weight")
        if module == t.name or len(t.shape) != 2 or module in parts or module in ignore:
            continue
        if left_alone(module) != "embedding":
            report.failures.append(
                f"{t.name!r} is not quantized and config.json does not ignore it: "
                "loaders look for its scales"
            )
    if not modules:
        report.failures.append("no tensor is quantized")
    return modules


def check_scales(
    checkpoint: Checkpoint, scheme: Scheme, modules: list[Module], report: Report
) -> None:
    """Scales are finite and above zero, and global scales equal inside fused groups."""
    family = Family(checkpoint.config)
    shared: dict[tuple[str, str], tuple[str, float]] = {}
    for m in modules:
        scale = read(checkpoint, m.tensors["weight_scale"])
        if scheme.scale == "e8m0":
            good = scale != 255
        else:
            value = scale.astype(np.float32)
            good = np.isfinite(value) & (value > 0)
        if not good.all():
            row, col = np.argwhere(~good)[0]
            report.failures.append(
                f"{m.name + '.weight_scale'!r} is {scale[row, col]} at row {row}, column {col}: "
                "scales must be finite and above zero"
            )
        for suffix in ("weight_global_scale", "input_global_scale"):
            if suffix in m.tensors:
                constant = float(read(checkpoint, m.tensors[suffix])[0])
                if not 0 < constant < inf:
                    report.failures.append(f"{m.name + '.' + suffix!r} is {constant}")
        if scheme.two_level and (found := family.group_of(m.name)):
            g = float(read(checkpoint, m.tensors["weight_global_scale"])[0])
            key = (found[0], found[1].members[0])
            first = shared.setdefault(key, (m.name, g))
            if first[1] != g:
                report.failures.append(
                    f"{m.name!r} has weight_global_scale {g:g}, {first[0]!r} has {first[1]:g}, "
                    f"but loaders fuse them ({found[1].name})"
                )
