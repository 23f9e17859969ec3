"""The structure that architecture and packaging promise."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"streamq": ROOT / "streamq", "streamq.kernels": ROOT / "kernels"}

# Imports go down only; rooms on one floor do not see each other.
FLOORS = [
    {"compiled", "errors", "pace"},
    {"crew", "tables", "tensors"},
    {"schemes", "trust"},
    {"hub"},
    {"checkpoint", "writer", "families", "kernels"},
    {"formats", "nz", "pipeline", "quality", "recipe", "views"},
    {"stored"},
    {"planning"},
    {"converting", "measure", "reindexing", "progress"},
    {"allocate", "engines", "verifying"},
    {"compressing", "repairing"},
    {"show", "api"},
    {"ahead", "batch", "report"},
    {"cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (*package.split("."), *path.relative_to(folder).with_suffix("").parts)
            yield path, parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path, parts):
    """Absolute names of what a module imports."""
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from (
                (base if node.module else (*base, a.name) for a in node.names)
                if base != ("streamq",)
                else ((*base, a.name) for a in node.names)
            )


MODULES = {".".join(parts): (path, parts) for path, parts in sources()}


@pytest.mark.parametrize("name", [m for m in MODULES if m != "streamq"])
def test_imports_go_down_only(name):
    path, parts = MODULES[name]
    room = parts[1]
    for target in imports_of(path, parts):
        if target[0] == "streamq" and len(target) > 1 and target[1] != room:
            assert FLOOR[target[1]] < FLOOR[room], f"{name} imports {'.'.join(target)}"


@pytest.mark.parametrize("name", MODULES)
def test_torch_is_imported_for_gpus_only(name):
    path, parts = MODULES[name]
    if parts[:3] not in (("streamq", "kernels", "triton"), ("streamq", "pipeline", "cuda")):
        assert not {t[0] for t in imports_of(path, parts)} & {"torch", "triton"}


@pytest.mark.parametrize("name", MODULES)
def test_files_are_rooms_not_attics(name):
    path, _ = MODULES[name]
    assert len(path.read_text().splitlines()) <= 330


def test_every_package_is_in_the_wheel():
    """setuptools is told the packages by name, because kernels/ lies outside of streamq/."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p) for path, p in sources() if path.name == "__init__.py"}
    assert set(setup["packages"]) == found


def test_the_wheel_runs_from_anywhere(tmp_path):
    """Built from its sdist, unpacked, and imported where no source tree is in reach."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(site)
    assert any(n.startswith("streamq/kernels/cpu/") for n in names)
    assert any(n.endswith("golden/inputs.safetensors") for n in names)
    for source in ("kernels.asc", "CMakeLists.txt", "device/tile.h"):
        assert f"streamq/kernels/ascendc/{source}" in names
    assert {f"streamq/report/page.{x}" for x in ("css", "html", "js")} <= {*names}
    assert not any(n.startswith(("kernels/", "tests/", "bench/")) for n in names)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r});"
        "import streamq, streamq.kernels.cpu as cpu;"
        "print(streamq.__file__, cpu.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert all(str(site) in path for path in out.split())
