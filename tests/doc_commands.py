"""The commands in README.md, docs/ and ``--help``, and directories in which they can be run.

A command is a line of a code block that begins with one of ``PROGRAMS``, behind what it sets in the
environment. Behind two spaces or `` # `` comes what it does, for readers; ``[DST]`` counts as DST.
It exits with 0, unless what is said behind it has "exit code N". SRC and other names stand for
small checkpoints, see ``NAMES``; what a command writes to does not exist before it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ascend_checkpoints import CONFIG as ASCEND_CONFIG
from ascend_checkpoints import moe
from click.testing import CliRunner
from compressible import floats, w8a8s
from helpers import write_checkpoint

import streamq
from streamq.cli import cli
from streamq.cli.texts import EXAMPLES

ROOT = Path(__file__).parent.parent
PAGES = {
    str(p.relative_to(ROOT)): p.read_text()
    for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
PROGRAMS = ("streamq", "printf", "make", "python", "pip", "cmake", "source", "eval", "vllm")
_COMMENT = re.compile(r"(?:\s{2,}|\s+#\s).*")


@dataclass(frozen=True)
class Command:
    """A line that is typed, without its comment: its page, words, exit code."""

    page: str
    line: str
    code: int = 0
    environment: dict = field(default_factory=dict, compare=False)
    words: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self):
        return f"{self.page}: {self.line}"


def blocks(text):
    """Texts of fenced code blocks, and of indented ones behind an empty line."""
    fenced, taken, before = False, [], ""
    for line in [*text.splitlines(), "end"]:
        if line.startswith("```"):
            if fenced:
                yield "\n".join(taken) + "\n"
            fenced, taken = not fenced, []
        elif fenced:
            taken.append(line)
        elif line.startswith("    ") and (taken or not before.strip()):
            taken.append(line[4:])
        elif taken and line.strip():
            yield "\n".join(taken) + "\n"
            taken = []
        elif taken:
            taken.append("")
        before = line


def parsed(page, line):
    """The command of a line; None where it is none."""
    line = re.sub(r"\[((?:-|DST)[^\]]*)\]", r"\1", line)
    comment = _COMMENT.search(line)
    typed = line[: comment.start()] if comment else line
    try:
        words = shlex.split(typed)
    except ValueError:  # no line for a shell
        return None
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if not words or words[0] not in PROGRAMS:
        return None
    code = re.search(r"exit code (\d+)", comment[0]) if comment else None
    return Command(page, typed.strip(), int(code[1]) if code else 0, environment, tuple(words))


def commands(page, *programs):
    """The commands of a page, in order; of some programs."""
    found = (
        parsed(page, line)
        for block in blocks(PAGES[page])
        for line in block.replace("\\\n", " ").splitlines()
    )
    return [c for c in found if c is not None and (not programs or c.words[0] in programs)]


def of_help(name):
    """The examples in the help of a command."""
    return [parsed(f"{name} --help", line.strip()) for line in EXAMPLES[name].strip().splitlines()]


# --- running -----------------------------------------------------------------------------


def example(folder):
    shutil.copytree(ROOT / "examples" / "bytes-llama", folder)


def quantized(folder):
    streamq.convert(ROOT / "examples" / "bytes-llama", folder, "w8a8")


def deepseek(folder):
    """FP8 in blocks, as DeepSeek publishes it."""
    streamq.convert(ROOT / "examples" / "bytes-llama", folder, "fp8_block", format="fp8")


def broken(folder):
    """The index has a wrong size."""
    example(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(re.sub(r'"total_size": ?\d+', '"total_size": 1', index.read_text()))


def packed(folder):
    streamq.compress(ROOT / "examples" / "bytes-llama", folder)


def single(path):
    shutil.copy(ROOT / "examples" / "bytes-llama" / "model-00001-of-00002.safetensors", path)


def recipe(path):
    path.write_text('scheme = "w4a16"\n')


def jobs(path):
    """The file of jobs on the page about them, and its sources that are directories."""
    path.write_text(next(b for b in blocks(PAGES["docs/batch.md"]) if "[[source]]" in b))
    example(path.parent / "models" / "local")


def models(path):
    path.write_text("Qwen/Qwen3-8B\norg/repo\n")


#: Repositories of the Hub in commands, by branch and folder.
REPOS = {
    "Qwen/Qwen3-8B": [("main", "")], "org/model": [("main", "")],
    "org/repo": [("main", ""), ("v2", ""), ("refs/pr/3", "sub/folder/")],
    "meta/llama": [("main", "")], "qwen/qwen3": [("v1", "")],
    "org/a": [("main", "")], "org/b": [("main", "")],
}  # fmt: skip


def fill(hub):
    """Put them into a stand-in of the Hub."""
    for repo, places in REPOS.items():
        for branch, folder in places:
            hub.commit_folder(repo, ROOT / "examples" / "bytes-llama", branch, folder)


def shipped(path):
    path.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "recipes" / path.name, path)


#: What is there before a command that speaks of it.
NAMES = {
    "SRC": example, "QUANTIZED": quantized, "BAD": broken, "PACKED": packed,
    "model.safetensors": single, "recipe.toml": recipe, "recipes/edge.toml": shipped,
    "jobs.toml": jobs, "models.txt": models, "Qwen3-8B": example, "DeepSeek-V3": deepseek,
}  # fmt: skip
#: The same for one page, or for one command.
ELSEWHERE = {
    "docs/ascend.md": {"SRC": lambda folder: write_checkpoint(folder, moe(), ASCEND_CONFIG)},
    "docs/compress.md: streamq compress SRC DST --codec ascend": {"SRC": w8a8s},
    "docs/compress.md: streamq compress SRC DST --codec ascend --sparsity magnitude:0.5":
        {"SRC": lambda folder: floats(folder, np.float16)},
}  # fmt: skip
#: Words that stand for others.
WORDS = {"NAME": "nvfp4a16"}


def arguments(command):
    """What click makes of a command of streamq."""
    name, *args = (WORDS.get(w, w) for w in command.words[1:])
    return cli.commands[name].make_context(name, args, resilient_parsing=True).params


def run(command, here):
    """Prepare the directory ``here``, which is the current one, and run; exit code and output."""
    makers = NAMES | ELSEWHERE.get(command.page, {}) | ELSEWHERE.get(command.key, {})
    for word in command.words:
        if word in makers and (not (here / word).exists() or command.key in ELSEWHERE):
            shutil.rmtree(here / word, ignore_errors=True)
            makers[word](here / word)
    if command.words[0] == "printf":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command.line], capture_output=True, text=True,
            env={**os.environ, "PATH": path}, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr
    args = [WORDS.get(w, w) for w in command.words[1:]]
    if args[0] in ("convert", "compress", "decompress", "reindex", "repair"):
        shutil.rmtree(here / str(arguments(command)["dst"]), ignore_errors=True)
    if not command.environment:
        done = CliRunner().invoke(cli, args, catch_exceptions=False)
        return done.exit_code, done.output
    done = subprocess.run(
        [Path(sys.executable).with_name("streamq"), *args], capture_output=True, text=True,
        env={**os.environ, **command.environment}, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
