"""What the documentation says of formats is what the program says, and its examples run."""

import re
import shlex
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint

from streamq.cli import cli
from streamq.formats import FORMATS
from streamq.schemes import OF_FORMATS, PLAIN, SCHEMES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "formats.md").read_text()
LOADERS, HELD = 0, 1


def table(number):
    """Cells of a table, line by line, without the rule below its head."""
    lines = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)[number].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def section(name):
    """The text below a heading."""
    head = rf"^## (?:.*, )?{name}(?:, .*)?\n"
    return re.split(head, TEXT, flags=re.MULTILINE)[1].split("\n## ")[0]


def examples(name):
    """The indented lines below a heading."""
    return "".join(re.findall(r"^    (.*\n)", section(name), re.MULTILINE))


def test_formats_and_loaders():
    _, *rows = table(LOADERS)
    assert [(name, loaders) for name, loaders, _ in rows] == [
        (f.name, f.loaders) for f in FORMATS.values()
    ]


def test_schemes_that_formats_hold():
    (_, *names), *rows = table(HELD)
    assert names == [f.name for f in FORMATS.values() if f.name != "plain"]
    assert [scheme for scheme, *_ in rows] == [*SCHEMES, *OF_FORMATS]
    for name, *marks in zip(names, *(row[1:] for row in rows), strict=True):
        held = {row[0] for row, mark in zip(rows, marks, strict=True) if mark == "x"}
        assert held == set(FORMATS[name].presets), name
    assert FORMATS["plain"].presets == tuple(PLAIN)
    assert "Plain holds BF16, F16 and F32" in TEXT


def test_each_format_has_a_section():
    named = [name for head in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
             for name in head.split(", ") if name in FORMATS]  # fmt: skip
    assert named == list(FORMATS)


def test_tensors_of_each_format_are_named():
    for f in FORMATS.values():
        text = section(f.name)
        for suffix in {*f.code_suffixes, *f.other_suffixes} if f.name != "plain" else ():
            assert f"{suffix}`" in text, (f.name, suffix)


def test_lines_are_short():
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a checkpoint SRC."""
    monkeypatch.chdir(tmp_path)
    weight = np.linspace(-1, 1, 128 * 256).reshape(128, 256).astype(ml_dtypes.bfloat16)
    write_checkpoint(tmp_path / "SRC", {"model.layers.0.mlp.down_proj.weight": weight})
    return tmp_path


def test_several_outputs(here):
    program, *args = shlex.split(examples("Several outputs"))
    assert program == "streamq"
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.stderr
    for dst in ("OUT-NVFP4", "OUT-AWQ", "OUT-GPTQ"):
        args = ["verify", dst, "--source", "SRC", "-q"]
        assert CliRunner().invoke(cli, args).exit_code == 0


def test_from_python(here):
    exec(compile(examples("From Python"), "docs/formats.md", "exec"), {})
    assert (here / "DST" / "config.json").exists()
