"""Conversions on a cluster of three nodes: the bytes of a local run, whatever is killed.

A node is a raylet with processes of its own on this machine; a killed one gets SIGKILL, and its
workers end with it. What nodes do to a shard is steered by files, see ray_node/sitecustomize.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from small_units import contents
from straddling import ROWS, straddling

import streamq
from streamq.cli import cli

# Nothing leaves this machine: a head would tell usage-stats.ray.io of itself after a minute, and
# without the other, which is read by the import, nodes look for their address by a socket to
# 8.8.8.8 and use that one instead of 127.0.0.1.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
ray = pytest.importorskip("ray", reason="Ray is not installed")

HERE = Path(__file__).parent
STREAMQ = Path(sys.executable).with_name("streamq")
#: Some ten shards.
HOW = ["-s", "nvfp4", "--shard-size", "20kB"]
#: Seconds for what takes one or two.
SOON = 60


class Nodes:
    """A head without CPUs, and three nodes with one each; ``folder``: files that steer them."""

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        self.folder = folder
        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        assert self.cluster.address.startswith("127.0.0.1:")
        self.engine = f"ray:{self.cluster.address}"
        self.by_name = {name: self.add(name) for name in "abc"}

    def add(self, name):
        path = os.pathsep.join([str(HERE / "ray_node"), os.environ.get("PYTHONPATH", "")])
        return self.cluster.add_node(
            num_cpus=1, node_name=name, object_store_memory=80 << 20,
            env_vars={"PYTHONPATH": path, "RAY_NODE": str(self.folder / name)},
        )  # fmt: skip

    def kill(self, name):
        self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    @contextmanager
    def steered(self, **files):
        """Files that are there meanwhile, such as ``a_slow=""``."""
        paths = {self.folder / name.replace("_", "."): text for name, text in files.items()}
        for path, text in paths.items():
            path.write_text(text)
        try:
            yield
        finally:
            for path in paths:
                path.unlink()

    def command(self, source, out, *options):
        return [STREAMQ, "convert", source, out, *HOW, "--engine", self.engine, *options]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    yield made
    made.cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return straddling(tmp_path_factory.mktemp("ray") / "in", "llama")


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted") / "out"
    streamq.convert(source, out, "nvfp4", shard_size=20_000)
    assert len([*out.glob("*.safetensors")]) > 6
    return contents(out)


def until(holds):
    """Wait for something."""
    end = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def done(out):
    """Shards that are noted as complete in an output that is not."""
    journal = out.with_name("out.partial") / "journal"
    return journal.read_text().count('"file"') if journal.exists() else 0


@contextmanager
def half_way(nodes, source, out):
    """A conversion of which some shards are done, while node c is at one and goes no further."""
    begun = len(nodes.log("c"))
    with nodes.steered(c_hangs="", a_slow="", b_slow=""):
        process = subprocess.Popen(
            nodes.command(source, out, "--json"), stdout=-1, stderr=-1, text=True
        )
        try:
            until(lambda: done(out) > 1 and len(nodes.log("c")) > begun)
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_node_is_killed_half_way(nodes, source, wanted, tmp_path):
    with half_way(nodes, source, tmp_path / "out") as process:
        (lost,) = nodes.log("c")[-1:]
        nodes.kill("c")
        stdout, stderr = process.communicate(timeout=SOON)
    nodes.by_name["c"] = nodes.add("c")
    assert process.returncode == 0, stderr
    assert contents(tmp_path / "out") == wanted
    shards = len([name for name in wanted if name.endswith(".safetensors")])
    (remark,) = json.loads(stdout)["remarks"]
    said = rf"Ray: {shards} tasks on [12] nodes; 1 more were lost with their worker or node, .*"
    assert re.fullmatch(said, remark)
    name, attempt = Path(lost).name, Path(lost).parent.name
    assert attempt.endswith("-0")
    again = [line for n in "ab" for line in nodes.log(n) if line.endswith(f"-1/{name}")]
    assert len(again) == 1
    assert streamq.verify(tmp_path / "out", source).failures == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("how", "code", "then"), [(signal.SIGKILL, -9, "ray"), (signal.SIGINT, 130, "local")]
)
def test_the_driver_is_stopped_half_way(how, code, then, nodes, source, wanted, tmp_path):
    """Either engine goes on from there."""
    out = tmp_path / "out"
    with half_way(nodes, source, out) as process:
        process.send_signal(how)
        _, stderr = process.communicate(timeout=SOON)
        assert process.returncode == code, stderr
    assert not out.exists()
    assert ".partial stays, the same command goes on" in stderr or how == signal.SIGKILL
    engine = nodes.engine if then == "ray" else then
    summary = streamq.convert(source, out, "nvfp4", shard_size=20_000, engine=engine)
    assert summary.resumed > 0
    assert contents(out) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def connected(nodes):
    """This process as a driver: one connection for all conversions in it."""
    ray.init(nodes.cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def failed(nodes, source, out):
    """What a conversion says that fails: one sentence, and that it can go on."""
    _, *arguments = map(str, nodes.command(source, out, "-q"))
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 1
    assert not out.exists()
    sentence, _ = run.stderr.splitlines()
    return sentence


def test_an_error_in_a_task(nodes, connected, tmp_path):
    src = straddling(tmp_path / "in", "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    with streamq.checkpoint.open_checkpoint(src) as c:
        t = c.tensors[name]
    with (src / t.file).open("r+b") as file:
        file.seek(t.start)
        file.write(np.array([np.nan], ml_dtypes.bfloat16).tobytes())
    sentence = failed(nodes, src, tmp_path / "out")
    assert re.match(rf"Error: tensor '{name}' in \S+: row 0, column 0 is NaN or Inf; ", sentence)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("in", r"in: no such file or directory\."),
        ("out", "where nodes share storage"),
    ],
)
def test_a_node_that_does_not_see_all(lacks, message, nodes, connected, tmp_path):
    src = straddling(tmp_path / "in", "llama")
    with nodes.steered(b_lacks=str(tmp_path / lacks)):
        sentence = failed(nodes, src, tmp_path / "out")
    assert re.match(rf"Error: node \S+ \(b\) of the Ray cluster: .*{message}", sentence)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_bytes_are_those_of_a_local_run(row, nodes, connected, tmp_path):
    src = straddling(tmp_path / "in", row.family)
    streamq.convert(src, tmp_path / "local", row.scheme, **row.more)
    summary = streamq.convert(src, tmp_path / "ray", row.scheme, engine=nodes.engine, **row.more)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    shards = len([*(tmp_path / "ray").glob("*.safetensors")])
    assert re.fullmatch(rf"Ray: {shards} tasks on [123] nodes", summary.remarks[0])
    assert streamq.verify(tmp_path / "ray", src).failures == []
