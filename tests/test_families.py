"""Every model family: what is quantized, what shares a scale, and experts in three dimensions."""

import json
import math
import subprocess
import sys
from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest
from family_checkpoints import BF16, FAMILIES, E, H, I, draw
from helpers import run_convert, tensors_of, write_checkpoint

import streamq
from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError
from streamq.families import EXPERT_LAYOUTS, ExpertLayout, Family
from streamq.formats import FORMATS
from streamq.planning import Options, make_plan
from streamq.recipe import LAYOUTS
from streamq.schemes import resolve
from streamq.stored import open_tensors
from streamq.verifying import verify

STACKED = [n for n, make in FAMILIES.items() if make().stacks and n != "gpt_oss"]


def shards(tensors, count=3):
    """Names of each of some files, by turns, so that every group lies in several."""
    names = sorted(tensors)
    return [names[i::count] for i in range(count)]


def write(folder, made, tensors=None):
    tensors = made.tensors if tensors is None else tensors
    return write_checkpoint(folder, tensors, made.config, shards(tensors))


def two_d(made):
    """The same checkpoint with its experts as weights of their own."""
    stacks = {s.name for s in made.stacks}
    gone = stacks | {n.removesuffix(".weight") + "_bias" for n in stacks}
    return {n: np.ascontiguousarray(x)
            for n, x in (made.tensors | made.each).items() if n not in gone}  # fmt: skip


def contents(folder):
    return {n: (t.dtype, t.shape, data) for n, (t, data) in tensors_of(folder).items()}


def convert(made, tmp_path, scheme, tensors=None, **options):
    """Converted and verified; the plan, and what is in the output."""
    size = 32 if scheme.lower().startswith("w4a16") else None
    src = write(tmp_path / "in", made, tensors)
    plan = run_convert(src, tmp_path / "out", scheme, group_size=size, **options)
    with open_checkpoint(src) as c:
        assert verify(tmp_path / "out", c).failures == []
    return plan, contents(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_BLOCK", "W4A16"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gpt_oss"])
def test_every_family_converts_and_verifies(name, scheme, tmp_path):
    made = FAMILIES[name]()
    plan, out = convert(made, tmp_path, scheme)
    wanted = two_d(made)
    weights = {n.removesuffix(".weight") for n, x in wanted.items()
               if n.endswith(".weight") and x.ndim == 2}  # fmt: skip
    done = {n.removesuffix(".weight_packed") for n in out if n.endswith(".weight_packed")}
    if scheme == "FP8_BLOCK":
        done = {n.removesuffix(".weight_scale") for n in out if n.endswith(".weight_scale")}
    kept = weights - done
    assert all(out[n][2] == x.tobytes() for n, x in wanted.items()
               if n.removesuffix(".weight") not in done)  # fmt: skip
    if scheme == "NVFP4A16":
        assert kept == made.keeps
    assert kept <= made.keeps
    scheme_of, _ = FORMATS["compressed-tensors"].rules(plan.config)
    assert {module for module in weights if scheme_of(module) is None} == kept
    told = [n for n in plan.notes if "not known here" in n]
    assert bool(told) == (name == "unheard_of")


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gpt_oss"])
def test_fused_weights_share_one_global_scale(name, tmp_path):
    """Of all that loaders fuse, across shards and layouts; it is that of the largest weight."""
    made = FAMILIES[name]()
    _, out = convert(made, tmp_path, "NVFP4A16")
    wanted, family = two_d(made), Family(made.config)
    groups = defaultdict(list)
    for n in out:
        if n.endswith(".weight_packed"):
            module = n.removesuffix(".weight_packed")
            parent, row = family.group_of(module) or (module, None)
            groups[parent, row].append(module)
    assert any(len(members) > 1 for members in groups.values()) or name in ("phi3", "nemotron_h")
    for members in groups.values():
        top = max(np.abs(wanted[m + ".weight"].astype("f4")).max() for m in members)
        for m in members:
            (g,) = np.frombuffer(out[m + ".weight_global_scale"][2], "f4")
            assert g == np.float32(2688) / np.float32(top), m


