"""What goes wrong in compressing gives one sentence, the right exit code, no destination."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from compressible import CONFIG, DESCRIPTION, files_of, floats, w8a8s
from helpers import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from streamq.cli import cli
from streamq.compressing import Opened, OpenFile

STREAMQ = str(Path(sys.executable).with_name("streamq"))
MANIFEST = "streamq_compression.json"
UP = "model.layers.0.mlp.up_proj."
FIRST = "model-00001-of-00002.safetensors"


def call(*args):
    return CliRunner().invoke(cli, [*map(str, args)])


def refused(result, message, code=1):
    assert result.exit_code == code, result.output
    sentence = result.stderr.splitlines()[-1 if code == 2 else 0]
    assert re.search(f"^Error: .*{message}", sentence), sentence
    assert "Traceback" not in result.stderr


def described(change):
    """A W8A8S checkpoint with something else in its description."""

    def make(folder):
        w8a8s(folder)
        said = json.loads((folder / DESCRIPTION).read_text())
        (folder / DESCRIPTION).write_text(json.dumps(change(said)))
        return folder

    return make


def configured(**other):
    def make(folder):
        return w8a8s(folder, {**CONFIG, **other})

    return make


def retyped(folder):
    """A weight that is not of the dtype of its type."""
    w8a8s(folder)
    made = load_file(folder / FIRST)
    made[UP + "weight"] = made[UP + "weight"].view(np.uint8)
    save_file(made, folder / FIRST)
    return folder


def unequal(folder):
    """q and v with other scales of their input."""
    w8a8s(folder)
    made = load_file(folder / FIRST)
    made["model.layers.0.self_attn.v_proj.input_scale"] += 1
    save_file(made, folder / FIRST)
    return folder


def taken(folder):
    """A source that has a tensor X.index."""
    w8a8s(folder)
    made = load_file(folder / "model-00002-of-00002.safetensors")
    for path in folder.glob("model*"):
        path.unlink()
    made = {k.replace("layers.1", "layers.0"): v for k, v in made.items()}
    made[UP + "index"] = np.ones(8, np.int8)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


ASCEND = ["--codec", "ascend"]
PRUNE = ["--sparsity", "magnitude:0.5"]
REFUSED = {
    "no description": (floats, ASCEND, "no W8A8S or W16A16S weight .* --codec zstd"),
    "bf16": (floats, [*ASCEND, *PRUNE], "is BF16, and --codec ascend takes F16"),
    "nothing sparse": (
        described(lambda s: {k: "FLOAT" if v == "W8A8S" else v for k, v in s.items()}),
        ASCEND, "has no W8A8S and no W16A16S weight",
    ),
    "compressed": (
        described(lambda s: {k: "W8A8SC" if v == "W8A8S" else v for k, v in s.items()}),
        ASCEND, "its weights are W8A8SC, so compressed already",
    ),
    "no types": (described(lambda s: {"version": "1.0.0"}), ASCEND, "no tensor has an entry"),
    "wrong dtype": (retyped, ASCEND, "is U8, and quant_model_description.json says W8A8S"),
    "pruned": (w8a8s, [*ASCEND, *PRUNE], "prune before quantizing"),
    "sparsity": (floats, ["--sparsity", "random:0.5"], "it is magnitude:R"),
    "sparsity 0": (floats, ["--sparsity", "magnitude:0"], "above 0 and up to 1"),
    "dictionary": (floats, ["--dictionary", "tile"], "zstd has no dictionaries"),
    "memory": (floats, ["--max-memory", "10k"], "--max-memory .* is too little"),
    "heads": (w8a8s, ["--tp", "3"], "--tp 3 does not divide the 4 attention heads"),
    "no heads": (
        configured(num_attention_heads=None), ["--tp", "2"], "the None attention heads",
    ),
    "kv heads": (
        configured(num_attention_heads=96, num_key_value_heads=64), ["--tp", "96"],
        "neither divides the 64 key and value heads",
    ),
    "too many ranks": (
        configured(num_attention_heads=16, num_key_value_heads=16), [*ASCEND, "--tp", "16"],
        r"o_proj.weight' has the shape \[128, 8\] on each rank, too little",
    ),
    "head rows": (configured(num_attention_heads=6), ["--tp", "2"], "128 rows, which the 6 heads"),
    "vocabulary": (
        configured(num_attention_heads=64, num_key_value_heads=64), ["--tp", "64"],
        "does not divide the vocabulary of 'model.embed_tokens.weight', 96",
    ),
    "model": (configured(model_type="gpt_oss"), ["--tp", "2"], "knows the models llama, qwen2"),
    "fused types": (
        w8a8s, [*ASCEND, "--tp", "2", "--disable-layers", "*.q_proj"],
        "q_proj.weight' is stored as it is .*k_proj.weight' compressed, but --tp fuses them",
    ),
    "fused scales": (unequal, ["--tp", "2"], "v_proj.input_scale' is not equal to .*q_proj"),
    "names": (taken, ASCEND, "up_proj.index' is in the source already"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "args", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compressed(make, args, message, tmp_path):
    src = make(tmp_path / "src")
    refused(call("compress", src, tmp_path / "dst", *args), message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Compressed directories of every coding."""
    folder = tmp_path_factory.mktemp("packed")
    w8a8s(folder / "w8a8s")
    floats(folder / "floats")
    assert call("compress", folder / "w8a8s", folder / "ascend", *ASCEND).exit_code == 0
    assert call("compress", folder / "floats", folder / "zstd", "--transpose").exit_code == 0
    return folder


