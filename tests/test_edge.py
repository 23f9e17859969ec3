"""Small machines (docs/edge.md): memory, kernels that are shipped, what is imported."""

import compileall
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from compressible import floats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from checkpoints import make  # noqa: E402

MB = 1 << 20
#: Run the command line; then say the peak of memory, in kB. Not getrusage: what it gives is at
#: least what the parent had when it forked.
CHILD = """
import sys
from streamq.cli import cli
try:
    cli(sys.argv[1:])
except SystemExit as e:
    assert not e.code, e.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
#: As edge.md has it.
RECIPE = ["-j", "1", "--max-memory", "64MiB"]


@contextmanager
def memory_limit(nbytes):
    """The ``cgroup.procs`` of a new cgroup with this limit, of v2 or v1; None where none mounts."""
    name = f"streamq-test-{os.getpid()}"
    for parent, file in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        group = Path("/sys/fs/cgroup", parent, name)
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / file).exists():
                (group / file).write_text(str(nbytes))
                yield group / "cgroup.procs"
                return
        finally:
            group.rmdir()
    yield None


def evict(path):
    """Out of the page cache, so that reading it counts for the cgroup that does."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


#: checkpoint of bench/checkpoints.py: (limit of the cgroup, whether it is for the soak)
SIZES = {"E": (192 * MB, False), "M": (256 * MB, True)}


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_larger_than_the_memory(name, tmp_path, pytestconfig):
    limit, long = SIZES[name]
    if long and pytestconfig.getoption("--hypothesis-profile") != "soak":
        pytest.skip("4 GB: in make soak")
    source = make(name, tmp_path)
    how = "-s", "nvfp4a16", "-q", *RECIPE
    tiny = [floats(tmp_path / "tiny"), tmp_path / "compiled"]  # as compiling takes more
    subprocess.run([sys.executable, "-c", CHILD, "convert", *tiny, *how], check=True)
    for path in source.iterdir():
        evict(path)
    with memory_limit(limit) as procs:
        into = ["sh", "-c", 'echo 0 > "$0" && exec "$@"', procs] if procs else []
        child = subprocess.run(
            [*into, sys.executable, "-c", CHILD, "convert", source, tmp_path / "out", *how],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) << 10 <= limit
    shutil.rmtree(source)
    if procs is None:
        pytest.skip("no cgroup with a limit for memory can be made here; the peak was looked at")


# --- kernels that are shipped ------------------------------------------------------------

#: What a process may not do any more, root or not: CAP_DAC_OVERRIDE, by which root writes where
#: nobody may. PR_CAPBSET_DROP is 24; for who is not root it fails, and changes nothing.
LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
COUNTED = """
import sys
from streamq.cli import cli
from streamq.compiled import COUNTS
code = 0
try:
    cli(sys.argv[1:])
except SystemExit as e:
    code = e.code
print("compiled", COUNTS.compiled, "kept", COUNTS.kept)
sys.exit(code)
"""


def installed(folder):
    """streamq as a wheel would lie there."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "streamq", folder / "streamq", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "streamq" / "kernels", ignore=ignore)
    return folder


def read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)


def run(site, *args, **environment):
    """A command of what is installed at ``site``, without a home; its output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    child = subprocess.run(
        [sys.executable, "-c", LAUNCH, COUNTED, *map(str, args)], cwd=site.parent,
        env=kept | {"PYTHONPATH": str(site), "HOME": "/proc/none", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def test_kernels_compiled_elsewhere_are_used_where_nothing_can_be_written(tmp_path):
    src, dst, shipped = tmp_path / "in", tmp_path / "out", tmp_path / "shipped"
    floats(src)
    what = "-s", "w8a8", "-f", "compressed-tensors", "--dtype", "bf16"
    here, there = installed(tmp_path / "a"), installed(tmp_path / "b" / "deeper")
    said = run(here, "kernels", *what, "--into", shipped)
    assert f"use them with NUMBA_CACHE_DIR={shipped}" in said
    for path in there.rglob("*.py"):
        os.utime(path, (0, 0))
    compileall.compile_dir(there, quiet=2)  # as pip does
    read_only(there)
    read_only(shipped)
    for args in (
        ("convert", src, dst, "-s", "w8a8", "--stats"), ("verify", dst, "--source", src),
        ("convert", src, tmp_path / "paged", "-s", "w8a8", "--report", tmp_path / "r.json"),
        ("convert", dst, tmp_path / "back", "-s", "bf16"),
        ("kernels", *what),
    ):  # fmt: skip
        out = run(there, *args, NUMBA_CACHE_DIR=str(shipped))
        assert out.endswith("compiled 0 kept 0\n"), (args, out)
    out = run(there, "convert", src, tmp_path / "without", "-s", "w8a8")
    assert "compiled 1 kept 0" in out
    assert not list(there.rglob("*.kernel"))


def test_a_conversion_imports_little(tmp_path):
    """Each of these would take a tenth of a second and more of every start."""
    code = (
        "import sys\nfrom streamq.cli import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'triton', 'huggingface_hub', 'vl_convert', 'scipy', 'pytest'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    args = ["convert", floats(tmp_path / "in"), tmp_path / "out", "-s", "w8a8", "-q"]
    out = subprocess.run(
        [sys.executable, "-c", code, *args], check=True, capture_output=True, text=True
    ).stdout
    assert out == "[]\n"


def test_kernels_for_any_cpu_give_the_same_numbers(pytestconfig, tmp_path):
    """Compiled for what every CPU of the architecture has; the rest of the schemes in the soak."""
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         ROOT / "tests" / "test_kernels.py", "-k", "test_golden and " + ("cpu" if soak else
         "cpu and (NVFP4A16 or W8A8)")],
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "",
             "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout
