"""The quality report: its numbers beside numpy, its page, and what it refuses."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import family_checkpoints
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint

import streamq
from streamq.cli import cli
from streamq.report import as_json, page
from streamq.report.fold import CELLS, COLUMNS, KINDS, TABLE_ROWS, page_data
from streamq.report.page import embedded

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{js}}\u2028"


def run(*args, code=0):
    result = CliRunner().invoke(cli, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A checkpoint with experts, and the report of a mixed conversion of it."""
    made = family_checkpoints.qwen3_moe()
    folder = tmp_path_factory.mktemp("moe")
    src = write_checkpoint(folder / "src", made.tensors, made.config)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        'scheme = "w4a16"\ngroup_size = 32\n'
        '[[rule]]\npattern = "*.self_attn.*"\nscheme = "fp8_dynamic"\n'
    )
    run("convert", src, folder / "dst", "--recipe", recipe, "--report", folder / "r.json", "-q")
    return src, folder / "dst", json.loads((folder / "r.json").read_text())


def losses_by_numpy(src, dst):
    """Of every quantized tensor its SQNR in dB, largest error, and that over the RMS."""
    found = {}
    with streamq.open(src) as before, streamq.open(dst) as after:
        for name in after.stored:
            w, v = before[name].astype(np.float64), after[name].astype(np.float64)
            signal, noise = (w**2).sum(), ((w - v) ** 2).sum()
            top = abs(w - v).max()
            found[name] = (10 * np.log10(signal / noise), top, top / np.sqrt((w**2).mean()))
    return found


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [("nvfp4a16", None), ("mxfp4", None), ("mxfp8", None), ("fp8_block", None), ("w8a8", None),
     ("w3a16", None), ("w4a16_asym", "awq"), ("w4a16", "gptq"), ("w4a16_asym", "mlx"),
     ("w4a16_asym", "group"), ("nvfp4", "modelopt"), ("w8a16", "gpt-fast")],
)  # fmt: skip
def test_numbers_are_those_of_numpy(scheme, fmt, tmp_path):
    made = family_checkpoints.dense("llama")
    src, dst = write_checkpoint(tmp_path / "src", made.tensors, made.config), tmp_path / "dst"
    how = ("-s", scheme, *(("-f", fmt) if fmt else ()))
    how += (
        ("--group-size", 64) if scheme[0] == "w" and scheme != "w8a8" and fmt != "gpt-fast" else ()
    )
    run("convert", src, dst, *how, "--report", tmp_path / "r.json", "-q")
    on_the_way = json.loads((tmp_path / "r.json").read_text())
    afterwards = json.loads(run("report", dst, "--source", src, "--json").stdout)
    wanted = losses_by_numpy(src, dst)
    for report in (on_the_way, afterwards):
        # MLX rounds zero point times scale, which what is measured on the way does not see.
        slack = 50 if fmt == "mlx" and report is on_the_way else 1
        got = {t["name"]: t for t in report["tensors"] if t["scheme"]}
        assert got.keys() == wanted.keys()
        for name, (sqnr, top, spread) in wanted.items():
            t = got[name]
            assert t["sqnr_db"] == pytest.approx(sqnr, abs=2e-3 * slack), name
            assert t["max_error"] == pytest.approx(top, rel=1e-3 * slack), name
            assert t["max_error_rms"] == pytest.approx(spread, rel=1e-3 * slack), name
    strict = [(t["name"], t["bytes_in"], t["bytes_out"], t["clipped"]) for t in
              on_the_way["tensors"]]  # fmt: skip
    assert strict == [(t["name"], t["bytes_in"], t["bytes_out"], t["clipped"]) for t in
                      afterwards["tensors"]]  # fmt: skip