@pytest.mark.parametrize(
    "verb", [("convert", "-s", "nvfp4"), ("plan", "-s", "nvfp4"), ("reindex",), ("compress",)]
)
@pytest.mark.parametrize("place", ["zstd", f"ascend/{FIRST}"])
def test_other_verbs_say_decompress_first(verb, place, packed, tmp_path):
    name, *args = verb
    result = call(name, packed / place, tmp_path / "dst", *args)
    refused(result, "is compressed; `streamq decompress` it first")


@pytest.mark.parametrize("name", ["zstd", "ascend"])
def test_a_lost_manifest_is_missed(name, packed, tmp_path):
    src = shutil.copytree(packed / name, tmp_path / "copy")
    (src / MANIFEST).unlink()
    message = f"{FIRST}: is compressed, and {MANIFEST} is not beside it"
    assert message in call("verify", src).stderr
    assert call("verify", src).exit_code == 3
    if name == "zstd":
        refused(call("convert", src, tmp_path / "dst", "-s", "nvfp4"), message)


def test_what_was_not_compressed_is_not_decompressed(packed, tmp_path):
    refused(call("decompress", packed / "floats", tmp_path / "dst"), "`streamq compress` did not")
    refused(call("decompress", packed / "no", tmp_path / "dst"), "no such directory")
    refused(
        call("decompress", packed / "zstd", tmp_path / "dst", "--max-memory", "10k"),
        "--max-memory 10.0 kB is too little",
    )
    assert [*tmp_path.iterdir()] == []
    refused(call("verify", packed / "zstd", "--source", packed / "floats"), "is compressed", 2)


def test_a_plan_says_what_is_left_and_why(packed, tmp_path):
    out = call("compress", packed / "w8a8s", "--dry-run", "--disable-layers", "*.o_proj",
               "--disable-layers", "typo", *ASCEND).stdout  # fmt: skip
    assert re.search(r"W8A8SC: 12 tensors, .* are compressed, of .* in 2 files", out)
    assert re.search(r"stored as is: 2, .* \(--disable-layers\)", out)
    assert re.search(r"stored as is: 4, .* \(FLOAT\)", out)
    assert "disk" in out
    assert "if nothing shrinks" in out
    assert "warning: --disable-layers typo matches no layer" in out


def test_each_layer_says_what_it_saved(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"model.layers.0.mlp.{leaf}.weight" for leaf in ("up_proj", "down_proj")]
    wide = rng.integers(-128, 128, (128, 256)).astype(np.int8)
    narrow = rng.integers(-2, 3, (128, 256)).astype(np.int8)
    src = write_checkpoint(tmp_path / "src", dict(zip(names, (wide, narrow), strict=True)), CONFIG)
    (src / DESCRIPTION).write_text(json.dumps(dict.fromkeys(names, "W8A8S")))
    out = call("compress", src, tmp_path / "dst", *ASCEND).stdout
    assert re.search(rf"32.8 kB -> +32.8 kB 1.001 stored as is  {names[0]}", out)
    assert re.search(rf"32.8 kB -> .* 0.\d+ +{names[1]}", out)
    assert "nothing was saved on 1 of 2 layers" in out
    assert "1.001 stored as is" in call("inspect", tmp_path / "dst").stdout


