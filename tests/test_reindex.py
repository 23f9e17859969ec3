"""streamq reindex: bytes go to other places, and to no others."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, tensors_of, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import streamq
from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError, PlanError, WriteError
from streamq.formats import named
from streamq.reindexing import Options, make_plan, reindex
from streamq.stored import open_tensors
from streamq.writer import Unit

BF16 = np.dtype(ml_dtypes.bfloat16)
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 384,
}  # fmt: skip


def values(*shape, dtype=BF16, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape, np.float32).astype(dtype)


def llama(layers=2, hidden=256, q=256, kv=128, inter=384, bias=False, dtype=BF16):
    """Names in the order that the Hub has them, by the alphabet."""
    tensors = {"model.embed_tokens.weight": values(32, hidden, dtype=dtype)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes = {
            "mlp.down_proj": (hidden, inter), "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "self_attn.q_proj": (q, hidden),
            "self_attn.v_proj": (kv, hidden),
        }  # fmt: skip
        for i, (name, shape) in enumerate(shapes.items()):
            tensors[f"{layer}{name}.weight"] = values(*shape, dtype=dtype, seed=10 * n + i)
            if bias and name[10:] in QKV:
                tensors[f"{layer}{name}.bias"] = values(shape[0], dtype=dtype, seed=n + i)
        tensors[layer + "input_layernorm.weight"] = values(hidden, dtype=dtype, seed=n)
    return tensors | {"lm_head.weight": values(32, hidden, dtype=dtype, seed=9)}


def run(src, dst, *, workers=2, max_memory=64 << 20, **options):
    with open_checkpoint(src) as source:
        plan = make_plan(source, Options(**options))
        reindex(source, plan, dst, workers=workers, max_memory=max_memory, sync=False)
    return plan


def contents(folder):
    """Dtype, shape and bytes of every tensor, by name."""
    return {name: (t.dtype, t.shape, data) for name, (t, data) in tensors_of(folder).items()}


def config_of(folder):
    """config.json; lists of names are sorted, as their order says nothing."""

    def tidy(value):
        if isinstance(value, dict):
            return {key: tidy(inner) for key, inner in value.items()}
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return sorted(value)
        return [tidy(item) for item in value] if isinstance(value, list) else value

    return tidy(json.loads((folder / "config.json").read_text()))


def dequantized(folder):
    with open_tensors(folder) as tensors:
        return {name: np.asarray(array, np.float32) for name, array in tensors}


def scattered(src, dst, files=3, changed=lambda name, found: found):
    """A checkpoint whose tensors lie in shards by turns, so that nothing is where it belongs.

    ``changed``: of a name with its dtype, shape and bytes what is written instead.
    """
    dst.mkdir()
    parts = [{} for _ in range(files)]
    for i, (name, found) in enumerate(contents(src).items()):
        parts[i % files][name] = changed(name, found)
    where = {}
    for i, part in enumerate(parts, 1):
        file, header, at = f"model-{i:05d}-of-{files:05d}.safetensors", {}, 0
        for name, (dtype, shape, data) in part.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
            where[name] = file
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        data = b"".join(data for _, _, data in part.values())
        (dst / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (dst / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (dst / "config.json").write_bytes((src / "config.json").read_bytes())
    return dst


# --- shards ---------------------------------------------------------------------------


def test_groups_that_straddle_shards_come_together(tmp_path):
    tensors = llama(bias=True)
    names = list(tensors)
    src = write_checkpoint(
        tmp_path / "src", tensors, LLAMA, [names[0::3], names[1::3], names[2::3]]
    )
    (src / "tokenizer.json").write_text("{}")
    plan = run(src, tmp_path / "dst")
    assert (plan.groups, plan.apart) == (4, 4)
    assert plan.moved > 0
    assert contents(tmp_path / "dst") == contents(src)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()
    old = {name: t.file for name, (t, _) in tensors_of(src).items()}
    new = {name: t.file for name, (t, _) in tensors_of(tmp_path / "dst").items()}
    groups = [(f"model.layers.{n}.{parent}.", leaves) for n in range(2)
              for parent, leaves in (("self_attn", QKV), ("mlp", GATE_UP))]  # fmt: skip
    grouped = set()
    for parent, leaves in groups:
        members = [name for name in names if name.startswith(tuple(parent + x for x in leaves))]
        grouped.update(members)
        assert {new[name] for name in members} == {min(old[name] for name in members)}
    assert all(new[name] == old[name] for name in names if name not in grouped)
    assert run(src, tmp_path / "fused", fuse=True).moved > 0
    again = run(tmp_path / "dst", tmp_path / "again")
    assert (again.apart, again.moved) == (0, 0)


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [("w4a16_asym", None), ("nvfp4", None), ("nvfp4", "modelopt"), ("w4a16", "gptq"),
     ("w4a16_asym", "mlx"), ("w8a16", "group"), ("mxfp4a16", "gpt-oss")],
)  # fmt: skip
def test_parts_of_a_quantized_weight_stay_together(tmp_path, scheme, fmt):
    tensors = llama(1)
    config = LLAMA
    if fmt == "gpt-oss":
        config = {"model_type": "gpt_oss"}
        stack = "model.layers.0.mlp.experts."
        tensors |= {
            stack + "gate_up_proj": values(2, 64, 64),
            stack + "down_proj": values(2, 32, 64),
        }
    src = write_checkpoint(tmp_path / "src", tensors, config)
    group = 64 if fmt == "mlx" else None
    run_convert(src, tmp_path / "q", scheme, format=named(fmt) if fmt else None, group_size=group)
    if fmt == "group":  # it says shapes in __metadata__
        run_convert(src, tmp_path / "apart", scheme, format=named(fmt), shard_size=100_000)
    else:
        scattered(tmp_path / "q", tmp_path / "apart")
    plan = run(tmp_path / "apart", tmp_path / "dst")
    assert plan.apart == (0 if fmt == "group" else 2)
    assert contents(tmp_path / "dst") == contents(tmp_path / "q")
    with open_tensors(tmp_path / "dst") as found:
        for s in found.stored.values():
            assert len({t.file for t in s.tensors.values()}) == 1
        moved = {name: np.asarray(x) for name, x in found}
    assert {k: v.tobytes() for k, v in moved.items()} == {
        k: np.asarray(v).tobytes() for k, v in open_tensors(tmp_path / "q")
    }


def test_shard_size_keeps_groups_whole(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama(), LLAMA)
    run(src, tmp_path / "dst", shard_size=300_000)
    assert contents(tmp_path / "dst") == contents(src)
    with open_checkpoint(tmp_path / "dst") as found:
        assert len(found.files) > 3
        for n in range(2):
            members = [f"model.layers.{n}.mlp.{leaf}.weight" for leaf in GATE_UP]
            assert len({found.tensors[name].file for name in members}) == 1


def test_a_quantization_that_is_not_known_is_moved_all_the_same(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    leaf = "model.layers.0.self_attn.{}.weight{}"
    tensors = {leaf.format(p, s): values(8, dtype=np.float32) for s in ("", ".absmax") for p in QKV}
    names = list(tensors)
    src = write_checkpoint(tmp_path / "src", tensors, config, [names[:2], names[2:]])
    plan = run(src, tmp_path / "dst")
    assert contents(tmp_path / "dst") == contents(src)
    assert len(plan.shards) == 1
    assert "not known" in plan.notes[0]
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        run(src, tmp_path / "fused", fuse=True)


def test_odd_tensors_pass_through(tmp_path):
    tensors = {
        "a": np.array(3.5, np.float64), "b": np.zeros((0, 4), np.float32),
        "c.weight": np.array([True, False]), "d.weight": values(3, 5, 7), "e": np.int8([1, 2, 3]),
    }  # fmt: skip
    src = write_checkpoint(tmp_path / "src", tensors, {})
    run(src, tmp_path / "dst", fuse=True)
    assert contents(tmp_path / "dst") == contents(src)


# --- fuse and split -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_floats_fuse_and_split(tmp_path, dtype):
    src = write_checkpoint(tmp_path / "src", llama(bias=True, dtype=dtype), LLAMA)
    plan = run(src, tmp_path / "fused", fuse=True)
    assert plan.made == {"qkv_proj": 2, "gate_up_proj": 2}
    old, new = contents(src), contents(tmp_path / "fused")
    for n in range(2):
        for parent, leaves, suffix in (
            (f"model.layers.{n}.self_attn.", QKV, "weight"),
            (f"model.layers.{n}.self_attn.", QKV, "bias"),
            (f"model.layers.{n}.mlp.", GATE_UP, "weight"),
        ):
            fused = "qkv_proj" if leaves is QKV else "gate_up_proj"
            data = b"".join(old[f"{parent}{leaf}.{suffix}"][2] for leaf in leaves)
            assert new[f"{parent}{fused}.{suffix}"][2] == data
            assert not any(f"{parent}{leaf}.{suffix}" in new for leaf in leaves)
    run(tmp_path / "fused", tmp_path / "back", split=True)
    assert contents(tmp_path / "back") == old


PACKED = [
    ("w4a16_asym", None, 64), ("w4a16", None, None), ("w3a16", None, None), ("w8a8", None, None),
    ("nvfp4a16", None, None), ("nvfp4", None, None), ("mxfp4", None, None),
    ("fp8_block", None, None), ("fp8_dynamic", None, None), ("w4a16_asym", "awq", 64),
    ("w4a16_asym", "awq_gemv", 64),
    ("w4a16", "gptq", 64), ("w8a16_asym", "gptq_v2", None), ("fp8_block", "fp8", None),
    ("nvfp4", "modelopt", None), ("fp8_dynamic", "modelopt", None), ("fp8_block", "modelopt", None),
    ("w4a16_asym", "mlx", 64), ("w8a16", "gpt-fast", None), ("w8a16", "group", 64),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "fmt", "group"), PACKED)
def test_packed_weights_fuse_and_split(tmp_path, scheme, fmt, group):
    src = write_checkpoint(tmp_path / "src", llama(1, bias=True), LLAMA)
    run_convert(
        src, tmp_path / "q", scheme, format=named(fmt) if fmt else None, group_size=group,
        ignore=("*.layers.0.mlp.*",) if scheme in ("w8a8", "w4a16", "nvfp4") else (),
    )  # fmt: skip
    plan = run(tmp_path / "q", tmp_path / "fused", fuse=True)
    assert plan.warnings == []
    assert streamq.verify(tmp_path / "fused").failures == []
    old, new = dequantized(tmp_path / "q"), dequantized(tmp_path / "fused")
    for parent, fused, leaves in (
        ("model.layers.0.self_attn.", "qkv_proj", QKV),
        ("model.layers.0.mlp.", "gate_up_proj", GATE_UP),
    ):  # fmt: skip
        for suffix in ("weight", "bias") if leaves is QKV else ("weight",):
            want = np.concatenate([old[f"{parent}{leaf}.{suffix}"] for leaf in leaves])
            assert np.array_equal(new[f"{parent}{fused}.{suffix}"], want)
    run(tmp_path / "fused", tmp_path / "back", split=True)
    assert contents(tmp_path / "back") == contents(tmp_path / "q")
    assert config_of(tmp_path / "back") == config_of(tmp_path / "q")
    assert scheme != "w4a16" or "gate_proj" not in (tmp_path / "fused/config.json").read_text()
    with open_checkpoint(tmp_path / "q") as q, open_checkpoint(tmp_path / "back") as back:
        assert q.metadata == back.metadata


@pytest.mark.parametrize("wide", [1, 200, 300])
def test_wide_lines_are_copied_one_by_one(tmp_path, monkeypatch, wide):
    """Lines of 192 to 512 bytes here: all of them, some of them, or only those of heads."""
    monkeypatch.setattr("streamq.reindexing.placing.WIDE", wide)
    src = write_checkpoint(tmp_path / "src", llama(1), LLAMA)
    run_convert(src, tmp_path / "q", "w4a16_asym", group_size=64, format=named("awq"))
    run(tmp_path / "q", tmp_path / "fused", fuse=True)
    old, new = dequantized(tmp_path / "q"), dequantized(tmp_path / "fused")
    want = np.concatenate([old[f"model.layers.0.self_attn.{leaf}.weight"] for leaf in QKV])
    assert np.array_equal(new["model.layers.0.self_attn.qkv_proj.weight"], want)
    run(tmp_path / "fused", tmp_path / "back", split=True)
    assert contents(tmp_path / "back") == contents(tmp_path / "q")


def awq_values(qweight, qzeros, scales, group):
    """AutoAWQ's GEMM layout: nibble i of a word is column order[i] of eight."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def unpack(words):
        nibbles = words.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        out = np.empty(nibbles.shape, np.float32)
        out[:, :, order] = nibbles
        return out.reshape(len(words), -1)

    zeros, scale = (np.repeat(x, group, 0) for x in (unpack(qzeros), scales.astype(np.float32)))
    return ((unpack(qweight) - zeros) * scale).T


