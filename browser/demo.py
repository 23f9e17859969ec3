"""Checkpoints whose reports are looked at: the bundled llama, and a made-up MoE of 24 layers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 24, 8, 256, 128, 512

#: Experts in four bits, attention in eight, and o_proj of the first and the last layers in another.
RECIPE = """
scheme = "nvfp4a16"
[[rule]]
pattern = "re:.*layers[.](0|1|22|23)[.]self_attn[.]o_proj$"
scheme = "w8a16"
[[rule]]
pattern = "*.self_attn.*"
scheme = "fp8_dynamic"
"""


def moe(folder: Path) -> Path:
    """Weights with heavy tails, and outliers in the down_proj of three layers."""
    tensors = {}

    def put(name: str, rows: int, cols: int, layer: int = 0) -> None:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        tail = rng.standard_t(4 + 12 * rng.random(), (rows, cols))
        if layer in (5, 6, 17) and name.endswith("down_proj"):
            tail[rng.random(tail.shape) < 0.004] *= 30
        tensors[name + ".weight"] = (0.02 * tail).astype(ml_dtypes.bfloat16)

    put("model.embed_tokens", VOCABULARY, HIDDEN)
    put("lm_head", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        for leaf, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)):
            put(f"{at}self_attn.{leaf}", rows, HIDDEN, n)
        put(f"{at}mlp.gate", EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for leaf, shape in (("gate_proj", (INNER, HIDDEN)), ("up_proj", (INNER, HIDDEN)),
                                ("down_proj", (HIDDEN, INNER))):  # fmt: skip
                put(f"{at}mlp.experts.{e}.{leaf}", *shape, n)
        tensors[f"{at}input_layernorm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