def test_a_stream_that_loaders_have_no_room_for(tmp_path):
    """vllm-ascend allocates n x k bytes."""
    name = "model.layers.0.mlp.up_proj.weight"
    wide = np.random.default_rng(0).integers(-128, 128, (130, 256)).astype(np.int8)
    src = write_checkpoint(tmp_path / "src", {name: wide}, CONFIG)
    (src / DESCRIPTION).write_text(json.dumps({name: "W8A8S"}))
    out = call("compress", src, tmp_path / "dst", *ASCEND).stdout
    assert re.search(f"warning: 1 streams are longer than .* --disable-layers, .* {name}", out)
    assert "warning" not in call("compress", src, tmp_path / "dst2").stdout


# --- damage ------------------------------------------------------------------------------


def flip(path, at, bit):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


@given(st.data())
def test_every_flip_is_caught(packed, tmp_path_factory, data):
    """In a stream, an index, info, a header, spaces behind it, the manifest, any other file."""
    src = packed / data.draw(st.sampled_from(["zstd", "ascend"]))
    name = data.draw(st.sampled_from(sorted(files_of(src))))
    size = (src / name).stat().st_size
    at = data.draw(st.one_of(st.integers(0, size - 1), st.integers(0, min(size, 4000) - 1)))
    bit = data.draw(st.integers(0, 7))
    path = src / name
    flip(path, at, bit)
    try:
        result = call("verify", src)
        assert result.exit_code == 3, (name, at, bit, result.output)
        assert "failed: " in result.stderr
        out = tmp_path_factory.getbasetemp() / "unpacked"
        result = call("decompress", src, out)
        assert result.exit_code == 1, (name, at, bit, result.output)
        assert result.stderr.startswith("Error: ")
        assert "bug in streamq" not in result.stderr
        assert not out.exists()
    finally:
        flip(path, at, bit)


@given(st.data())
def test_rubbish_is_never_more_than_a_finding(packed, tmp_path_factory, data):
    """Runs of random bytes, lost ends and exchanged pieces, without a manifest that fits."""
    src = packed / data.draw(st.sampled_from(["zstd", "ascend"]))
    path = src / data.draw(st.sampled_from(sorted(files_of(src))))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=64))
    kind = data.draw(st.sampled_from(["over", "cut", "swap", "grow"]))
    bad = {
        "over": good[:at] + piece + good[at + len(piece) :],
        "cut": good[:at],
        "swap": good[at:] + good[:at],
        "grow": good + piece,
    }[kind]
    path.write_bytes(bad)
    try:
        result = call("verify", src)
        assert result.exit_code == (0 if bad == good else 3), result.output
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["zstd", "ascend"])
def test_damage_that_the_manifest_agrees_with_is_found_by_decoding(name, packed, tmp_path):
    """A new sum over damaged streams does not help: the original's has to fit as well."""
    src = shutil.copytree(packed / name, tmp_path / "copy")
    opened = Opened(src)
    file = OpenFile(opened, FIRST)
    item = next(item for item in file.items if item.coding != "raw")
    flip(src / FIRST, file.stored(item).start + 300, 3)
    file.close()
    result = call("verify", src)
    assert result.exit_code == 3
    assert re.search(f"failed: {FIRST}: tensor {item.name!r}", result.stderr)


def resummed(src, change):
    """Change the manifest and give it the sum that it has then."""
    value = json.loads((src / MANIFEST).read_text())
    del value["crc32"]
    change(value)
    head = json.dumps(value, indent=1).removesuffix("\n}") + ',\n "crc32": "'
    (src / MANIFEST).write_text(f'{head}{zlib.crc32(head.encode()):08x}"\n}}\n')


def original(value, old, new):
    file = value["shards"][FIRST]
    assert old in file["original_header"]
    file["original_header"] = file["original_header"].replace(old, new)


def exchanged(value):
    tensors = value["shards"][FIRST]["tensors"]
    a, b = [name for name, sums in tensors.items() if sums[0] != "raw"][:2]
    tensors[a], tensors[b] = tensors[b], tensors[a]


