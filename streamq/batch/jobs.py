"""Jobs from a file or from lines: every source with every scheme and format, and where to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from streamq.errors import PlanError, StreamqError
from streamq.hub import is_hub, parse_hub
from streamq.tables import Table, read_table, read_text
from streamq.writer import place_of

from .template import LONGEST, check_template, filled, values_of

#: Largest file of jobs in bytes, and most jobs.
MAX_FILE, MAX_JOBS = 2_000_000, 10_000

#: Keys of a file of jobs, beside ``source`` and ``sources``, that are about the run.
RUN_KEYS = ("jobs", "retries", "workers", "max_memory", "max_disk")
#: Keys that a source may have as well; those of ``streamq.api.options``, and where to.
JOB_KEYS = (
    "out", "schemes", "formats", "recipe", "group_size", "scales", "ignore", "only", "numerics",
    "input_scale", "shard_size", "requantize", "check_tp", "gpt_fast_names", "scale_fmt",
    "group_dim",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One output.

    ``where``: what asked for it, for messages. ``src``, ``dst``: a path, or ``hf://...``. ``how``:
    keywords of ``streamq.api.options``.
    """

    where: str
    src: str
    dst: str
    how: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What tells it from all other jobs: where its output goes."""
        return str(parse_hub(self.dst)) if is_hub(self.dst) else os.path.realpath(self.dst)

    @property
    def label(self) -> str:
        """Its scheme and format, for people."""
        scheme = self.how.get("scheme") or f"recipe {Path(self.how['recipe']).name}"
        fmt = self.how.get("format")
        return f"{fmt}/{scheme}" if fmt else str(scheme)


class Asked(NamedTuple):
    """The jobs, and what the file says of the run: some of ``RUN_KEYS``."""

    jobs: list[Job]
    run: dict[str, Any]


class _Source(NamedTuple):
    where: str
    given: dict[str, Any]


def read_jobs(given: str, lines: Sequence[str] | None, over: Mapping[str, Any]) -> Asked:
    """The jobs of a file (.toml, .yaml, .yml), or of ``lines`` with a source on each.

    ``given``: the path, or what the lines are called. ``over``: keys of ``JOB_KEYS`` that count
    more than those of the whole file, and less than those of a source. Raises PlanError, with the
    line or the number of the source, for whatever is wrong with one of them.
    """
    if lines is None and Path(given).suffix == ".txt":
        lines = read_text(Path(given), "file of jobs", MAX_FILE).splitlines()
    if lines is not None:
        run: dict[str, Any] = {}
        sources = [_Source(where, {"src": src}) for where, src in _of_lines(given, lines)]
        top = dict(over)
    else:
        if Path(given).suffix not in (".toml", ".yaml", ".yml"):
            raise PlanError(
                f"the file of jobs {given} must end in .toml, .yaml, .yml, or in .txt for a source "
                "on each line; - is standard input."
            )
        table = Table(read_table(given, "file of jobs", MAX_FILE), Path(given).name)
        sources, run, top = _of_table(table)
        top |= over
    if not sources:
        raise PlanError(f"{given}: names no source.")
    jobs: list[Job] = []
    checked: set[str] = set()
    for source in sources:
        for job in _expanded(source, top, checked):
            if len(jobs) == MAX_JOBS:
                raise PlanError(f"{source.where}: more than {MAX_JOBS} jobs; make several batches.")
            jobs.append(job)
    refuse_entangled(jobs)
    return Asked(jobs, run)


def _of_lines(name: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is on each line that is not empty and no comment."""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{name}, line {number}", text


def _of_table(table: Table) -> tuple[list[_Source], dict[str, Any], dict[str, Any]]:
    run = {k: table.number(k) for k in ("jobs", "retries", "workers")}
    run |= {k: table.size(k) for k in ("max_memory", "max_disk")}
    least = {"retries": 0}
    for key, value in run.items():
        if value is not None and value < least.get(key, 1):
            raise PlanError(f"{table.where}: {key} must be {least.get(key, 1)} or more.")
    top = _given(table)
    sources = [_Source(f"{table.where}, sources {i}", {"src": src})
               for i, src in enumerate(table.names("sources"), 1)]  # fmt: skip
    for t in table.tables("source"):
        src = t.need("src", t.text("src"))
        sources.append(_Source(t.where, {**_given(t), "src": src}))
        t.done("src", *JOB_KEYS)
    table.done("source", "sources", *RUN_KEYS, *JOB_KEYS)
    return sources, {k: v for k, v in run.items() if v is not None}, top


def _given(t: Table) -> dict[str, Any]:
    """The keys of ``JOB_KEYS`` that a table has."""
    found = {
        "out": t.text("out"), "schemes": _several(t, "scheme"), "formats": _several(t, "format"),
        "recipe": t.text("recipe"), "group_size": t.number("group_size"),
        "scales": t.text("scales", ("absmax", "search")), "ignore": t.names("ignore"),
        "only": t.names("only"), "numerics": t.text("numerics", ("f32", "weight")),
        "input_scale": t.real("input_scale"), "shard_size": t.size("shard_size"),
        "requantize": t.flag("requantize"), "check_tp": t.numbers("check_tp"),
        "gpt_fast_names": t.flag("gpt_fast_names"), "scale_fmt": t.text("scale_fmt", ("ue8m0",)),
        "group_dim": t.number("group_dim"),
    }  # fmt: skip
    return {k: v for k, v in found.items() if v is not None and v != ()}


