"""Bits per byte of text: ``python examples/bits_per_byte.py CHECKPOINT...``

``--every-scheme CHECKPOINT`` prints a table instead. No torch.

A llama's forward pass over byte values in f32, on text it was not trained on, in windows
of the length it was trained with. Quantized checkpoints are read back as their loaders
would see them, so a difference is what quantizing the weights costs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from text import text

from streamq.checkpoint import open_checkpoint
from streamq.converting import Settings, convert
from streamq.planning import Options, make_plan
from streamq.schemes import SCHEMES, resolve
from streamq.stored import open_tensors

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]

#: Windows at a time.
BATCH = 16


def forward(w: Weights, config: dict[str, Any], tokens: Array) -> Array:
    """Logits f32 ``[batch, length, vocabulary]`` of token numbers ``[batch, length]``."""
    n, head = tokens.shape[1], config["head_dim"]
    frequency = config["rope_theta"] ** (-np.arange(0, head, 2) / head)
    angle = np.tile(np.outer(np.arange(n), frequency), 2)
    cos, sin = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    future = np.triu(np.full((n, n), -np.inf, "f4"), 1)

    def norm(x: Array, name: str) -> Array:
        mean = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + np.float32(config["rms_norm_eps"])) * w[name]

    def heads(x: Array, count: int) -> Array:
        x = x.reshape(*x.shape[:2], count, head).transpose(0, 2, 1, 3)
        return x.repeat(config["num_attention_heads"] // count, 1)

    def rotate(x: Array) -> Array:
        a, b = np.split(x, 2, -1)
        return x * cos + np.concatenate((-b, a), -1) * sin

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (h @ w[f"{layer}self_attn.{p}_proj.weight"].T for p in "qkv")
        q = rotate(heads(q, config["num_attention_heads"]))
        k, v = (heads(a, config["num_key_value_heads"]) for a in (k, v))
        a = softmax(q @ rotate(k).swapaxes(2, 3) / np.float32(head**0.5) + future) @ v
        a = a.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        x = x + a @ w[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = h @ w[layer + "mlp.gate_proj.weight"].T
        up = h @ w[layer + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bits_per_byte(folder: Path) -> float:
    """Mean bits that the model needs for a byte of the held-out text."""
    config = json.loads((folder / "config.json").read_text())
    with open_tensors(folder) as tensors:
        w = {name: array.astype(np.float32) for name, array in tensors}
    context = config["max_position_embeddings"]
    data = text(held_out=True)
    windows = (len(data) - 1) // context
    data = data[: windows * context + 1]
    inputs, targets = data[:-1].reshape(-1, context), data[1:].reshape(-1, context)
    bits = 0.0
    for i in range(0, windows, BATCH):
        p = softmax(forward(w, config, inputs[i : i + BATCH]))
        bits -= np.log2(np.take_along_axis(p, targets[i : i + BATCH, :, None], -1)).sum()
    return float(bits / targets.size)


def every_scheme(source: Path) -> None:
    """A table of what each scheme makes of a checkpoint."""
    before = bits_per_byte(source)
    print(f"| scheme | bits per byte | change | weight SQNR, dB | size, MB |\n{'|---' * 5}|")
    print(f"| none (bf16) | {before:.4f} | | | {size(source):.2f} |")
    for name in SCHEMES:
        with tempfile.TemporaryDirectory() as folder, open_checkpoint(source) as checkpoint:
            out = Path(folder, name)
            plan = make_plan(checkpoint, Options(resolve(name)))
            quality = convert(checkpoint, plan, out, Settings(stats=True)).quality
            assert quality is not None
            bits = bits_per_byte(out)
            row = (name, f"{bits:.4f}", f"{bits - before:+.4f}", f"{quality.total:.2f}")
            print(f"| {' | '.join(row)} | {size(out):.2f} |", flush=True)


def size(folder: Path) -> float:
    """MB of the shards."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6


def main(arguments: list[str]) -> None:
    """One line each; the first is what the others are compared with."""
    if arguments[0] == "--every-scheme":
        every_scheme(Path(arguments[1]))
        return
    first = None
    for folder in arguments:
        bits = bits_per_byte(Path(folder))
        first = bits if first is None else first
        print(f"{bits:.4f} bits per byte  {bits - first:+.4f}  {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
