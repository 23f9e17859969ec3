"""Verification accepts what conversion writes, and finds each way in which it can be broken."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, tensors_of, write_checkpoint
from tampering import BY_NAME, HALF_STEP, SCALE, TAMPERS, Q, data, recast

from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError
from streamq.schemes import SCHEMES
from streamq.verifying import elements, verify

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
HIDDEN, INNER, KV, VOCAB = 128, 256, 36, 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
QUANTIZED = 2 * len(LINEARS)


def outliers(shape):
    w = np.random.default_rng(2).standard_normal(shape) * 1e-3
    w.flat[::97] = 100
    return w


#: Values that make degenerate scales and zero points.
ODD = {
    "zeros": np.zeros,
    "one value": lambda shape: np.full(shape, -0.7),
    "tiny": lambda shape: np.full(shape, 1e-7),
    "one sign": lambda shape: np.random.default_rng(2).uniform(0.5, 1, shape),
    "outliers": outliers,
}


def llama(dtype, draw=None):
    """Tensors of two layers; ``draw`` makes the values of a shape."""
    rng = np.random.default_rng(1)
    draw = draw or (lambda shape: rng.standard_normal(shape) * 0.05)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {layer + name: shape for name, shape in LINEARS.items()}
        shapes |= {layer + f"{n}_layernorm": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    return {name + ".weight": draw(shape).astype(dtype) for name, shape in shapes.items()}


def write_llama(folder, dtype="bf16", draw=None):
    tensors = llama(DTYPES[dtype], draw)
    names = list(tensors)
    return write_checkpoint(folder, tensors, shards=[names[:10], names[10:]])


def check(dst, src=None, **kw):
    if src is None:
        return verify(dst, **kw)
    with open_checkpoint(src) as source:
        return verify(dst, source, **kw)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {d: write_llama(tmp_path_factory.mktemp("source") / d, d) for d in DTYPES}


@pytest.fixture(scope="module")
def odd_sources(tmp_path_factory):
    return {n: write_llama(tmp_path_factory.mktemp("odd") / "in", draw=d) for n, d in ODD.items()}


@pytest.fixture(scope="module")
def output_of(sources, tmp_path_factory):
    """A function from a scheme to an output of the bf16 source, made once."""
    made = {}

    def output(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("good") / scheme
            run_convert(sources["bf16"], made[scheme], scheme)
        return made[scheme]

    return output


# --- good outputs ----------------------------------------------------------------------

#: Lowest SQNR in dB of any weight, for normally distributed ones: about 1 dB below what is
#: measured, so that a worse scale or rounding shows.
FLOOR = {
    "NVFP4A16": 19.2, "NVFP4": 19.2, "MXFP4A16": 17.8, "MXFP4": 17.8,
    "MXFP8A16": 30.3, "MXFP8": 30.3, "FP8_DYNAMIC": 30.5, "FP8_BLOCK": 30.3,
    "W8A8": 41.3, "W4A16_ASYM": 18.7, "W4AFP8": 17.8, "W4A8": 17.8,
    "W2A16": 3.9, "W3A16": 11.1, "W4A16": 17.8, "W5A16": 24.1, "W6A16": 30.2,
    "W7A16": 36.1, "W8A16": 41.8, "W2A16_ASYM": 4.5, "W3A16_ASYM": 12.0, "W5A16_ASYM": 25.0,
    "W6A16_ASYM": 31.0, "W7A16_ASYM": 36.5, "W8A16_ASYM": 41.8,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numerics", ["f32", "weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_conversion_verifies(scheme, numerics, dtype, sources, tmp_path):
    run_convert(sources[dtype], tmp_path / "out", scheme, numerics=numerics, record=True)
    again = check(tmp_path / "out", sources[dtype])
    assert (again.failures, again.exact, again.quantized) == ([], True, QUANTIZED)
    (tmp_path / "out" / "streamq.json").unlink()
    alone = check(tmp_path / "out")
    assert (alone.failures, alone.scheme, alone.quantized) == ([], scheme, QUANTIZED)
    assert not alone.quality
    report = check(tmp_path / "out", sources[dtype])
    assert (report.failures, report.exact, report.quantized) == ([], False, QUANTIZED)
    assert again.quality.by_tensor() == pytest.approx(report.quality.by_tensor())
    sqnr = report.quality.by_tensor()
    assert len([n for n in sqnr if n.endswith("_proj.weight")]) == QUANTIZED
    assert min(sqnr.values()) > FLOOR[scheme]
    assert min(sqnr.values()) <= report.quality.total <= max(sqnr.values())


@pytest.mark.parametrize("draw", ODD)
@pytest.mark.parametrize("numerics", ["f32", "weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_conversion_of_odd_weights_verifies(scheme, numerics, draw, odd_sources, tmp_path):
    run_convert(odd_sources[draw], tmp_path / "out", scheme, numerics=numerics)
    assert check(tmp_path / "out", odd_sources[draw]).failures == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slabs_give_the_same_report_as_whole_tensors(scheme, sources, output_of, monkeypatch):
    whole = check(output_of(scheme), sources["bf16"])
    monkeypatch.setattr(elements, "slab_rows", lambda step, *_: step)
    slabs = check(output_of(scheme), sources["bf16"])
    assert slabs.failures == whole.failures == []
    assert slabs.quality.by_tensor() == pytest.approx(whole.quality.by_tensor())


# --- tampered outputs ------------------------------------------------------------------


def matching(pattern, failures):
    return [f for f in failures if re.search(pattern, f)]


@pytest.mark.parametrize("row", TAMPERS, ids=lambda row: row.name)
def test_tampering_is_found(row, sources, output_of, tmp_path):
    out = shutil.copytree(output_of(row.scheme), tmp_path / "out")
    row.change(out)
    alone = check(out).failures
    both = check(out, sources["bf16"]).failures
    assert matching(row.failure, both), both
    if row.needs_source:
        assert alone == []
    else:
        assert matching(row.failure, alone), alone
    assert matching("\n", alone + both) == []


def test_each_tampering_has_a_name_of_its_own():
    assert len(BY_NAME) == len(TAMPERS)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_one_step_of_an_int8_code_is_found_where_the_dtype_resolves_it(dtype, sources, tmp_path):
    """Half an ulp of f16 is 1/32 step at code 127, so 0.7 steps are too far."""
    run_convert(sources[dtype], tmp_path / "out", "W8A8")
    was, is_ = tensors_of(sources[dtype]), tensors_of(tmp_path / "out")
    w = np.frombuffer(was[Q + ".weight"][1], DTYPES[dtype]).reshape(128, 128).astype(np.float32)
    scale = np.frombuffer(is_[SCALE][1], DTYPES[dtype]).reshape(128, 1).astype(np.float32)
    x = w / scale
    at = int(np.flatnonzero((x > 100) & (x < 126) & (x % 1 > 0.2) & (x % 1 < 0.3))[0])
    data(Q + ".weight", lambda old: bytes([old[0] + 1]), at)(tmp_path / "out")
    report = check(tmp_path / "out", sources[dtype])
    assert matching(HALF_STEP, report.failures)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_a_source_without_the_scale_of_a_weight_is_refused(dtype, sources, output_of, tmp_path):
    src = shutil.copytree(sources["bf16"], tmp_path / "src")
    bits = {"F4": 4, "F6_E2M3": 6}[dtype]
    recast(Q + ".weight", dtype=dtype, data=bytes(128 * 128 * bits // 8))(src)
    with pytest.raises(CheckpointError, match=f"q_proj.weight'.* is {dtype} and has no"):
        check(output_of("W4A16"), src)


@pytest.mark.parametrize("dtype", ["I32", "BOOL"])
def test_a_source_weight_of_another_dtype_is_found(dtype, sources, output_of, tmp_path):
    src = shutil.copytree(sources["bf16"], tmp_path / "src")
    bits = {"I32": 32, "BOOL": 8}[dtype]
    recast(Q + ".weight", dtype=dtype, data=bytes(128 * 128 * bits // 8))(src)
    failures = check(output_of("W4A16"), src).failures
    assert len(matching("q_proj.weight'", failures)) == 1, failures


# --- command line ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bit of a norm", "bf16 scale NaN", "shard truncated"])
def test_the_command_lists_failures_and_exits_with_3(name, sources, output_of, tmp_path):
    row = BY_NAME[name]
    out = shutil.copytree(output_of(row.scheme), tmp_path / "out")
    row.change(out)
    result = CliRunner().invoke(cli, ["verify", str(out), "--source", str(sources["bf16"])])
    assert result.exit_code == 3
    assert re.search(f"^failed: .*{row.failure}", result.stderr, re.M)
    assert re.search(r"^Error: .*: \d+ checks? failed\.$", result.stderr, re.M)
    assert "Traceback" not in result.output
    assert "ok" not in result.stdout.split()


def test_the_command_says_ok(sources, output_of):
    out = output_of("NVFP4")
    result = CliRunner().invoke(cli, ["verify", str(out), "--source", str(sources["bf16"])])
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{out}: ok; " in result.stdout
    assert "14 weights in NVFP4" in result.stdout


def test_json_stays_json_where_nothing_is_lost(odd_sources, tmp_path):
    src = odd_sources["zeros"]
    run_convert(src, tmp_path / "out", "W8A8")
    result = CliRunner().invoke(
        cli, ["verify", str(tmp_path / "out"), "--source", str(src), "--json"]
    )
    assert result.exit_code == 0

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    assert json.loads(result.stdout, parse_constant=refuse)["ok"] is True


# --- what is no output at all ----------------------------------------------------------


@pytest.mark.parametrize("what", ["absent", "file"])
def test_what_is_no_directory_is_an_error(what, tmp_path):
    path = tmp_path / "out"
    if what == "file":
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"out: .*directory.*\.$"):
        verify(path)
    result = CliRunner().invoke(cli, ["verify", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: ")


def test_a_directory_without_an_output_fails(tmp_path):
    report = verify(tmp_path)
    (only,) = report.failures
    assert re.search("no .*safetensors file here", only)
    assert "\n" not in only
    assert CliRunner().invoke(cli, ["verify", str(tmp_path)]).exit_code == 3


def test_what_is_not_quantized_verifies_as_that(sources):
    report = verify(sources["bf16"])
    assert (report.failures, report.scheme, report.quantized) == ([], "plain", 0)


def test_another_source_is_found(output_of, tmp_path):
    other = write_llama(tmp_path / "other", draw=np.ones)
    report = check(output_of("NVFP4"), other)
    assert len(report.failures) == len(llama(np.float32))
