"""Module names as few patterns that every reader of compressed-tensors resolves alike.

transformers takes exact names first, then regexes by alphabet, then classes; vLLM and SGLang
take the order of the JSON, try the name of a fused layer before those of its parts, and map
exact names to their own but not regexes. So targets are disjoint, regexes say how a name
ends, from a dot on, and no name is matched by a regex of another group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from streamq.families import collapse

_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")
_STACK = re.compile(r"^(.*\bexperts)\.[a-z_0-9]*[a-z_][a-z_0-9]*$")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")

Parts = tuple[str, ...]


def is_expert(module: str) -> bool:
    """Whether it is a projection of a routed expert."""
    return _EXPERT.match(module) is not None


def is_no_linear(module: str) -> bool:
    """Whether "Linear" does not take it everywhere: embeddings, and the head in vLLM."""
    return _NUMBER.search(module) is None


def targets_of(groups: Sequence[Iterable[str]], ignore: Iterable[str]) -> list[list[str]]:
    """Disjoint targets of each group of modules, that match nothing in ``ignore``.

    A layer's routed experts of one group are in it as a whole too (``re:.*\\.experts$``): vLLM
    fuses them into one module, and transformers looks for the group whose regexes say "experts".
    """
    kinds = _Kinds([_with_layers(names) for names in [*groups, ignore]])
    return [kinds.targets(i) for i in range(len(groups))]


def ignored_by(groups: Sequence[Iterable[str]], ignore: Iterable[str]) -> list[str]:
    """The ignore list: exact names, and regexes for routed experts, each projection and all.

    Experts that stay in one tensor have no modules of their own, but vLLM looks for their names.
    """
    names = list(ignore)
    experts = [n for n in names if _EXPERT.match(n)]
    if not experts and not any(_STACK.match(n) for n in names):
        return names
    stacks = {found[1] for n in names if (found := _STACK.match(n))}
    kinds = _Kinds([_with_layers(experts), *map(_with_layers, groups)])
    told = set(experts)
    exact = [n for n in names if n not in told and not _STACK.match(n)]
    inside = {rf"re:.*\.{re.escape(_tail(stack))}\..*" for stack in stacks}
    return sorted(exact) + sorted({*kinds.targets(0), *inside})


def _tail(stack: str) -> str:
    """``mlp.experts`` of ``model.layers.0.mlp.experts``; with the layer where that is all."""
    parts = stack.split(".")
    return ".".join(parts[-2:]) if len(parts) > 1 and not parts[-2].isdigit() else parts[-1]


def _with_layers(names: Iterable[str]) -> list[str]:
    """The names, and the modules that hold all their routed experts."""
    names = list(names)
    return names + list(dict.fromkeys(f[1] for n in names if (f := _EXPERT.match(n))))


class _Kinds:
    """Names by what they are with the numbers left out; layers have those in common."""

    def __init__(self, groups: list[list[str]]) -> None:
        self._kinds: dict[str, dict[int, list[str]]] = {}
        for i, names in enumerate(groups):
            for name in names:
                self._kinds.setdefault(collapse(name), {}).setdefault(i, []).append(name)
        for kind in [k for k in self._kinds if k.endswith("experts")]:  # layers with several
            self._drop_shared(self._kinds[kind])
        self._ends: dict[Parts, set[str]] = {}
        for kind in self._kinds:
            parts = tuple(kind.split("."))
            for first in range(len(parts)):
                self._ends.setdefault(parts[first:], set()).add(kind)

    @staticmethod
    def _drop_shared(found: dict[int, list[str]]) -> None:
        counts: dict[str, int] = {}
        for names in found.values():
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        for names in found.values():
            names[:] = [name for name in names if counts[name] == 1]

    def targets(self, group: int) -> list[str]:
        """Targets of one group: exact names first, then regexes, each in order."""
        exact: list[str] = []
        regexes: set[str] = set()
        for kind, found in self._kinds.items():
            names = found.get(group, [])
            if not names:
                continue
            pattern = self._pattern(kind, found, group) if "*" in kind else None
            if pattern is None:
                exact += names
            else:
                regexes.add(pattern)
        return sorted(exact) + sorted(regexes)

    def _pattern(self, kind: str, found: dict[int, list[str]], group: int) -> str | None:
        """The shortest regex that takes all names of a kind in a group, and none of another."""
        parts = tuple(kind.split("."))
        if [i for i, names in found.items() if names] == [group]:
            for first in reversed(range(1, len(parts))):
                end = parts[first:]
                owners = {i for k in self._ends[end] for i, n in self._kinds[k].items() if n}
                if end[0] != "*" and owners == {group}:
                    return _regex(end, r"\d+")
            return None
        first = parts.index("*")
        if first == 0 or len(self._ends[parts[first - 1 :]]) > 1 or first == 1:
            return None
        layers = {i: {_NUMBER.findall(n)[0] for n in names} for i, names in found.items()}
        mine = layers.pop(group)
        if any(mine & other for other in layers.values()):
            return None
        return _regex(parts[first - 1 :], f"(?:{'|'.join(sorted(mine, key=int))})")


def _regex(end: Parts, number: str) -> str:
    """The first number as given, any for the others."""
    said = []
    for part in end:
        said.append(number if part == "*" else re.escape(part))
        number = r"\d+" if part == "*" else number
    return r"re:.*\." + r"\.".join(said) + "$"
