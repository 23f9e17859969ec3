"""Conversions through devices: the same bytes as the CPU's, whatever the devices do."""

import gc
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from fake_device import FakeDevice
from helpers import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import streamq
from streamq.cli import cli
from streamq.converting import Settings, devices, fleet, jobs, slabs
from streamq.errors import PlanError, StreamqError
from streamq.pipeline import find
from streamq.pipeline.kept import Kept
from streamq.pipeline.names import device_names
from streamq.schemes import ALL, SCHEMES

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
DOWN = "model.layers.0.mlp.down_proj.weight"


def make(folder, seed=0, spoil=None):
    """Weights of many slabs and of a few rows, side by side, in three dtypes and two shards."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (96, 256), "model.norm.weight": (256,)}
    for n in range(3):
        layer = f"model.layers.{n}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (256, 256) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (384, 256) for p in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (256, 384)}
        shapes |= {f"{layer}mlp.experts.{e}.down_proj.weight": (32, 128) for e in range(6)}
    dtypes = {"layers.1.": F16, "layers.2.": F32}
    made = {}
    for name, shape in shapes.items():
        dtype = next((d for part, d in dtypes.items() if part in name), BF16)
        made[name] = (rng.standard_normal(shape) * 0.02).astype(dtype)
    if spoil:
        row, col, value = spoil
        made[DOWN][row, col] = value
    names = list(made)
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4}
    return write_checkpoint(folder, made, config, [names[:20], names[20:]])


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source") / "in")


@pytest.fixture
def use(monkeypatch):
    """Makes devices stand in for GPUs; slabs and jobs small enough that there are many."""

    def stand_in(*fakes, slab=32 << 10, least=16 << 10, job=256 << 10):
        by_name = {fake.name: fake for fake in fakes}
        monkeypatch.setattr(find, "open_devices", lambda names: [by_name[n] for n in names])
        monkeypatch.setattr(fleet, "SLAB", slab)
        monkeypatch.setattr(fleet, "LEAST_SLAB", least)
        monkeypatch.setattr("streamq.converting.slabs.SLAB", least)
        monkeypatch.setattr(fleet, "SMALL", least)
        monkeypatch.setattr(jobs, "JOB", job)
        return ",".join(by_name)

    return stand_in


def pair(**how):
    """Two devices, both of which get something to do from the three threads of ``convert``."""
    meet = threading.Barrier(3)
    return [FakeDevice(f"cuda:{i}", meet=meet, **how) for i in range(2)]


def convert(source, out, scheme, device="cpu", how=None, **settings):
    said = Settings(**{"sync": False, "workers": 3, "device": device} | settings)
    return streamq.convert(source, out, scheme, settings=said, **how or {})


def same(source, tmp_path, scheme, device, how=None, **settings):
    """Convert on devices and on the CPU, compare every byte; what the devices' run said."""
    convert(source, tmp_path / "cpu", scheme, how=how)
    summary = convert(source, tmp_path / "device", scheme, device, how, **settings)
    assert files(tmp_path / "device") == files(tmp_path / "cpu")
    return summary


# --- the same bytes ----------------------------------------------------------------------

FORMATS = [
    ("w4a16", {"format": "gptq"}), ("w4a16_asym", {"format": "awq"}),
    ("w4a16_asym", {"format": "mlx", "group_size": 64}), ("fp8_block", {"format": "fp8"}),
    ("nvfp4", {"format": "modelopt"}), ("nvfp4", {"numerics": "weight"}),
    ("nvfp4a16", {"scales": "search"}), ("w8a8", {"numerics": "weight"}),
]  # fmt: skip