def test_sums_over_tensors(moe):
    _, _, report = moe
    tensors = report["tensors"]
    quantized = [t for t in tensors if t["scheme"]]
    assert report["output"]["quantized"] == len(quantized) == 2 * (4 + 3 * 4) + 0
    for group in ("schemes", "cells"):
        assert sum(g["tensors"] for g in report[group] if g["sqnr_db"]) == len(quantized)
    assert sum(s["bytes_out"] for s in report["schemes"]) == sum(t["bytes_out"] for t in tensors)
    assert report["total"]["lowest_sqnr_db"] == min(t["sqnr_db"] for t in quantized)
    assert report["worst"][0]["sqnr_db"] == report["total"]["lowest_sqnr_db"]
    bits = 8 * sum(t["bytes_out"] for t in quantized) / sum(np.prod(t["shape"]) for t in quantized)
    assert report["output"]["bits_per_weight"] == pytest.approx(bits, rel=1e-5)
    cell = next(c for c in report["cells"] if c["kind"] == "experts.up_proj" and c["layer"] == 1)
    assert (cell["stack"], cell["tensors"], cell["schemes"]) == ("model.layers", 4, ["W4A16"])
    reasons = {t["name"]: t["reason"] for t in tensors if not t["scheme"]}
    assert reasons["lm_head.weight"]
    counts = report["errors"]["by_kind"]
    assert counts.keys() == {k["kind"] for k in report["kinds"]}
    numel = sum(np.prod(t["shape"]) for t in quantized)
    assert sum(map(sum, counts.values())) == pytest.approx(numel / 127, rel=0.1)


def test_histograms_are_those_of_numpy(moe):
    src, dst, report = moe
    with streamq.open(src) as before, streamq.open(dst) as after:
        for w in report["worst"]:
            h = w["histogram"]
            x = before[w["name"]].astype(float)
            assert h["weights"] == x.size
            assert h["reach"] == pytest.approx(4 * np.sqrt((x**2).mean()), rel=1e-5)
            for key, values in (("source", x), ("dequantized", after[w["name"]])):
                edges = np.linspace(-h["reach"], h["reach"], 50)
                inside = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
                wanted, _ = np.histogram(inside, edges)
                # reach has six digits, so that few weights at an edge may change sides
                assert abs(np.array(h[key]) - wanted).sum() <= 0.01 * x.size


def test_a_large_tensor_is_looked_at_in_places(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"model.layers.0.mlp.up_proj.weight":
               rng.standard_normal((4096, 512)).astype(ml_dtypes.bfloat16)}  # fmt: skip
    src = write_checkpoint(tmp_path / "src", tensors)
    run("convert", src, tmp_path / "dst", "-s", "fp8_block", "-q")
    report = json.loads(run("report", tmp_path / "dst", "--source", src, "--json").stdout)
    (worst,) = report["worst"]
    assert worst["histogram"]["weights"] == sum(worst["histogram"]["source"]) == 16 * 64 * 512 * 2


def test_what_is_repacked_has_no_loss_on_the_way_and_none_afterwards(moe, tmp_path):
    src, _, _ = moe
    run("convert", src, tmp_path / "a", "-s", "w4a16", "--group-size", 32, "-q")
    how = ("-s", "w4a16", "--group-size", 32, "-f", "gptq", "--report", tmp_path / "r.json", "-q")
    run("convert", tmp_path / "a", tmp_path / "b", *how)
    made = json.loads((tmp_path / "r.json").read_text())
    assert made["total"]["sqnr_db"] is None
    found = json.loads(run("report", tmp_path / "b", "--source", tmp_path / "a", "--json").stdout)
    assert found["total"]["exact"] or found["total"]["sqnr_db"] > 50  # scales of gptq are f16
    floats = tmp_path / "floats"
    run("convert", tmp_path / "a", floats, "-s", "bf16", "--report", tmp_path / "f.html", "-q")
    assert "bf16" in (tmp_path / "f.html").read_text()


def test_the_same_report_whatever_the_threads(moe, tmp_path):
    src, _, _ = moe
    texts = []
    for i, workers in enumerate((1, 3)):
        path = tmp_path / f"{i}.json"
        dst = tmp_path / "dst"
        how = ("-s", "nvfp4", "--overwrite", "-q", "-j", workers, "--report", path)
        run("convert", src, dst, *how)
        report = json.loads(path.read_text())
        for key in ("run", "options", "command"):
            del report[key]
        texts.append(as_json(report))
    assert texts[0] == texts[1]