def gptq_values(qweight, qzeros, scales, g_idx):
    shifts = 4 * np.arange(8, dtype=np.uint32)
    codes = (qweight.view(np.uint32)[:, None] >> shifts[:, None] & 15).reshape(-1, qweight.shape[1])
    zeros = (qzeros.view(np.uint32)[:, :, None] >> shifts & 15).reshape(len(qzeros), -1) + 1
    return ((codes - zeros[g_idx].astype(np.float32)) * scales[g_idx].astype(np.float32)).T


def ct_values(packed, zeros, scales, shape, group):
    shifts = 4 * np.arange(8, dtype=np.uint32)
    codes = (packed.view(np.uint32)[:, :, None] >> shifts & 15).reshape(len(packed), -1)
    zero = (zeros.view(np.uint32)[:, None] >> shifts[:, None] & 15).reshape(-1, zeros.shape[1])
    zero, scale = zero[: shape[0]].astype(np.float32), scales.astype(np.float32)
    return (codes[:, : shape[1]] - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)


@pytest.mark.parametrize("fmt", ["awq", "gptq", "compressed-tensors"])
def test_fused_codes_by_the_formulas_of_their_formats(tmp_path, fmt):
    src = write_checkpoint(tmp_path / "src", llama(1), LLAMA)
    scheme = "w4a16" if fmt == "gptq" else "w4a16_asym"
    run_convert(src, tmp_path / "q", scheme, group_size=64, format=named(fmt))
    run(tmp_path / "q", tmp_path / "fused", fuse=True)
    found = {}
    tags = {"I32": "<i4", "F16": "<f2", "BF16": BF16, "I64": "<i8"}
    for name, (dtype, shape, data) in contents(tmp_path / "fused").items():
        if "qkv_proj" in name:
            suffix = name.rpartition(".")[2]
            found[suffix] = np.frombuffer(data, tags[dtype]).reshape(shape)
    if fmt == "awq":
        got = awq_values(found["qweight"], found["qzeros"], found["scales"], 64)
    elif fmt == "gptq":
        got = gptq_values(found["qweight"], found["qzeros"], found["scales"], found["g_idx"])
    else:
        got = ct_values(
            *(found[f"weight_{x}"] for x in ("packed", "zero_point", "scale", "shape")), 64
        )
    with open_tensors(tmp_path / "q") as members:
        want = [members[f"model.layers.0.self_attn.{leaf}.weight"] for leaf in QKV]
    assert np.array_equal(got, np.concatenate(want))


