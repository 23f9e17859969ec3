"""Sources on the Hub, against a stand-in of it: the bytes of a local run, or one sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_checkpoints
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint
from hub_stand_in import Exchange, HubStandIn, cutting, failing, stalling
from hypothesis import given
from hypothesis import strategies as st
from small_units import contents, small_units, write_small

import streamq
from streamq.checkpoint import blocks, from_hub, open_checkpoint, remote, spool
from streamq.checkpoint.blocks import Book, fetched_of, forecast
from streamq.cli import cli
from streamq.converting import Output, Settings, convert_all, jobs, reads
from streamq.errors import AddressError, StreamqError
from streamq.hub import HubPath, client, is_branch, is_hub, parse_hub
from streamq.planning import make_plan

#: Of the tests: so small that a checkpoint of some MB has many blocks and jobs.
BLOCK, JOB = 1 << 16, 150_000
REPO = "hf://org/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in, which the environment names; nothing is cached, and waits are short."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(client, "FIRST", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        close_session()
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith("streamq-")]
    assert left == [], "files of a source are left behind"


def shrink(put: Callable[[Any, str, int], None] = setattr) -> None:
    """Blocks and jobs so small that small checkpoints have many; ``put``: that of monkeypatch."""
    small_units(put)
    put(jobs, "JOB", JOB)
    for module in (blocks, reads, spool):
        put(module, "BLOCK", BLOCK)
    put(from_hub, "FIRST", 1 << 10)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch.setattr)


def convert(src: str | Path, out: Path, *schemes: str, **how: Any) -> list[Any]:
    """A conversion to one or several outputs, ``out`` or ``out/0``, ``out/1``; the summaries."""
    s = Settings(**{"sync": False, **how})
    with open_checkpoint(src, spool=s.spool, spool_dir=s.spool_dir) as source:
        plans = [make_plan(source, streamq.api.options(**_how(scheme))) for scheme in schemes]
        folders = [out] if len(plans) == 1 else [out / str(i) for i in range(len(plans))]
        out.mkdir(parents=True, exist_ok=True)
        outputs = [Output(*pair) for pair in zip(plans, folders, strict=True)]
        if len(plans) == 1:
            out.rmdir()
        return convert_all(source, outputs, s)


def _how(scheme: str) -> dict[str, Any]:
    fmt, _, name = scheme.rpartition("/")
    return {"scheme": name, "format": fmt or None}


def same(here: Path, there: Path) -> None:
    """All files are equal, but for what streamq.json says of the origin, and its own checksum."""
    a, b = contents(here), contents(there)
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith("streamq.json"):
            assert a[name] == b[name], name
            continue
        one, two = json.loads(a[name]), json.loads(b[name])
        del one["crc32"], two["crc32"]
        origin = {k for k in {**one["source"], **two["source"]} if k.startswith("hf://")}
        for said in (one, two):
            said["source"] = {k: v for k, v in said["source"].items() if k not in origin}
        assert one == two


def made(folder: Path, made: family_checkpoints.Made) -> Path:
    """A checkpoint of a family, in three shards, so that groups straddle them."""
    names = list(made.tensors)
    return write_checkpoint(
        folder, made.tensors, made.config, [names[::3], names[1::3], names[2::3]]
    )


def big(folder: Path, layers: int = 2, width: int = 256) -> Path:
    """Some MB, of which two shards share every fused group."""
    rng = np.random.default_rng(1)
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (2 * width, width), "mlp.up_proj": (2 * width, width),
        "mlp.down_proj": (width, 2 * width),
    }  # fmt: skip
    tensors = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
            tensors[f"model.layers.{layer}.{name}.weight"] = values
        norm = np.ones(width, ml_dtypes.bfloat16)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = norm
    names = list(tensors)
    return write_checkpoint(folder, tensors, shards=[names[::2], names[1::2]])


def quantized(folder: Path, scheme: str) -> Path:
    """A checkpoint that is quantized already."""
    src = big(folder.with_name(folder.name + "-float"))
    streamq.convert(src, folder, settings=Settings(sync=False), **_how(scheme))
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "dense": big,
    "small": write_small,
    "gpt-oss": lambda f: write_small(f, "gpt-oss"),
    "experts": lambda f: made(f, family_checkpoints.qwen3_5_moe()),
    "experts by lines": lambda f: made(f, family_checkpoints.llama4()),
    "nvfp4": lambda f: quantized(f, "nvfp4a16"),
    "awq": lambda f: quantized(f, "awq/w4a16_asym"),
    "gptq": lambda f: quantized(f, "gptq/w4a16"),
    "fp8": lambda f: quantized(f, "fp8/fp8_block"),
}


@pytest.mark.parametrize(
    ("kind", "schemes"),
    [
        ("dense", ["nvfp4"]),
        ("dense", ["fp8_block"]),
        ("dense", ["w4a16"]),
        ("dense", ["bf16"]),  # its files are copied as they are
        ("dense", ["bf16", "w4a16"]),
        ("dense", ["nvfp4", "awq/w4a16_asym", "fp8_dynamic"]),
        ("small", ["mxfp4"]),
        ("gpt-oss", ["gpt-oss/mxfp4a16"]),
        ("experts", ["nvfp4a16"]),
        ("experts by lines", ["nvfp4", "fp8_dynamic"]),
        ("nvfp4", ["bf16"]),
        ("nvfp4", ["modelopt/nvfp4a16"]),
        ("awq", ["w4a16_asym"]),
        ("gptq", ["w4a16", "f16"]),
        ("fp8", ["bf16"]),
    ],
)
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_bytes_are_those_of_a_local_run(kind, schemes, limit, hub, small, tmp_path):
    src = SOURCES[kind](tmp_path / "in")
    hub.commit_folder("org/model", src)
    convert(src, tmp_path / "local", *schemes)
    convert(REPO, tmp_path / "hub", *schemes, spool=limit)
    same(tmp_path / "local", tmp_path / "hub")


# --- how much is downloaded ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("schemes", "limit", "least", "most"),
    [
        (["nvfp4"], 1 << 30, 1.0, 1.02),
        (["nvfp4", "w4a16"], 1 << 30, 1.0, 1.02),
        (["fp8_block"], 0, 1.0, 1.02),
        (["bf16"], 0, 1.0, 1.02),
        (["bf16", "fp8_block"], 1 << 30, 2.0, 2.02),  # the copy comes by itself
        (["nvfp4"], 0, 1.3, 2.0),  # large groups are looked at twice
        (["nvfp4"], 12 * BLOCK, 1.05, 1.9),
    ],
)
def test_each_byte_is_fetched_once_where_the_spool_holds_it(
    schemes, limit, least, most, hub, small, tmp_path
):
    src = big(tmp_path / "in", layers=3)
    hub.commit_folder("org/model", src)
    with open_checkpoint(REPO, spool=limit) as source:
        store = source._store
        tensors = source.nbytes
        before = hub.sent()
        outputs = [Output(make_plan(source, streamq.api.options(s)), tmp_path / s) for s in schemes]
        told = streamq.converting.means_of(outputs, Settings()).traffic
        (summary, *_) = convert_all(source, outputs, Settings(sync=False, workers=3))
        peak = store._book.peak * BLOCK
        on_disk = os.fstat(store._spool._fd).st_blocks * 512 if limit else 0
    assert told.needed == tensors
    assert least * tensors <= hub.sent() - before <= most * tensors
    assert abs(told.fetched - (hub.sent() - before)) < 0.3 * tensors
    assert summary.downloaded >= hub.sent() - before
    assert on_disk <= peak <= limit
    if most < 1.1:
        assert hub.sent() <= 1.02 * tensors  # with all headers


MEASURED = """
import os, sys
from pathlib import Path
import streamq
from streamq.checkpoint import open_checkpoint
from streamq.converting import Output, Settings, convert_all, means_of
from streamq.planning import make_plan
src, dst, spool = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
how = Settings(sync=False, workers=3)
with open_checkpoint(src, spool=spool) as source:
    outputs = [Output(make_plan(source, streamq.api.options("nvfp4")), dst)]
    planned = means_of(outputs, how).peak_memory(outputs[0].plan)
    convert_all(source, outputs, how)
    disk = os.fstat(source._store._spool._fd).st_blocks * 512
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(peak, planned, disk)
"""


def test_memory_and_disk_are_what_the_plan_says(hub, tmp_path):
    """By a process of its own: its peak, and what the spool took of the disk."""
    base = np.random.default_rng(2).standard_normal(4096 * 2048).astype(ml_dtypes.bfloat16)
    sizes = {"self_attn.o_proj": 2048, "mlp.gate_proj": 4096, "mlp.up_proj": 4096}
    tensors = {
        f"model.layers.{layer}.{name}.weight": base[: rows * 2048].reshape(rows, 2048)
        for layer in range(6) for name, rows in sizes.items()
    }  # fmt: skip
    names = list(tensors)
    src = write_checkpoint(tmp_path / "in", tensors, shards=[names[::2], names[1::2]])
    hub.commit_folder("org/model", src)
    limit = 24 << 20
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, REPO, tmp_path / "out", str(limit)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak, planned, disk = map(int, child.stdout.split())
    assert peak <= planned
    assert 0 < disk <= limit


def test_the_spool_leaves_the_outputs_their_disk(hub, small, tmp_path, monkeypatch):
    src = big(tmp_path / "in")
    hub.commit_folder("org/model", src)
    with open_checkpoint(REPO) as source:
        output = Output(make_plan(source, streamq.api.options("nvfp4")), tmp_path / "out")
        free = output.plan.disk_needed + 3 * BLOCK + 10
        monkeypatch.setattr(reads, "free_bytes", lambda place: free)
        told = streamq.converting.means_of([output], Settings()).traffic
        convert_all(source, [output], Settings(sync=False))
        assert told.spooled == source._store._book.peak * BLOCK == 3 * BLOCK
        assert told.factor > 1.1
        monkeypatch.setattr(reads, "free_bytes", lambda place: 0)
        assert streamq.converting.means_of([output], Settings()).traffic.spooled == 0
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", tmp_path / "out")


def test_requests_are_few(hub, tmp_path):
    """Neighbours come together, and the address of a file is asked for once."""
    src = big(tmp_path / "in")
    hub.commit_folder("org/model", src)
    convert(REPO, tmp_path / "out", "nvfp4")
    weights = [r for r in hub.log if r.path.endswith(".safetensors")]
    assert len([r for r in weights if r.server == "hub"]) == 2
    assert len([r for r in weights if r.server == "cdn"]) <= 8
    assert not [r for r in weights if r.server == "cdn" and r.authorized]


spans = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40), st.integers(1, 20)).map(
        lambda s: (s[0], 8 + s[1] * BLOCK // 4, min(12 * BLOCK, 8 + (s[1] + s[2]) * BLOCK // 4))
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@given(st.lists(spans, max_size=12), st.integers(0, 40), st.randoms(use_true_random=False))
def test_blocks_are_kept_for_those_who_need_them(jobs, slots, rng):
    """Whatever order jobs begin and end in: no slot is for two blocks, none is lost."""
    extents = {"a": (8, 12 * blocks.BLOCK), "b": (8, 12 * blocks.BLOCK)}
    jobs = [[(f, a * blocks.BLOCK // BLOCK, b * blocks.BLOCK // BLOCK) for f, a, b in job]
            for job in jobs]  # fmt: skip
    book = Book(extents, slots)
    for job in jobs:
        book.expect(job)
    needed = sum(b - a for _, a, b in blocks.joined(span for job in jobs for span in job))
    waiting, running, fetched = list(jobs), [], 0
    while waiting or running:
        if waiting and (not running or rng.random() < 0.6):
            parts = book.take(waiting.pop(rng.randrange(len(waiting))))
            fetched += sum(map(fetched_of, parts))
            if rng.random() < 0.1:
                for part in parts:
                    if part.new and part.kept is not None:
                        part.kept.failed = True
            running.append(parts)
        else:
            book.give_back(running.pop(rng.randrange(len(running))))
        taken = [kept.slot for kept in book._kept.values()]
        assert len({*taken, *book._free}) == len(taken) + len(book._free) <= book.peak <= slots
    assert not book._kept
    assert len(book._free) == book.peak
    assert forecast(jobs, extents, 0).fetched >= needed
    whole = forecast(jobs, extents, 1000)
    assert whole.needed == needed
    assert whole.fetched <= needed + 24 * blocks.BLOCK


# --- what can go wrong on the way ---------------------------------------------------------


def moving(hub: HubStandIn, src: Path, after: int) -> Callable[[Exchange], bool]:
    """The branch moves to other weights after some requests."""
    count = [0]

    def fault(x: Exchange) -> bool:
        count[0] += 1
        if count[0] == after:
            other = {p.name: bytes(p.stat().st_size) for p in src.glob("*.safetensors")}
            hub.commit("org/model", other, keep=True)
        return False

    return fault


FAULTS: dict[str, Callable[[HubStandIn, Path], Any]] = {
    "5% of requests": lambda hub, src: [failing(0.05, seed=3)],
    "a third of requests": lambda hub, src: [failing(0.33, status=500, seed=4)],
    "429": lambda hub, src: [failing(0.1, 429, seed=5, times=4, Retry_After="0")],
    "429 with a window": lambda hub, src: [
        failing(0.1, 429, seed=5, times=3, RateLimit='"resolvers";r=0;t=0')
    ],
    "broken connections": lambda hub, src: [cutting(0.3, after=70_000, seed=6)],
    "broken at once": lambda hub, src: [cutting(0.2, after=0, seed=7)],
    "stalled": lambda hub, src: [stalling(1.5, times=2)],
    "stalled in the middle": lambda hub, src: [cutting(0.2, after=90_000, seed=8, stall=1.5)],
    "addresses that expire": lambda hub, src: setattr(hub, "uses", 2),
    "addresses for one request": lambda hub, src: setattr(hub, "uses", 1),
    "a branch that moves at once": lambda hub, src: [moving(hub, src, 3)],
    "a branch that moves": lambda hub, src: [moving(hub, src, 12)],
    "all of it": lambda hub, src: [
        failing(0.05, seed=9), cutting(0.1, after=70_000, seed=10), moving(hub, src, 9)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_do_not_change_a_byte(name, hub, small, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    hub.faults = FAULTS[name](hub, src) or []
    convert(REPO, tmp_path / "hub", "nvfp4", spool=8 * BLOCK)
    hub.faults = []
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", tmp_path / "hub")


def test_whatever_happens(hub, small, tmp_path, monkeypatch, pytestconfig):
    """The bytes of a local run, or one sentence; and then the next run gives them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    src = big(tmp_path / "in", layers=1)
    place = f"{REPO}@{hub.commit_folder('org/model', src)}"
    convert(src, tmp_path / "local", "nvfp4")
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    for seed in range(200 if soak else 3):
        chance = random.Random(seed)
        hub.uses = chance.choice([1, 2, 5, 10**9])
        kinds = [
            failing(chance.random() / 2, chance.choice([500, 502, 503, 504, 408]), seed),
            failing(chance.random() / 3, 429, seed + 1, Retry_After="0"),
            cutting(chance.random() / 2, chance.choice([0, 100, 70_000, 100_000]), seed + 2),
            stalling(0.8, chance.random() / 10, seed + 3, times=3),
            cutting(chance.random() / 10, 70_000, seed + 4, stall=0.8, times=3),
        ]
        hub.faults = chance.sample(kinds, chance.randint(1, len(kinds)))
        out, limit = tmp_path / "out", chance.choice([0, 3 * BLOCK, 1 << 30])
        said = ""
        try:
            convert(place, out, "nvfp4", spool=limit)
        except StreamqError as e:
            said = str(e)
        hub.faults = []
        assert "\n" not in said
        assert out.exists() == (not said)
        if said:
            convert(place, out, "nvfp4", spool=limit)
        same(tmp_path / "local", out)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([failing(status=503, where="cdn/.*")], "the Hub answered 503"),
        ([failing(status=404, where="hub.*resolve.*-00002.*")], "the Hub answered 404"),
        ([failing(status=403, where="cdn/.*")], "the storage that the Hub leads to answered 403"),
        ([failing(status=403, where="hub/api.*")], "the Hub refused"),
        ([failing(status=401, where="hub.*resolve.*")], "does not know this token"),
        ([failing(status=429, Retry_After="1000", where="cdn.*")], "run again in 1000 s"),
        ([failing(status=400, where="hub.*resolve.*")], "the Hub answered 400"),
        ([cutting(after=10)], "the Hub cannot be reached: .*received 10 bytes"),
        ([cutting(after=0, where="hub/api.*")], "the Hub cannot be reached.*HF_ENDPOINT"),
        ([stalling(0.8)], "did not answer in time.*HF_HUB_DOWNLOAD_TIMEOUT"),
    ],
)
def test_what_does_not_pass_is_one_sentence(faults, message, hub, small, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(client, "TRIES", 3)
    hub.commit_folder("org/model", big(tmp_path / "in", layers=1))
    hub.faults = faults
    with pytest.raises(StreamqError, match=message) as found:
        convert(REPO, tmp_path / "out", "nvfp4")
    assert "\n" not in str(found.value)
    assert "org/model" in str(found.value)
    assert not (tmp_path / "out").exists()


def bare(status: int) -> Callable[[Exchange], bool]:
    """Storage fails and does not say why, so that a message has its address."""

    def fault(x: Exchange) -> bool:
        if x.where == "cdn":
            x.start(status, 0)
        return x.where == "cdn"

    return fault


def test_signed_addresses_are_not_told(hub, small, tmp_path, monkeypatch):
    """Whoever has one may read what it leads to."""
    monkeypatch.setattr(client, "TRIES", 2)
    hub.commit_folder("org/model", big(tmp_path / "in", layers=1))
    hub.faults = [bare(500)]
    with pytest.raises(StreamqError, match=r"the Hub answered 500.*run again later") as found:
        convert(REPO, tmp_path / "out", "nvfp4")
    assert hub.cdn in str(found.value)
    assert "Signature" not in str(found.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("url 'https://cdn/a?X-Sig=12&x=3' at all", "url 'https://cdn/a' at all"),
        ("no way to http://me:pass@proxy:80/", "no way to http://proxy:80/"),
        ("Is it there? a=b", "Is it there? a=b"),
    ],
)  # fmt: skip
def test_secrets_of_addresses_are_not_told(said, told):
    assert str(client.translated(ValueError(said), "x")) == f"x: ValueError: {told}."


