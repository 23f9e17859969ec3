"""``compress`` and ``decompress``: what goes in comes out, in any dtype, by any number of ranks."""

import json
import zlib

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from compressible import (
    CONFIG,
    DESCRIPTION,
    HIDDEN,
    INNER,
    SHAPES,
    VOCAB,
    every_dtype,
    files_of,
    floats,
    w8a8s,
)
from helpers import tensors_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import streamq
from streamq.cli import cli
from streamq.compressing.blocks import (
    count,
    decode,
    encode,
    index_bytes,
    most_bytes,
    parts_of,
    spans_of,
    units_within,
)
from streamq.compressing.crc import Sum
from streamq.compressing.rows import Reader, prune
from streamq.compressing.types import Item, Run
from streamq.errors import PlanError
from streamq.nz.codec import dictionaries
from streamq.nz.tiles import HEIGHT
from streamq.nz.tiles import compress as compress_matrix
from streamq.tensors import DTYPES

UP = "model.layers.0.mlp.up_proj."


def run(*args, code=0):
    result = CliRunner().invoke(cli, [*map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def there_and_back(src, tmp_path, *args):
    """The compressed directory and what decompressing gives."""
    packed, back = tmp_path / "packed", tmp_path / "back"
    run("compress", src, packed, "--no-sync", "-q", *args)
    run("verify", packed)
    run("decompress", packed, back, "--no-sync", "-q")
    return packed, back


SOURCES = {"every dtype": every_dtype, "bf16": floats, "w8a8s": w8a8s,
           "f16": lambda p: floats(p, "f2"), "f32": lambda p: floats(p, "f4")}  # fmt: skip
SPARSE = ["--codec", "ascend"]
IDENTITY = [
    *((name, []) for name in SOURCES),
    ("every dtype", ["--transpose"]),
    ("every dtype", ["--disable-layers", "BF16*", "--max-memory", "1MB", "-j", "2"]),
    ("f32", ["--transpose", "--max-memory", "1MB"]),
    ("w8a8s", SPARSE),
    ("w8a8s", [*SPARSE, "--dictionary", "tile"]),
    ("w8a8s", [*SPARSE, "--transpose", "--disable-layers", "*.down_proj"]),
    ("w8a8s", [*SPARSE, "--max-memory", "200kB"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args"), IDENTITY, ids=[f"{n} {' '.join(a)}" for n, a in IDENTITY]
)
def test_the_same_files_come_back(name, args, tmp_path):
    src = SOURCES[name](tmp_path / "src")
    packed, back = there_and_back(src, tmp_path, *args)
    assert files_of(back) == files_of(src)
    coded = json.loads(run("inspect", packed, "--json").stdout)
    assert {t["coding"] for t in coded["tensors"]} >= {"raw", "low" if "ascend" in args else "zstd"}


def test_one_file_of_several_is_a_checkpoint(tmp_path):
    src = floats(tmp_path / "src")
    name = "model-00001-of-00002.safetensors"
    _, back = there_and_back(src / name, tmp_path)
    assert files_of(back) == {
        n: raw for n, raw in files_of(src).items() if n in (name, "config.json")
    }


def test_the_record_of_a_conversion_comes_back(tmp_path):
    src = tmp_path / "src"
    run("convert", floats(tmp_path / "floats"), src, "-s", "w8a8", "--no-sync", "-q")
    packed, back = there_and_back(src, tmp_path)
    assert "streamq.json" in files_of(src)
    assert "streamq.json" not in files_of(packed)
    assert files_of(back) == files_of(src)
    run("verify", back, "--source", tmp_path / "floats")


def test_the_verbs_for_python(tmp_path):
    src = floats(tmp_path / "src", "f2")
    packed, back = tmp_path / "packed", tmp_path / "back"
    done = streamq.compress(src, packed, codec="ascend", sparsity="magnitude:1", tp=2)
    assert done.bytes_out == sum(p.stat().st_size for p in packed.glob("*.safetensors"))
    report = streamq.verify(packed)
    assert (report.scheme, report.failures) == ("W16A16SC", [])
    assert streamq.decompress(packed, back).tensors == report.tensors
    with pytest.raises(PlanError, match="ranks from 1 on, not 0"):
        streamq.compress(src, tmp_path / "more", tp=0)
    with pytest.raises(PlanError, match="takes no source"):
        streamq.verify(packed, src)


def test_files_without_tensors_and_older_names_of_descriptions(tmp_path):
    src = w8a8s(tmp_path / "src")
    (src / DESCRIPTION).rename(src / "quant_model_description_w8a8s.json")
    (src / "model.safetensors.index.json").unlink()
    save_file({}, src / "model-00000-empty.safetensors", {"format": "pt"})
    packed, back = there_and_back(src, tmp_path, *SPARSE)
    assert files_of(back) == files_of(src)
    assert json.loads((packed / DESCRIPTION).read_text())["model_quant_type"] == "W8A8SC"
    assert not (packed / "quant_model_description_w8a8s.json").exists()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dictionary", ["call", "tile"])
def test_streams_are_those_of_the_library(transpose, dictionary, tmp_path):
    """Also where memory has room for 128 rows at a time only."""
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = np.clip(rng.standard_normal((700, 600)) * 3, -12, 12).astype(np.int8)
    src = write_checkpoint(tmp_path / "src", {name: weight}, CONFIG)
    said = {"model_quant_type": "W8A8S", name: "W8A8S"}
    (src / DESCRIPTION).write_text(json.dumps(said))
    args = ["--max-memory", "600kB", "-j", "2", *(["--transpose"] if transpose else [])]
    packed, _ = there_and_back(src, tmp_path, *SPARSE, "--dictionary", dictionary, *args)
    found = load_file(packed / "model.safetensors")
    stream, index, info = compress_matrix(weight, "low", dictionary, transpose=transpose)
    assert (found[UP + "weight"] == stream).all()
    assert (found[UP + "index"] == index).all()
    assert (found[UP + "info"] == info).all()
    new = json.loads((packed / DESCRIPTION).read_text())
    assert new == {"model_quant_type": "W8A8SC", **dict.fromkeys(
        (UP + s for s in ("weight", "index", "info")), "W8A8SC")}  # fmt: skip


def test_no_byte_depends_on_workers_or_memory(tmp_path):
    for source, args in ((w8a8s, SPARSE), (floats, ["--transpose"])):
        src = source(tmp_path / f"src-{len(args)}")
        made = []
        for i, how in enumerate((["-j", "1"], ["-j", "7", "--max-memory", "3MB"],
                                 ["-j", "3", "--max-memory", "400kB"])):  # fmt: skip
            dst = tmp_path / f"dst-{len(args)}-{i}"
            run("compress", src, dst, "-q", "--no-sync", *args, *how)
            made.append(files_of(dst))
        assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("codec", ["zstd", "ascend"])
@pytest.mark.parametrize("keep", ["0.25", "1"])
def test_pruned_weights_come_back_as_pruned(codec, keep, tmp_path):
    src = floats(tmp_path / "src", np.float16)
    packed, back = there_and_back(
        src, tmp_path, "--codec", codec, "--sparsity", f"magnitude:{keep}"
    )
    old, new = (
        {
            n: np.frombuffer(raw, np.float16).reshape(t.shape)
            for n, (t, raw) in tensors_of(p).items()
        }
        for p in (src, back)
    )
    for name, x in old.items():
        pruned = "proj" in name
        assert (new[name] == (slowly_pruned(x, float(keep)) if pruned else x)).all(), name
    assert (back / DESCRIPTION).exists() is False
    if codec == "ascend":
        said = json.loads((packed / DESCRIPTION).read_text())
        assert said["model_quant_type"] == said[UP + "weight"] == said[UP + "info"] == "W16A16SC"
        assert said["model.embed_tokens.weight"] == "FLOAT"
        info = load_file(packed / "model-00001-of-00002.safetensors")[UP + "info"]
        assert info.tolist() == [8, 8, 2 * HIDDEN, INNER, 1]


def slowly_pruned(x, keep):
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        kept = sorted(range(len(row)), key=lambda c: (-abs(row[c]), c))[
            : max(1, round(keep * len(row)))
        ]
        out[i, kept] = row[kept]
    return out


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 999))
def test_pruning_beside_sorting(rows, cols, keep, seed):
    rng = np.random.default_rng(seed)
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        x = (rng.integers(-4, 5, (rows, cols)) / 4).astype(dtype)  # many ties, and -0.0
        expected = slowly_pruned(x, keep)
        prune(x.view(np.uint8), x.dtype.itemsize, keep)
        assert (x == expected).all()


class Memory:
    """A source of one file."""

    def __init__(self, raw):
        self.raw = raw

    def pread(self, file, start, into):
        into[:] = self.raw[start : start + len(into)]


@given(
    st.sampled_from(["I8", "BF16", "F32", "F64", "BOOL"]),
    st.integers(1, 300), st.integers(1, 400), st.sampled_from(["zstd", "low", "high"]),
    st.booleans(), st.sampled_from([1, 40_000, 1 << 20]), st.sampled_from([1, 70_000, 1 << 20]),
    st.integers(0, 999),
)  # fmt: skip
def test_parts_of_any_size_make_the_same_whole(
    dtype, rows, cols, coding, transpose, budget, other, seed
):
    """Cut in one way for coding and in another for decoding."""
    rng = np.random.default_rng(seed)
    width = cols * DTYPES[dtype].itemsize
    data = (rng.integers(0, 6, (rows, width)) ** 2).astype(np.uint8)
    run = Run("f", 0, rows, width, width)
    item = Item("w", dtype, (rows, cols), 0, (run,), coding, transpose)
    if item.tiling is None and coding != "zstd":
        return
    reader = Reader(Memory(data.tobytes()))
    shared = None
    if coding != "zstd" and seed % 2:
        shared = dictionaries(sum(count(part, reader) for part in parts_of(item, budget)))
    coded = [encode(part, reader, shared) for part in parts_of(item, budget)]
    stream = np.frombuffer(b"".join(c.data for c in coded), np.uint8)
    index = index_bytes(item, np.concatenate([c.units for c in coded]))
    assert len(stream) <= most_bytes(item)
    entries = spans_of(item, index, len(stream))
    back, total, crcs = np.zeros_like(data), 0, [Sum(), Sum()]
    for part in parts_of(item, other):
        here = entries[units_within(part)]
        begin, end = int(here[0, 0]), int(here[-1, 0] + here[-1, 1])
        block, crc, nbytes = decode(part, stream[begin:end], here - [begin, 0, 0])
        crcs[0].add(crc, nbytes)
        if item.tiling is None:
            back.reshape(-1)[part.first : part.stop] = block
        elif transpose:
            w = DTYPES[dtype].itemsize * HEIGHT
            back[:, part.first * w : part.stop * w] = block
        else:
            back.reshape(-1)[total : total + nbytes] = block
        total += nbytes
    assert (back == data).all()
    for c in coded:
        crcs[1].add(c.crc, c.nbytes)
    assert crcs[0].crc == crcs[1].crc
    assert transpose or crcs[0].crc == zlib.crc32(data)


# --- tensor-parallel ranks ---------------------------------------------------------------


def cut(old, leaf, suffix, tp, rank):
    """What a rank has of a tensor, by the rules of tensor parallelism."""
    x = old[f"{leaf}.{suffix}"]
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}.get(leaf.rpartition(".")[2], tp)
    if x.shape == (1,):
        return x
    if leaf.endswith(("o_proj", "down_proj")):
        if suffix == "weight":
            return np.split(x, tp, axis=1)[rank]
        return x if rank == 0 or suffix != "quant_bias" else np.zeros_like(x)
    return np.split(x, min(tp, heads))[rank * min(tp, heads) // tp]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("source", ["w8a8s", "bf16"])
def test_ranks_get_what_loaders_would_cut(source, tp, tmp_path):
    src = SOURCES[source](tmp_path / "src")
    args = SPARSE if source == "w8a8s" else []
    packed, back = there_and_back(src, tmp_path, "--tp", tp, *args)
    old = {}
    for path in sorted(src.glob("*.safetensors")):
        old |= load_file(path)
    ranks = [f"model-rank-{r}-part-0.safetensors" for r in range(tp)]
    assert sorted(p.name for p in packed.glob("*.safetensors")) == ranks
    assert not [*packed.glob("*.index.json")]
    for rank, name in enumerate(ranks):
        new, stored = load_file(back / name), load_file(packed / name)
        layer = "model.layers.1."
        for fused, members in {
            "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "self_attn.o_proj": ["self_attn.o_proj"], "mlp.down_proj": ["mlp.down_proj"],
        }.items():  # fmt: skip
            for suffix in ("weight", "input_scale", "quant_bias", "deq_scale"):
                if layer + f"{members[0]}.{suffix}" not in old:
                    continue
                parts = [cut(old, layer + m, suffix, tp, rank) for m in members]
                whole = parts[0] if parts[0].shape == (1,) else np.concatenate(parts)
                found = new.pop(layer + f"{fused}.{suffix}")
                assert (found == whole).all(), (fused, suffix)
                assert found.dtype == whole.dtype
        rows = VOCAB // tp
        embed = old["model.embed_tokens.weight"][rank * rows : (rank + 1) * rows]
        assert (new["model.embed_tokens.weight"] == embed).all()
        norm = layer + "input_layernorm.weight"
        assert (new[norm] == old[norm]).all()
        assert not [n for n in new if n.startswith(layer) and "proj" in n and "offset" not in n]
        if args:
            info = stored[layer + "mlp.gate_up_proj.info"]
            assert info.tolist() == [8, 8, HIDDEN, 2 * INNER // tp, 1]
    if args:
        said = json.loads((packed / DESCRIPTION).read_text())
        for leaf in SHAPES:
            for suffix in ("weight", "index", "info", "deq_scale"):
                assert said[f"model.layers.0.{leaf}.{suffix}"] == "W8A8SC"
        assert not [key for key in said if "qkv" in key or "gate_up" in key]
        assert (back / DESCRIPTION).read_bytes() == (src / DESCRIPTION).read_bytes()


def test_pruning_is_by_rows_of_the_whole_weight(tmp_path):
    src = floats(tmp_path / "src", np.float16)
    _, back = there_and_back(src, tmp_path, "--tp", 2, "--sparsity", "magnitude:0.3", *SPARSE)
    name = "model.layers.0.mlp.down_proj.weight"
    (old,) = (found[name] for p in src.glob("*.safetensors") if name in (found := load_file(p)))
    whole = slowly_pruned(old, 0.3)
    parts = [load_file(back / f"model-rank-{r}-part-0.safetensors")[name] for r in (0, 1)]
    assert (np.concatenate(parts, axis=1) == whole).all()