def test_phi3_splits(tmp_path):
    config = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"model_type": "phi3"}
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": values(512, 256),
        "model.layers.0.mlp.gate_up_proj.weight": values(768, 256, seed=1),
    }
    src = write_checkpoint(tmp_path / "src", tensors, config)
    run(src, tmp_path / "dst", split=True)
    qkv, gate_up = tensors.values()
    found = {
        k: np.frombuffer(v[2], BF16).reshape(v[1]) for k, v in contents(tmp_path / "dst").items()
    }
    attn, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert found.keys() == {f"{attn}{x}.weight" for x in QKV} | {
        f"{mlp}{x}.weight" for x in GATE_UP
    }
    for name, want in (
        (attn + "q_proj", qkv[:256]), (attn + "k_proj", qkv[256:384]), (attn + "v_proj", qkv[384:]),
        (mlp + "gate_proj", gate_up[:384]), (mlp + "up_proj", gate_up[384:]),
    ):  # fmt: skip
        assert np.array_equal(found[name + ".weight"], want)


# --- linear attention -----------------------------------------------------------------


def linear(kind, k_heads, k_dim, v_heads, v_dim):
    return {
        "model_type": kind, "linear_num_key_heads": k_heads, "linear_key_head_dim": k_dim,
        "linear_num_value_heads": v_heads, "linear_value_head_dim": v_dim,
    }  # fmt: skip