def test_an_endpoint_that_is_no_address_is_told_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "localhost:1")
    monkeypatch.setattr(client, "FIRST", 1000.0)
    with pytest.raises(StreamqError, match="protocol; check the network, the proxy and HF_ENDPO"):
        open_checkpoint(REPO)


@pytest.mark.parametrize("reads", [False, True])
def test_interrupted_while_others_wait(reads, hub, small, tmp_path):
    """The Hub asks for a pause of a minute; Ctrl-C does not wait for its end."""
    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    waiting = failing(status=429, Retry_After="60", where="cdn.*", times=1)
    hub.faults = [] if reads else [waiting]
    code = (
        "import sys, hub_stand_in; from streamq.checkpoint import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]) as source:\n"
        "    print('open', flush=True); sys.stdin.read(1)\n"
        "    for t in source.tensors.values():\n"
        "        source.pread(t.file, t.start, memoryview(bytearray(t.nbytes)))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, REPO], cwd=Path(__file__).parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    if reads:
        assert child.stdout.readline() == "open\n"
        hub.faults = [waiting]
        child.stdin.write("x")
        child.stdin.flush()
    while not any(r.status == 429 for r in hub.log):
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=30)[1]


def altered(**headers: str) -> Callable[[Exchange], bool]:
    """Answers of the Hub about files have other headers."""

    def fault(x: Exchange) -> bool:
        def send(name: str, value: str) -> None:
            value = headers.get(name.replace("-", "_"), value)
            type(x).send_header(x, name, value)

        if "resolve" in x.path or x.where == "cdn":
            x.send_header = send  # type: ignore[method-assign]
        return False

    return fault


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X_Repo_Commit": "0" * 40}, "another commit"),
        ({"X_Linked_Etag": '"1234"'}, "another ETag, 1234"),
        ({"X_Linked_Size": "5"}, "another size"),
        ({"Content_Range": "bytes 0-9/10"}, "does not know ranges"),
    ],
)
def test_answers_about_another_file_are_refused(headers, message, hub, small, tmp_path):
    hub.commit_folder("org/model", big(tmp_path / "in", layers=1))
    hub.faults = [altered(**headers)]
    with pytest.raises(StreamqError, match=message):
        convert(REPO, tmp_path / "out", "nvfp4")


