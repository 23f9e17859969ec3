"""The checkpoints that benchmarks run on: made once, in seconds, whatever their size.

Weights are Gaussian (sigma 0.02) in bf16, cut from one block of 32 MB at changing
offsets: kernels without branches do not care that numbers come again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]
#: Size of an attention head.
HEAD = 128


def llama(hidden: int, inter: int, layers: int, vocab: int) -> Shapes:
    """A dense model."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes |= _attention(layer, hidden)
        shapes |= _mlp(layer + "mlp.", hidden, inter)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def moe(hidden: int, inter: int, layers: int, experts: int, vocab: int) -> Shapes:
    """A mixture of experts with a 2-D weight per projection and expert."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes |= _attention(layer, hidden)
        shapes[layer + "mlp.gate.weight"] = (experts, hidden)
        for e in range(experts):
            shapes |= _mlp(f"{layer}mlp.experts.{e}.", hidden, inter)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def stacked(hidden: int, inter: int, layers: int, experts: int, vocab: int) -> Shapes:
    """A mixture whose experts lie in one 3-D tensor a projection, transposed as qwen3_vl_moe's."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes |= _attention(layer, hidden)
        shapes[layer + "mlp.gate.weight"] = (experts, hidden)
        shapes[layer + "mlp.experts.gate_up_proj"] = (experts, hidden, 2 * inter)
        shapes[layer + "mlp.experts.down_proj"] = (experts, inter, hidden)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def experts_only(layers: int, experts: int, rows: int, cols: int) -> Shapes:
    """Nothing but experts: many tensors of one size."""
    return {
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": (rows, cols)
        for n in range(layers) for e in range(experts) for p in ("gate", "up", "down")
    }  # fmt: skip


def _attention(layer: str, hidden: int) -> Shapes:
    sizes = {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}
    shapes: Shapes = {f"{layer}self_attn.{p}_proj.weight": (n, hidden) for p, n in sizes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {f"{layer}{norm}.weight": (hidden,) for norm in norms}


def _mlp(parent: str, hidden: int, inter: int) -> Shapes:
    return {
        parent + "gate_proj.weight": (inter, hidden),
        parent + "up_proj.weight": (inter, hidden),
        parent + "down_proj.weight": (hidden, inter),
    }


#: name: (what it is, its tensors, number of shards)
CHECKPOINTS: dict[str, tuple[str, Callable[[], Shapes], int]] = {
    "XS": ("7 MB llama", lambda: llama(512, 1024, 1, 1024), 1),
    "E": ("250 MB llama", lambda: llama(2048, 8192, 1, 16384), 1),
    "S": ("1 GB llama", lambda: llama(2048, 8192, 8, 16384), 2),
    "M": ("4 GB llama", lambda: llama(4096, 11008, 10, 32768), 4),
    "MoE": ("2 GB mixture of experts", lambda: moe(1536, 512, 6, 64, 16384), 2),
    "F3D": ("2 GB, experts in 3-D tensors", lambda: stacked(2048, 768, 6, 32, 16384), 1),
    "K": ("70,000 tensors of 64 KB", lambda: experts_only(60, 389, 128, 256), 4),
    "L": ("the bytes of K in tensors of 96 MB", lambda: experts_only(2, 8, 11670, 4096), 4),
    "H10": ("10 GB llama", lambda: llama(8192, 28672, 5, 65536), 4),
    "H40": ("40 GB llama", lambda: llama(8192, 28672, 22, 65536), 16),
    "B": ("one tensor of 8 GB", lambda: {"layers.0.mlp.down_proj.weight": (1_000_000, 4096)}, 1),
    "T": ("1 TB, 100,000 tensors", lambda: experts_only(61, 547, 2048, 2448), 200),
}  # fmt: skip
#: Files with a header and a hole: as large as they say to a reader, all zeros, no space on disk.
HOLES = ("H10", "H40", "B", "T")


def make(name: str, folder: Path) -> Path:
    """The checkpoint ``name`` in ``folder``, written if it is not there yet."""
    target = folder / name
    if (target / "config.json").is_file():
        return target
    _, shapes_of, count = CHECKPOINTS[name]
    shapes = shapes_of()
    target.mkdir(parents=True, exist_ok=True)
    parts = list(_split(shapes, count))
    import ml_dtypes
    import numpy as np

    where = {}
    block = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    data = memoryview(block.astype(ml_dtypes.bfloat16).view(np.uint8))
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        _write(target / file, part, None if name in HOLES else data)
        where |= dict.fromkeys(part, file)
    total = sum(2 * prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps(_config(shapes)))
    return target


def _config(shapes: Shapes) -> dict[str, Any]:
    """Of a llama; with its sizes, which some tools ask for, where it is a dense one."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    layer = "model.layers.0."
    stack = shapes.get(layer + "mlp.experts.down_proj")
    if stack:
        sizes = zip(("num_experts", "moe_intermediate_size", "hidden_size"), stack, strict=True)
        return config | {"model_type": "qwen3_vl_moe", **dict(sizes)}
    if layer + "mlp.gate_proj.weight" not in shapes or "lm_head.weight" not in shapes:
        return config
    inter, hidden = shapes[layer + "mlp.gate_proj.weight"]
    return config | {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": sum(name.endswith(".q_proj.weight") for name in shapes),
        "vocab_size": shapes["lm_head.weight"][0],
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": shapes[layer + "self_attn.k_proj.weight"][0] // HEAD,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }


def _split(shapes: Shapes, count: int) -> Iterator[Shapes]:
    """Shards of about one size; llm-compressor refuses those that cut through q, k and v."""
    total = sum(prod(shape) for shape in shapes.values())
    part: Shapes = {}
    done, given = 0, 0
    block = ""
    for name, shape in shapes.items():
        before, block = block, name.rsplit(".", 2)[0]
        if block != before and done * count >= total * (given + 1):
            yield part
            part, given = {}, given + 1
        part[name] = shape
        done += prod(shape)
    yield part


def _write(path: Path, shapes: Shapes, data: memoryview | None) -> None:
    sizes = [2 * prod(shape) for shape in shapes.values()]
    ends = accumulate(sizes)
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [end - size, end]}
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    at = 0
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        if data is None:
            f.truncate(8 + len(text) + sum(sizes))
            return
        for size in sizes:
            while size:
                n = min(size, len(data) - at)
                f.write(data[at : at + n])
                size -= n
                at = (at + n + 2 * 7919) % (len(data) - 1 & ~1) if at + n < len(data) else 0


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