def in_order(qkvz, ba, k_heads, k_dim, v_heads, v_dim):
    """``fix_query_key_value_ordering`` as numpy, on rows."""
    ratio = v_heads // k_heads
    grouped = qkvz.reshape(k_heads, 2 * k_dim + 2 * ratio * v_dim, -1)
    cuts = np.cumsum([k_dim, k_dim, ratio * v_dim])
    q, k, v, z = (x.reshape(-1, qkvz.shape[1]) for x in np.split(grouped, cuts, axis=1))
    b, a = (x.reshape(-1, ba.shape[1])
            for x in np.split(ba.reshape(k_heads, 2 * ratio, -1), 2, axis=1))  # fmt: skip
    return np.concatenate([q, k, v]), z, b, a


PARTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40),
    st.sampled_from([BF16, np.float32]), st.sampled_from([8192, 64 << 20]),
)  # fmt: skip
def test_qwen3_next_rows_come_in_order(tmp_path_factory, k_heads, k_dim, ratio, v_dim, hidden,
                                       dtype, memory):  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3_next")
    sizes = (k_heads, k_dim, k_heads * ratio, v_dim)
    qkvz = values(2 * k_heads * (k_dim + ratio * v_dim), hidden, dtype=dtype)
    ba = values(2 * k_heads * ratio, hidden, dtype=dtype, seed=1)
    layer = "model.layers.0.linear_attn."
    tensors = {layer + "in_proj_ba.weight": ba, layer + "in_proj_qkvz.weight": qkvz}
    src = write_checkpoint(folder / "src", tensors, linear("qwen3_next", *sizes))
    run(src, folder / "dst", split=True, max_memory=memory)
    found = contents(folder / "dst")
    for name, want in zip(PARTS, in_order(qkvz, ba, *sizes), strict=True):
        assert found[f"{layer}{name}.weight"][1:] == (want.shape, want.tobytes())


def test_wide_heads_are_copied_line_by_line(tmp_path):
    sizes = (2, 16, 4, 8)
    qkvz, ba = values(128, 4096), values(8, 4096, seed=1)
    layer = "model.layers.0.linear_attn."
    tensors = {layer + "in_proj_qkvz.weight": qkvz, layer + "in_proj_ba.weight": ba}
    src = write_checkpoint(tmp_path / "src", tensors, linear("qwen3_next", *sizes))
    run(src, tmp_path / "dst", split=True)
    found = contents(tmp_path / "dst")
    for name, want in zip(PARTS, in_order(qkvz, ba, *sizes), strict=True):
        assert found[f"{layer}{name}.weight"][2] == want.tobytes()


