"""Opening directories and files: the index against the shards, and what else lies there."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from helpers import write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.errors import CheckpointError

ONES = np.ones((4, 8), ml_dtypes.bfloat16)
TENSORS = {f"model.layers.{i}.mlp.up_proj.weight": ONES * (i + 1) for i in range(4)}
NAMES = list(TENSORS)
SHARDS = [NAMES[:2], NAMES[2:]]
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "in", TENSORS, shards=SHARDS)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def doubled(folder):
    (folder / INDEX).unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes((folder / FIRST).read_bytes())


def truncated(folder):
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:-1])


FAULTS = {
    "shard missing": (lambda f: (f / SECOND).unlink(), rf"{SECOND}: named by the index but not"),
    "shard truncated": (truncated, rf"{SECOND}: .*truncated, download it again"),
    "absent tensor": (
        lambda f: edit_index(f, lambda m: m.update(ghost=FIRST)),
        rf"the index says that {FIRST} holds tensor 'ghost', but no shard has it",
    ),
    "tensor elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({NAMES[0]: SECOND})),
        rf"the index says that {SECOND} holds tensor '{NAMES[0]}', but it is in {FIRST}",
    ),
    "tensor not in the index": (
        lambda f: edit_index(f, lambda m: m.pop(NAMES[3])),
        rf"{SECOND} holds tensor '{NAMES[3]}', which the index does not name",
    ),
    "tensor in two shards": (doubled, rf"tensor '{NAMES[0]}' is in {FIRST} and in model-00003"),
    "path in the index": (
        lambda f: edit_index(f, lambda m: m.update({NAMES[0]: f"../in/{FIRST}"})),
        "leads out of the directory",
    ),
    "number in the index": (
        lambda f: edit_index(f, lambda m: m.update({NAMES[0]: 1})),
        rf"'{NAMES[0]}' is in 1, not a \*.safetensors file",
    ),
    "pickle in the index": (
        lambda f: edit_index(f, lambda m: m.update({NAMES[0]: "pytorch_model.bin"})),
        "not a .*safetensors file",
    ),
    "index without weight_map": (lambda f: (f / INDEX).write_text("{}"), "weight_map must map"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX}: is not valid JSON"),
    "index not an object": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
    "config not JSON": (lambda f: (f / "config.json").write_text("\xff"), "config.json: is not"),
    "two odd indexes": (
        lambda f: [(f / INDEX).rename(f / ("a" + INDEX)), (f / ("b" + INDEX)).write_text("{}")],
        "several index files",
    ),
    "no shards": (lambda f: [p.unlink() for p in f.iterdir()], r"no \*.safetensors file here"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_sentence(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as e:
        open_checkpoint(folder)
    assert "\n" not in str(e.value)


def test_an_index_is_not_needed(folder):
    with open_checkpoint(folder) as c:
        wanted = dict(c.tensors)
    (folder / INDEX).unlink()
    with open_checkpoint(folder) as c:
        assert c.tensors == wanted
        assert c.files == [FIRST, SECOND]


def test_a_shard_that_the_index_does_not_name_is_left_out_and_told(folder):
    (folder / "consolidated.safetensors").write_bytes((folder / FIRST).read_bytes())
    with open_checkpoint(folder) as c:
        assert c.files == [FIRST, SECOND]
        assert any("consolidated.safetensors: not named by the index" in o for o in c.oddities)


def test_a_single_file_brings_its_config_along(folder):
    with open_checkpoint(folder / FIRST) as c:
        assert list(c.tensors) == NAMES[:2]
        assert c.config["model_type"] == "llama"
        assert c.others == ["config.json"]


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    with open_checkpoint(snapshot) as c:
        assert list(c.tensors) == NAMES
        assert c.others == ["config.json"]


def test_other_files_are_all_but_weights_and_hidden_ones(folder):
    kept = ["LICENSE", "tokenizer.model", "chat_template.jinja", "modeling_x.py", "sub/notes.txt"]
    dropped = ["pytorch_model.bin", "model.gguf", "old.pth", ".gitattributes", ".cache/a", "x.onnx"]
    for name in kept + dropped:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    with open_checkpoint(folder) as c:
        assert sorted(c.others) == sorted([*kept, "config.json"])


def test_a_shard_that_shrinks_while_it_is_read(folder):
    with open_checkpoint(folder) as c:
        t = c.tensors[NAMES[1]]
        os.truncate(folder / t.file, t.end - 1)
        with pytest.raises(CheckpointError, match=f"{FIRST}: ends before byte {t.end}; it changed"):
            c.pread(t.file, t.start, memoryview(bytearray(t.nbytes)))


def test_a_shard_that_cannot_be_opened(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    with pytest.raises(CheckpointError, match=SECOND):
        open_checkpoint(folder)


def test_header_metadata_without_format_is_odd(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as c:
        assert any("no format in __metadata__" in o for o in c.oddities)
