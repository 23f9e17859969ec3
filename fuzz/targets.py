"""What is fuzzed: a function of bytes for each kind of input that others write.

Each lets only StreamqError pass as an answer, of one sentence in one line; whatever else escapes
is a bug. ``tests/corpus`` has what was once interesting, and ``make test`` replays it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from streamq.batch import read_jobs
from streamq.checkpoint import open_checkpoint
from streamq.errors import StreamqError
from streamq.planning import Options, make_plan
from streamq.recipe import load
from streamq.repairing import make_plan as plan_repair
from streamq.repairing import open_broken
from streamq.schemes import resolve
from streamq.stored import open_tensors
from streamq.trust import crc32, parse_record
from streamq.verifying import verify

#: In memory where there is such a place: a target writes a file or two each time.
_PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FOLDER = Path(tempfile.mkdtemp(prefix="streamq-fuzz-", dir=_PLACE))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
_LARGEST = 1 << 16


def _checked(what: Callable[[], object]) -> None:
    """Run it. A StreamqError is an answer if it is one line."""
    said = None
    try:
        what()
    except StreamqError as e:
        said = str(e)
    assert said is None or len(said.splitlines()) == 1, f"not one line: {said!r}"


def _folder(name: str) -> Path:
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    return folder


def _write_shard(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A small shard; every byte is 56, which is 1.0 as a scale in e4m3."""
    sizes = {"U8": 1, "F8_E4M3": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\x38" * end)


#: A module of each kind of layout, so that a config has something to be about.
_TENSORS: dict[str, tuple[str, list[int]]] = {
    "model.layers.0.self_attn.q_proj.weight_packed": ("U8", [16, 16]),
    "model.layers.0.self_attn.q_proj.weight_scale": ("F8_E4M3", [16, 2]),
    "model.layers.0.self_attn.q_proj.weight_global_scale": ("F32", [1]),
    "model.layers.0.self_attn.k_proj.weight_packed": ("U8", [16, 16]),
    "model.layers.0.self_attn.k_proj.weight_scale": ("F8_E4M3", [16, 2]),
    "model.layers.0.self_attn.k_proj.weight_global_scale": ("F32", [1]),
    "model.layers.0.mlp.gate_proj.weight": ("U8", [16, 16]),
    "model.layers.0.mlp.gate_proj.weight_scale": ("F8_E4M3", [16, 2]),
    "model.layers.0.mlp.gate_proj.weight_scale_2": ("F32", []),
    "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", [128, 128]),
    "model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", [1, 1]),
    "model.layers.0.mlp.down_proj.qweight": ("I32", [32, 8]),
    "model.layers.0.mlp.down_proj.qzeros": ("I32", [1, 8]),
    "model.layers.0.mlp.down_proj.scales": ("F16", [1, 64]),
    "model.layers.0.mlp.down_proj.g_idx": ("I32", [32]),
    "model.layers.0.input_layernorm.weight": ("BF16", [16]),
    "lm_head.weight": ("BF16", [16, 32]),
}
#: The same by the first part of a name's end, as checkpoints are of one kind each.
_KINDS = {
    "compressed-tensors": ("q_proj", "k_proj"), "modelopt": ("gate_proj",), "fp8": ("up_proj",),
    "awq": ("down_proj",), "plain": (),
}  # fmt: skip


def _bytes_of(raw: bytes) -> int:
    """The end of the last tensor of a header, if it is one and not far away."""
    try:
        ends = [t["data_offsets"][1] for k, t in json.loads(raw).items() if k != "__metadata__"]
        return int(max(0, min(max(ends, default=0), _LARGEST)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def header(data: bytes) -> None:
    """A safetensors file: opened, planned, iterated.

    A whole one where the first byte is odd; else JSON, to which length and zeros are added.
    """
    path = _folder("header") / "model.safetensors"
    raw = data[1:_LARGEST]
    if not data or data[0] % 2 == 0:
        raw = len(raw).to_bytes(8, "little") + raw + bytes(_bytes_of(raw))
    path.write_bytes(raw)

    def look() -> None:
        with open_checkpoint(path) as c:
            make_plan(c, Options(resolve("nvfp4a16")))
        with open_tensors(path) as tensors:
            for _ in tensors:
                pass

    _checked(look)


def index(data: bytes) -> None:
    """An index beside two shards: opened, verified, planned to be repaired."""
    folder = _folder("index")
    names = list(_TENSORS)
    for i, part in ((1, names[-2:-1]), (2, names[-1:])):
        file = folder / f"model-0000{i}-of-00002.safetensors"
        if not file.exists():
            _write_shard(file, {name: _TENSORS[name] for name in part})
    (folder / "model.safetensors.index.json").write_bytes(data[:_LARGEST])

    def look() -> None:
        verify(folder)
        source, wrong = open_broken(folder)
        with source:
            plan_repair(source, wrong)

    _checked(look)


def config(data: bytes) -> None:
    """A config.json; its first byte chooses the checkpoint that it stands beside."""
    kinds = list(_KINDS)
    kind = kinds[data[0] % len(kinds)] if data else "plain"
    folder = _folder(f"config-{kind}")
    if not (folder / "model.safetensors").exists():
        leaves = (*_KINDS[kind], "input_layernorm", "lm_head")
        chosen = {n: t for n, t in _TENSORS.items() if n.split(".")[-2] in leaves}
        _write_shard(folder / "model.safetensors", chosen)
    (folder / "config.json").write_bytes(data[1:_LARGEST])

    def look() -> None:
        for failure in verify(folder, check_tp=(2, 3)).failures:
            assert len(failure.splitlines()) == 1, failure
        with open_tensors(folder) as tensors:
            for _ in tensors:
                pass

    def plan() -> None:
        with open_checkpoint(folder) as c:
            make_plan(c, Options(resolve("bf16")))

    _checked(look)
    _checked(plan)


def recipe(data: bytes) -> None:
    """A recipe, in YAML where its first byte is odd, else in TOML, and a plan by it."""
    yaml = bool(data) and data[0] % 2 == 1
    folder = _folder("recipe")
    path = folder / ("recipe.yaml" if yaml else "recipe.toml")
    path.write_bytes(data[1:_LARGEST])
    shard = folder / "model.safetensors"
    if not shard.exists():
        _write_shard(shard, {
            "model.layers.0.mlp.gate_proj.weight": ("BF16", [128, 128]),
            "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 64, 64]),
            "lm_head.weight": ("BF16", [16, 128]),
        })  # fmt: skip

    def look() -> None:
        from streamq.api import options

        rules = load(path)
        if rules.schemes:
            with open_checkpoint(folder) as c:
                make_plan(c, options(recipe=path))

    _checked(look)


def jobs(data: bytes) -> None:
    """A file of jobs: YAML, TOML or lines by its first byte."""
    suffix = (".toml", ".yaml", ".txt")[data[0] % 3 if data else 0]
    path = _folder("jobs") / f"jobs{suffix}"
    path.write_bytes(data[1:_LARGEST])
    over = {"out": "out/{org}/{name}", "schemes": ("nvfp4",)} if suffix == ".txt" else {}
    _checked(lambda: read_jobs(str(path), None, over))


def record(data: bytes) -> None:
    """streamq.json, with the right checksum of itself, which none would meet by chance."""
    body = data[:_LARGEST]
    _checked(lambda: parse_record(body + b'  "crc32": "%08x"\n}\n' % crc32(body)))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header, "index": index, "config": config, "recipe": recipe,
    "record": record, "jobs": jobs,
}  # fmt: skip