def test_qwen3_5_rows_are_in_order_already(tmp_path):
    layer = "model.layers.0.linear_attn."
    qkvz, ba = values(2 * 2 * 8 + 2 * 4 * 6, 16), values(8, 16)
    tensors = {layer + "in_proj_qkvz.weight": qkvz, layer + "in_proj_ba.weight": ba}
    text = linear("qwen3_5_text", 2, 8, 4, 6)
    src = write_checkpoint(
        tmp_path / "src", tensors, {"model_type": "qwen3_5", "text_config": text}
    )
    run(src, tmp_path / "dst", split=True)
    found = contents(tmp_path / "dst")
    for name, want in zip(PARTS, (qkvz[:56], qkvz[56:], ba[:4], ba[4:]), strict=True):
        assert found[f"{layer}{name}.weight"][2] == want.tobytes()


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "w4a16_asym"])
def test_a_permutation_of_quantized_rows(tmp_path, scheme):
    """By the values: zero points have a word for eight rows, which heads of eight do not cut."""
    sizes, layer = (2, 8, 4, 16), "model.layers.0.linear_attn."
    tensors = {layer + "in_proj_qkvz.weight": values(160, 128)}
    src = write_checkpoint(tmp_path / "src", tensors, linear("qwen3_next", *sizes))
    run_convert(src, tmp_path / "q", scheme)
    run_convert(src, tmp_path / "awq", "w4a16_asym", format=named("awq"), group_size=32)
    for q in ("q", "awq"):
        run(tmp_path / q, tmp_path / f"{q}-split", split=True)
        whole = dequantized(tmp_path / q)[layer + "in_proj_qkvz.weight"]
        qkv, z, _, _ = in_order(whole, whole[:8], *sizes)
        found = dequantized(tmp_path / f"{q}-split")
        assert np.array_equal(found[layer + "in_proj_qkv.weight"], qkv)
        assert np.array_equal(found[layer + "in_proj_z.weight"], z)


def test_a_permutation_that_cuts_blocks_is_refused(tmp_path):
    layer = "model.layers.0.linear_attn."
    tensors = {layer + "in_proj_qkvz.weight": values(384, 128)}
    src = write_checkpoint(tmp_path / "src", tensors, linear("qwen3_next", 2, 64, 2, 32))
    run_convert(src, tmp_path / "q", "fp8_block", format=named("fp8"))
    with pytest.raises(PlanError, match=r"in_proj_qkvz.weight_scale_inv.*every 128 rows"):
        run(tmp_path / "q", tmp_path / "dst", split=True)
    assert not list(tmp_path.glob("dst*"))


# --- experts --------------------------------------------------------------------------

SIZES = {"hidden_size": 24, "moe_intermediate_size": 16, "num_experts": 3, "num_local_experts": 3}


@pytest.mark.parametrize(
    ("kind", "parent", "names", "transposed"),
    [("qwen3_5_moe", "mlp.experts", ("gate_up_proj", "down_proj"), False),
     ("gemma4", "experts", ("gate_up_proj", "down_proj"), False),
     ("granitemoe", "block_sparse_moe", ("input_linear.weight", "output_linear.weight"), False),
     ("llama4", "feed_forward.experts", ("gate_up_proj", "down_proj"), True),
     ("qwen3_vl_moe", "mlp.experts", ("gate_up_proj", "down_proj"), True)],
)  # fmt: skip
@pytest.mark.parametrize("memory", [4096, 64 << 20])
def test_stacks_of_experts_are_split(tmp_path, kind, parent, names, transposed, memory):
    gate_up, down = values(3, 32, 24), values(3, 24, 16)
    parent = f"model.layers.0.{parent}."
    stacks = (gate_up, down)
    if transposed:
        stacks = [np.ascontiguousarray(x.transpose(0, 2, 1)) for x in stacks]
    tensors = dict(zip((parent + name for name in names), stacks, strict=True))
    config = {"model_type": kind, **SIZES}
    if kind == "granitemoe":
        config["intermediate_size"] = config.pop("moe_intermediate_size")
    src = write_checkpoint(tmp_path / "src", tensors | {"model.norm.weight": values(24)}, config)
    plan = run(src, tmp_path / "dst", split=True, max_memory=memory)
    assert plan.made == {"gate_proj": 3, "up_proj": 3, "down_proj": 3}
    found = contents(tmp_path / "dst")
    assert len(found) == 10
    experts = parent if parent.endswith("experts.") else f"{parent}experts."
    for e in range(3):
        wants = {"gate_proj": gate_up[e, :16], "up_proj": gate_up[e, 16:], "down_proj": down[e]}
        for leaf, want in wants.items():
            _, shape, data = found[f"{experts}{e}.{leaf}.weight"]
            assert (shape, data) == (want.shape, want.tobytes())


