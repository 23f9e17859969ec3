"""Input that is too large, too deep or leads elsewhere: one sentence, and nothing gets out."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from headers import one, pack
from helpers import write_checkpoint

from streamq.checkpoint import files, header, local, open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError, PlanError
from streamq.recipe import MAX_RECIPE, load

NAME = "model.layers.0.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    a = np.ones((32, 64), np.float32)
    tensors = {NAME: a, "lm_head.weight": a}
    return write_checkpoint(tmp_path / "in", tensors, shards=[[NAME], ["lm_head.weight"]])


def convert(src, dst, *options):
    return CliRunner().invoke(cli, ["convert", str(src), str(dst), "-s", "nvfp4a16", *options])


def refused(src, tmp_path, sentence):
    result = convert(src, tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert re.search(f"^Error: .*{sentence}", result.stderr)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def text(file, value):
    return lambda folder: (folder / file).write_text(value)


def shard_of(name):
    """The index says that the weight is in another file."""
    weights = {NAME: name, "lm_head.weight": "model-00002-of-00002.safetensors"}
    return text(INDEX, json.dumps({"metadata": {}, "weight_map": weights}))


DIGITS = "9" * 5000
# name: what is done to the source, what is said
BAD = {
    "config over the limit": (
        lambda f: os.truncate(f / "config.json", files.MAX_JSON + 1), "more than 100000000 bytes",
    ),
    "index over the limit": (
        lambda f: os.truncate(f / INDEX, files.MAX_JSON + 1), "more than 100000000 bytes",
    ),
    "config nested 65 deep": (
        text("config.json", '{"a":' * 65 + "1" + "}" * 65), "config.json: is nested more than 64",
    ),
    "config nested 100,000 deep": (
        text("config.json", "[" * 100_000), "config.json: is not valid JSON",
    ),
    "config with a number of 5,000 digits": (
        text("config.json", f'{{"a":{DIGITS}}}'), "config.json: is not valid JSON",
    ),
    "config with a key twice": (
        text("config.json", '{"model_type":"a","model_type":"b"}'), "the key 'model_type' twice",
    ),
    "config with a key twice by escape": (
        text("config.json", '{"a":1,"\\u0061":2}'), "the key 'a' twice",
    ),
    "config with half a character": (
        text("config.json", '{"model_type":"\\ud800"}'), "is not valid JSON .*surrogates",
    ),
    "config in Latin-1": (
        lambda f: (f / "config.json").write_bytes(b'{"a":"\xe4"}'), "is not valid JSON",
    ),
    "index with a tensor twice": (
        text(INDEX, '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'),
        "the key 'a' twice",
    ),
    "shard above": (shard_of("../model.safetensors"), "'../model.safetensors' leads out"),
    "shard elsewhere": (shard_of("/tmp/x.safetensors"), "'/tmp/x.safetensors' leads out"),
    "shard below": (shard_of("a/x.safetensors"), "'a/x.safetensors' leads out"),
    "shard with a NUL": (shard_of("a\0.safetensors"), "is no name of a file"),
    "shard with a line break": (shard_of("a\n.safetensors"), "'a.n.safetensors' leads out"),
    "shard of another kind": (shard_of("config.json"), "not a \\*.safetensors file"),
    "name of 4,097 characters": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(one(name="n" * 4097)),
        "tensor 'n{60}...' has 4097 characters",
    ),
    "shape of 2**66 elements": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(
            one(shape=f"[{2**33},{2**33}]")),
        "the shape .* of tensor 'w' overflows",
    ),
    "shape of more than there is": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(
            pack('{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}')),
        "it is truncated",
    ),
    "shard that is a pipe": (
        lambda f: (os.remove(f / "model-00001-of-00002.safetensors"),
                   os.mkfifo(f / "model-00001-of-00002.safetensors")),
        "named by the index but not in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, source, tmp_path):
    change, sentence = BAD[name]
    change(source)
    refused(source, tmp_path, sentence)


def test_too_many_tensors_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MAX_TENSORS", 1)
    refused(source, tmp_path, "more than 1 tensors")


@pytest.mark.parametrize("length", [header.MAX_NAME, 1])
def test_names_up_to_the_limit_are_read(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(one(name="n" * length))
    with open_checkpoint(tmp_path) as c:
        assert list(c.tensors) == ["n" * length]


def test_json_up_to_the_limit_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a":' * 64 + "1" + "}" * 64)
    assert "a" in files.read_json(path)
    path.write_text('{"say \\"a\\"": ["\\u00e9", NaN], "b": {"a": 1}}')
    assert list(files.read_json(path)) == ['say "a"', "b"]


# --- links -------------------------------------------------------------------------------


def test_the_cache_of_the_hub_is_followed(source, tmp_path):
    """snapshots/<revision>/x is a link to ../../blobs/<hash>."""
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "1").mkdir(parents=True)
    (source / "tokenizer.json").write_text("{}")
    for path in source.iterdir():
        (repo / "blobs" / path.name[::-1]).write_bytes(path.read_bytes())
        (repo / "snapshots" / "1" / path.name).symlink_to(f"../../blobs/{path.name[::-1]}")
    result = convert(repo / "snapshots" / "1", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    (tmp_path / "link").symlink_to(repo / "snapshots" / "1")
    assert convert(tmp_path / "link", tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_a_link_inside_is_followed_and_one_outside_is_left_out(source, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (source / "merges.txt").write_text("x")
    (source / "vocab.txt").symlink_to("merges.txt")
    (source / "notes.txt").symlink_to("../secret")
    result = convert(source, tmp_path / "out")
    assert result.exit_code == 0
    assert "note: notes.txt: links out of the directory, not copied" in result.stdout
    assert (tmp_path / "out" / "vocab.txt").read_text() == "x"
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_a_config_that_leads_out_is_refused(source, tmp_path):
    (source / "config.json").rename(tmp_path / "config.json")
    (source / "config.json").symlink_to("../config.json")
    refused(source, tmp_path, f"config.json: is a link to {tmp_path}/config.json, out of")


def test_a_shard_may_be_a_link_to_anywhere(source, tmp_path):
    shard = source / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert convert(source, tmp_path / "out").exit_code == 0


# --- files that change -------------------------------------------------------------------


def touch(path):
    os.utime(path, ns=(0, 1))


def rewrite(path):
    path.write_bytes(path.read_bytes())


def replace(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("change", [touch, rewrite, replace, Path.unlink])
@pytest.mark.parametrize("command", ["convert", "reindex"])
def test_a_source_that_changes_meanwhile_is_named(command, change, source, tmp_path, monkeypatch):
    """Just before the end, when all has been read."""
    shard = source / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(0, 0))
    check = local.Checkpoint.refuse_changed
    monkeypatch.setattr(
        local.Checkpoint, "refuse_changed", lambda self: (change(shard), check(self))
    )
    args = ["convert", "-s", "nvfp4a16"] if command == "convert" else ["reindex"]
    result = CliRunner().invoke(cli, [*args, str(source), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.match(
        "Error: model-00002-of-00002.safetensors: c(hanged while|annot be)", result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_what_did_not_change_is_not_named(source):
    with open_checkpoint(source) as c:
        c.refuse_changed()
        touch(source / "config.json")
        c.refuse_changed()


# --- recipes -----------------------------------------------------------------------------

RECIPES = {
    "aliases": ("r.yaml", "a: &a [x, x]\nb: [*a, *a]\n", "has YAML aliases"),
    "a loop": ("r.yaml", "&a [*a]\n", "has YAML aliases"),
    "objects": ("r.yaml", "scheme: !!python/object:os.system x\n", "is not valid YAML"),
    "a date that is none": ("r.yaml", "scheme: 2001-99-99\n", "is not valid YAML"),
    "a number of 5,000 digits": ("r.yaml", f"scheme: {DIGITS}\n", "is not valid YAML"),
    "3,000 deep": ("r.yaml", "[" * 3000, "is nested more than 16 deep"),
    "TOML, a number of 5,000 digits": ("r.toml", f"scheme = {DIGITS}\n", "is not valid TOML"),
    "TOML, 3,000 deep": ("r.toml", "a = " + "[" * 3000, "is not valid TOML"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_one_sentence(name, tmp_path):
    file, content, sentence = RECIPES[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(PlanError, match=sentence) as caught:
        load(tmp_path / file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"#" * (MAX_RECIPE + 1))
    with pytest.raises(PlanError, match="more than 32000000 bytes"):
        load(path)


def test_a_shard_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
