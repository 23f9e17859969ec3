"""What --help and completion in a shell tell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from streamq.cli import cli
from streamq.cli.group import SECTIONS
from streamq.cli.texts import EXAMPLES, SHORT
from streamq.formats import FORMATS
from streamq.schemes import SCHEMES


def shown(*args):
    result = CliRunner().invoke(cli, [*args, "--help"], terminal_width=100)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_has_a_sentence_and_its_default(name):
    command = cli.commands[name]
    text = " ".join(shown(name).split())
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert re.search(r"[.)]$", option.help), option.name
        if type(option.default) in (str, int, float):
            assert f"default: {option.default}" in text, option.name


@pytest.mark.parametrize("name", cli.commands)
def test_examples_end_the_help(name):
    text = shown(name)
    tail = text.split("Examples:\n")[1]
    assert tail.split() == EXAMPLES[name].split()
    assert max(map(len, text.splitlines())) <= 100


def test_commands_are_listed_with_a_line_each():
    lines = [" ".join(line.split()) for line in shown().splitlines()]
    for name in cli.commands:
        assert f"{name} {SHORT[name]}" in lines


def test_options_are_in_sections():
    text = shown("convert")
    heads = ["Options:", *(f"{head}:" for head in SECTIONS), "Examples:"]
    assert re.findall(r"^\s*([A-Z][a-z ]+:)$", text, re.MULTILINE) == heads
    assert text.index("--scheme") < text.index("Machine:") < text.index("--workers")


def test_exit_codes_and_environment_are_in_the_help():
    text = shown()
    for code in ("0 done", "1 error", "2 wrong usage", "3 verification failed", "130 interrupted"):
        assert code in text
    assert "NUMBA_CACHE_DIR" in text
    assert "_STREAMQ_COMPLETE" in text


# --- completion --------------------------------------------------------------------------


def completed(line):
    """What a shell offers for the last word of a line, and the kinds of it."""
    *args, word = line.split(" ")
    found = ShellComplete(cli, {}, "streamq", "_STREAMQ_COMPLETE").get_completions(args, word)
    return {item.value: item.type for item in found}


LINES = {
    "con": {"convert"},
    "re": {"reindex", "repair", "report"},
    "convert --sca": {"--scales", "--scale-fmt"},
    "convert --scheme nvfp": {"nvfp4", "nvfp4a16"},
    "convert -s W4A16": {"W4A16", "W4A16_ASYM"},
    "convert -s w8a8": {"w8a8", "w8a8_dynamic", "w8a8_mxfp8"},
    "convert -s bf": {"bf16"},
    "plan --format g": {"gptq", "gptq_v2", "gpt-oss", "group", "gpt-fast"},
    "convert --scales ": {"absmax", "search"},
    "compress --codec a": {"ascend"},
    "kernels -f aw": {"awq", "awq_gemv"},
    "batch jobs.txt -s nvfp": {"nvfp4", "nvfp4a16"},
    "batch jobs.txt -f aw": {"awq", "awq_gemv"},
}


@pytest.mark.parametrize("line", LINES)
def test_words_are_completed(line):
    assert completed(line).keys() == LINES[line]


def test_all_schemes_and_formats_are_offered():
    assert completed("convert -s ").keys() >= {name.lower() for name in SCHEMES}
    assert completed("convert -f ").keys() == FORMATS.keys()


@pytest.mark.parametrize(
    ("line", "kind"),
    [("convert S", "file"), ("inspect S", "file"), ("convert SRC D", "dir"), ("verify D", "file"),
     ("compress SRC D", "dir"), ("reindex SRC D", "dir"), ("verify D --source S", "file")],
)  # fmt: skip
def test_paths_are_left_to_the_shell(line, kind):
    assert set(completed(line).values()) == {kind}


def test_a_shell_gets_it_without_numba():
    code = (
        "import sys\nfrom streamq.cli import cli\n"
        "try: cli(prog_name='streamq')\n"
        "except SystemExit: pass\n"
        "assert 'numba' not in sys.modules and 'rich' not in sys.modules\n"
    )
    words = {"_STREAMQ_COMPLETE": "bash_complete", "COMP_WORDS": "streamq convert -s mxfp4",
             "COMP_CWORD": "3"}  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert out.split() == ["plain,mxfp4", "plain,mxfp4a16"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_have_a_script(shell):
    out = subprocess.run(
        [Path(sys.executable).with_name("streamq")], check=True, capture_output=True, text=True,
        env={**os.environ, "_STREAMQ_COMPLETE": f"{shell}_source"},
    ).stdout  # fmt: skip
    assert "_STREAMQ_COMPLETE" in out
