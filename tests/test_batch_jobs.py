"""What files of jobs, lines and templates ask for; and everything that can be wrong with them."""

import re
import textwrap
from pathlib import Path

import pytest

from streamq.batch import read_jobs
from streamq.batch.jobs import MAX_FILE, MAX_JOBS, source_of
from streamq.batch.template import values_of
from streamq.errors import PlanError

TWO = """
out = "out/{org}/{name}-{scheme}"
schemes = ["nvfp4", "fp8_block"]
jobs = 2
max_memory = "1GiB"
[[source]]
src = "meta/llama"
[[source]]
src = "meta/local"
schemes = ["w4a16"]
ignore = ["re:.*gate.*"]
"""
THE_SAME_IN_YAML = """
out: out/{org}/{name}-{scheme}
schemes: [nvfp4, fp8_block]
jobs: 2
max_memory: 1073741824
source:
- src: meta/llama
- src: meta/local
  schemes: w4a16
  ignore: re:.*gate.*
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with meta/local in it."""
    monkeypatch.chdir(tmp_path)
    Path("meta/local").mkdir(parents=True)
    Path("models/local").mkdir(parents=True)
    return tmp_path


def read(text, suffix=".toml", **over):
    path = Path("jobs" + suffix)
    path.write_text(text)
    return read_jobs(str(path), None, over)


def lines(*found, **over):
    return read_jobs("standard input", found, over)


def seen(asked):
    return [(j.src, j.dst, j.how["scheme"], j.how["format"]) for j in asked.jobs]


@pytest.mark.parametrize(("text", "suffix"), [(TWO, ".toml"), (THE_SAME_IN_YAML, ".yaml")])
def test_the_example(text, suffix):
    asked = read(text, suffix)
    assert seen(asked) == [
        ("hf://meta/llama", "out/meta/llama-nvfp4", "nvfp4", None),
        ("hf://meta/llama", "out/meta/llama-fp8_block", "fp8_block", None),
        ("meta/local", "out/meta/local-w4a16", "w4a16", None),
    ]
    assert asked.run == {"jobs": 2, "max_memory": 1 << 30}
    assert asked.jobs[2].how["ignore"] == ("re:.*gate.*",)
    assert "ignore" not in asked.jobs[0].how


def test_the_example_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "batch.md").read_text()
    (example,) = re.findall(r"^    out = (?:.*\n|\n)+?(?=^\S)", text, re.MULTILINE)
    asked = read(textwrap.dedent(example))
    assert [j.dst for j in asked.jobs] == [
        "out/meta/llama-nvfp4", "out/meta/llama-fp8_block", "out/qwen/qwen3-nvfp4",
        "out/qwen/qwen3-fp8_block", "out/models/local-w4a16",
    ]  # fmt: skip
    assert asked.jobs[-1].src == "models/local"