def test_storage_that_changes_is_refused(hub, small, tmp_path):
    """The same signed address with another ETag."""
    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    with open_checkpoint(REPO) as source:
        hub.faults = [altered(ETag='"other"')]
        with pytest.raises(StreamqError, match='ETag "other"'):
            source.pread(source.files[0], 2000, memoryview(bytearray(10)))


def test_the_disk_of_the_spool_is_full(hub, small, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    monkeypatch.setattr(spool.Spool, "write", full)
    convert(REPO, tmp_path / "hub", "nvfp4")
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", tmp_path / "hub")


# --- going on -----------------------------------------------------------------------------


def interrupted(src: str, out: Path, after: int) -> None:
    """A conversion that is interrupted when so many bytes of the source are done."""
    done = [0]

    def progress(n: int, name: str) -> None:
        done[0] += n
        if done[0] > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(src, out, "nvfp4", progress=progress, workers=1)
    assert not out.exists()


def test_a_run_goes_on_where_it_was_interrupted(hub, small, tmp_path):
    src = big(tmp_path / "in", layers=4)
    size = sum(p.stat().st_size for p in src.glob("*.safetensors"))
    commit = hub.commit_folder("org/model", src)
    out = tmp_path / "out"
    interrupted(REPO, out, size * 2 // 3)
    hub.log.clear()
    (summary,) = convert(REPO, out, "nvfp4")
    assert summary.resumed > 0
    assert hub.sent() < 0.6 * size
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", out)
    assert f'"commit": "{commit}"' in (out / "streamq.json").read_text()


def test_a_branch_that_moved_is_not_gone_on_with(hub, small, tmp_path):
    src = big(tmp_path / "in")
    before = hub.commit_folder("org/model", src)
    out = tmp_path / "out"
    interrupted(REPO, out, 1_200_000)
    after = hub.commit("org/model", {"README.md": b"moved"}, keep=True)
    with pytest.raises(StreamqError, match=f"commit: '{before}' there, '{after}' here"):
        convert(REPO, out, "nvfp4")
    (summary,) = convert(f"{REPO}@{before}", out, "nvfp4")
    assert summary.resumed > 0
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", out)


def test_a_killed_run_goes_on(hub, small, tmp_path):
    """It leaves nothing of the weights outside of DST.partial."""
    src = big(tmp_path / "in", layers=6)
    size = sum(p.stat().st_size for p in src.glob("*.safetensors"))
    hub.commit_folder("org/model", src)
    hub.faults = [stalling(0.05)]
    code = (
        "import sys; from test_hub_sources import shrink; shrink()\n"
        "from streamq.cli import cli; cli(sys.argv[1:])"
    )
    args = ["convert", REPO, str(tmp_path / "out"), "-s", "nvfp4", "-j", "1"]
    here = str(Path(__file__).parent)
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args], env={**os.environ, "PYTHONPATH": here},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        journal = tmp_path / "out.partial" / "journal"
        until = time.monotonic() + 60
        while time.monotonic() < until and child.poll() is None:
            if journal.exists() and journal.read_text().count("\n") > 3:
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    finally:
        assert child.wait(60) == -signal.SIGKILL
    for left in tmp_path.glob("streamq-*"):
        assert sum(p.stat().st_size for p in left.rglob("*") if p.is_file()) < 10_000
        shutil.rmtree(left)
    hub.faults, hub.log = [], []
    (summary,) = convert(REPO, tmp_path / "out", "nvfp4")
    assert summary.resumed > 0
    assert hub.sent() < size
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", tmp_path / "out")


# --- the cache ----------------------------------------------------------------------------


def test_files_in_the_cache_are_used(hub, small, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    src = big(tmp_path / "in")
    hub.commit_folder("org/model", src)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    shard = "model-00001-of-00002.safetensors"
    for name in (shard, "config.json"):
        hf_hub_download("org/model", name, endpoint=hub.url)
    hub.log.clear()
    (summary, *_) = convert(REPO, tmp_path / "hub", "nvfp4", "w8a16")
    assert hub.sent(f".*({shard}|config.json)") == 0
    assert summary.downloaded < 1.03 * (src / "model-00002-of-00002.safetensors").stat().st_size
    convert(src, tmp_path / "local", "nvfp4", "w8a16")
    same(tmp_path / "local", tmp_path / "hub")


def test_offline_a_download_is_used_or_asked_for(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    src = write_small(tmp_path / "in")
    hub.commit_folder("org/model", src, under="sub/")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StreamqError, match=r"HF_HUB_OFFLINE is set.*`hf download org/model`"):
        open_checkpoint(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("org/model", endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    convert(REPO + "/sub", tmp_path / "hub", "nvfp4")
    assert hub.log == []
    convert(src, tmp_path / "local", "nvfp4")
    same(tmp_path / "local", tmp_path / "hub")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 0 "}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": "nonsense"}, None),
    ],
)
def test_how_long_an_answer_asks_to_wait(headers, seconds):
    assert client.retry_after(headers) == seconds


