"""Build the llm-compressor golden files next to this script.

Needs an environment with llmcompressor==0.14.*; the tests themselves only read
what it writes:

    {bf16,f16,f32}/       a tiny llama checkpoint, two shards and an index
    {bf16,f16,f32}.json   what model_free_ptq makes of it: dtype, shape and
                          sha256 of every output tensor of every scheme, the
                          bytes of the small ones, and the quantization_config

    python make.py [--only bf16] [--keep DIR]
"""

import argparse
import base64
import hashlib
import json
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from llmcompressor import model_free_ptq
from loguru import logger
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "safetensors", "numpy")
SCHEMES = (
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP8A16",
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "W3A16",
)
IGNORE = ("lm_head", "model.embed_tokens")
VOCAB = 16
# Tensors stored with their bytes, so that a mismatch can be read off the file.
SMALL_SUFFIXES = ("_scale", "_zero_point", "_shape")
SMALL_BYTES = 2048


@dataclass(frozen=True)
class Variant:
    """One checkpoint: its dtype, its sizes, and where the dtype's edges lie."""

    name: str
    dtype: torch.dtype
    seed: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tiny: float  # small, still normal
    large: float  # large, still far from overflow
    top_exponent: int  # of the largest finite values
    bottom_exponent: int  # of the smallest normal value


# Every weight has a multiple of 128 columns. The rows of k/v are not a multiple
# of 128, so the last row of FP8 blocks is ragged: the second of two in bf16, the
# only one in the others.
VARIANTS = (
    Variant("bf16", torch.bfloat16, 1, 2, 256, 4, 2, 96, 128, 1e-30, 1e30, 127, -126),
    Variant("f16", torch.float16, 2, 1, 128, 4, 2, 32, 256, 2.0**-13, 3e4, 15, -14),
    Variant("f32", torch.float32, 3, 1, 128, 4, 2, 32, 256, 1e-30, 1e30, 127, -126),
)

# Sixteen values in units of 2**exponent. The first is the group's absmax, which
# makes the scale of the named target a power of two; the others then lie
# halfway between two of its codes.
TIES = {
    "fp8": (-13, [448, 432, 17, 1.0625, 1.1875, 1.3125, 2**-10, 3 * 2**-10, -5 * 2**-10,
                  -(2**-10), -1.0625, -1.1875, -17, -432, 15.5, -0.0]),
    "fp4": (-7, [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5,
                 -3.5, -5, -0.0]),
    "int8": (-11, [127.5, 126.5, 1.5, 0.5, -0.5, -1.5, 2.5, -2.5, 63.5, 64.5, -63.5, -64.5,
                   -126.5, -127.5, 100.5, -99.5]),
    "int4": (-8, [-7.5, 7.5, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5, 0.5, -0.5, -1.5, -2.5, -3.5, -4.5,
                  -5.5, -6.5]),
    "int3": (-7, [3.5, 2.5, 1.5, 0.5, -0.5, -1.5, -2.5, -3.5, 0, -0.0, 1, -1, 2, -2, 3, -3]),
    # 15 steps from min to max: the scale is a power of two.
    "int4_asym": (-8, [10, -5, 0.5, 1.5, -0.5, -1.5, 9.5, -4.5, 2.5, 3.5, -2.5, -3.5, 8.5, 7.5,
                       6.5, 5.5]),
    # As above, with the zero point itself halfway between two integers.
    "int4_asym_zp": (-8, [11.5, -3.5, 0.5, 1, 1.5, -1, -0.5, 2, 2.5, 3, 10.5, 9, -2, -1.5, 4,
                          7.5]),
}  # fmt: skip

# Absmax of every 128x128 block of the edge tensors: FP8_BLOCK's scale is 2**-11.
BLOCK_MAX = 448 * 2.0**-11
# Absmax of an edge tensor (and of what is fused with it): NVFP4's global scale,
# 448 * 6 / absmax, is a power of two, so that "fp4" above really gives ties.
TENSOR_MAX = 448 * 6 * 2.0**-13


