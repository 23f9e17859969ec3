"""Every command in the documentation and in ``--help`` runs, and does what it says."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from doc_commands import (
    ELSEWHERE,
    PAGES,
    ROOT,
    arguments,
    blocks,
    commands,
    example,
    fill,
    of_help,
    run,
)  # fmt: skip
from hub_stand_in import HubStandIn
from hub_uploads import Uploads

import streamq
from streamq.cli import cli

# huggingface_hub gives files to its HTTP library in a way that one will drop some day.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

#: What is not run, and why. A line that is not in the documentation any more does not belong here.
NOT_RUN = {
    "docs/ascend.md: streamq convert SRC DST -s W8A8_DYNAMIC --device npu": "needs an NPU",
    "docs/ascend.md: streamq convert SRC DST -s W8A8_DYNAMIC --device npu:0,npu:1": "needs NPUs",
    "docs/ascend.md: source /usr/local/Ascend/cann/set_env.sh": "needs CANN",
    "docs/ascend.md: cmake -B build -DCMAKE_ASC_ARCHITECTURES=dav-2201 && cmake --build build":
        "needs CANN",
    "docs/gpu.md: streamq convert SRC DST -s nvfp4 --device cuda": "needs a GPU",
    "docs/gpu.md: streamq convert SRC DST -s nvfp4 --device cuda:0,cuda:1": "needs GPUs",
    "docs/ray.md: streamq convert SRC DST -s nvfp4 --engine ray:HEAD:6379":
        "needs a cluster; tests/test_ray.py has some",
    "docs/quickstart.md: vllm serve DST": "needs vLLM; `make oracle` runs it",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_compiled_ahead(monkeypatch):
    """`streamq kernels` would take minutes; tests/test_edge.py has it compile some."""
    monkeypatch.setattr("streamq.ahead.run", lambda case, folder, *how: None)
    monkeypatch.setattr("streamq.ahead.compress", lambda folder: None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the Hub that has all repositories of the documentation, and is written to."""
    with HubStandIn() as stand_in:
        uploads = Uploads(stand_in)
        fill(stand_in)
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_TOKEN", "org")
        monkeypatch.setenv("HF_HOME", str(tmp_path / ".hf"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield uploads
        huggingface_hub.close_session()


def succeeds(command, here, hub):
    code, output = run(command, here)
    assert code == command.code, f"{command.key}\n{output}"
    if command.words[1] != "convert":
        return
    for dst in [
        arguments(command)["dst"],
        *(t.partition(":")[2] for t in arguments(command)["to"]),
    ]:
        if dst and dst.startswith("hf://"):
            assert "model.safetensors.index.json" in hub.files(dst.removeprefix("hf://"))
        elif dst:
            assert streamq.verify(dst).failures == [], command.key


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p, "streamq", "printf")])
def test_commands_run(page, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGES[page]):
        if "[[rule]]" in block.splitlines():
            (tmp_path / "recipe.toml").write_text(block)
    for command in commands(page, "streamq", "printf"):
        if command.key not in NOT_RUN:
            succeeds(command, tmp_path, hub)


@pytest.mark.parametrize("name", cli.commands)
def test_examples_of_help_run(name, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert of_help(name)
    for command in of_help(name):
        assert command.words[1] == name
        succeeds(command, tmp_path, hub)


def test_what_is_said_of_commands_is_of_commands_that_are_there():
    known = {c.key for page in PAGES for c in commands(page)}
    assert NOT_RUN.keys() - known == set()
    assert {key for key in ELSEWHERE if ": " in key} - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_targets_scripts_and_extras_exist(page):
    """What takes hours, a network or another machine is there at least, and every command is of a
    kind that is looked at here.
    """
    text = PAGES[page]
    for command in commands(page):
        kinds = ("streamq", "printf", "make", "python", "pip", "eval")
        assert command.words[0] in kinds or command.key in NOT_RUN, command.key
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}"
    for script in re.findall(r"(?:`|^    )python ([\w./]+\.py)", text, re.MULTILINE):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for extra in re.findall(r"pip install '(?:streamq|\.)\[([\w,-]+)\]'", text):
        assert set(extra.split(",")) <= EXTRAS.keys(), extra
    for name in re.findall(r"`streamq ([a-z]+)", text):
        assert name in cli.commands, name


@pytest.mark.parametrize("line", [c.line for page in PAGES for c in commands(page, "eval")])
def test_lines_for_bash_run(line):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    out = subprocess.run(
        ["bash", "--norc", "-c", f"{line} && complete -p streamq"], check=True,
        env={**os.environ, "PATH": path}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "streamq" in out


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example(tmp_path / "SRC")
    weight = np.random.default_rng(0).integers(-7, 8, (64, 512)).astype(np.int8)
    for block in blocks(PAGES[page]):
        if re.match(r"(import|from) \w", block):
            exec(compile(block, page, "exec"), {"weight": weight})