@pytest.mark.parametrize("late", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize(
    ("scheme", "how"), [(s, {}) for s in SCHEMES] + FORMATS,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)  # fmt: skip
def test_the_bytes_are_those_of_the_cpu(scheme, how, late, source, tmp_path, use):
    fakes = pair(late=late)
    summary = same(source, tmp_path, scheme, use(*fakes), how)
    assert all(fake.slabs and not fake.used for fake in fakes)
    assert summary.backend == "fake on cuda:0, cuda:1"
    assert summary.remarks == ()


@pytest.mark.parametrize("job", [64 << 10, 64 << 20], ids=["large steps", "whole batches"])
def test_slabs_stay_on_the_device_between_two_passes(job, source, tmp_path, use):
    fake = FakeDevice()
    same(source, tmp_path, "nvfp4", use(fake, job=job))
    little = FakeDevice()
    use(little, job=job)
    convert(source, tmp_path / "little", "nvfp4", "cuda:0", device_memory=300 << 10)
    assert files(tmp_path / "little") == files(tmp_path / "cpu")
    assert fake.uploads < little.uploads
    assert little.most <= 300 << 10


def test_what_is_kept_on_devices():
    """By place, for the device that has it, in the size it was kept; no more than the budget."""
    kept = Kept({"cuda:0": 100, "cuda:1": 100})
    for i, (device, nbytes) in enumerate([("cuda:0", 60), ("cuda:0", 60), ("cuda:1", 60)]):
        kept.put(("a", i * 60), device, nbytes, i)
    assert kept.take(("a", 60), "cuda:0", 60) is None  # was over the budget
    assert kept.take(("a", 120), "cuda:0", 60) is None  # is on another one, and dropped now
    assert kept.take(("a", 120), "cuda:1", 60) is None
    kept.put(("a", 60), "cuda:1", 90, "new")
    assert kept.take(("a", 60), "cuda:1", 60) is None  # not that size
    assert kept.take(("a", 0), "cuda:0", 60) == 0
    kept.put(("a", 0), "cuda:0", 100, 1)
    kept.forget([("b", 0, 9), ("a", 1, 9)])
    assert kept.take(("a", 0), "cuda:0", 100) == 1
    kept.put(("a", 0), "cuda:0", 100, 1)
    kept.forget([("a", 0, 1)])
    assert kept.take(("a", 0), "cuda:0", 100) is None
    kept.put(("a", 0), "cuda:0", 100, 1)
    kept.close("cuda:0")
    kept.put(("a", 0), "cuda:0", 1, 1)
    assert kept.take(("a", 0), "cuda:0", 1) is None


def test_what_is_measured_is_what_the_cpu_measures(source, tmp_path, use):
    on_cpu = convert(source, tmp_path / "a", "nvfp4", stats=True)
    on_device = convert(source, tmp_path / "b", "nvfp4", use(FakeDevice()), stats=True)
    assert on_device.quality.by_tensor() == pytest.approx(on_cpu.quality.by_tensor(), abs=1e-6)


def test_sources_that_are_quantized(source, tmp_path, use):
    """Values of codes are made by the CPU and quantized by the device."""
    convert(source, tmp_path / "fp8", "fp8_block")
    device = use(FakeDevice())
    summary = same(tmp_path / "fp8", tmp_path, "w4a16", device, {"requantize": True})
    assert summary.backend == "fake on cuda:0"


def test_several_outputs_from_one_pass(source, tmp_path, use):
    device = use(FakeDevice("cuda:0"), FakeDevice("cuda:1"))
    for where, on in (("a", "cpu"), ("b", device)):
        to = [f"nvfp4:{tmp_path}/{where}1", f"fp8_block:{tmp_path}/{where}2"]
        args = ["convert", str(source), "--to", to[0], "--to", to[1], "--device", on, "-q"]
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0, result.stderr
    for n in "12":
        assert files(tmp_path / f"a{n}") == files(tmp_path / f"b{n}")


def test_what_a_device_does_not_have_runs_on_the_cpu(source, tmp_path, use):
    summary = same(source, tmp_path, "w8a16", use(FakeDevice()), {"format": "group"})
    assert summary.backend == "cpu (numba)"
    (remark,) = summary.remarks
    assert "W8A16 ran on cpu (numba), for fake does not have it" in remark
    recipe = {"rule": [{"pattern": "*down_proj", "scheme": "w4a16"}], "scheme": "fp8_block"}
    use(fake := FakeDevice())
    fake.supports = lambda scheme, numerics, packing: scheme.element == "int"
    convert(source, tmp_path / "r1", None, how={"recipe": recipe})
    mixed = convert(source, tmp_path / "r2", None, "cuda:0", {"recipe": recipe})
    assert files(tmp_path / "r1") == files(tmp_path / "r2")
    assert mixed.backend == "fake on cuda:0, cpu (numba)"
    assert "weights to FP8_BLOCK ran on cpu" in mixed.remarks[0]


ANY = ["NVFP4A16", "MXFP4", "FP8_BLOCK", "FP8_DYNAMIC", "W8A8", "W4A16", "W3A16_ASYM"]


@given(data=st.data())
def test_any_checkpoint_on_any_devices(data):
    """Odd shapes, slabs and jobs of any size, memory for hardly more than one slab."""
    scheme = SCHEMES[data.draw(st.sampled_from(ANY))]
    step = 1 if scheme.block[1] == ALL or scheme.block[0] != 1 else scheme.block[1]
    dtype = data.draw(st.sampled_from([BF16, F16, F32]))
    leaves = st.sampled_from(["q_proj", "k_proj", "o_proj", "down_proj"])
    modules = st.lists(st.tuples(st.integers(0, 3), leaves), min_size=1, max_size=8, unique=True)
    rng, tensors = np.random.default_rng(data.draw(st.integers(0, 9))), {}
    for layer, leaf in data.draw(modules):
        shape = data.draw(st.integers(1, 260)), step * data.draw(st.integers(1, 600 // step + 1))
        x = (rng.standard_normal(shape) * 0.02).astype(dtype)
        tensors[f"model.layers.{layer}.{leaf}.weight"] = x
    late, memory = data.draw(st.booleans()), data.draw(st.sampled_from([2 << 20, 8 << 20]))
    slab, small = (1 << data.draw(st.integers(12, 19)) for _ in range(2))
    fakes = {f"cuda:{i}": FakeDevice(f"cuda:{i}", late=late, memory=memory)
             for i in range(data.draw(st.integers(1, 3)))}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source = write_checkpoint(Path(folder, "in"), tensors)
        how = {"shard_size": data.draw(st.sampled_from([None, 50_000]))}
        convert(source, Path(folder, "cpu"), scheme.name, how=how)
        patch.setattr(find, "open_devices", lambda names: [fakes[n] for n in names])
        patch.setattr(fleet, "SLAB", slab)
        patch.setattr(fleet, "LEAST_SLAB", 1 << 12)
        patch.setattr(fleet, "SMALL", small)
        patch.setattr(slabs, "SLAB", small)
        patch.setattr(jobs, "JOB", 1 << data.draw(st.integers(12, 20)))
        convert(source, Path(folder, "device"), scheme.name, ",".join(fakes), how)
        assert files(Path(folder, "device")) == files(Path(folder, "cpu"))
    assert all(fake.used == 0 and fake.most <= memory for fake in fakes.values())


# --- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_block", "w4a16_asym", "mxfp4"])
def test_out_of_memory_halves_the_slabs(scheme, source, tmp_path, use):
    short = pair(largest=200 << 10)
    device = use(*short, slab=512 << 10, job=1 << 20)
    gc.disable()  # as in the command; what did not fit must not stay because of its exception
    try:
        summary = same(source, tmp_path, scheme, device)
        assert all(fake.used == 0 for fake in short)
    finally:
        gc.enable()
    assert summary.remarks
    for remark in summary.remarks:
        assert re.match("cuda:[01] ran out of memory and went on with slabs of ", remark)


def test_memory_that_holds_no_slab_is_an_error(source, tmp_path, use):
    device = use(FakeDevice(largest=1 << 10))
    with pytest.raises(StreamqError, match=r"^cuda:0 has no memory left for .* of tensor '.*'; f"):
        convert(source, tmp_path / "out", "nvfp4", device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_memory": 4 << 10}, r"cuda:0: the slabs of one thread need .* --device-memory"),
        ({"max_memory": 1 << 20}, r"--max-memory 1MiB is too little: 2 devices need \d+MiB"),
    ],
    ids=["device", "host"],
)
def test_too_little_memory_is_known_before(settings, message, source, tmp_path, use):
    device = use(FakeDevice("cuda:0"), FakeDevice("cuda:1"), slab=1 << 20, least=1 << 20)
    with pytest.raises(PlanError, match=message):
        convert(source, tmp_path / "out", "nvfp4", device, **settings)
    assert not (tmp_path / "out.partial").exists()


def test_little_host_memory_makes_slabs_smaller(source, tmp_path, use):
    device = use(FakeDevice(), slab=8 << 20, least=64 << 10)
    summary = same(source, tmp_path, "nvfp4", device, max_memory=8 << 20)
    assert summary.workers >= 1


# --- failures ----------------------------------------------------------------------------


def test_a_failing_device_is_an_error(source, tmp_path, use):
    works, breaks = pair()
    breaks.broken = "CUDA error: an illegal memory access\nCompile with"
    device = use(works, breaks)
    with pytest.raises(StreamqError) as e:
        convert(source, tmp_path / "out", "nvfp4", device)
    assert str(e.value).startswith("cuda:1 failed at tensor 'model.layers.")
    assert ": CUDA error: an illegal memory access; run it again" in str(e.value)
    assert works.trimmed
    assert works.used == 0
    assert not (tmp_path / "out").exists()


def test_a_failure_that_shows_late_is_an_error(source, tmp_path, use, monkeypatch):
    monkeypatch.setattr("fake_device.FakeStream.run", lambda *a: 1 / 0)
    with pytest.raises(StreamqError, match=r"^cuda:0 failed at tensor .*division by zero; run it"):
        convert(source, tmp_path / "out", "nvfp4", use(FakeDevice()))


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_dynamic", "w4a16_asym", "mxfp4"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite(value, scheme, tmp_path, use):
    source = make(tmp_path / "in", spoil=(200, 131, value))
    place = f"tensor '{DOWN}' in model-00001-of-00002.safetensors: row 200, column 131 is NaN"
    with pytest.raises(StreamqError, match=place):
        convert(source, tmp_path / "out", scheme, use(FakeDevice()))


SLOW = """
import sys, time
from fake_device import FakeDevice, FakeStream
from streamq.pipeline import find
from streamq.pipeline.kept import Kept
from streamq.cli import main
find.open_devices = lambda names: [FakeDevice(n) for n in names]
quick = FakeStream.quantize
def quantize(*a):
    print("working", flush=True)
    time.sleep(0.2)
    return quick(*a)
FakeStream.quantize = quantize
sys.argv = ["streamq", *sys.argv[1:]]
main()
"""


def test_ctrl_c(source, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", source, out, "-s", "nvfp4", "--device", "cuda",
         "-q", "-j", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert process.stdout.read(7) == "working"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[0] == "Interrupted."
    assert "Traceback" not in stderr
    assert not out.exists()


# --- which devices -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cpu", ("cpu",)), ("AUTO", ("auto",)), ("cuda", ("cuda:0",)), ("npu", ("npu:0",)),
        ("cuda:1", ("cuda:1",)), ("cuda:0, cuda:3", ("cuda:0", "cuda:3")),
    ],
)  # fmt: skip
def test_names_of_devices(text, names):
    assert device_names(text) == names


@pytest.mark.parametrize(
    "text", ["gpu", "cuda:x", "cuda:", "cuda:0,cuda:0", "cuda,cuda:0", "cpu,cuda", "cuda,npu", ""]
)
def test_unknown_devices_are_wrong_usage(text, source, tmp_path):
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--device", text]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "Invalid value for '--device'" in result.stderr
    with pytest.raises(PlanError):
        convert(source, tmp_path / "out", "nvfp4", text)


def test_torch_that_is_missing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "find_spec", lambda name: None)
    for command in ("plan", "convert"):
        args = [command, str(source), str(tmp_path / "out"), "-s", "nvfp4", "--device", "cuda"]
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 1
        assert result.stderr == (
            "Error: --device cuda:0 needs torch and triton; pip install 'streamq[gpu]', or use "
            "--device cpu.\n"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("start", "gpu", "opens", "reason"),
    [
        (9.0, True, True, "the CPU, because its kernels need about 0.0 s for this, a GPU 9 s to "),
        (0.0, False, True, "the CPU, because this machine shows no GPU"),
        (0.0, True, False, "the CPU, because of an old driver"),
        (0.0, True, True, "cuda:0, because on the CPU its kernels need about 0.0 s for this"),
    ],
    ids=["small", "no GPU", "unusable", "GPU"],
)
def test_auto(start, gpu, opens, reason, source, tmp_path, monkeypatch):
    fake = FakeDevice()

    def open_devices(names):
        if not opens:
            raise PlanError("an old driver.")
        return [fake]

    monkeypatch.setattr(devices, "GPU_START", start)
    monkeypatch.setattr(find, "has_gpu", lambda: gpu)
    monkeypatch.setattr(find, "open_devices", open_devices)
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--device", "auto"]
    result = CliRunner().invoke(cli, [*args, "--json"])
    said = json.loads(result.stdout)
    assert said["remarks"][0].startswith(f"device auto: {reason}")
    assert said["backend"] == ("fake on cuda:0" if reason.startswith("cuda") else "cpu (numba)")
    assert (fake.slabs > 0) == reason.startswith("cuda")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Torch not compiled with CUDA enabled", "torch 2.13.0 is built for the CPU alone; inst"),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            "the NVIDIA driver is too old for torch 2.13.0; update it, or install a torch",
        ),
        ("Found no NVIDIA driver on your system. Please check", "there is no NVIDIA driver; inst"),
        ("No CUDA GPUs are available", "no GPU is visible to torch; look at CUDA_VISIBLE_DEVICES"),
        ("CUDA unknown error - this\nmay be", "torch finds no GPU (CUDA unknown error - this); m"),
    ],
)
def test_why_there_is_no_gpu(said, why):
    assert find.no_gpu(said, "2.13.0").startswith(why)
