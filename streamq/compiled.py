"""Compiled kernels, and the files that keep them between runs, which may be shipped.

numba has a cache too. It takes a directory only where it can write, finds a kernel by the absolute
path of its source, and believes it current while that one file is, though most of a kernel comes
from the files beside it; two processes that compile at once may leave an index of it that names
the wrong code. Here a kernel is one file that is complete or not there, which any directory may
hold, read-only ones too, and which counts while no source in the folder of the kernel changed.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

# The SLP vectorizer is off by default in numba: 10.3 against 6.3 GB/s on NVFP4 with it.
_CONFIG: Any = numba.config
_CONFIG.SLP_VECTORIZE = 1

# How numba's own caches turn what is compiled into bytes, and back.
_DUMPS: Any = dumps
_RESULT: Any = CompileResult

#: How a kernel's file ends.
SUFFIX = ".kernel"
_SUM = 32  # bytes of a sha256


@dataclass
class Counts:
    """Kernels of this process: ``compiled`` or about to be, ``loaded`` from files, ``kept``."""

    compiled: int = 0
    loaded: int = 0
    kept: int = 0

    def __sub__(self, before: Counts) -> Counts:
        """What came since."""
        return Counts(
            self.compiled - before.compiled, self.loaded - before.loaded, self.kept - before.kept
        )


COUNTS = Counts()
#: Where ``only_in`` says that kernels are kept; else ``places`` finds out.
_only: Path | None = None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``numba.njit`` as all kernels want it: without the lock of Python, and kept in files.

    ``error_model="numpy"``: the python one checks every division for zero, which costs
    vectorization.
    """
    if function is None:
        return lambda function: jit(function, **options)
    made = numba.njit(nogil=True, error_model="numpy", **options)(function)
    made._cache = _Kept(function)
    return made


@contextmanager
def only_in(folder: Path) -> Iterator[None]:
    """Keep and look for kernels below ``folder`` and nowhere else."""
    global _only
    _only, before = folder, _only
    try:
        yield
    finally:
        _only = before


def places(folder: Path) -> Iterator[Path]:
    """Where compiled kernels of a folder of sources may be, in the order of looking.

    Below $NUMBA_CACHE_DIR, beside the sources, in the cache of the user. They are kept in the
    first of these that can be written.
    """
    if _only is not None:
        yield _only / folder.name
        return
    if _CONFIG.CACHE_DIR:
        yield Path(_CONFIG.CACHE_DIR, "streamq", folder.name)
    yield folder / "__pycache__"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(home):  # there may be no home
        yield Path(home, "streamq", "kernels", folder.name)


def home(folder: Path) -> Path | None:
    """Where kernels of a folder of sources that are compiled now are kept; None for nowhere."""
    return next((place for place in places(folder) if _writable(place)), None)


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    # not Path.exists, which raises where the home is one that this user may not look into
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    return os.access(there, os.W_OK | os.X_OK)


class _Kept:
    """The files of one function, one for each of its signatures on each kind of CPU.

    What numba asks of its own caches.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._py_func = function
        self._source = Path(function.__code__.co_filename)

    @property
    def cache_path(self) -> str:
        """Where the files are looked for first."""
        return str(next(places(self._source.parent)))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for these arguments; None where there is nothing."""
        # All that code which is compiled needs. numba's own caches refresh the context, which
        # imports what compiling needs: 0.07 of the 0.45 s of a short conversion.
        rtsys.initialize(target_context)
        name = self._file(sig, target_context.codegen())
        for place in places(self._source.parent):
            found = _read(place / name, _stamp(self._source.parent))
            if found is not None:
                COUNTS.loaded += 1
                return _RESULT._rebuild(target_context, *pickle.loads(found))
        COUNTS.compiled += 1
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, where anything can be kept."""
        if not self._source.is_file() or data.library.has_dynamic_globals:
            return
        name, payload = self._file(sig, data.codegen), _DUMPS(data._reduce())
        for place in places(self._source.parent):
            with suppress(OSError):
                _write(place / name, _stamp(self._source.parent), payload)
                COUNTS.kept += 1
                return

    def _file(self, sig: Any, codegen: Any) -> str:
        """A name for the function with what it closes over, its arguments, and the CPU."""
        code = self._py_func.__code__
        key = repr((_closed_over(self._py_func), sig, codegen.magic_tuple())).encode()
        return (
            f"{self._source.stem}.{code.co_name}-{code.co_firstlineno}."
            f"{sys.implementation.cache_tag}.{sha256(key).hexdigest()[:24]}{SUFFIX}"
        )

    def flush(self) -> None:
        """Nothing waits to be written."""


def _closed_over(function: Callable[..., Any]) -> list[str]:
    """Names and values of what a function closes over, and what functions among them do.

    numba pickles all that, and with it where the sources lie.
    """
    found = []
    for cell in function.__closure__ or ():
        value = getattr(cell.cell_contents, "py_func", cell.cell_contents)
        if isinstance(value, FunctionType):
            found += [value.__qualname__, *_closed_over(value)]
        else:
            found.append(repr(value))
    return found


@cache
def _stamp(folder: Path) -> bytes:
    """What every kernel of a folder depends on: all sources in it, these options, the compiler."""
    digest = sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in [*sorted(folder.glob("*.py")), Path(__file__)]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.digest()


def _read(path: Path, stamp: bytes) -> bytes | None:
    """What ``_write`` was given, if it is whole and has this stamp."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    payload = data[2 * _SUM :]
    if data[:_SUM] != stamp or data[_SUM : 2 * _SUM] != sha256(payload).digest():
        return None
    return payload


def _write(path: Path, stamp: bytes, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, part = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(stamp + sha256(payload).digest() + payload)
        os.chmod(part, 0o644)  # mkstemp keeps it from everybody else, and it is to be shipped
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