# --- the page -------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page would load, and the elements it has."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self.policy, self._script = [], [], None, None
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self._script = attrs if tag == "script" else None
        for name in ("src", "href", "srcset", "action", "data", "poster", "formaction"):
            if attrs.get(name):
                self.found.append(attrs[name])
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script and self._script.get("id") == "data":
            self.data += data


def test_the_page_loads_nothing(moe):
    _, _, report = moe
    text = page(report)
    loads = Loads(text)
    assert loads.found == ["data:,"]
    assert loads.tags.count("script") == 3
    assert loads.policy.startswith("default-src 'none'; script-src 'unsafe-inline'; style-src")
    assert "@import" not in text[: text.index("</style>")]
    assert "url(" not in text[: text.index("</style>")]
    assert len(text) < 2_000_000
    data = json.loads(loads.data)
    assert len(data["table"]) == len(report["tensors"])


def test_names_of_a_checkpoint_are_text(tmp_path):
    name = f"model.layers.0.{EVIL}.up_proj.weight"
    weight = np.linspace(-1, 1, 64 * 128).reshape(64, 128).astype(ml_dtypes.bfloat16)
    src = write_checkpoint(tmp_path / "src", {name: weight}, {"model_type": EVIL})
    run("convert", src, tmp_path / "dst", "-s", "w4a16", "--report", tmp_path / "r.html", "-q")
    text = (tmp_path / "r.html").read_text()
    loads = Loads(text)
    assert (loads.tags.count("script"), loads.tags.count("img")) == (3, 0)
    data = json.loads(loads.data)
    assert data["table"][0][0] == name
    assert data["source"]["model_type"] == EVIL
    assert "{{css}}" not in text


def large_report(moe, names):
    """The report of a checkpoint of so many quantized tensors."""
    _, _, report = moe
    like = next(t for t in report["tensors"] if t["scheme"])
    cell = next(c for c in report["cells"] if c["sqnr_db"])
    return {
        **report,
        "tensors": [{**like, "name": n, "kind": n, "sqnr_db": 20.0 + i % 7} for i, n in
                    enumerate(names)],
        "cells": [{**cell, "kind": n, "layer": i % 99} for i, n in enumerate(names)],
        "warnings": names,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ([f"model.layers.{i // 1536}.mlp.experts.{i // 3 % 512}.{i % 3}_proj.weight"
          for i in range(120_000)], 79 * 3 + 500),
        ([f"{'x' * 500}.{i}.weight" for i in range(30_000)], TABLE_ROWS),
    ],
    ids=["experts", "long names"],
)  # fmt: skip
def test_a_page_stays_small(moe, names, rows):
    report = large_report(moe, names)
    data = page_data(report)
    assert len(data["table"]) == rows
    assert f"{len(names):,} tensors" in data["folded"]
    assert len(data["cells"]) <= CELLS
    assert len(data["rows"]) <= KINDS
    assert len(embedded(data)) < 8_500_000
    assert all(len(row) == len(COLUMNS) for row in data["table"])
    if "experts" in names[0]:
        assert sum(row[COLUMNS.index("count")] for row in data["table"]) == len(names) + 500
        merged = next(r for r in data["table"] if "experts.*" in r[0])
        noise = np.mean([10 ** -((20 + i % 7) / 10) for i in range(7)])
        assert merged[COLUMNS.index("sqnr_db")] == pytest.approx(-10 * np.log10(noise), abs=0.05)


# --- commands -------------------------------------------------------------------------------


def test_verify_says_what_it_found(moe, tmp_path):
    src, dst, _ = moe
    path = tmp_path / "v.json"
    run("verify", dst, "--source", src, "--report", path, "-q")
    assert json.loads(path.read_text())["verification"] == {"ok": True, "failures": []}
    other = {n: (x.astype(np.float32) * 1.3).astype(x.dtype) for n, x in
             family_checkpoints.qwen3_moe().tensors.items()}  # fmt: skip
    wrong = write_checkpoint(tmp_path / "wrong", other, family_checkpoints.qwen3_moe().config)
    run("verify", dst, "--source", wrong, "--report", path, "-q", code=3)
    found = json.loads(path.read_text())
    assert not found["verification"]["ok"]
    assert found["total"]["sqnr_db"] < 15
    assert "failed: " in page_data(found)["said"][0]


