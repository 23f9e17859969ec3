"""gpt-oss: experts of a layer in one tensor, transposed in bf16 and by rows in MXFP4."""

import re

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint
from streamq.kernels.reference import dequantize, quantize

from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError
from streamq.formats import FORMATS
from streamq.schemes import SCHEMES
from streamq.stored import open_tensors
from streamq.verifying import verify

EXPERTS, HIDDEN, INTER = 3, 64, 96
FORMAT = FORMATS["gpt-oss"]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
CONFIG = {"model_type": "gpt_oss", "dtype": "bfloat16", "num_hidden_layers": 1}


def weights():
    rng = np.random.default_rng(11)

    def draw(*shape):
        return (rng.standard_normal(shape) * 0.05).astype(ml_dtypes.bfloat16)

    return {
        "model.embed_tokens.weight": draw(32, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": draw(HIDDEN, HIDDEN),
        "model.layers.0.mlp.router.weight": draw(EXPERTS, HIDDEN),
        GATE_UP: draw(EXPERTS, HIDDEN, 2 * INTER),
        GATE_UP + "_bias": draw(EXPERTS, 2 * INTER),
        DOWN: draw(EXPERTS, INTER, HIDDEN),
        DOWN + "_bias": draw(EXPERTS, HIDDEN),
        "lm_head.weight": draw(32, HIDDEN),
    }


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "in", weights(), CONFIG)


def test_blocks_and_scales_are_those_of_each_expert(source, tmp_path):
    plan = run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMAT)
    assert plan.config["quantization_config"]["quant_method"] == "mxfp4"
    out = tensors_of(tmp_path / "out")
    for name in (GATE_UP, DOWN):
        x = weights()[name]
        count, cols, rows = x.shape
        for suffix, shape in (("_blocks", (count, rows, cols // 32, 16)),
                              ("_scales", (count, rows, cols // 32))):  # fmt: skip
            t, _ = out[name + suffix]
            assert (t.dtype, t.shape) == ("U8", shape)
        blocks = np.frombuffer(out[name + "_blocks"][1], np.uint8).reshape(count, rows, -1, 16)
        scales = np.frombuffer(out[name + "_scales"][1], np.uint8).reshape(count, rows, -1)
        for e in range(count):
            q = quantize(np.ascontiguousarray(x[e].T), SCHEMES["MXFP4A16"])
            assert np.array_equal(scales[e], q.scale)
            codes = q.codes.reshape(rows, -1, 32)
            assert np.array_equal(blocks[e], codes[..., ::2] | codes[..., 1::2] << 4)
    for name, x in weights().items():
        if name not in (GATE_UP, DOWN):
            assert out[name][1] == x.tobytes()


def test_it_reads_again_and_goes_back_to_bf16(source, tmp_path):
    run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMAT)
    report = verify(tmp_path / "out")
    assert (report.failures, report.scheme, report.quantized) == ([], "MXFP4A16", 2 * EXPERTS)
    run_convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    back = tensors_of(tmp_path / "bf16")
    assert sorted(back) == sorted(weights())
    with open_tensors(tmp_path / "out") as tensors:
        assert sorted(tensors.names) == sorted(weights())
        for name in (GATE_UP, DOWN):
            x = weights()[name]
            values = tensors[name]  # [experts, out, in], as the codes are
            assert (back[name][0].dtype, back[name][0].shape) == ("BF16", x.shape)
            data = np.frombuffer(back[name][1], ml_dtypes.bfloat16).reshape(x.shape)
            want = values.transpose(0, 2, 1).astype(ml_dtypes.bfloat16)
            assert data.tobytes() == want.tobytes()
            for e in range(EXPERTS):
                q = quantize(np.ascontiguousarray(x[e].T), SCHEMES["MXFP4A16"])
                assert np.array_equal(values[e], dequantize(q, SCHEMES["MXFP4A16"]))
    plan = run_convert(tmp_path / "out", tmp_path / "again", "MXFP4A16", format=FORMAT)
    assert plan.verbatim


def test_slabs_do_not_show(source, tmp_path, monkeypatch):
    run_convert(source, tmp_path / "whole", "MXFP4A16", format=FORMAT)
    monkeypatch.setattr("streamq.converting.slabs.STORED_SLAB", 1000)
    monkeypatch.setattr("streamq.converting.jobs.JOB", 4000)
    run_convert(source, tmp_path / "rows", "MXFP4A16", format=FORMAT)
    a, b = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "rows")
    assert {n: d for n, (_, d) in a.items()} == {n: d for n, (_, d) in b.items()}
    run_convert(tmp_path / "whole", tmp_path / "f32", "f32")
    assert verify(tmp_path / "f32").failures == []


def test_only_experts_of_gpt_oss_fit(tmp_path):
    tensors = {"model.layers.0.self_attn.q_proj.weight": np.ones((64, 64), ml_dtypes.bfloat16)}
    src = write_checkpoint(tmp_path / "llama", tensors, {"model_type": "llama"})
    with pytest.raises(PlanError, match=r"nothing to quantize.*not an expert"):
        run_convert(src, tmp_path / "out", "MXFP4A16", format=FORMAT)


def test_some_experts_of_one_tensor_cannot_stay(source, tmp_path):
    with pytest.raises(PlanError, match=r"some weights of '.*(gate_up|down)_proj' would stay"):
        run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMAT, ignore=("*proj??1?",))
    run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMAT, ignore=("*down_proj*",))
    out = tensors_of(tmp_path / "out")
    assert out[DOWN][1] == weights()[DOWN].tobytes()
    assert GATE_UP + "_blocks" in out


def test_verify_compares_experts_with_their_source(source, tmp_path):
    run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMAT, ignore=("*down_proj*",))
    run_convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    with open_checkpoint(source) as c:
        report = verify(tmp_path / "out", c)
    assert (report.failures, len(report.quality.by_tensor())) == ([], EXPERTS)
    with open_checkpoint(tmp_path / "out") as c:
        assert verify(tmp_path / "bf16", c).failures == []
    for folder, name, at in (("out", GATE_UP + "_blocks", 7), ("bf16", GATE_UP, 6000)):
        with open_checkpoint(tmp_path / folder) as c:
            t = c.tensors[name]
        path = tmp_path / folder / t.file
        raw = bytearray(path.read_bytes())
        raw[t.start + at] ^= 0x44
        path.write_bytes(raw)
    with open_checkpoint(source) as c:
        (failure,) = verify(tmp_path / "out", c).failures
    assert re.search(r"gate_up_proj\[#0\]' at row 0, column 1[45]", failure)
    with open_checkpoint(tmp_path / "out") as c:
        (failure,) = verify(tmp_path / "bf16", c).failures
    assert "gate_up_proj[#0]' at row" in failure
