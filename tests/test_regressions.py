"""Corners where two parts of the house meet, each once got wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint

import streamq
from streamq.checkpoint import open_checkpoint
from streamq.converting import Output, Settings, convert_all, jobs
from streamq.errors import PlanError, StreamqError
from streamq.formats import FORMATS, named
from streamq.planning import Options, make_plan
from streamq.schemes import ALL, resolve
from streamq.stored import find_stored, open_tensors, read_rows
from streamq.verifying import verify

BF16 = ml_dtypes.bfloat16
CONFIG = {"model_type": "llama", "dtype": "bfloat16"}


def draw(seed, rows=128, cols=256, dtype=BF16):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * 0.02).astype(dtype)


def attention(**change):
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return {f"m.{n}.weight": draw(i) for i, n in enumerate(names)} | change


def data(folder):
    return {n: d for n, (_, d) in tensors_of(folder).items()}


def test_a_gptq_weight_with_one_group_a_row_is_read_in_slabs(tmp_path, monkeypatch):
    src = write_checkpoint(tmp_path / "in", {"m.o_proj.weight": draw(1, 256, 512)}, CONFIG)
    run_convert(src, tmp_path / "gptq", "W4A16", format=FORMATS["gptq"], group_size=ALL)
    with open_tensors(tmp_path / "gptq") as t:
        whole = t["m.o_proj.weight"]
    monkeypatch.setattr("streamq.stored.SLAB", 1 << 14)
    with open_tensors(tmp_path / "gptq") as t:
        assert np.array_equal(t["m.o_proj.weight"], whole)


def test_pieces_of_a_large_step_fit_the_blocks_of_every_member(tmp_path, monkeypatch):
    fmt = named("group", group_dim=0)
    tensors = {"m.k_proj.weight": draw(1, 128), "m.q_proj.weight": draw(2, 384)}
    src = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    run_convert(src, tmp_path / "whole", "W8A16", format=fmt, group_size=ALL)
    monkeypatch.setattr(jobs, "JOB", 1 << 14)
    run_convert(src, tmp_path / "pieces", "W8A16", format=fmt, group_size=ALL)
    assert data(tmp_path / "whole") == data(tmp_path / "pieces")


def test_a_scheme_that_the_format_holds_with_other_numbers_is_not_kept_in_it(tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    run_convert(src, tmp_path / "ct", "NVFP4A16", only=("*o_proj",))
    with pytest.raises(PlanError, match=r"o_proj.weight'.*NVFP4A16.*cannot hold"):
        run_convert(tmp_path / "ct", tmp_path / "mlx", "W4A16_ASYM", format=FORMATS["mlx"],
                    group_size=64, only=("*q_proj", "*k_proj", "*v_proj", "*o_proj"))  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"), [("n/a", "n"), ("n", "n/a"), ("n.partial", "n"), ("n", "n.partial")]
)
def test_outputs_that_would_destroy_each_other_are_refused(first, second, tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    with open_checkpoint(src) as c:
        outputs = [Output(make_plan(c, Options(resolve("w8a8"))), tmp_path / name)
                   for name in (first, second)]  # fmt: skip
        with pytest.raises(PlanError, match="overlap"):
            convert_all(c, outputs, Settings(overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_source_where_the_output_would_be_built_is_refused(tmp_path):
    src = write_checkpoint(tmp_path / "m.partial", attention(), CONFIG)
    with pytest.raises(PlanError, match="overlaps the source"):
        streamq.convert(src, tmp_path / "m", "w4a16")
    assert len(list(src.iterdir())) == 2


def test_names_with_brackets_are_names(tmp_path):
    odd = {"blocks[0].ln.weight": np.ones(5, "f4"), "blocks[1].ln.weight": np.ones(5, "f4"),
           "a[0]": np.ones(7, "f4"), "a[1]": np.ones(9, "f4"), "extra[0]": draw(9)}  # fmt: skip
    src = write_checkpoint(tmp_path / "in", attention() | odd, CONFIG)
    run_convert(src, tmp_path / "out", "W8A8")
    out = tensors_of(tmp_path / "out")
    for name, x in odd.items():
        assert (out[name][0].shape, out[name][1]) == (x.shape, x.tobytes())


def test_zeros_and_tiny_weights_go_from_mxfp4_to_nvfp4(tmp_path):
    tensors = {
        "m.o_proj.weight": draw(1) * BF16(0),
        "m.down_proj.weight": draw(2) * BF16(2.0**-118),
    }
    src = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    run_convert(src, tmp_path / "mx", "MXFP4A16")
    plan = run_convert(tmp_path / "mx", tmp_path / "nv", "NVFP4A16")
    assert "1 weights stay quantized to MXFP4A16" in plan.notes
    assert verify(tmp_path / "nv").failures == []
    with open_tensors(tmp_path / "mx") as a, open_tensors(tmp_path / "nv") as b:
        for name in tensors:
            assert np.array_equal(a[name], b[name])


def test_an_ignored_weight_stays_mxfp4(tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    run_convert(src, tmp_path / "mx", "MXFP4A16")
    run_convert(tmp_path / "mx", tmp_path / "nv", "NVFP4A16", ignore=("*o_proj",))
    before, after = tensors_of(tmp_path / "mx"), tensors_of(tmp_path / "nv")
    for suffix in ("weight_packed", "weight_scale"):
        assert after[f"m.o_proj.{suffix}"][1] == before[f"m.o_proj.{suffix}"][1]
    assert "m.o_proj.weight_global_scale" not in after


def test_files_that_speak_of_an_old_quantization_do_not_survive(tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    run_convert(src, tmp_path / "mo", "NVFP4A16", format=FORMATS["modelopt"])
    assert (tmp_path / "mo" / "hf_quant_config.json").is_file()
    run_convert(tmp_path / "mo", tmp_path / "bf16", "bf16")
    run_convert(tmp_path / "mo", tmp_path / "ct", "NVFP4A16")
    run_convert(tmp_path / "mo", tmp_path / "same", "NVFP4A16", format=FORMATS["modelopt"])
    kept = [(tmp_path / n / "hf_quant_config.json").exists() for n in ("bf16", "ct", "same")]
    assert kept == [False, False, True]


def test_a_float_source_becomes_the_dtype_that_is_asked_for(tmp_path):
    tensors = {"m.o_proj.weight": draw(1, dtype=np.float32), "m.norm.weight": np.ones(4, "f4")}
    src = write_checkpoint(tmp_path / "in", tensors, {**CONFIG, "dtype": "float32"})
    plan = run_convert(src, tmp_path / "out", "bf16")
    assert not plan.verbatim
    out = tensors_of(tmp_path / "out")
    assert out["m.o_proj.weight"][1] == tensors["m.o_proj.weight"].astype(BF16).tobytes()
    assert out["m.norm.weight"][0].dtype == "F32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert run_convert(tmp_path / "out", tmp_path / "again", "bf16").verbatim


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_scales_are_not_repacked(bad, tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    run_convert(src, tmp_path / "ct", "W4A16_ASYM")
    with open_checkpoint(tmp_path / "ct") as c:
        t = c.tensors["m.o_proj.weight_scale"]
    path = tmp_path / "ct" / t.file
    raw = bytearray(path.read_bytes())
    raw[t.start + 4 : t.start + 6] = np.array([bad], BF16).tobytes()
    path.write_bytes(raw)
    with pytest.raises(StreamqError, match=r"'m.o_proj.weight'.* a scale .*not finite"):
        run_convert(tmp_path / "ct", tmp_path / "awq", "W4A16_ASYM", format=FORMATS["awq"])


def test_floats_that_are_called_scales_are_floats(tmp_path):
    odd = {"m.mixer.scales": np.ones(4, BF16), "scales": np.ones(3, BF16)}
    src = write_checkpoint(tmp_path / "in", attention() | odd, CONFIG)
    for fmt, group in (("awq", 64), ("mlx", 64)):
        run_convert(src, tmp_path / fmt, "W4A16_ASYM", format=FORMATS[fmt], group_size=group)
        run_convert(tmp_path / fmt, tmp_path / (fmt + "32"), "f32")
        out = tensors_of(tmp_path / (fmt + "32"))
        assert all(out[n][1] == x.tobytes() for n, x in odd.items())


def test_searched_scales_beside_kept_ones_are_one_scheme(tmp_path):
    src = write_checkpoint(tmp_path / "in", attention(), CONFIG)
    run_convert(src, tmp_path / "awq", "W4A16_ASYM", format=FORMATS["awq"], only=("*o_proj",))
    streamq.convert(tmp_path / "awq", tmp_path / "all", "w4a16_asym", format="awq",
                    scales="search", only=["*_proj"])  # fmt: skip
    assert verify(tmp_path / "all").quantized == 4


def test_several_outputs_with_one_that_joins_weights_share_scales_as_alone(tmp_path, monkeypatch):
    config = {**CONFIG, "num_attention_heads": 4, "head_dim": 32}
    tensors = {f"model.layers.0.self_attn.{p}_proj.weight": draw(i) for i, p in enumerate("qkvo")}
    tensors = {"a.weight": np.ones(3, BF16), **tensors}
    src = write_checkpoint(tmp_path / "in", tensors, config)
    run_convert(src, tmp_path / "alone", "NVFP4A16")
    monkeypatch.setattr(jobs, "JOB", 1 << 14)
    fast = named("gpt-fast", gpt_fast_names=True)
    with open_checkpoint(src) as c:
        plans = [make_plan(c, Options(resolve("nvfp4a16"))),
                 make_plan(c, Options(resolve("w8a16"), format=fast))]  # fmt: skip
        outputs = [Output(p, tmp_path / n) for p, n in zip(plans, "ab", strict=True)]
        convert_all(c, outputs, Settings(sync=False))
    assert data(tmp_path / "a") == data(tmp_path / "alone")
    with open_checkpoint(tmp_path / "b") as c:
        for s in find_stored(c).values():
            assert np.isfinite(read_rows(c, s, 0, s.layout.rows).scale.astype("f4")).all()