@pytest.mark.parametrize("scheme", ["NVFP4A16", "W4A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("name", STACKED)
def test_stacks_give_the_bytes_of_the_same_weights_in_two_dimensions(name, scheme, tmp_path):
    made = FAMILIES[name]()
    plan, stacked = convert(made, tmp_path / "3d", scheme)
    other, flat = convert(made, tmp_path / "2d", scheme, two_d(made))
    assert stacked == flat
    assert plan.config == other.config


@pytest.mark.parametrize(
    ("name", "fmt", "scheme"),
    [("aria", "modelopt", "NVFP4"), ("llama4", "fp8", "FP8_BLOCK"),
     ("qwen3_5_moe", "awq", "W4A16_ASYM"), ("qwen3_vl_moe", "gptq", "W4A16")],
)  # fmt: skip
def test_other_formats_get_experts_one_by_one(name, fmt, scheme, tmp_path):
    made = FAMILIES[name]()
    options = {"format": FORMATS[fmt]}
    _, stacked = convert(made, tmp_path / "3d", scheme, **options)
    _, flat = convert(made, tmp_path / "2d", scheme, two_d(made), **options)
    assert stacked == flat


# --- gpt-oss ------------------------------------------------------------------------------

GPT_OSS_ROWS = (ExpertLayout("*.experts.*_proj", transposed=True, interleaved=True),)


def test_gpt_oss_keeps_its_stacks_in_its_own_format(tmp_path):
    made = FAMILIES["gpt_oss"]()
    _, out = convert(made, tmp_path, "MXFP4A16", format=FORMATS["gpt-oss"])
    for s in made.stacks:
        assert out.pop(s.name + "_blocks")[0] == out.pop(s.name + "_scales")[0] == "U8"
    kept = {n: x for n, x in made.tensors.items() if n not in {s.name for s in made.stacks}}
    assert {n: d for n, (_, _, d) in out.items()} == {n: x.tobytes() for n, x in kept.items()}


def test_gpt_oss_experts_that_no_loader_reads_are_refused(tmp_path):
    made = FAMILIES["gpt_oss"]()
    src = write(tmp_path / "in", made)
    with pytest.raises(PlanError, match=r"_proj'.*skip gpt-oss experts.*--format gpt-oss"):
        run_convert(src, tmp_path / "out", "NVFP4A16")


def _declare(monkeypatch, rows):
    """Rows as a recipe adds them."""
    plain = Family.__init__

    def init(self, config, *, extra_groups=(), extra_experts=()):
        plain(self, config, extra_groups=extra_groups, extra_experts=(*rows, *extra_experts))

    monkeypatch.setattr(Family, "__init__", init)


def test_gpt_oss_declared_by_hand_is_split_with_its_biases(tmp_path, monkeypatch):
    made = FAMILIES["gpt_oss"]()
    _, flat = convert(made, tmp_path / "2d", "NVFP4A16", two_d(made))
    _declare(monkeypatch, GPT_OSS_ROWS)
    _, stacked = convert(made, tmp_path / "3d", "NVFP4A16")
    assert stacked == flat
    assert stacked["model.layers.1.mlp.experts.2.up_proj.bias"][1] == (I,)


# --- layouts ------------------------------------------------------------------------------


def moe(tmp_path, shape, config, name="model.layers.0.mlp.experts.gate_up_proj"):
    tensors = {name: draw("x", *shape), "model.layers.0.mlp.o_proj.weight": draw("o", H, H)}
    return write_checkpoint(tmp_path / "in", tensors, config)


SIZES = {"hidden_size": H, "moe_intermediate_size": I - 16, "num_experts": E}
WIDE = 2 * (I - 16)


@pytest.mark.parametrize(
    ("model_type", "shape", "message"),
    [
        ("qwen3_5_moe", (E, H, WIDE), r"is not \[experts, 2 x intermediate, hidden\].*hidden_size "
         r"128, moe_intermediate_size 48, num_experts 4"),
        ("qwen3_vl_moe", (E, WIDE, H), r"is not \[experts, hidden, 2 x intermediate\]"),
        ("qwen3_5_moe", (E + 1, WIDE, H), r"\[5, 96, 128\].*num_experts 4"),
        ("qwen3_5_moe", (E, WIDE // 2, H), "moe_intermediate_size 48"),
        ("unheard_of", (E, WIDE, H), r"not known for the model_type 'unheard_of'; declare it in a "
         r"recipe, \[\[experts\]\] with pattern = .*layout = .plain. or .transposed."),
    ],
)  # fmt: skip
def test_a_stack_that_lies_otherwise_is_refused_by_name(model_type, shape, message, tmp_path):
    kind = {"model_type": model_type}
    for config in (SIZES | kind, {**kind, "text_config": SIZES, "hidden_size": 96}):
        src = moe(tmp_path, shape, config)
        with pytest.raises(PlanError, match=rf"'model.layers.0.*gate_up_proj'.*{message}"):
            run_convert(src, tmp_path / "out", "nvfp4a16")
        plan = run_convert(
            src, tmp_path / "left", "nvfp4a16", overwrite=True, ignore=("*.experts.*",)
        )
        assert [t.name.rpartition(".")[2] for t, _ in plan.unquantized] == ["gate_up_proj"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_ones_own(layout, tmp_path, monkeypatch):
    row = ExpertLayout("*.wi", *LAYOUTS[layout])
    name = "model.layers.0.moe.wi"
    shape = (E, H, WIDE) if LAYOUTS[layout][0] else (E, WIDE, H)
    config = {**SIZES, "model_type": "unheard_of"}
    src = moe(tmp_path, shape, config, name)
    _declare(monkeypatch, (row,))
    run_convert(src, tmp_path / "out", "fp8_dynamic")
    x = draw("x", *shape)
    x = x.transpose(0, 2, 1) if LAYOUTS[layout][0] else x
    with open_tensors(tmp_path / "out") as out:
        assert len(out) == 2 * E + 1
        for e in range(E):
            up = out[f"model.layers.0.moe.experts.{e}.up_proj.weight"]
            want = x[e, 1::2] if LAYOUTS[layout][1] else x[e, WIDE // 2 :]
            assert np.abs(up - want.astype("f4")).max() < 0.01


def test_a_stack_whose_name_does_not_tell_what_it_holds(tmp_path, monkeypatch):
    src = moe(tmp_path, (E, WIDE, H), {"model_type": "x"}, "model.layers.0.moe.kernel")
    _declare(monkeypatch, (ExpertLayout("*.kernel"),))
    with pytest.raises(PlanError, match=r"moe.kernel' holds experts, but its name does not say"):
        run_convert(src, tmp_path / "out", "nvfp4a16")


def test_rows_of_the_table_are_of_one_kind():
    for row in EXPERT_LAYOUTS:
        assert row.model_types
        assert Family({"model_type": row.model_types[0]}).known
        assert Family({"model_type": row.model_types[0] + "_text"}).known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recipe_declares_a_layout_and_a_group(layout, tmp_path):
    """For converting and for verifying; without it nobody knows what belongs together."""
    name = "model.layers.0.moe.wi"
    shape = (E, H, WIDE) if LAYOUTS[layout][0] else (E, WIDE, H)
    src = moe(tmp_path, shape, {**SIZES, "model_type": "unheard_of"}, name)
    recipe = {
        "scheme": "nvfp4a16",
        "experts": [{"pattern": "*.wi", "layout": layout, "parts": ["one", "other"]}],
        "group": [{"name": "both", "members": ["one", "other"]}],
    }
    streamq.convert(src, tmp_path / "out", "nvfp4a16", recipe=recipe)
    assert streamq.verify(tmp_path / "out", src).exact  # streamq.json has the recipe
    (tmp_path / "out" / "streamq.json").unlink()
    assert streamq.verify(tmp_path / "out", src, recipe=recipe).failures == []
    assert "'model.layers.0.moe.wi' is not in the output" in str(
        streamq.verify(tmp_path / "out", src).failures
    )
    out = contents(tmp_path / "out")
    for e in range(E):
        ends = [f"model.layers.0.moe.experts.{e}.{p}.weight_global_scale" for p in ("one", "other")]
        assert out[ends[0]] == out[ends[1]]


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "FP8_DYNAMIC"])
def test_quantized_stacks_are_refused_by_other_formats(scheme, tmp_path):
    made = FAMILIES["gpt_oss"]()
    convert(made, tmp_path, "MXFP4A16", format=FORMATS["gpt-oss"])
    for path in (tmp_path / "out", tmp_path / "in"):
        with pytest.raises(PlanError, match=r"_proj' holds.*experts.*--format gpt-oss"):
            run_convert(path, tmp_path / "again", scheme, requantize=True)


# --- what stays ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe", "granitemoe"])
def test_ignored_stacks_are_copied_as_they_are(name, tmp_path):
    made = FAMILIES[name]()
    whole = {s.name for s in made.stacks}
    for i, pattern in enumerate(("*.experts.*", "*.block_sparse_moe.*")):
        patterns = (pattern, "*.mlp.experts.*", "*put_linear")
        _, out = convert(made, tmp_path / str(i), "FP8_DYNAMIC", ignore=patterns)
        assert {n for n in out if ".experts." in n or "put_linear" in n} == whole
        assert all(out[n][2] == made.tensors[n].tobytes() for n in whole)
    with pytest.raises(PlanError, match=r"would stay as it is .--ignore. and .* together"):
        run_convert(tmp_path / "0" / "in", tmp_path / "down", "FP8_DYNAMIC",
                    ignore=(sorted(whole)[0].removesuffix(".weight"),))  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe", "gpt_oss"])
def test_some_experts_of_a_stack_stay(name, tmp_path, monkeypatch):
    made = FAMILIES[name]()
    if name == "gpt_oss":
        _declare(monkeypatch, GPT_OSS_ROWS)
    first = made.stacks[0].name.rpartition(".")[0]
    x = made.tensors[made.stacks[0].name]
    x[1].reshape(-1)[5] = np.nan  # of one that stays
    made.each = {n: w for n, w in made.each.items() if f"{first}.1." not in n}
    src = write(tmp_path / "in", made)
    run_convert(src, tmp_path / "out", "NVFP4A16", ignore=(f"{first}.1.*",))
    with open_checkpoint(src) as c:  # vLLM has one scheme for all experts of a layer
        assert all(f.startswith("vLLM takes") for f in verify(tmp_path / "out", c).failures)
    out = contents(tmp_path / "out")
    for part in ("gate_proj", "up_proj", "down_proj"):
        dtype, shape, _ = out[f"{first}.1.{part}.weight"]
        assert (dtype, shape) == ("BF16", (H, I) if part == "down_proj" else (I, H))
        assert f"{first}.2.{part}.weight_packed" in out
    values = {p: np.frombuffer(out[f"{first}.1.{p}_proj.weight"][2], BF16) for p in ("gate", "up")}
    stack = x[1] if name == "qwen3_5_moe" else x[1].T
    halves = (stack[::2], stack[1::2]) if name == "gpt_oss" else (stack[:I], stack[I:])
    for found, want in zip(values.values(), halves, strict=True):
        assert found.tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("name", ["gemma4", "llama4"])
def test_stacks_that_mlx_lm_has_elsewhere(name, tmp_path):
    made = FAMILIES[name]()
    src = write(tmp_path / "in", made)
    with pytest.raises(PlanError, match=r"_proj' holds the experts.*stacks of .* not written for"):
        run_convert(src, tmp_path / "out", "W4A16", group_size=32, format=FORMATS["mlx"])


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4"])
def test_slabs_of_a_view_do_not_show(name, tmp_path, monkeypatch):
    made = FAMILIES[name]()
    _, whole = convert(made, tmp_path / "whole", "NVFP4A16")
    monkeypatch.setattr("streamq.converting.slabs.STORED_SLAB", 1000)
    monkeypatch.setattr("streamq.converting.slabs.SLAB", 1000)
    monkeypatch.setattr("streamq.converting.jobs.JOB", 4000)
    _, rows = convert(made, tmp_path / "rows", "NVFP4A16")
    assert whole == rows


def test_several_outputs_and_several_shards(tmp_path):
    from streamq.converting import Output, Settings, convert_all

    made = FAMILIES["qwen3_vl_moe"]()
    src = write(tmp_path / "in", made)
    with open_checkpoint(src) as c:
        outputs = [Output(make_plan(c, Options(resolve(s), shard_size=100_000)), tmp_path / s)
                   for s in ("NVFP4A16", "FP8_DYNAMIC")]  # fmt: skip
        convert_all(c, outputs, Settings(sync=False, stats=True))
        for s in ("NVFP4A16", "FP8_DYNAMIC"):
            run_convert(src, tmp_path / f"{s}-one", s)
            assert contents(tmp_path / s) == contents(tmp_path / f"{s}-one")
            assert verify(tmp_path / s, c).failures == []


def test_verify_sees_what_is_spoilt_in_an_expert(tmp_path):
    made = FAMILIES["qwen3_vl_moe"]()
    convert(made, tmp_path, "NVFP4A16")
    name = "model.language_model.layers.0.mlp.experts.2.up_proj.weight_packed"
    t, _ = tensors_of(tmp_path / "out")[name]
    path = tmp_path / "out" / t.file
    raw = bytearray(path.read_bytes())
    raw[t.start + 70] ^= 0x77
    path.write_bytes(raw)
    with open_checkpoint(tmp_path / "in") as c:
        (failure,) = verify(tmp_path / "out", c).failures
    assert "experts.2.up_proj.weight' at row 1, column 1" in failure


CHILD = """
import sys
import streamq
from streamq.converting import Settings
settings = Settings(max_memory=256 << 20, sync=False, workers=2)
streamq.convert(sys.argv[1], sys.argv[2], "nvfp4a16", settings=settings)
assert "torch" not in sys.modules
# Not getrusage: its peak is at least what the parent had when it forked.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "llama4"])
def test_a_stack_larger_than_the_memory_it_takes(model_type, tmp_path):
    """640 MiB, a hole on the disk. One of 4 GB takes no more (docs/families.md)."""
    shape = [4, 5120, 16384] if model_type == "llama4" else [4, 16384, 5120]
    size = 2 * math.prod(shape)
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.mlp.experts.gate_up_proj": entry}).encode()
    header += b" " * (-len(header) % 8)
    src = tmp_path / "in"
    src.mkdir()
    with (src / "model.safetensors").open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)
    sizes = {"model_type": model_type, "hidden_size": 5120, "intermediate_size": 8192}
    (src / "config.json").write_text(json.dumps(sizes))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, src, tmp_path / "out"], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 400 << 10


# --- care ---------------------------------------------------------------------------------


def test_odd_tensors_pass_through(tmp_path):
    odd = {
        "empty.weight": np.zeros((0, 64), BF16),
        "a.empty.gate_up_proj": np.zeros((0, 64, 32), BF16),
        "model.layers.0.a.scalar": np.array(1.5, "f4"),
        "model.layers.0.a.mask": np.array([[True, False]] * 8),
        "model.layers.0.a.position_ids": np.arange(64).reshape(1, 64),
        "model.layers.0.a.table.weight": np.arange(4096, dtype="i4").reshape(64, 64),
        "model.layers.0.a.double.weight": np.random.default_rng(0).random((64, 64)),
        "model.layers.0.a.vector.weight": np.ones(64, "f2"),
    }
    same = draw("same", 64, 64)
    ends = {"model.embed_tokens.weight": same, "lm_head.weight": same}
    tensors = odd | ends | {f"model.layers.{n}.b_proj.weight": same for n in (0, 1)}
    src = write_checkpoint(tmp_path / "in", tensors, {"model_type": "llama"})
    for scheme in ("NVFP4A16", "FP8_BLOCK"):
        run_convert(src, tmp_path / scheme, scheme)
        out = contents(tmp_path / scheme)
        for name, x in (odd | ends).items():
            assert out[name][1:] == (x.shape, x.tobytes()), name
        found = [n for n in out if n.startswith("model.layers.0.b_proj")]
        assert all(out[n] == out[n.replace("0.b", "1.b")] for n in found)
        with open_checkpoint(src) as c:
            assert verify(tmp_path / scheme, c).failures == []


def test_tensors_that_share_their_bytes(tmp_path):
    """Two names for the same bytes of the file, as some writers have them."""
    x = draw("x", 64, 64)
    names = ["model.embed_tokens.weight", "model.layers.0.o_proj.weight", "lm_head.weight"]
    src = write_checkpoint(tmp_path / "in", dict.fromkeys(names, x), {"model_type": "llama"})
    run_convert(src, tmp_path / "out", "W8A16", group_size=32)
    out = contents(tmp_path / "out")
    assert out["lm_head.weight"] == out["model.embed_tokens.weight"]


def test_tied_embeddings_stay_tied(tmp_path):
    config = {"model_type": "llama", "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": draw("e", 64, 64),
               "model.layers.0.o_proj.weight": draw("o", 64, 64)}  # fmt: skip
    src = write_checkpoint(tmp_path / "in", tensors, config)
    plan = run_convert(src, tmp_path / "out", "NVFP4A16")
    assert plan.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in contents(tmp_path / "out")


def test_a_quantized_sources_own_ignore_is_honoured(tmp_path):
    names = [f"model.layers.{n}.{p}_proj.weight" for n in (0, 1) for p in ("o", "down")]
    src = write_checkpoint(tmp_path / "in", {n: draw(n, 128, 128) for n in names},
                           {"model_type": "llama"})  # fmt: skip
    run_convert(src, tmp_path / "fp8", "FP8_BLOCK", ignore=("*.0.down_proj",),
                format=FORMATS["fp8"])  # fmt: skip
    plan = run_convert(tmp_path / "fp8", tmp_path / "out", "NVFP4A16", requantize=True)
    assert [(t.name, why) for t, why in plan.unquantized] == [
        (names[1], "left out in the source; --only takes it")
    ]
    assert "model.layers.0.down_proj" in plan.config["quantization_config"]["ignore"]
    plan = run_convert(tmp_path / "fp8", tmp_path / "all", "NVFP4A16", requantize=True, only=("*",))
    assert plan.unquantized == []


def test_f16_and_f32_stacks(tmp_path):
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        made = FAMILIES["llama4"]()
        made.tensors = {n: x.astype(dtype) for n, x in made.tensors.items()}
        made.each = {n: x.astype(dtype) for n, x in made.each.items()}
        folder = tmp_path / np.dtype(dtype).name
        _, stacked = convert(made, folder / "3d", "W4A16")
        _, flat = convert(made, folder / "2d", "W4A16", two_d(made))
        assert stacked == flat
