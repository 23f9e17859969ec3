"""What several test files share: make checkpoints, convert them, read the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from streamq.checkpoint import open_checkpoint
from streamq.converting import Settings, convert
from streamq.planning import Options, Plan, make_plan
from streamq.schemes import resolve


def write_checkpoint(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any] | None = None,
    shards: list[list[str]] | None = None,
) -> Path:
    """A checkpoint as the Hub has them; ``shards`` lists the tensor names of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "num_hidden_layers": 2} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    parts = shards or [list(tensors)]
    weight_map = {}
    for i, names in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        file = "model.safetensors" if len(parts) == 1 else file
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run_convert(
    src: Path, dst: Path, scheme: str, *, group_size: int | None = None, record: bool = False,
    **kw: Any,
) -> Plan:  # fmt: skip
    """Convert by the Python calls that the command line makes.

    Without ``record`` streamq.json is removed, so that ``verify`` looks at elements.
    """
    keys = ("workers", "max_memory", "sync", "overwrite")
    how = Settings(**{"sync": False} | {k: kw.pop(k) for k in keys if k in kw})
    with open_checkpoint(src) as source:
        plan = make_plan(source, Options(resolve(scheme, group_size), **kw))
        convert(source, plan, dst, how)
    if not record:
        (dst / "streamq.json").unlink()
    return plan


def tensors_of(folder: Path) -> dict[str, tuple[Any, bytes]]:
    """TensorInfo and bytes of every tensor of a checkpoint, by name."""
    with open_checkpoint(folder) as c:
        return {
            t.name: (t, (folder / t.file).read_bytes()[t.start : t.end]) for t in c.tensors.values()
        }