# --- what is said -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("hf://org/model", HubPath("org/model")),
        ("hf://models/org/model/", HubPath("org/model")),
        ("hf://o-r.g_1/m@v1.0", HubPath("o-r.g_1/m", "v1.0")),
        ("hf://o/m@feature%2Fx/sub", HubPath("o/m", "feature/x", "sub")),
        ("hf://o/m@refs/pr/12/a/b", HubPath("o/m", "refs/pr/12", "a/b")),
        ("hf://o/m/a/b@c", HubPath("o/m", None, "a/b@c")),
    ],
)
def test_addresses(text, path):
    assert is_hub(text)
    assert parse_hub(text) == path
    assert parse_hub(str(path)) == path


@pytest.mark.parametrize(
    ("src", "hint"),
    [
        ("org/model", "; a repository on the Hub is hf://org/model."),
        ("https://huggingface.co/org/model", "; a repository on the Hub is hf://org/model."),
        ("out/model.safetensors", "directory."),
        ("/a/b", "directory."),
    ],
)
def test_who_forgot_the_scheme_is_told(src, hint):
    with pytest.raises(StreamqError) as found:
        open_checkpoint(src)
    assert str(found.value).endswith(hint)


@pytest.mark.parametrize(
    "name", ["main", "feature/x", "v1.0", "refs/pr/3", "ä", "a@b", "a-b_c", "b/-a"]
)  # fmt: skip
def test_names_of_branches(name):
    assert is_branch(name)