def test_stacks_that_are_not_split_are_said(tmp_path):
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    for kind, why in (
        ("gpt_oss", "no loader reads"),
        ("unheard_of", "not known for the model_type"),
    ):
        src = write_checkpoint(tmp_path / kind, {stack: values(2, 8, 12)}, {"model_type": kind})
        plan = run(src, tmp_path / f"{kind}-dst", split=True)
        assert contents(tmp_path / f"{kind}-dst") == contents(src)
        assert any(stack in note and why in note for note in plan.notes)
        assert plan.warnings == ["there is nothing to split"]


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [("w4a16", None), ("w4a16_asym", "awq"), ("w4a16", "gptq"), ("fp8_block", "fp8"),
     ("nvfp4", "modelopt"), ("w4a16_asym", "mlx"), ("w8a16", "group")],
)  # fmt: skip
def test_renamed_modules_are_what_they_were(tmp_path, scheme, fmt):
    src = write_checkpoint(tmp_path / "src", llama(), LLAMA)
    run_convert(
        src, tmp_path / "q", scheme, format=named(fmt) if fmt else None,
        group_size=64 if fmt == "mlx" else None, ignore=("*.1.mlp.*",),
    )  # fmt: skip
    plan = run(tmp_path / "q", tmp_path / "dst", rename=((r"^model\.", "model.language_model."),))
    assert plan.warnings == []
    assert streamq.verify(tmp_path / "dst").failures == []
    old, new = dequantized(tmp_path / "q"), dequantized(tmp_path / "dst")
    assert new.keys() == {re.sub(r"^model\.", "model.language_model.", name) for name in old}
    for name, x in old.items():
        assert np.array_equal(new[re.sub(r"^model\.", "model.language_model.", name)], x)
    for path in (tmp_path / "dst").glob("*.json"):
        text = path.read_text().replace("\\\\", "\\")
        assert not re.search(r"[\"^]model\\?\.layers", text)
    back = run(tmp_path / "dst", tmp_path / "back", rename=((r"\.language_model\.", "."),))
    assert back.renamed == plan.renamed
    assert contents(tmp_path / "back") == contents(tmp_path / "q")
    assert config_of(tmp_path / "back") == config_of(tmp_path / "q")


def test_modules_with_a_scheme_of_their_own_keep_it(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama(1), LLAMA)
    run_convert(src, tmp_path / "q", "w4a16")
    config = json.loads((tmp_path / "q/config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    modules = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    modules += [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    group["targets"] = modules
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    run(tmp_path / "q", tmp_path / "dst", fuse=True)
    made = json.loads((tmp_path / "dst/config.json").read_text())
    (group,) = made["quantization_config"]["config_groups"].values()
    leaves = [name.removeprefix("model.layers.0.") for name in group["targets"]]
    assert leaves == ["mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj", "self_attn.o_proj"]
    group["targets"] = [r"re:.*\.(qkv_proj|gate_up_proj|down_proj|o_proj)$"]
    (tmp_path / "dst/config.json").write_text(json.dumps(made))
    plan = run(tmp_path / "dst", tmp_path / "back", split=True)
    assert "5 modules another scheme" in plan.warnings[0]


def test_patterns_that_cannot_be_read_are_said(tmp_path):
    config = {**LLAMA, "quantization_config": {"quant_method": "hqq"}}
    src = write_checkpoint(tmp_path / "src", llama(), config)
    assert run(src, tmp_path / "same").warnings == []
    plan = run(src, tmp_path / "dst", rename=((r"^model\.", "language_model."),))
    assert "was not checked" in plan.warnings[0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [(((r"layers\.\d", "layers.0"),), "would both be"), ((("^.*$", ""),), "leaves nothing"),
     ((("(", ""),), "not a valid regex"), ((("a", r"\1"),), "not a valid regex")],
)  # fmt: skip
def test_renames_that_cannot_be(tmp_path, rules, message):
    src = write_checkpoint(tmp_path / "src", llama(), LLAMA)
    with pytest.raises(PlanError, match=message):
        run(src, tmp_path / "dst", rename=rules)
    assert not list(tmp_path.glob("dst*"))


# --- errors ---------------------------------------------------------------------------


def attn(q=(64, 64), k=(32, 64), v=(32, 64), **more):
    parent = "model.layers.0.self_attn."
    shapes = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, **more}
    return {parent + name: x if isinstance(x, np.ndarray) else values(*x)
            for name, x in shapes.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "message"),
    [(attn(v=(32, 48)), "same columns"), (attn(v=values(32, 64, dtype=np.float32)), "one dtype"),
     (attn(**{"q_proj.bias": (64,)}), "no counterpart"),
     (attn(**{"k_proj.k_scale": (1,)}), "k_scale.*no part"),
     (attn(**{"q_proj.bias": (63,)}), "no part"),
     (attn(**{"qkv_proj.weight": (8, 64)}), "already")],
)  # fmt: skip
def test_members_that_differ_are_refused(tmp_path, tensors, message):
    src = write_checkpoint(tmp_path / "src", tensors)
    with pytest.raises(PlanError, match=message):
        run(src, tmp_path / "dst", fuse=True)
    assert not list(tmp_path.glob("dst*"))


def test_incomplete_groups_stay(tmp_path):
    tensors = attn()
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    src = write_checkpoint(tmp_path / "src", tensors)
    plan = run(src, tmp_path / "dst", fuse=True)
    assert contents(tmp_path / "dst") == contents(src)
    assert "v_proj" in plan.notes[0]