FORGED = {
    "version": (lambda v: v.update(version=2), "version 2 is not known here"),
    "no version": (lambda v: v.pop("version"), "is not what streamq writes"),
    "shards": (lambda v: v.update(shards=[1]), "is not what streamq writes"),
    "way out": (lambda v: v["restore"].update({"../x": "y"}), "leads out of the directory"),
    "shard out": (
        lambda v: v["shards"].update({"/x": v["shards"].pop(FIRST)}), "leads out of the directory",
    ),
    "no shard": (
        lambda v: v["shards"].update(x=v["shards"].pop(FIRST)), "x: cannot be opened",
    ),
    "size": (
        lambda v: v["shards"][FIRST].update(original_bytes=10**15), "end at byte .* has 10{15} b",
    ),
    "header": (lambda v: original(v, "{", "["), "the original header of .* is not a JSON object"),
    "name": (lambda v: original(v, "up_proj", "xx_proj"), "does not say how '.*xx_proj"),
    "shape": (lambda v: original(v, "[192,128]", "[128,192]"), "does not fit its stream"),
    "coding": (
        lambda v: v["shards"][FIRST]["tensors"].update({UP + "weight": ["lzma", 0, 0]}),
        "does not say how '.*up_proj",
    ),
    "mode": (
        lambda v: v["shards"][FIRST]["tensors"].update({UP + "weight": ["low", 0, 0]}),
        "is not where|something else",
    ),
    "transpose": (lambda v: v.update(transpose=False), "failed: .*"),
    "sums": (exchanged, "does not have its check sum"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FORGED.values(), ids=FORGED)
def test_a_manifest_that_says_something_else(change, message, packed, tmp_path):
    src = shutil.copytree(packed / "zstd", tmp_path / "copy")
    resummed(src, lambda value: None)
    assert call("verify", src).exit_code == 0
    resummed(src, change)
    result = call("verify", src)
    assert result.exit_code == 3
    assert re.search(message, result.stderr), result.stderr
    result = call("decompress", src, tmp_path / "out")
    assert result.exit_code == 1
    assert "bug in streamq" not in result.stderr
    assert sorted({p.name for p in tmp_path.iterdir()} - {"out.partial"}) == ["copy"]


# --- interruptions -----------------------------------------------------------------------

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
needs_namespaces = pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True, check=False)
    .returncode != 0,
    reason="user and mount namespaces are not allowed here",
)  # fmt: skip

#: The second part of a run hangs, or the disk is believed to be large.
DRIVE = """
import sys, time
import streamq.compressing.run as run, streamq.compressing.unpack as unpack, streamq.writer
from streamq.cli import main
kind, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = "streamq"
if kind == "hang":
    def slow(quick):
        def task(*a):
            print("working", flush=True)
            time.sleep(0.2)
            return quick(*a)
        return task
    run.encode, unpack.decode = slow(run.encode), slow(unpack.decode)
else:
    run.check_destination = unpack.check_destination = lambda *a: 0
    streamq.writer.check_destination = lambda *a: 10**9
main()
"""
VERBS = {"compress": "floats", "decompress": "zstd"}


@needs_namespaces
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fills_up(verb, packed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "drive.py").write_text(DRIVE)
    command = (
        f"{sys.executable} {tmp_path}/drive.py full {verb} {packed / VERBS[verb]} {disk}/out -q"
    )
    script = f'mount -t tmpfs -o size=200k none "$0"; set +e; {command}; c=$?; ls "$0"; exit $c'
    result = subprocess.run(
        [*NAMESPACE, script, str(disk)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "no space left on the device" in result.stderr.splitlines()[0]
    assert "Traceback" not in result.stderr
    assert result.stdout.split() == ["out.partial"]


@needs_namespaces
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_known_before(verb, packed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{STREAMQ} {verb} {packed / VERBS[verb]} {disk}/out -q"
    script = f'mount -t tmpfs -o size=100k none "$0"; set +e; {command}; c=$?; ls "$0"; exit $c'
    result = subprocess.run(
        [*NAMESPACE, script, str(disk)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.search("needs .* the disk has .* free", result.stderr)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_destination(verb, how, packed, tmp_path):
    (tmp_path / "drive.py").write_text(DRIVE)
    src, out = packed / VERBS[verb], tmp_path / "out"
    args = [sys.executable, tmp_path / "drive.py", "hang", verb, src, out, "-q", "-j", "1"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.splitlines()[0] == "Interrupted."
        assert "out.partial stays, the next run replaces it" in stderr
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    more = ["--transpose"] if verb == "compress" else []
    assert call(verb, src, out, *more).exit_code == 0
    assert files_of(out) == files_of(packed / ("zstd" if verb == "compress" else "floats"))
    assert not os.path.lexists(tmp_path / "out.partial")