# What a file says, what the command line does, and the jobs: destination, scheme, format.
MATRICES = {
    "schemes x formats": (
        'sources = ["a/b"]\nout = "{name}-{scheme}-{format}"\nschemes = ["w4a16", "w8a16"]\n'
        'formats = ["gptq", "compressed-tensors"]', {},
        [("b-w4a16-gptq", "w4a16", "gptq"),
         ("b-w4a16-compressed-tensors", "w4a16", "compressed-tensors"),
         ("b-w8a16-gptq", "w8a16", "gptq"),
         ("b-w8a16-compressed-tensors", "w8a16", "compressed-tensors")],
    ),
    "the command line is over the file": (
        'sources = ["a/b"]\nout = "x"\nscheme = "w4a16"',
        {"out": "y-{scheme}", "schemes": ("fp8_block",)},
        [("y-fp8_block", "fp8_block", None)],
    ),
    "and below a source": (
        '[[source]]\nsrc = "a/b"\nscheme = "w4a16"\nout = "x"', {"out": "y", "schemes": ("nvfp4",)},
        [("x", "w4a16", None)],
    ),
    "twice the same scheme": (
        'sources = ["a/b"]\nout = "{scheme}"\nschemes = ["nvfp4", "nvfp4"]', {},
        [("nvfp4", "nvfp4", None)],
    ),
    "as a format spells it": (
        'sources = ["a/b"]\nout = "{format}-{scheme}"\nschemes = ["NVFP4", "w8a8_dynamic"]', {},
        [("compressed-tensors-nvfp4", "NVFP4", None),
         ("ascend-w8a8_dynamic", "w8a8_dynamic", None)],
    ),
    "lists before tables": (
        'out = "{name}"\nscheme = "nvfp4"\nsources = ["a/b"]\n[[source]]\nsrc = "a/c"', {},
        [("b", "nvfp4", None), ("c", "nvfp4", None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name):
    text, over, wanted = MATRICES[name]
    assert [row[1:] for row in seen(read(text, **over))] == wanted


def test_options_that_only_some_outputs_have():
    """As with ``convert --to``: group sizes are for schemes with groups, if there are others."""
    text = 'sources = ["a/b"]\nout = "{scheme}"\ngroup_size = 64\nschemes = '
    first, second = read(text + '["w4a16", "fp8_block"]').jobs
    assert first.how["group_size"] == 64
    assert "group_size" not in second.how
    with pytest.raises(PlanError, match="group"):
        read(text + '["fp8_block"]')


def test_lines():
    found = lines(
        "a/b", "", "  # a comment", "  hf://q/r@v1 ", "meta/local", out="{name}-{scheme}",
        schemes=("nvfp4",),
    )  # fmt: skip
    assert [(j.where, j.src) for j in found.jobs] == [
        ("standard input, line 1", "hf://a/b"),
        ("standard input, line 4", "hf://q/r@v1"),
        ("standard input, line 5", "meta/local"),
    ]
    Path("l.txt").write_text("a/b\nmeta/local\n")
    found = read_jobs("l.txt", None, {"out": "{name}", "schemes": ("nvfp4",)})
    assert [j.where for j in found.jobs] == ["l.txt, line 1", "l.txt, line 2"]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("meta/local", "meta/local"),
        ("hf://meta/local", "hf://meta/local"),
        ("meta/other", "hf://meta/other"),
        ("meta/other@v2/sub", "hf://meta/other@v2/sub"),
        ("./meta/local", "./meta/local"),
    ],
)
def test_an_existing_directory_wins_over_the_hub(text, source):
    assert source_of(text, "") == source


@pytest.mark.parametrize(
    ("src", "how", "wanted"),
    [
        ("hf://meta/Llama-3", {"scheme": "NVFP4"},
         ("meta", "Llama-3", "main", "nvfp4", "compressed-tensors")),
        ("hf://meta/llama@refs/pr/3/sub", {"scheme": "nvfp4", "format": "modelopt"},
         ("meta", "llama", "refs-pr-3", "nvfp4", "modelopt")),
        ("meta/local", {"recipe": "recipes/moe.toml"}, ("meta", "local", None, "moe", None)),
        ("meta/local/x.safetensors", {"scheme": "w4a16"},
         ("local", "x", None, "w4a16", "compressed-tensors")),
        ("/", {"scheme": "w4a16"}, (None, None, None, "w4a16", "compressed-tensors")),
    ],
)  # fmt: skip
def test_what_stands_for_the_fields(src, how, wanted):
    assert tuple(values_of(src, how).values()) == wanted


GOOD = 'out = "out"\nscheme = "nvfp4"\n'
#: What is in a file, and what is said of it.
MALFORMED = {
    "no TOML": ("out = ", "jobs.toml is not valid TOML"),
    "empty": ("", "names no source"),
    "no source": (GOOD, "jobs.toml: names no source"),
    "unknown key": (GOOD + 'schema = "x"\nsources = ["a/b"]', "unknown key 'schema'"),
    "unknown key of a source": (GOOD + '[[source]]\nsrc = "a/b"\nx = 1',
                                "jobs.toml, source 1: unknown key 'x'"),
    "no src": (GOOD + '[[source]]\nscheme = "nvfp4"', "source 1: src is missing"),
    "a source that is none": (GOOD + 'sources = ["a/b", "x y"]',
                              "sources 2: 'x y' is no directory here, and no name of a repository"),
    "a bad address": (GOOD + 'sources = ["hf://x"]', "sources 1: .* is not hf://org/repo"),
    "a data set": (GOOD + 'sources = ["hf://datasets/a/b"]', "sources 1: .* only model"),
    "source is no table": (GOOD + 'source = "a/b"', "must be an array of tables"),
    "sources is a number": (GOOD + "sources = 1", "sources must be a text or a list of texts"),
    "no destination": ('scheme = "nvfp4"\nsources = ["a/b"]', "sources 1: no destination"),
    "no scheme": ('out = "x"\nsources = ["a/b"]', "sources 1: no scheme"),
    "unknown scheme of two": ('out = "x"\nscheme = ["w9", "w8a8"]\nsources = ["a/b"]',
                              "sources 1: .*w9"),
    "unknown scheme": ('out = "x"\nscheme = "w9"\nsources = ["a/b"]', "sources 1: .*w9"),
    "unknown format": (GOOD + 'format = "zip"\nsources = ["a/b"]', "sources 1: .*zip"),
    "scheme and schemes": (GOOD + 'schemes = ["w4a16"]\nsources = ["a/b"]', "are one key"),
    "no recipe": ('out = "x"\nrecipe = "none.toml"\nsources = ["a/b"]',
                  "sources 1: the recipe none.toml cannot be read"),
    "unknown field": ('out = "{model}"\nscheme = "nvfp4"\nsources = ["a/b"]',
                      r"has \{model\}; known are \{org\}, \{name\}"),
    "attributes": ('out = "{name.__class__}"\nscheme = "nvfp4"\nsources = ["a/b"]',
                   r"has \{name.__class__\}"),
    "a conversion": ('out = "{name!r}"\nscheme = "nvfp4"\nsources = ["a/b"]', r"has \{name!r\}"),
    "a width": ('out = "{name:999}"\nscheme = "nvfp4"\nsources = ["a/b"]', r"has \{name:999\}"),
    "open braces": ('out = "{name"\nscheme = "nvfp4"\nsources = ["a/b"]', "sources 1: out"),
    "no revision": ('out = "{revision}"\nscheme = "nvfp4"\nsources = ["meta/local"]',
                    r"sources 1: has no \{revision\}"),
    "no format of a recipe": ('out = "{format}"\nrecipe = "r.toml"\nsources = ["a/b"]',
                              r"has no \{format\}"),
    "one destination": (GOOD + 'sources = ["a/b", "a/c"]',
                        "sources 2: nvfp4 would go to out, as nvfp4 of jobs.toml, sources 1"),
    "one destination, spelled in two ways": (
        'scheme = "nvfp4"\n[[source]]\nsrc = "a/b"\nout = "x"\n[[source]]\nsrc = "a/c"\n'
        'out = "y/../x"', "source 2: .* as nvfp4 of jobs.toml, source 1"),
    "two formats, one destination": (GOOD + 'formats = ["modelopt", "compressed-tensors"]\n'
                                     'sources = ["a/b"]', "{scheme} or {format}"),
    "one output in another": (
        'scheme = "nvfp4"\n[[source]]\nsrc = "a/b"\nout = "x"\n[[source]]\nsrc = "a/c"\n'
        'out = "x/y"', "source 2: x/y would lie in the output of jobs.toml, source 1"),
    "where another is built": (
        'scheme = "nvfp4"\n[[source]]\nsrc = "a/b"\nout = "x"\n[[source]]\nsrc = "a/c"\n'
        'out = "x.partial"', "source 2: x.partial is where x is built"),
    "an output in a source": (
        'scheme = "nvfp4"\nout = "meta/local/{name}"\nsources = ["meta/local", "a/b"]',
        "would lie in the source of jobs.toml, sources 1"),
    "an output that is a source": (
        'scheme = "nvfp4"\nout = "meta/{name}"\nsources = ["meta/local"]',
        "meta/local would lie in the source"),
    "a source in an output": (
        'scheme = "nvfp4"\n[[source]]\nsrc = "meta/local"\nout = "y"\n[[source]]\n'
        'src = "a/c"\nout = "meta"', "meta/local lies in the output of jobs.toml, source 2"),
    "a branch in out": ('out = "hf://me/x@v1"\nscheme = "nvfp4"\nsources = ["a/b"]',
                        "sources 1: .* give the branch with --branch v1"),
    "a repository of two jobs": ('out = "hf://me/x"\nscheme = "nvfp4"\nsources = ["a/b", "a/c"]',
                                 "sources 2: nvfp4 would go to hf://me/x, as"),
    "jobs": (GOOD + 'jobs = 0\nsources = ["a/b"]', "jobs must be 1 or more"),
    "retries": (GOOD + 'retries = -1\nsources = ["a/b"]', "retries must be 0 or more"),
    "a size": (GOOD + 'max_disk = "much"\nsources = ["a/b"]', "max_disk must be a size like"),
    "a size below one": (GOOD + 'max_disk = 0\nsources = ["a/b"]', "max_disk must be a size like"),
    "a flag": (GOOD + 'requantize = 1\nsources = ["a/b"]', "requantize must be true or false"),
    "a real": (GOOD + 'input_scale = "1"\nsources = ["a/b"]', "input_scale must be a number"),
    "numbers": (GOOD + 'check_tp = [1.5]\nsources = ["a/b"]', "list of whole numbers"),
    "an option that does not fit": (GOOD + 'group_size = 32\nsources = ["a/b"]', "sources 1: "),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_sentence(name):
    text, sentence = MALFORMED[name]
    Path("r.toml").write_text('scheme = "w4a16"\n')
    with pytest.raises(PlanError, match=sentence) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (["a/b", "a/c"], "line 2: nvfp4 would go to out, as nvfp4 of standard input, line 1"),
        (["a/b", "a/b"], "line 2: hf://a/b is there already, standard input, line 1"),
        (["a/b", "..", "c d"], "line 3: 'c d' is no directory"),
        ([], "standard input: names no source"),
        (["#", " "], "names no source"),
        (["a/b\0"], "line 1"),
        (["\u202e/x"], "line 1"),
    ],
)
def test_malformed_lines(found, sentence):
    out = "out" if found[-1:] != ["c d"] else "{name}"
    with pytest.raises(PlanError, match=sentence):
        lines(*found, out=out, schemes=("nvfp4",))


def test_limits():
    how = {"out": "{name}", "schemes": ("nvfp4",)}
    with pytest.raises(PlanError, match=f"line {MAX_JOBS + 1}: more than {MAX_JOBS} jobs"):
        lines(*(f"a/m{i}" for i in range(MAX_JOBS + 1)), **how)
    with pytest.raises(PlanError, match=f"more than {MAX_FILE} bytes"):
        read("#" * (MAX_FILE + 1))
    with pytest.raises(PlanError, match=r"must end in \.toml"):
        read("{}", ".json")