def _several(t: Table, key: str) -> tuple[str, ...]:
    """``scheme`` or ``schemes``: one or several."""
    one, many = t.names(key), t.names(f"{key}s")
    if one and many:
        raise PlanError(f"{t.where}: {key} and {key}s are one key; give one of them.")
    return one or many


def _expanded(source: _Source, top: Mapping[str, Any], checked: set[str]) -> Iterator[Job]:
    """A job for each scheme and format; ``checked``: options that were looked at."""
    from streamq.formats import FORMATS, named
    from streamq.schemes import has_groups

    how = {**top, **source.given}
    where, template = source.where, how.pop("out", None)
    schemes = tuple(dict.fromkeys(how.pop("schemes", ()))) or (None,)
    formats = tuple(dict.fromkeys(how.pop("formats", ()))) or (None,)
    if template is None:
        raise PlanError(f"{where}: no destination; give --out, or out in the file of jobs.")
    if schemes == (None,) and "recipe" not in how:
        raise PlanError(f"{where}: no scheme; give --scheme, or schemes in the file of jobs.")
    check_template(template, where)
    _refuse_odd(how.get("recipe", ""), where)
    src = source_of(how.pop("src"), where)
    several = len(schemes) * len(formats) > 1
    for scheme in schemes:
        for fmt in formats:
            mine = {**how, "scheme": scheme, "format": fmt}
            with _at(where):
                if several and scheme and not has_groups(scheme):
                    mine.pop("group_size", None)  # for those of several outputs that have groups
                if several and (fmt is None or fmt in FORMATS):
                    has = named(fmt).options if fmt else ()
                    for key in ("gpt_fast_names", "scale_fmt", "group_dim"):
                        if key not in has:
                            mine.pop(key, None)
                _check(mine, checked)
            dst = filled(template, values_of(src, mine), where)
            with _at(where):
                place_of(dst)
            yield Job(where, src, dst, mine)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors say what asked for it."""
    try:
        yield
    except StreamqError as e:
        raise PlanError(f"{where}: {e}") from None


def source_of(text: str, where: str) -> str:
    """A path or an address: what exists is a path, unless it begins with ``hf://``.

    A name like ``org/repo``, with all that an address has behind it, is one on the Hub where
    there is no such directory. Raises PlanError for what is neither.
    """
    _refuse_odd(text, where)
    if not is_hub(text) and os.path.exists(text):
        return text
    if is_hub(text):
        return _address(text, where)
    try:
        return str(parse_hub(f"hf://{text}"))
    except StreamqError:
        raise PlanError(
            f"{where}: {text!r} is no directory here, and no name of a repository of the Hub such "
            "as org/name."
        ) from None


def _refuse_odd(name: str, where: str) -> None:
    """Raise PlanError for a name of a file that messages could not show."""
    if not name.isprintable() or len(name) > LONGEST:
        raise PlanError(f"{where}: {name[:80]!r} is no name of a file or directory.")


def _address(text: str, where: str) -> str:
    with _at(where):
        return str(parse_hub(text))


def _check(how: Mapping[str, Any], checked: set[str]) -> None:
    """Raise PlanError for options that are not known; the same ones are looked at once."""
    from streamq.api import options

    key = json.dumps(how, sort_keys=True)
    if key in checked:
        return
    options(**how)
    checked.add(key)


def refuse_entangled(jobs: Sequence[Job]) -> None:
    """Raise PlanError where two jobs have one destination, or one lies in another or in a source.

    That includes the directory beside it in which an output is built.
    """
    taken: dict[str, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.key, job)
        if (job.src, job.how) == (other.src, other.how) and other is not job:
            raise PlanError(f"{job.where}: {job.src} is there already, {other.where}.")
        if other is not job:
            raise PlanError(
                f"{job.where}: {job.label} would go to {job.dst}, as {other.label} of "
                f"{other.where}; {{org}}, {{name}}, {{revision}}, {{scheme}} or {{format}} in out "
                "tells them apart."
            )
    sources = {os.path.realpath(job.src): job for job in jobs if not is_hub(job.src)}
    outputs = {job.key: job for job in jobs if not is_hub(job.dst)}
    for job in list(outputs.values()):
        if (other := outputs.setdefault(job.key + ".partial", job)) is not job:
            raise PlanError(f"{other.where}: {other.dst} is where {job.dst} is built.")
    for place, job in outputs.items():
        for at in (place, *_above(place)):
            if at in sources:
                _refuse(job, f"{job.dst} would lie in the source", sources[at])
            if outputs.get(at, job) is not job:
                _refuse(job, f"{job.dst} would lie in the output", outputs[at])
    for place, job in sources.items():
        for at in _above(place):
            if at in outputs:
                _refuse(job, f"{job.src} lies in the output", outputs[at])


def _refuse(job: Job, what: str, other: Job) -> NoReturn:
    raise PlanError(f"{job.where}: {what} of {other.where}.")


def _above(place: str) -> Iterator[str]:
    """The directories that hold a place, from the inside out."""
    while (above := os.path.dirname(place)) != place:
        yield above
        place = above