@pytest.mark.parametrize(
    ("scheme", "fmt", "rows", "message"),
    [("fp8_block", "fp8", 192, "weight_scale_inv.*128"),
     ("fp8_block", None, 192, "weight_scale.*128"),
     ("w4a16_asym", None, 12, "weight_zero_point.*every 8 rows")],
)  # fmt: skip
def test_blocks_and_words_that_would_be_cut_are_refused(tmp_path, scheme, fmt, rows, message):
    src = write_checkpoint(tmp_path / "src", attn(q=(rows, 128), k=(rows, 128), v=(8, 128)))
    run_convert(src, tmp_path / "q", scheme, format=named(fmt) if fmt else None)
    with pytest.raises(PlanError, match=message):
        run(tmp_path / "q", tmp_path / "dst", fuse=True)
    # The last member may end anywhere.
    src = write_checkpoint(tmp_path / "last", attn(q=(256, 128), k=(128, 128), v=(rows, 128)))
    run_convert(src, tmp_path / "ql", scheme, format=named(fmt) if fmt else None)
    run(tmp_path / "ql", tmp_path / "fused", fuse=True)
    old, new = dequantized(tmp_path / "ql"), dequantized(tmp_path / "fused")
    assert np.array_equal(np.concatenate([old[n] for n in attn()]), *new.values())


def test_global_scales_must_be_equal(tmp_path):
    src = write_checkpoint(tmp_path / "src", attn())
    run_convert(src, tmp_path / "q", "nvfp4a16")
    t, _ = tensors_of(tmp_path / "q")["model.layers.0.self_attn.k_proj.weight_global_scale"]
    data = bytearray((tmp_path / "q" / t.file).read_bytes())
    data[t.start] ^= 1
    (tmp_path / "q" / t.file).write_bytes(data)
    with pytest.raises(PlanError, match=r"k_proj.weight_global_scale.*not equal"):
        run(tmp_path / "q", tmp_path / "dst", fuse=True)


def test_members_in_two_schemes_are_refused(tmp_path):
    src = write_checkpoint(tmp_path / "src", attn(q=(64, 128), k=(64, 128), v=(64, 128)))
    for group in (32, 64):
        run_convert(src, tmp_path / f"g{group}", "w4a16_asym", group_size=group)
    mixed = scattered(tmp_path / "g32", tmp_path / "mixed", 1, lambda name, found: (
        contents(tmp_path / "g64")[name] if "q_proj" in name else found
    ))  # fmt: skip
    config = json.loads((mixed / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    other = json.loads((tmp_path / "g64/config.json").read_text())["quantization_config"]
    groups |= {"group_1": other["config_groups"]["group_0"]}
    groups["group_0"]["targets"] = ["re:.*[kv]_proj"]
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="share one scheme"):
        run(mixed, tmp_path / "dst", fuse=True)
    assert not list(tmp_path.glob("dst*"))


def test_a_shape_in_i32_stays_in_i32(tmp_path):
    """Kimi's checkpoints have it so."""
    src = write_checkpoint(tmp_path / "src", attn(q=(64, 128), k=(64, 128), v=(64, 128)))
    run_convert(src, tmp_path / "q", "w4a16")

    def as_i32(name, found):
        dtype, shape, data = found
        if dtype != "I64":
            return found
        return "I32", shape, np.frombuffer(data, "<i8").astype("<i4").tobytes()

    scattered(tmp_path / "q", tmp_path / "i32", 1, as_i32)
    run(tmp_path / "i32", tmp_path / "dst", fuse=True)
    found = contents(tmp_path / "dst")["model.layers.0.self_attn.qkv_proj.weight_shape"]
    assert found == ("I32", (2,), np.array([192, 128], "<i4").tobytes())


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [({"a.qkv_proj.weight": values(100, 8)}, LLAMA, "100 rows.*num_attention_heads 4"),
     ({"a.qkv_proj.weight": values(100, 8)}, {}, "num_attention_heads None"),
     ({"a.gate_up_proj.weight": values(7, 8)}, {}, "7 rows, not two halves"),
     ({"a.in_proj_ba.weight": values(8, 8)}, linear("qwen4", 2, 8, 4, 8), "for the model_type"),
     ({"a.in_proj_ba.weight": values(7, 8)}, linear("qwen3_next", 2, 8, 4, 8), "not those of"),
     ({"a.in_proj_qkvz.weight": values(7, 8)}, {}, "linear_num_key_heads None"),
     ({"a.gate_up_proj.weight": values(8, 8), "a.up_proj.weight": values(4, 8)}, {}, "already"),
     ({"x.experts.gate_up_proj": values(2, 8, 12)},
      {"model_type": "llama4", "hidden_size": 12, "intermediate_size": 4}, "is not .experts")],
)  # fmt: skip
def test_what_cannot_be_split_is_said(tmp_path, tensors, config, message):
    src = write_checkpoint(tmp_path / "src", tensors, config)
    with pytest.raises(PlanError, match=message):
        run(src, tmp_path / "dst", split=True)
    assert not list(tmp_path.glob("dst*"))


def test_fuse_and_split_exclude_each_other():
    with pytest.raises(PlanError, match="choose one"):
        Options(fuse=True, split=True)


