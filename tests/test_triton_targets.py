"""Every Triton kernel is compiled for GPUs that are not here, and its instructions are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from torch_backend import needs_triton

pytestmark = needs_triton

SCRIPT = Path(__file__).parent.parent / "bench" / "triton_targets.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Weights of bf16 in `make test`, of every dtype in `make soak`.
EVERY_DTYPE = ["--every-dtype"] if settings.default.max_examples > 1000 else []


#: Kernels that divide by nothing but a global scale.
MULTIPLY_ONLY = ("row_stats", "values", "squares")


@pytest.fixture(scope="module", params=TARGETS)
def rows(request):
    """What the compilers say of every kernel, in a process where Triton compiles."""
    command = [sys.executable, SCRIPT, "--json", request.param, *EVERY_DTYPE]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def test_every_kernel_is_compiled(rows):
    kernels = Path(__file__).parent.parent / "kernels" / "triton"
    launched = {
        word.split(",")[0].strip()
        for path in kernels.glob("*.py")
        for word in path.read_text().replace("launch(\n", "launch(").split("launch(")[1:]
        if "kernel: Any" not in word[:20]
    }
    assert launched == {row["kernel"] for row in rows}


def test_nothing_is_spilled(rows):
    assert [(r["case"], r["kernel"], r["spilled"]) for r in rows if r["spilled"]] == []


def test_division_is_that_of_ieee(rows):
    for row in rows:
        names = set(row["code"])
        bad = [n for n in names if n.startswith(("div.full", "div.approx", "rcp", "sqrt", "ex2"))]
        assert not bad, (row["case"], row["kernel"], bad)
        divides = "div.rn.f32" in names or any(n.startswith("v_div_fixup_f32") for n in names)
        if row["kernel"] not in MULTIPLY_ONLY or row["case"] == "NVFP4: values":
            assert divides, (row["case"], row["kernel"])


def test_no_product_is_fused_with_a_sum(rows):
    """The divisions of gfx942 are made of fused operations, and nothing else is."""
    for row in rows:
        code = row["code"]
        if row["target"] != "gfx942":
            fused = [n for n in code if n.startswith(("fma", "mad.rn", "mad.f"))]
            assert not fused, (row["case"], row["kernel"], fused)
            continue
        divisions = code.get("v_div_fixup_f32", code.get("v_div_fixup_f32_e64", 0))
        fused = sum(c for n, c in code.items() if n.startswith(("v_fma_f32", "v_fmac_f32")))
        assert fused <= 5 * divisions, (row["case"], row["kernel"], code)


def test_rounding_by_addition_is_not_folded_away(rows):
    """32 weights a thread, or 16 where scales are searched, each is rounded."""
    for row in rows:
        if row["target"] != "gfx942" and row["kernel"] in ("integer", "piece_errors"):
            assert row["code"]["rint"] >= 16, (row["case"], row["kernel"])


def test_programs_have_no_more_threads_than_a_device_can_start(rows):
    for row in rows:
        assert row["warps"] * (64 if row["target"] == "gfx942" else 32) <= 1024, row["case"]


def test_subnormals_are_kept(rows):
    for row in rows:
        assert row["code"]["ftz"] == 0, (row["case"], row["kernel"])
        assert row["code"]["denormals"] == 3, (row["case"], row["kernel"])
