"""Checkpoints that are compressed in tests, and directories as bytes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from helpers import write_checkpoint

from streamq.tensors import DTYPES

HIDDEN, INNER, VOCAB, HEADS, KV = 128, 192, 96, 4, 2
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "vocab_size": VOCAB, "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
DESCRIPTION = "quant_model_description.json"


def few(rng, shape, dtype=np.int8):
    """Values of few bits, half of them zero."""
    return (rng.integers(-7, 8, shape) * (rng.random(shape) < 0.5)).astype(dtype)


def w8a8s(folder: Path, config=CONFIG) -> Path:
    """A W8A8S checkpoint as msmodelslim writes them, in two shards."""
    rng = np.random.default_rng(1)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype("f2")}
    types = {"model.embed_tokens.weight": "FLOAT"}
    for i in range(2):
        for leaf, (n, k) in SHAPES.items():
            module = f"model.layers.{i}.{leaf}"
            made = {
                "weight": few(rng, (n, k)),
                "input_scale": np.full(1, 0.5, np.float16),
                "input_offset": np.full(1, 3, np.float16),
                "quant_bias": rng.integers(-99, 99, n).astype(np.int32),
                "deq_scale": rng.integers(1, 99, n).astype(np.int64),
            }
            tensors |= {f"{module}.{suffix}": x for suffix, x in made.items()}
            types |= dict.fromkeys((f"{module}.{suffix}" for suffix in made), "W8A8S")
        norm = f"model.layers.{i}.input_layernorm.weight"
        tensors[norm], types[norm] = np.ones(HIDDEN, np.float16), "FLOAT"
    tensors["lm_head.weight"] = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
    types["lm_head.weight"] = "FLOAT"
    names = list(tensors)
    write_checkpoint(folder, tensors, config, [names[:30], names[30:]])
    said = {"model_quant_type": "W8A8S", "version": "1.0.0", **types}
    (folder / DESCRIPTION).write_text(json.dumps(said, indent=1))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return folder


def floats(folder: Path, dtype=ml_dtypes.bfloat16) -> Path:
    """A float checkpoint in two shards."""
    rng = np.random.default_rng(2)
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(2):
        tensors |= {f"model.layers.{i}.{leaf}.weight": shape for leaf, shape in SHAPES.items()}
        tensors[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
    made = {n: (rng.standard_normal(s) * 0.02).astype(dtype) for n, s in tensors.items()}
    names = list(made)
    return write_checkpoint(folder, made, CONFIG, [names[:7], names[7:]])


def every_dtype(folder: Path) -> Path:
    """A file with matrices, vectors, stacks, scalars and empty tensors of every dtype."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    entries, data = {}, b""
    for tag, row in DTYPES.items():
        for shape in ((130, 96), (9, 4000), (5000,), (3, 40, 64), (), (0, 8)):
            bits = int(np.prod(shape)) * row.bits
            if bits % 8:
                continue
            raw = (rng.integers(0, 8, bits // 8) * 5).astype(np.uint8).tobytes()
            span = [len(data), len(data) + len(raw)]
            name = f"{tag}.{'x'.join(map(str, shape))}.weight"
            entries[name] = {"dtype": tag, "shape": list(shape), "data_offsets": span}
            data += raw
    # Spaces and metadata as other writers leave them.
    header = json.dumps({"__metadata__": {"who": "\u00e9"}, **entries}, indent=1).encode() + b"   "
    raw = len(header).to_bytes(8, "little") + header + data
    (folder / "model.safetensors").write_bytes(raw)
    (folder / "config.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a directory by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