def test_dst_is_absent_after_a_failure(tmp_path, monkeypatch):
    tensors = llama()
    names = list(tensors)
    src = write_checkpoint(tmp_path / "src", tensors, LLAMA, [names[0::2], names[1::2]])

    def full(self, *_):
        raise WriteError("model.safetensors: no space left on the device.")

    with monkeypatch.context() as patch:
        patch.setattr(Unit, "copy_from", full)
        with pytest.raises(WriteError, match="no space") as error:
            run(src, tmp_path / "dst")
    assert "was not written" in error.value.__notes__[0]
    assert not (tmp_path / "dst").exists()
    run(src, tmp_path / "dst", fuse=True)
    assert not (tmp_path / "dst.partial").exists()
    with pytest.raises(WriteError, match="already exists"):
        run(src, tmp_path / "dst")


def test_a_source_that_ends_early(tmp_path):
    src = write_checkpoint(tmp_path / "src", attn(), {})
    with open_checkpoint(src) as source:
        plan = make_plan(source, Options())
        path = src / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(WriteError, match="ended early"):
            reindex(source, plan, tmp_path / "dst", workers=1, max_memory=1 << 20, sync=False)
    assert not (tmp_path / "dst").exists()


# --- shapes ---------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=3), st.integers(1, 3),
    st.sampled_from([("w4a16_asym", "awq"), ("w4a16", "gptq"), ("w4a16_asym", "awq_gemv"),
                     ("w4a16_asym", None), ("w3a16", None), ("bf16", "plain")]),
    st.integers(1, 3),
)  # fmt: skip
def test_any_shapes_fuse_and_split(tmp_path_factory, rows, cols, how, workers):
    folder = tmp_path_factory.mktemp("shapes")
    scheme, fmt = how
    gate, up = 8 * rows[0], 8 * rows[1]
    tensors = attn(
        q=(8 * rows[0], 64 * cols), k=(8 * rows[1], 64 * cols), v=(8 * rows[1], 64 * cols)
    )
    tensors |= {
        "m.gate_proj.weight": values(gate, 64 * cols),
        "m.up_proj.weight": values(gate, 64 * cols, seed=up),
    }
    config = {"num_attention_heads": rows[0], "num_key_value_heads": rows[1], "head_dim": 8}
    src = write_checkpoint(folder / "src", tensors, config)
    group = None if scheme == "bf16" else 64
    run_convert(src, folder / "q", scheme, group_size=group, format=named(fmt) if fmt else None)
    run(folder / "q", folder / "fused", fuse=True, workers=workers, max_memory=8192)
    run(folder / "fused", folder / "back", split=True, workers=workers, max_memory=8192)
    assert contents(folder / "back") == contents(folder / "q")
    old, new = dequantized(folder / "q"), dequantized(folder / "fused")
    want = np.concatenate([old[name] for name in attn()])
    assert np.array_equal(new["model.layers.0.self_attn.qkv_proj.weight"], want)


# --- command line ---------------------------------------------------------------------


def invoke(*args):
    return CliRunner().invoke(cli, ["reindex", *map(str, args)])


def test_command_line(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama(), LLAMA)
    dry = invoke(src, "--fuse", "--dry-run", "--json")
    plan = json.loads(dry.stdout)
    assert plan["made"] == {"qkv_proj": 2, "gate_up_proj": 2}
    done = invoke(
        src, tmp_path / "dst", "--fuse", "--json", "--shard-size", "0.3MB", "--workers", 1
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["dst"], said["made"]) == (str(tmp_path / "dst"), plan["made"])
    assert len(said["shards"]) > 1
    assert invoke(src, tmp_path / "dst", "-q").exit_code == 1
    text = invoke(src, tmp_path / "dst", "--overwrite", "--no-sync", "--rename", "^(?=model)=x.")
    assert text.exit_code == 0
    assert "tensors renamed" in text.stdout
    assert "x.model.embed_tokens.weight" in contents(tmp_path / "dst")
    quiet = invoke(src, tmp_path / "quiet", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert contents(tmp_path / "quiet") == contents(src)


@pytest.mark.parametrize(
    ("args", "code"),
    [((), 2), (("--rename", "abc", "dst"), 2), (("--fuse", "--split", "dst"), 1),
     (("--rename", "(=x", "dst"), 1), (("--shard-size", "many", "dst"), 2)],
)  # fmt: skip
def test_wrong_usage(tmp_path, args, code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "src", attn(), {})
    assert invoke("src", *args).exit_code == code
    assert not (tmp_path / "dst").exists()


def test_from_python(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama(1), LLAMA)
    done = streamq.reindex(
        src, tmp_path / "dst", fuse=True, rename=[("^model", "m")], shard_size=10**9
    )
    assert done.bytes_out == (tmp_path / "dst/model.safetensors").stat().st_size
    assert "m.layers.0.self_attn.qkv_proj.weight" in contents(tmp_path / "dst")
    with pytest.raises(PlanError, match="overlaps"):
        streamq.reindex(src, src / "inside")
