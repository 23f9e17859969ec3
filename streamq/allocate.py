"""Bits where they help most: a recipe for a size, from the errors of the weights alone.

What each candidate scheme loses is measured in each unit: a fused group, or all routed
experts of a layer, as loaders want one scheme in those. Then units are raised along the
lower hull of their bytes and errors, most error per byte first; ties go by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.formats import default_format
from streamq.measure import EXPERTS, Progress, Unit, measure, units_of
from streamq.planning import Options, make_plan
from streamq.quality import decibel
from streamq.recipe import Recipe, Rule, text_of
from streamq.schemes import Scheme, resolve
from streamq.tensors import size_text

#: Candidates where none are named.
CANDIDATES = (
    "w3a16", "w3a16:64", "w3a16:32", "w4a16", "w4a16:64", "w4a16:32", "w5a16", "w6a16", "w8a16",
)  # fmt: skip


def candidates_of(names: Iterable[str], scales: str = "absmax") -> list[Scheme]:
    """Schemes from ``NAME`` or ``NAME:GROUP_SIZE``. Raises PlanError for fewer than two."""
    found = []
    for name in names:
        preset, _, size = name.strip().partition(":")
        if size and not size.lstrip("-").isdigit():
            raise PlanError(f"the candidate {name!r} is not NAME or NAME:GROUP_SIZE.")
        scheme = resolve(preset, int(size) if size else None)
        if scheme.is_float:
            raise PlanError(f"the candidate {name!r} is no quantization.")
        found.append(replace(scheme, scales=scales))  # type: ignore[arg-type]
    if len(set(found)) < 2:
        raise PlanError("--candidates needs two schemes or more to choose from.")
    return list(dict.fromkeys(found))


def allocate(
    source: Checkpoint,
    options: Options,
    candidates: Sequence[Scheme],
    *,
    bits: float | None = None,
    size: int | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe of least squared error for a target, and sentences about it.

    ``options``: without scheme and recipe, which are chosen here. ``bits``: of each quantized
    weight, scales included. ``size``: bytes of all shards. Raises PlanError for a target that
    the smallest candidates are above.
    """
    fmt = options.format or default_format(candidates[0])
    bare = replace(options, recipe=None, format=fmt)
    fit, plans, said = [], [], []
    for scheme in map(fmt.concrete, candidates):
        try:
            plans.append(make_plan(source, replace(bare, scheme=scheme)))
            fit.append(scheme)
        except PlanError as e:
            said.append(f"the candidate {_short(scheme)} is left out: {e}")
    if not plans:
        raise PlanError(said[0])
    candidates = fit
    units = units_of(plans)
    measure(source, units, candidates, bare, workers, progress)
    numel = sum(u.numel for u in units)
    if size is None:
        assert bits is not None
        budget = int(bits * numel / 8)
    else:  # all but the weights is as in the first plan, and the names in the headers
        budget = size - plans[0].bytes_out + sum(u.sizes[0] or 0 for u in units)
    for _ in range(8):
        chosen = share_out(units, budget)
        recipe = _recipe_of(units, chosen, candidates, options)
        made = make_plan(source, replace(bare, scheme=recipe.schemes[0], recipe=recipe))
        if size is None or made.bytes_out <= size:
            break
        budget -= made.bytes_out - size  # longer headers
    taken = sum(_size(u, i) for u, i in zip(units, chosen, strict=True))
    error = sum(_error(u, i) for u, i in zip(units, chosen, strict=True))
    signal = sum(u.signal for u in units)
    count = Counter(_short(candidates[i]) for i in chosen)
    said.append(
        f"{8 * taken / numel:.3f} bits a weight, SQNR {decibel(signal, error):.2f} dB, by the "
        f"allocation of {len(units)} groups: {', '.join(f'{n} x {s}' for s, n in count.items())}"
    )
    return recipe, said


def _short(scheme: Scheme) -> str:
    """The scheme as ``candidates_of`` takes it."""
    size = scheme.block[1]
    own = "" if scheme.block == resolve(scheme.name).block else f":{size}"
    return scheme.name.lower() + own


def _recipe_of(
    units: Sequence[Unit], chosen: Sequence[int], candidates: Sequence[Scheme], options: Options
) -> Recipe:
    """The most common candidate for all the rest, and a rule for each of the others."""
    count = Counter(chosen)
    most = min(count, key=lambda i: (-count[i], i))
    rules: list[Rule] = []
    for i in sorted(count):
        patterns = [p for u, c in zip(units, chosen, strict=True) if c == i for p in _patterns(u)]
        if i != most:
            rules.append(Rule(len(rules) + 1, tuple(patterns), candidates[i]))
    fmt = options.format.name if options.format else None
    recipe = Recipe(tuple(rules), candidates[most], fmt)
    return replace(recipe, text=text_of(recipe))


def _patterns(u: Unit) -> list[str]:
    experts = any(EXPERTS.match(m.tensor.name) for m in u.members)
    return [f"{u.name}.*"] if experts else [m.module for m in u.members]


def share_out(units: Sequence[Unit], budget: int) -> list[int]:
    """The candidate of each unit, at most ``budget`` bytes together, for the least error.

    Raises PlanError where not even the smallest candidates fit.
    """
    hulls = [_hull(u) for u in units]
    chosen = [hull[0] for hull in hulls]
    size = sum(u.sizes[i] or 0 for u, i in zip(units, chosen, strict=True))
    if size > budget:
        raise PlanError(
            f"the smallest candidates take {size_text(size)}, more than the {size_text(budget)} "
            "that the target leaves for them; choose a larger target, or smaller candidates."
        )
    steps = []
    for n, (u, hull) in enumerate(zip(units, hulls, strict=True)):
        for a, b in pairwise(hull):
            more, less = _size(u, b) - _size(u, a), _error(u, a) - _error(u, b)
            steps.append((-less / more, u.name, _size(u, a), n, b, more))
    stopped: set[int] = set()
    for _, _, _, n, to, more in sorted(steps):
        if n in stopped:
            continue
        if size + more > budget:
            stopped.add(n)  # its later steps are further up
            continue
        chosen[n] = to
        size += more
    return chosen


def _size(u: Unit, i: int) -> int:
    size = u.sizes[i]
    assert size is not None
    return size


def _error(u: Unit, i: int) -> float:
    error = u.errors[i]
    assert error is not None
    return error


def _hull(u: Unit) -> list[int]:
    """Candidates from the smallest up whose error falls ever less per byte."""
    fit = [i for i, size in enumerate(u.sizes) if size is not None]
    if not fit:
        raise PlanError(f"no candidate fits {u.name!r}; leave it with --ignore.")
    hull: list[int] = []
    for i in sorted(fit, key=lambda i: (_size(u, i), _error(u, i), i)):
        if hull and _error(u, i) >= _error(u, hull[-1]):
            continue
        while len(hull) > 1 and _slope(u, hull[-2], i) <= _slope(u, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def _slope(u: Unit, a: int, b: int) -> float:
    """Change of the error per byte from one candidate to a larger one; below zero."""
    return (_error(u, b) - _error(u, a)) / (_size(u, b) - _size(u, a))