@pytest.mark.parametrize(
    "name",
    ["", "a b", "/a", "a/", "a//b", "a..b", "a.lock", "a.", ".a", "a/.b", "-a", "@", "a@{1}", "a~1",
     "a^", "a:b", "a?", "a*", "a[", "a\\b", "a\n"],
)  # fmt: skip
def test_what_is_no_name_of_a_branch(name):
    assert not is_branch(name)


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://model", "hf://a/", "hf:///a/b", "hf://a/b@", "hf://a/b@/c", "hf://a/b/../c",
     "hf://a/b//c", "hf://datasets/a/b", "hf://-a/b", "hf://a/b.git", "hf://a/b c", "hf://a@x/b"],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(AddressError):
        parse_hub(text)
    result = CliRunner().invoke(cli, ["inspect", text])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("token", "kind", "message"),
    [
        (None, "private", "no such repository"),
        (None, "gated", "is gated; ask for access"),
        ("wrong", "gated", "is gated; ask for access"),
        ("right", "gated", None),
        ("right", "private", None),
    ],
)
def test_tokens(token, kind, message, hub, tmp_path, monkeypatch):
    hub.commit_folder("org/model", write_small(tmp_path / "in"))
    setattr(hub.repo("org/model"), kind, True)
    hub.repo("org/model").token = "right"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if message is None:
        with open_checkpoint(REPO) as source:
            assert source.tensors
            source.pread(source.files[0], 2000, memoryview(bytearray(10)))
        there = {(r.server, r.authorized) for r in hub.log if r.path.endswith(".safetensors")}
        assert there == {("hub", token), ("cdn", "")}, "storage sees no token"
        return
    with pytest.raises(StreamqError, match=message):
        open_checkpoint(REPO)