def test_a_broken_output_has_no_report(moe, tmp_path):
    src, _, _ = moe
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "model.safetensors").write_bytes(b"\xff" * 20)
    args = ("verify", tmp_path / "dst", "--source", src, "--report", tmp_path / "r.json")
    assert "no report, as " in run(*args, code=3).stderr
    assert not (tmp_path / "r.json").exists()


def test_the_name_of_the_page_is_that_of_the_output(moe, tmp_path, monkeypatch):
    src, dst, report = moe
    monkeypatch.chdir(tmp_path)
    said = run("report", dst, "--source", src).stdout
    assert said.endswith(
        f"dst.html: 32 quantized weights, SQNR {report['total']['sqnr_db']:.2f} dB\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["dst.html"]
    run("report", dst, "--source", src, "-o", "out.json", "--quiet")
    assert json.loads(Path("out.json").read_text())["schema"] == 1


USAGE = [
    (["convert", "SRC", "--to", "w4a16:X", "--report", "r.html"], "is of one conversion"),
    (["convert", "SRC", "X", "-s", "w4a16", "--dry-run", "--report", "r.html"], "one conversion"),
    (["verify", "DST", "--report", "r.html"], "--report needs --source"),
    (["report", "DST"], "Missing option '--source'"),
]
REFUSED = [
    (
        ["convert", "SRC", "X", "-s", "fp8_dynamic", "--report", "."],
        ". is a directory; name a file",
    ),
    (
        ["convert", "SRC", "X", "-s", "fp8_dynamic", "--report", "no/r.html"],
        "no is no directory; make",
    ),
    (["report", "DST", "--source", "OTHER"], "is not in DST; give the source that it was made"),
    (["report", "DST", "--source", "SMALLER"], "give the source that it was made from"),
]


@pytest.mark.parametrize(("args", "text"), [*USAGE, *REFUSED], ids=lambda x: str(x)[:60])
def test_what_is_refused(args, text, moe, tmp_path, monkeypatch):
    src, dst, _ = moe
    monkeypatch.chdir(tmp_path)
    Path("SRC").symlink_to(src)
    Path("DST").symlink_to(dst)
    made = family_checkpoints.qwen3_moe()
    more = {**made.tensors, "model.layers.0.extra.weight": np.zeros((8, 8), np.float32)}
    write_checkpoint(tmp_path / "OTHER", more, made.config)
    name = "model.layers.0.self_attn.q_proj.weight"
    write_checkpoint(tmp_path / "SMALLER", {**made.tensors, name: made.tensors[name][:64]},
                     made.config)  # fmt: skip
    result = run(*args, code=2 if (args, text) in USAGE else 1)
    assert text in result.stderr
    assert not Path("X").exists()
    assert not Path("X.partial").exists()
    assert not Path("r.html").exists()


def test_without_the_library_nothing_is_converted(moe, tmp_path, monkeypatch):
    src, dst, _ = moe
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    out = tmp_path / "out"
    args = ("convert", src, out, "-s", "w4a16", "--group-size", 32, "--report", tmp_path / "r.html")
    said = run(*args, code=1).stderr
    assert said == (
        "Error: a report needs Vega-Lite, which is not installed: pip install 'streamq[report]'.\n"
    )
    assert list(tmp_path.iterdir()) == []
    run("report", dst, "--source", src, "-o", tmp_path / "r.html", code=1)
    run("report", dst, "--source", src, "--json")  # needs none


def test_a_disk_that_is_full_leaves_no_half_page(moe, tmp_path, monkeypatch):
    src, dst, _ = moe

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    said = run("report", dst, "--source", src, "-o", tmp_path / "r.html", code=1).stderr
    assert "r.html: the report cannot be written: No space left on device" in said
    assert list(tmp_path.iterdir()) == []
