"""Checkpoints and thresholds so small that a conversion has many units, flushes and shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from helpers import write_checkpoint

from streamq.converting import jobs
from streamq.formats import FORMATS
from streamq.writer import shard

#: A preset of each format.
OF_FORMATS = [(name, f.presets[0].lower()) for name, f in FORMATS.items()]


def write_small(folder: Path, fmt: str = "") -> Path:
    """Three shards, of which one has copies only; one with experts for the format gpt-oss."""
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(64, 128), "model.norm.weight": weight(128)}
    for layer in (0, 1):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}self_attn.{name}.weight"] = weight(128, 128)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{at}mlp.{name}.weight"] = weight(256, 128)
        tensors[f"{at}mlp.down_proj.weight"] = weight(128, 256)
        tensors[f"{at}input_layernorm.weight"] = weight(128)
        if fmt == "gpt-oss":
            tensors[f"{at}mlp.experts.gate_up_proj"] = weight(3, 64, 192)
            tensors[f"{at}mlp.experts.down_proj"] = weight(3, 96, 64)
    names = list(tensors)
    if fmt == "gpt-oss":
        config = {"model_type": "gpt_oss", "dtype": "bfloat16", "num_hidden_layers": 2}
        return write_checkpoint(folder, tensors, config, [names[:2], names[2:12], names[12:]])
    return write_checkpoint(folder, tensors, shards=[names[:2], names[2:10], names[10:]])


def small_units(put: Callable[[object, str, int], None] = setattr) -> None:
    """Units of a few tensors, a flush after a few units; ``put`` is that of a monkeypatch."""
    put(jobs, "JOB", 70_000)
    put(shard, "SYNC_EVERY", 15_000)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