@pytest.mark.parametrize(
    ("place", "files", "message"),
    [
        ("hf://org/none", None, "no such repository"),
        (REPO + "@v2", None, "no such revision"),
        (REPO + "/sub", None, "has no file there"),
        (REPO + "/none.safetensors", None, "named by the index|not in"),
        (REPO, {"model.safetensors": b"12"}, "too few for a safetensors file"),
        (REPO, {"model.safetensors": b"\xff" * 100}, "header claims"),
        (REPO, {"model.safetensors": b"\x40" + bytes(7) + b"{}"}, "truncated"),
        (REPO, {"model.safetensors": b"\x02" + bytes(7) + b"[]"}, "model.safetensors"),
        (
            REPO,
            {"model.safetensors": (9_000_000).to_bytes(8, "little") + bytes(9_000_000)},
            "model.safetensors: ",
        ),
        (REPO, {"README.md": b"nothing"}, "no \\*.safetensors file"),
        (REPO, {"sub/model.safetensors": b"12"}, "no \\*.safetensors file"),
        (REPO, {"config.json": b"[", "model.safetensors": b"12"}, "config.json: is not valid JSON"),
        (REPO, {"streamq_compression.json": b"{}"}, "is compressed"),
        (
            REPO,
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'},
            "leads out of the directory",
        ),
        (
            REPO,
            {"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'},
            "named by the index but not in hf://org/model@",
        ),
    ],
)
def test_a_repository_is_not_trusted(place, files, message, hub, tmp_path):
    if files is None:
        hub.commit_folder("org/model", write_small(tmp_path / "in"))
    else:
        hub.commit("org/model", files)
    with pytest.raises(StreamqError, match=message) as found:
        open_checkpoint(place)
    assert "\n" not in str(found.value)


def test_names_that_lead_elsewhere_are_left_out(hub, tmp_path):
    src = write_small(tmp_path / "in")
    files = {p.name: p for p in src.iterdir()}
    odd = {"../evil.json": b"1", "a/../../evil.json": b"1", "/evil.json": b"1", ".hidden": b"1"}
    hub.commit("org/model", {**files, **odd, "sub/vocab.txt": b"abc"})
    with open_checkpoint(REPO) as source:
        found = {str(p.relative_to(source.root)) for p in source.root.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors.index.json", "sub/vocab.txt"}
    assert not list(tmp_path.rglob("evil*"))


def test_large_files_beside_the_weights_are_left_out(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(from_hub, "MAX_OTHERS", 5000)
    src = write_small(tmp_path / "in")
    (src / "video.mp4").write_bytes(bytes(9000))
    hub.commit_folder("org/model", src)
    with open_checkpoint(REPO) as source:
        assert source.others == ["config.json"]
        assert "video.mp4: 9.00 kB that are not weights, not copied" in source.oddities
    assert not [r for r in hub.log if r.path.endswith("video.mp4")]


def test_one_file_and_a_folder_of_a_revision(hub, tmp_path):
    src = write_small(tmp_path / "in")
    commit = hub.commit_folder("org/model", src, branch="v1", under="a/b/")
    file = "model-00001-of-00003.safetensors"
    with open_checkpoint(f"{REPO}@v1/a/b/{file}") as source, open_checkpoint(src / file) as local:
        assert source.tensors == local.tensors
        assert source.config == local.config
    with open_checkpoint(f"{REPO}@{commit}/a/b") as source, open_checkpoint(src) as local:
        assert source.tensors == local.tensors
        assert source.place == f"{REPO}@{commit}/a/b"


# --- every command ------------------------------------------------------------------------


def run(*args: str) -> str:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_command_takes_it(hub, tmp_path):
    src = big(tmp_path / "in")
    hub.commit_folder("org/model", src)
    hub.commit_folder("org/model", src, branch="v1", under="sub/")
    place = REPO + "@v1/sub"
    out = str(tmp_path / "out")
    how = ["--no-sync", "--spool", "8MiB", "--spool-dir", str(tmp_path)]
    assert json.loads(run("inspect", place, "--json"))["path"].startswith(REPO + "@")
    told = json.loads(run("plan", place, "-s", "nvfp4", "--json"))["download"]
    assert 0 < told["bytes"] <= told["factor"] * 1.02 * told["bytes"]
    assert "download 2.23 MB (1.00x of what is read)" in run("plan", place, "-s", "w4a16")
    told = json.loads(run("plan", place, "-s", "w4a16", "--json", "--spool", "0"))["download"]
    assert told["spool"] == 0
    said = run("convert", place, out, "-s", "nvfp4", *how)
    assert "downloaded 2.26 MB" in said
    assert "every byte is what the source converts to" in run("verify", out, "--source", place)
    assert "every byte is what the source converts to" in run("verify", out, "--source", str(src))
    again = str(tmp_path / "again")
    run("convert", str(src), again, "-s", "nvfp4", "--no-sync")
    assert "every byte is what the source converts to" in run("verify", again, "--source", place)
    recipe = run("allocate", place, "--target-bits", "5")
    assert recipe == run("allocate", str(src), "--target-bits", "5")
    run("report", out, "--source", place, "-o", str(tmp_path / "page.html"))
    for command in (["reindex", "--fuse"], ["compress"]):
        run(*command, place, out + command[0], *how)
        run(*command, str(src), out + command[0] + "-local", "--no-sync")
        same(Path(out + command[0] + "-local"), Path(out + command[0]))
    assert "nothing to repair" in run("repair", place, str(tmp_path / "mended"))
    (src / "model.safetensors.index.json").write_text("{}")
    hub.commit_folder("org/broken", src)
    run("repair", "hf://org/broken", str(tmp_path / "mended"), "--no-sync")
    run("repair", str(src), str(tmp_path / "mended-local"), "--no-sync")
    same(tmp_path / "mended-local", tmp_path / "mended")


def test_python_takes_it(hub, tmp_path):
    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    streamq.convert(REPO, tmp_path / "out", "w4a16", settings=Settings(sync=False, spool=0))
    assert streamq.plan(REPO, "w4a16").bytes_in == streamq.plan(src, "w4a16").bytes_in
    assert streamq.verify(tmp_path / "out", REPO).exact
    with streamq.open(REPO) as there, streamq.open(src) as here:
        for (a, x), (b, y) in zip(there, here, strict=True):
            assert a == b
            assert np.array_equal(x, y)


def test_many_small_reads_are_few_requests(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "AROUND", 1 << 17)
    src = big(tmp_path / "in", layers=1)
    hub.commit_folder("org/model", src)
    rng = random.Random(0)
    with open_checkpoint(REPO) as source:
        file = source.files[0]
        data = (src / file).read_bytes()
        for _ in range(300):
            start = rng.randrange(len(data) - 500)
            into = bytearray(rng.randrange(1, 500))
            source.pread(file, start, memoryview(into))
            assert into == data[start : start + len(into)]
        lines = np.empty((40, 100), np.uint8)
        source.pread_lines(file, 5000, 1000, lines)
        assert lines.tobytes() == b"".join(
            data[5000 + 1000 * i : 5100 + 1000 * i] for i in range(40)
        )
        large = bytearray(600_000)
        source.pread(file, 77, memoryview(large))
        assert large == data[77 : 77 + len(large)]
    assert len([r for r in hub.log if r.server == "cdn"]) < 12
    shutil.rmtree(src)
