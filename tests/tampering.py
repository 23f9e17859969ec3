"""Outputs that were tampered with: how, and what verify has to say of it."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from streamq.checkpoint import open_checkpoint
from streamq.schemes import SCHEMES

INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
OUT = "model.layers.0.self_attn.o_proj"
NORM = "model.layers.0.input_layernorm.weight"
OTHER_NORM = "model.layers.0.post_attention_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


class Raw(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


@contextmanager
def shards(folder):
    """``{file: {name: Raw}}`` of a checkpoint, written back with an index that fits.

    Without a library: numpy has no e4m3, and some of what is written here none would write.
    """
    files = {}
    with open_checkpoint(folder) as c:
        for t in c.tensors.values():
            data = (folder / t.file).read_bytes()[t.start : t.end]
            files.setdefault(t.file, {})[t.name] = Raw(t.dtype, list(t.shape), data)
    yield files
    for file, tensors in files.items():
        header, body = {"__metadata__": {"format": "pt"}}, b""
        for name, t in tensors.items():
            span = [len(body), len(body) + len(t.data)]
            header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": span}
            body += t.data
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    total = sum(len(t.data) for tensors in files.values() for t in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def holder(files, name):
    return next(tensors for tensors in files.values() if name in tensors)


# Each of these makes a function that changes a folder.


def data(name, change, at=0):
    """Put ``change(old bytes from at on)`` there; it must differ and may be shorter."""

    def tamper(folder):
        with open_checkpoint(folder) as c:
            t = c.tensors[name]
        file = bytearray((folder / t.file).read_bytes())
        old = bytes(file[t.start + at : t.end])
        new = change(old)
        assert len(new) <= len(old)
        assert not old.startswith(new)
        file[t.start + at : t.start + at + len(new)] = new
        (folder / t.file).write_bytes(file)

    return tamper


def put(name, dtype, *values, at=0):
    return data(name, lambda old: np.array(values).astype(dtype).tobytes(), at)


def flip(name, mask=1, at=0):
    return data(name, lambda old: bytes([old[at] ^ mask]), at)


def times(name, dtype, factor):
    return data(name, lambda old: (np.frombuffer(old, dtype) * dtype(factor)).tobytes())


def entry(name, change):
    """Replace a Raw, or drop it where ``change`` gives None."""

    def tamper(folder):
        with shards(folder) as files:
            tensors = holder(files, name)
            new = change(tensors.pop(name))
            if new is not None:
                tensors[name] = new

    return tamper


def drop(name):
    return entry(name, lambda old: None)


def recast(name, **kw):
    return entry(name, lambda old: old._replace(**kw))


def add(name, *raw, beside=NORM):
    def tamper(folder):
        with shards(folder) as files:
            holder(files, beside)[name] = Raw(*raw)

    return tamper


def swap(one, other):
    def tamper(folder):
        with shards(folder) as files:
            a, b = holder(files, one), holder(files, other)
            a[one], b[other] = b[other], a[one]

    return tamper


def drop_module(module):
    def tamper(folder):
        with shards(folder) as files:
            for tensors in files.values():
                for name in [n for n in tensors if n.startswith(module + ".")]:
                    del tensors[name]

    return tamper


def repeat(name):
    """The same tensor in each shard."""

    def tamper(folder):
        with shards(folder) as files:
            raw = holder(files, name)[name]
            for tensors in files.values():
                tensors[name] = raw

    return tamper


def first_shard(change):
    def tamper(folder):
        shard = min(folder.glob("*.safetensors"))
        new = change(shard.read_bytes())
        shard.unlink() if new is None else shard.write_bytes(new)

    return tamper


def in_json(file, change):
    def tamper(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return tamper


def index(change):
    return in_json(INDEX, change)


def config(change):
    return in_json("config.json", lambda c: change(c["quantization_config"]))


def weights(**kw):
    return config(lambda q: q["config_groups"]["group_0"]["weights"].update(kw))


def codes_of(scheme):
    plain = scheme.element == "e4m3" or scheme.name == "W8A8"
    return Q + (".weight" if plain else ".weight_packed")


BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
SCALE, GLOBAL, SHAPE = Q + ".weight_scale", ".weight_global_scale", Q + ".weight_shape"
BAD_SCALE = r"q_proj.weight_scale' is .* scales must be finite and above zero"
HALF_STEP = "q_proj.weight' at row .* more than half a code step away"
DIFFERS = "differs from the source within bytes"
NOT_IGNORED = "is not quantized and config.json does not ignore it"
ONE_GROUP = "config.json has no quantization_config|has no config_groups"
UNKNOWN = "is none that streamq knows"

#: Who finds it: the output by itself, or only a look at the source.
ALONE, SOURCE = False, True


class Tamper(NamedTuple):
    name: str
    scheme: str
    needs_source: bool
    change: Callable[[Path], None]
    failure: str


# An 8-bit integer needs two steps: half a step and half an ulp of bf16 are more than one.
LEAST_CHANGES = [
    Tamper(f"lowest bit of a code, {s.name}", s.name, SOURCE,
           flip(codes_of(s), mask=2 if s.element == "int" and s.bits == 8 else 1, at=4), HALF_STEP)
    for s in SCHEMES.values()
]  # fmt: skip

BAD_CONSTANTS = [
    Tamper(f"{part} {value}", "NVFP4", ALONE,
           put(f"{OUT}.{part}", np.float32, value), rf"o_proj.{part}' is {value}")
    for part in ("weight_global_scale", "input_global_scale")
    for value in (NAN, INF, 0.0, -1.0)
]  # fmt: skip

TAMPERS = [Tamper(*row) for row in [
    # codes
    *LEAST_CHANGES,
    ("e4m3 code NaN", "FP8_DYNAMIC", SOURCE,
     put(Q + ".weight", np.uint8, 127), HALF_STEP),
    ("last code byte", "NVFP4", SOURCE,
     data(Q + ".weight_packed", lambda old: old[:-1] + bytes([old[-1] ^ 255])),
     "q_proj.weight' at row 127, column 12[67]: .* more than half a code step away"),
    ("codes of two modules swapped", "W4A16", SOURCE,
     swap(Q + ".weight_packed", OUT + ".weight_packed"), HALF_STEP),
    ("zero point changed", "W4A16_ASYM", SOURCE,
     flip(Q + ".weight_zero_point"), HALF_STEP),
    ("zero point dropped", "W4A16_ASYM", ALONE,
     drop(Q + ".weight_zero_point"), "weight_zero_point' is absent"),
    ("zero point in a symmetric scheme", "W4A16", ALONE,
     add(Q + ".weight_zero_point", "I32", [16, 1], bytes(64)), "weight_zero_point' is I32"),
    # scales
    ("e4m3 scale NaN", "NVFP4", ALONE, put(SCALE, E4M3, NAN), BAD_SCALE),
    ("e4m3 scale 0", "NVFP4", ALONE, put(SCALE, E4M3, 0, at=9), "at row 1, column 1: scales must"),
    ("e4m3 scale negative", "NVFP4", ALONE, flip(SCALE, mask=0x80), BAD_SCALE),
    ("bf16 scale NaN", "FP8_DYNAMIC", ALONE, put(SCALE, BF16, NAN), BAD_SCALE),
    ("bf16 scale inf", "FP8_BLOCK", ALONE, put(SCALE, BF16, INF), BAD_SCALE),
    ("bf16 scale 0", "W4A16", ALONE, put(SCALE, BF16, 0), BAD_SCALE),
    ("bf16 scale 0 of an asymmetric scheme", "W4A16_ASYM", ALONE, put(SCALE, BF16, 0), BAD_SCALE),
    ("bf16 scale negative", "W8A8", ALONE, put(SCALE, BF16, -1), BAD_SCALE),
    ("e8m0 scale 255, codes e2m1", "MXFP4", ALONE, put(SCALE, np.uint8, 255), BAD_SCALE),
    ("e8m0 scale 255, codes e4m3", "MXFP8", ALONE, put(SCALE, np.uint8, 255), BAD_SCALE),
    ("e4m3 scale halved", "NVFP4", SOURCE,
     data(SCALE, lambda old: (np.frombuffer(old[:1], E4M3) * E4M3(0.5)).tobytes()), HALF_STEP),
    ("bf16 scale doubled", "W4A16", SOURCE, times(SCALE, BF16, 2), HALF_STEP),
    ("e8m0 scale doubled", "MXFP4", SOURCE,
     data(SCALE, lambda old: bytes([old[0] + 1])), HALF_STEP),
    ("e4m3 scale as U8", "NVFP4", ALONE,
     recast(SCALE, dtype="U8"), r"weight_scale' is U8 \[128, 8\], NVFP4 has F8_E4M3"),
    ("bf16 scale as I16", "W4A16", ALONE,
     recast(SCALE, dtype="I16"), "weight_scale' is I16, not a float"),
    ("bf16 scale as F16", "W4A16", SOURCE, recast(SCALE, dtype="F16"), HALF_STEP),
    ("scale transposed", "NVFP4", ALONE,
     recast(SCALE, shape=[8, 128]), r"is F8_E4M3 \[8, 128\], NVFP4 has F8_E4M3 \[128, 8\]"),
    ("scale without columns", "FP8_DYNAMIC", ALONE,
     recast(SCALE, shape=[128]), r"is BF16 \[128\], FP8_DYNAMIC has BF16 \[128, 1\]"),
    ("scale dropped", "NVFP4", ALONE,
     drop(SCALE), "no weight of two dimensions with its weight_scale"),
    ("codes dropped", "NVFP4", ALONE,
     drop(Q + ".weight_packed"), "no weight of two dimensions with its weight_scale"),
    # constants
    *BAD_CONSTANTS,
    ("global scale unequal in q, k, v", "NVFP4", ALONE,
     times(K + GLOBAL, np.float32, 1.5),
     "vLLM 0.32 takes the largest weight_global_scale of a fused layer .*k_proj'"),
    ("global scale NaN in q, k, v", "NVFP4", ALONE,
     put(K + GLOBAL, np.float32, NAN), "k_proj.weight_global_scale' is nan"),
    ("global scale changed", "NVFP4", SOURCE,
     times(OUT + GLOBAL, np.float32, 1.5), HALF_STEP.replace("q_", "o_")),
    ("global scale dropped", "NVFP4A16", ALONE,
     drop(OUT + GLOBAL), "o_proj.weight_global_scale' is absent"),
    ("weight_shape wrong by a group", "W4A16", ALONE,
     put(SHAPE, np.int64, 128, 256), "W4A16 has"),
    ("weight_shape wrong by a column", "W4A16", SOURCE,
     put(SHAPE, np.int64, 128, 127), r"BF16 \[128, 128\] in the source, not a float of"),
    ("weight_shape wrong by a row", "W4A16", ALONE,
     put(SHAPE, np.int64, 127, 128), r"weight_shape says \[127, 128\]"),
    ("weight_shape with a row more", "W4A16", ALONE,
     put(SHAPE, np.int64, 129, 128), r"weight_shape says \[129, 128\]"),
    ("weight_shape negative", "W4A16", ALONE,
     put(SHAPE, np.int64, 128, -128), r"weight_shape says \[128, -128\]"),
    ("weight_shape huge", "W4A16", ALONE, put(SHAPE, np.int64, 128, 2**63 - 1), "W4A16 has"),
    ("weight_shape dropped", "W4A16", ALONE, drop(SHAPE), "q_proj.weight_shape'"),
    ("weight_shape of one number", "W4A16", ALONE,
     recast(SHAPE, shape=[1], data=bytes(8)), "q_proj.weight_shape'"),
    ("weight_shape in F32, NaN", "W4A16", ALONE,
     recast(SHAPE, dtype="F32", data=np.float32([NAN, NAN]).tobytes()), "weight_shape"),
    ("weight_shape in F4", "W4A16", ALONE, recast(SHAPE, dtype="F4", data=b"1"), "weight_shape"),
    # tensors that are copied, tensors at all
    ("bit of a norm", "NVFP4", SOURCE, flip(NORM), DIFFERS),
    ("last bit of the embedding", "NVFP4", SOURCE,
     data(EMBEDDING, lambda old: old[:-1] + bytes([old[-1] ^ 128])), DIFFERS),
    ("norms swapped", "NVFP4", SOURCE, swap(NORM, OTHER_NORM), DIFFERS),
    ("norm in another dtype", "NVFP4", SOURCE,
     recast(NORM, dtype="F16"), r"is F16 \[128\], the source has BF16 \[128\]"),
    ("norm in another shape", "NVFP4", SOURCE,
     recast(NORM, shape=[128, 1, 1]), r"is BF16 \[128, 1, 1\], the source has BF16 \[128\]"),
    ("norm dropped", "NVFP4", SOURCE, drop(NORM), "input_layernorm.weight' is not in the output"),
    ("module dropped", "NVFP4", SOURCE, drop_module(OUT), "o_proj.weight' is not in the output"),
    ("vector added", "NVFP4", SOURCE,
     add("model.extra.bias", "BF16", [4], bytes(8)), "'model.extra.bias' is not in the source"),
    ("Linear added", "NVFP4", ALONE,
     add("model.extra.weight", "BF16", [4, 4], bytes(32)), "'model.extra.weight' " + NOT_IGNORED),
    ("weight beside its codes", "NVFP4", ALONE,
     add(Q + ".weight", "BF16", [4, 4], bytes(32)), "q_proj.weight' is BF16 .* NVFP4 has absent"),
    # shards
    ("shard missing", "NVFP4", ALONE,
     first_shard(lambda old: None), "named by the index but not in"),
    ("shard truncated", "NVFP4", ALONE, first_shard(lambda old: old[:-7]), "it is truncated"),
    ("shard longer", "NVFP4", ALONE, first_shard(lambda old: old + b"1"), "belong to no tensor"),
    ("shard empty", "NVFP4", ALONE, first_shard(lambda old: b""), "0 bytes are too few"),
    ("tensor in two shards", "NVFP4", ALONE, repeat(NORM), "a checkpoint holds each tensor once"),
    # index
    ("index missing", "NVFP4", ALONE,
     lambda folder: (folder / INDEX).unlink(), f"2 shards without {INDEX}"),
    ("index is not JSON", "NVFP4", ALONE,
     lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: is not valid JSON"),
    ("index with a wrong total_size", "NVFP4", ALONE,
     index(lambda i: i["metadata"].update(total_size=1)), "total_size is 1, the tensors have"),
    ("index without total_size", "NVFP4", ALONE,
     index(lambda i: i.pop("metadata")), "total_size is None, the tensors have"),
    ("index names an absent tensor", "NVFP4", ALONE,
     index(lambda i: i["weight_map"].update(ghost=i["weight_map"][NORM])),
     "holds tensor 'ghost', but no shard has it"),
    ("index lacks a tensor", "NVFP4", ALONE,
     index(lambda i: i["weight_map"].pop(NORM)), "which the index does not name"),
    # config
    ("config missing", "NVFP4", ALONE,
     lambda folder: (folder / "config.json").unlink(), ONE_GROUP),
    ("config is not JSON", "NVFP4", ALONE,
     lambda folder: (folder / "config.json").write_text("["), "config.json: is not valid JSON"),
    ("no quantization_config", "NVFP4", ALONE,
     in_json("config.json", lambda c: c.pop("quantization_config")), ONE_GROUP),
    ("quantization_config is text", "NVFP4", ALONE,
     in_json("config.json", lambda c: c.update(quantization_config="x")), "must be an object"),
    ("two config groups", "NVFP4", ALONE,
     config(lambda q: q["config_groups"].update(group_1={})), UNKNOWN),
    ("unknown scheme", "NVFP4", ALONE, weights(num_bits=5), UNKNOWN),
    ("another scheme", "MXFP8", ALONE, weights(num_bits=4), UNKNOWN),
    ("group_size 64", "W4A16", ALONE,
     weights(group_size=64), r"weight_scale' is BF16 \[128, 1\], W4A16 has BF16 \[128, 2\]"),
    ("group_size is text", "W4A16", ALONE, weights(group_size="128"), UNKNOWN),
    ("group_size 0", "W4A16", ALONE, weights(group_size=0), f"{UNKNOWN}|group_size"),
    ("group_size negative", "W4A16", ALONE, weights(group_size=-128), f"{UNKNOWN}|W4A16 has"),
    ("quantized module ignored", "NVFP4", ALONE,
     config(lambda q: q["ignore"].append(Q)), "q_proj' is quantized, but config.json ignores it"),
    ("lm_head not ignored", "NVFP4", ALONE,
     config(lambda q: q["ignore"].remove("lm_head")), "'lm_head.weight' " + NOT_IGNORED),
    ("ignore is a number", "NVFP4", ALONE, config(lambda q: q.update(ignore=5)), "ignore"),
    ("ignore holds a list", "NVFP4", ALONE, config(lambda q: q.update(ignore=[["a"]])), "ignore"),
]]  # fmt: skip
BY_NAME = {row.name: row for row in TAMPERS}