def gauss(rng: np.random.Generator, rows: int, cols: int, std: float = 0.02) -> np.ndarray:
    """Draw normal weights whose spread differs from row to row, below BLOCK_MAX."""
    spread = std * 2.0 ** rng.uniform(-3, 1, size=(rows, 1))
    return np.clip(rng.standard_normal((rows, cols)) * spread, -5 * std, 5 * std)


def group_tops(cols: int, group: int, tops: list[float], sign: float) -> np.ndarray:
    """Build a row of small values with one of the absmax values in each group."""
    row = np.zeros(cols)
    for i, start in enumerate(range(0, cols, group)):
        top = tops[i % len(tops)]
        row[start : start + group] = sign * top * np.linspace(0, 0.5, group)
        row[start + (5 * i) % group] = sign * top
    return row


def edge_rows(v: Variant, rng: np.random.Generator, cols: int) -> np.ndarray:
    """Build the rows that break naive implementations, none larger than BLOCK_MAX."""
    info = torch.finfo(v.dtype)
    mantissa = round(-np.log2(info.eps))
    subnormal = 2.0 ** (v.bottom_exponent - mantissa)
    noise = gauss(rng, 8, cols)
    zero = np.zeros(cols)
    rows = [
        zero,
        -zero,
        np.where(np.arange(cols) % 3 == 0, 0.0, -0.0),
        rng.integers(-(2**mantissa) + 1, 2**mantissa, cols) * subnormal,
        rng.integers(-1, 2, cols) * subnormal,
        np.where(noise[0] < 0, -v.tiny, v.tiny),
        noise[0] * v.tiny,
        np.full(cols, 0.03125),
        np.full(cols, -0.0123),
        np.abs(noise[1]),
        -np.abs(noise[1]),
        0.05 + np.abs(noise[2]) / 16,
        -0.05 - np.abs(noise[2]) / 16,
    ]

    outlier = noise[3] / 256
    outlier[11::128] = 0.2
    outlier[77 :: 2 * 128] = -0.2
    rows.append(outlier)

    zero_group = noise[4].copy()
    zero_group[:128] = 0
    rows.append(zero_group)

    zero_small = noise[5].copy()
    zero_small[0:16] = 0
    zero_small[32:64] = -0.0
    rows.append(zero_small)

    mixed = noise[6].copy()
    mixed[: cols // 2 : 2] = subnormal
    mixed[cols // 2 :] = rng.integers(-3, 4, cols - cols // 2) * subnormal
    rows.append(mixed)

    rows.append(np.concatenate([np.abs(noise[7][:64]), -np.abs(noise[7][64:])]))

    # Around where the exponent of an MX scale is clamped, or where its group's
    # absmax is rounded down to zero.
    low = 2.0**v.bottom_exponent
    for tops in (
        [low, low * 1.75, low * 2, low * 3.5],
        [low * 0.75, low * 0.5, low * 0.7, subnormal],
        [low * 2.0**e for e in (3, 6, 7, 8)],
        [low * 1.75 * 2.0**e for e in (2, 5, 7, 8)],
    ):
        rows.append(group_tops(cols, 32, tops, 1.0))
        rows.append(group_tops(cols, 32, tops, -1.0))

    for exponent, values in TIES.values():
        rows.append(np.tile(np.array(values) * 2.0**exponent, cols // 16))
    return np.stack(rows)


def with_edges(v: Variant, rng: np.random.Generator, weight: np.ndarray, last: bool) -> np.ndarray:
    """Plant the edge rows at the top or at the bottom, and one outlier per block."""
    rows = edge_rows(v, rng, weight.shape[1])
    start = weight.shape[0] - len(rows) if last else 0
    weight[start : start + len(rows)] = rows
    plain = 0 if last else len(rows)
    for top in range(0, weight.shape[0], 128):
        row = max(top, plain)
        for col in range(0, weight.shape[1], 128):
            weight[row, col + (37 * row + col) % 128] = BLOCK_MAX if col else -BLOCK_MAX
    return weight


def with_extremes(v: Variant, weight: np.ndarray) -> np.ndarray:
    """Plant values up to the largest finite one.

    A 128-group holds extremes of one sign only: max - min, which the asymmetric
    scheme takes, would overflow otherwise.
    """
    power = 2.0**v.top_exponent
    biggest = float(torch.finfo(v.dtype).max)
    tops = [1.75 * power, 1.74 * power, 1.5 * power, biggest]
    cols = weight.shape[1]
    weight[3] *= v.large / np.abs(weight[3]).max()
    weight[4] = v.large
    weight[5] = group_tops(cols, 32, tops, 1.0)
    weight[6] = group_tops(cols, 32, tops, -1.0)
    # One extreme in a row of ordinary values.
    for row, top in enumerate(tops, start=7):
        weight[row, 40] = top
        weight[row + 4, 40] = -top
    return weight


def with_nvfp4_max(weight: np.ndarray) -> np.ndarray:
    """Plant TENSOR_MAX, in the last row and column."""
    weight[-1, -1] = TENSOR_MAX
    return weight


def first_layer(v: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights with edge cases; only o_proj goes beyond TENSOR_MAX.

    NVFP4 has one global scale per tensor, so the extremes stay in one tensor.
    """
    q, kv = v.heads * v.head_dim, v.kv_heads * v.head_dim
    weights = {
        "self_attn.q_proj": with_nvfp4_max(with_edges(v, rng, gauss(rng, q, v.hidden), last=False)),
        "self_attn.k_proj": gauss(rng, kv, v.hidden),
        "self_attn.v_proj": with_edges(v, rng, gauss(rng, kv, v.hidden), last=True),
        "self_attn.o_proj": with_extremes(v, gauss(rng, v.hidden, q)),
        "mlp.gate_proj": with_edges(v, rng, gauss(rng, v.intermediate, v.hidden), last=False),
        "mlp.up_proj": with_nvfp4_max(gauss(rng, v.intermediate, v.hidden)),
        # Small: 448 * 6 / absmax overflows float16, in which it is computed.
        "mlp.down_proj": gauss(rng, v.hidden, v.intermediate, std=0.004),
    }
    weights["mlp.down_proj"][-128:, -128:] = 0
    if q >= 384:
        weights["self_attn.q_proj"][128:256, -128:] = 0
    return weights


def last_layer(v: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Mostly ordinary weights; the absmax of a fused set is in its last tensor.

    An all-zero tensor leaves NVFP4's global scale nothing to go by.
    """
    q, kv = v.heads * v.head_dim, v.kv_heads * v.head_dim
    return {
        "self_attn.q_proj": gauss(rng, q, v.hidden),
        "self_attn.k_proj": gauss(rng, kv, v.hidden, std=0.01),
        "self_attn.v_proj": gauss(rng, kv, v.hidden, std=0.05),
        "self_attn.o_proj": gauss(rng, v.hidden, q),
        "mlp.gate_proj": gauss(rng, v.intermediate, v.hidden),
        "mlp.up_proj": with_edges(v, rng, gauss(rng, v.intermediate, v.hidden), last=True),
        "mlp.down_proj": np.zeros((v.hidden, v.intermediate)),
    }


def make_config(v: Variant) -> dict:
    """Build the config.json of the checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": v.head_dim,
        "hidden_act": "silu",
        "hidden_size": v.hidden,
        "intermediate_size": v.intermediate,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": v.heads,
        "num_hidden_layers": v.layers,
        "num_key_value_heads": v.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(v.dtype).removeprefix("torch."),
        "vocab_size": VOCAB,
    }


def make_tensors(v: Variant) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, in its dtype."""
    rng = np.random.default_rng(v.seed)
    arrays = {"model.embed_tokens.weight": gauss(rng, VOCAB, v.hidden)}
    for i in range(v.layers):
        layer = first_layer(v, rng) if i == 0 else last_layer(v, rng)
        for name, weight in layer.items():
            arrays[f"model.layers.{i}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{i}.{name}.weight"] = 1 + gauss(rng, 1, v.hidden)[0]
    arrays["model.norm.weight"] = 1 + gauss(rng, 1, v.hidden)[0]
    arrays["lm_head.weight"] = gauss(rng, VOCAB, v.hidden)

    tensors = {name: torch.from_numpy(a).to(v.dtype) for name, a in arrays.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
    return tensors


def write_checkpoint(v: Variant, directory: Path) -> None:
    """Write the checkpoint; the last layer's fused sets straddle the shards.

    q/k/v lies with its first member in the first shard, gate/up with its first
    member in the second: a set has to be found through the index either way.
    """
    tensors = make_tensors(v)
    last = f"model.layers.{v.layers - 1}."
    second = {"model.norm.weight", "lm_head.weight"} | {
        f"{last}{name}.weight"
        for name in (
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.down_proj",
            "post_attention_layernorm",
        )
    }
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[name in second] for name in sorted(tensors)}

    directory.mkdir(parents=True, exist_ok=True)
    for file in names:
        shard = {name: tensors[name] for name in weight_map if weight_map[name] == file}
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2))
    write_text(directory / "config.json", json.dumps(make_config(v), indent=2))


def write_text(path: Path, text: str) -> None:
    """Write a text file the same way on every platform."""
    path.write_bytes(text.encode() + b"\n")


def read_raw(path: Path) -> dict[str, dict]:
    """Describe the tensors of a safetensors file as they lie in it.

    The header is read by hand, so that the result does not depend on which
    dtypes a library knows.
    """
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = blob[8 + size + begin : 8 + size + end]
        tensors[name] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if name.endswith(SMALL_SUFFIXES) and len(data) <= SMALL_BYTES:
            tensors[name]["base64"] = base64.b64encode(data).decode()
    return tensors


def quantize(source: Path, target: Path, scheme: str) -> dict:
    """Run one scheme and describe what it wrote."""
    model_free_ptq(
        model_stub=str(source),
        save_directory=str(target),
        scheme=scheme,
        ignore=IGNORE,
        max_workers=1,
        device="cpu",
    )
    tensors: dict[str, dict] = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors |= read_raw(file)
    config = json.loads((target / "config.json").read_text())
    return {
        "quantization_config": config["quantization_config"],
        "tensors": dict(sorted(tensors.items())),
    }


def dump(value: object, depth: int, indent: str = "") -> str:
    """JSON with one line per entry down to a depth, compact below it."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    inner = indent + " "
    items = (f"{inner}{json.dumps(k)}: {dump(x, depth - 1, inner)}" for k, x in value.items())
    return "{\n" + ",\n".join(items) + "\n" + indent + "}"


def make(v: Variant, keep: Path | None) -> None:
    """Write one checkpoint and what every scheme makes of it."""
    source = HERE / v.name
    write_checkpoint(v, source)
    with tempfile.TemporaryDirectory() as scratch:
        root = (keep or Path(scratch)) / v.name
        schemes = {scheme: quantize(source, root / scheme, scheme) for scheme in SCHEMES}
    golden = {
        "versions": {package: version(package) for package in PACKAGES},
        "schemes": schemes,
    }
    write_text(HERE / f"{v.name}.json", dump(golden, depth=4))


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Build the llm-compressor golden files.")
    parser.add_argument("--only", choices=[v.name for v in VARIANTS], help="one dtype only")
    parser.add_argument("--keep", type=Path, help="keep the quantized checkpoints in this folder")
    args = parser.parse_args()

    if not version("llmcompressor").startswith("0.14."):
        parser.error("needs llmcompressor==0.14.*")
    # Its log is one line per file; errors are raised anyway.
    logger.remove()
    for v in VARIANTS:
        if args.only in (None, v.name):
            make(v, args.keep)


if __name__ == "__main__":
    main()
