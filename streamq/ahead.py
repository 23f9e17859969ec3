"""Compile kernels before they are needed: a tiny model goes through every conversion.

Only what really runs has the types that kernels are compiled for, so nothing here lists them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from streamq import api
from streamq.converting import Settings
from streamq.formats import FORMATS, named
from streamq.schemes import PLAIN, resolve

DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
#: Rows and columns of all weights; blocks and groups of every scheme divide them.
SIZE = 256
LAYER = "model.layers.0."


class Case(NamedTuple):
    """One conversion there and back: a format, a preset that it holds, the dtype of the weights."""

    format: str
    scheme: str
    dtype: str


def cases(
    schemes: Sequence[str] = (), formats: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> list[Case]:
    """All conversions, or those of the schemes, formats and dtypes that are named.

    Raises PlanError for a name that is not known, and for a scheme that no such format holds.
    """
    wanted = {resolve(name).name: resolve(name) for name in schemes}
    chosen = [named(name) for name in formats] or list(FORMATS.values())
    found = [
        Case(fmt.name, preset, dtype)
        for fmt in chosen
        for preset in fmt.presets
        if preset not in PLAIN and (preset in wanted or not wanted)
        for dtype in dtypes or DTYPES
    ]
    for name in wanted.keys() - {case.scheme for case in found}:
        chosen[0].concrete(wanted[name])  # says that it does not hold it
    return found


def run(case: Case, folder: Path, scales: str = "absmax", numerics: str = "f32") -> None:
    """One conversion with and without measuring, and its output back to floats, in ``folder``."""
    source = _model(folder, case.dtype, FORMATS[case.format].stacks)
    there, back = folder / "there", folder / "back"
    for details in (False, True):
        settings = Settings(workers=1, sync=False, overwrite=True, stats=True, details=details)
        api.convert(
            source, there, case.scheme, format=case.format, scales=scales, numerics=numerics,
            settings=settings,
        )  # fmt: skip
    settings = Settings(workers=1, sync=False, overwrite=True)
    api.convert(there, back, case.dtype, settings=settings)


def compress(folder: Path) -> None:
    """Compress a model, decompress it, in ``folder``."""
    settings = Settings(workers=1, sync=False, overwrite=True)
    for dtype in DTYPES:
        api.compress(_model(folder, dtype, False), folder / "there", settings=settings)
        api.decompress(folder / "there", folder / "back", settings=settings)


def _model(folder: Path, dtype: str, stacked: bool) -> Path:
    """A mixture of experts of one layer; ``stacked`` as gpt-oss has them, transposed."""
    path = folder / f"{dtype}-{stacked}"
    if path.exists():
        return path
    experts = LAYER + "mlp.experts."
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"{LAYER}self_attn.{p}_proj.weight": (SIZE, SIZE) for p in "qkvo"}
    config = {"model_type": "qwen3_moe", "num_experts": 1}
    if stacked:
        config = {"model_type": "gpt_oss", "num_local_experts": 1}
        shapes |= {
            experts + "gate_up_proj": (1, SIZE, 2 * SIZE),
            experts + "down_proj": (1, SIZE, SIZE),
        }
    else:
        shapes |= {f"{experts}0.{p}_proj.weight": (SIZE, SIZE) for p in ("gate", "up", "down")}
    config |= {"num_hidden_layers": 1, "hidden_size": SIZE, "moe_intermediate_size": SIZE,
               "intermediate_size": SIZE}  # fmt: skip
    values = np.linspace(-1, 1, SIZE * SIZE * 2, dtype=np.float32).astype(DTYPES[dtype])
    tensors = {n: np.resize(values, shape) for n, shape in shapes.items()}
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path
